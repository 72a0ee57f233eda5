"""An evaluation in pieces that any process of any machine can do, and its answers put together.

What a model is asked is cut into shards at fixed places, whoever answers them: one process and many compute
the same batches, and so the same bits. A shard's answers, one per request, are an output in the store, found
by a key of the model, the requests and the code. A worker does whatever shard is not there and that nobody of
its machine does now, until none is left: a killed worker's shard is another's, and an evaluation that was
killed goes on where it was. Machines that share a store share the work: each takes shards in an order of its
own. Workers that the Ray executor reserved for the stage are handed one shard after the other. Figures are
computed from the answers alone (`evaluate.perplexity_of`, lm-eval's own aggregation).

The worker process is `python -m pipelines.shards WORK`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import psutil

from pipelines import cluster, keys
from pipelines.cluster import Reserved
from zoo import __version__
from zoo.entry import Record
from zoo.errors import FormatError, ZooError
from zoo.files import Store, canonical_json, sha256_file, sha256_json
from zoo.machine import this_machine
from zoo.progress import say
from zoo.runner import native
from zoo.shared_store import SharedStore, open_store

SHARD_CHARACTERS = 50_000  # about 12,000 tokens: seconds of a small model, a minute or two of a 7B
SHARDS_WORTH_A_WORKER = 4
ANSWER_CHARACTERS = 1000  # that a text to be generated counts for
TRIES = 3  # workers that end without an answer; whoever kills more of them means it
THREAD_ENDS_S = 10.0  # after what it waits for has ended
ANSWERS = "answers.json"
# What a model is asked: the methods of lm-eval's models, with their arguments; the loss of windows of token
# ids; and how far it is from its base there.
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "windows", "fidelity"]


class Shard(Record):
    kind: Kind
    requests: list[list[Any]]


class Answers(Record):
    """One per request, and by which arithmetic."""

    answers: list[Any]
    context_length: int
    dtype: str


class Work(Record):
    """What a worker process is to do."""

    model: Path  # a folder, a GGUF file or a packed file
    key: str  # the hash of the model
    store: Path
    shared: str | None
    workers: int | None  # processes of this machine that answer; None: as many as it is worth
    batch_size: int | None  # of a folder's model; None: what fits in 1 GiB of logits
    base: tuple[Path, str] | None = None  # of fidelity: the base's folder and hash
    shards: tuple[Shard, ...] = ()

    def open_store(self) -> Store:
        return open_store(self.store, self.shared)

    def shard_key(self, shard: Shard) -> str:
        base = None if self.base is None else self.base[1]
        asked = (self.batch_size, shard.kind, base, sha256_json(shard.requests))
        return keys.stage_key("answers", self.key, runner(self.model), *asked, code=keys.ANSWERS_CODE)


def work_on(
    model: Path, key: str, store: Store, workers: int | None = None, batch_size: int | None = None
) -> Work:
    """What is to be known of a model to ask it; `shards` are to be added."""
    shared = store.remote.url if isinstance(store, SharedStore) else None
    return Work(
        model=model.absolute(),
        key=key,
        store=store.root,
        shared=shared,
        workers=workers,
        batch_size=batch_size,
    )


@cache
def runner(model: Path) -> str:
    """What runs a model. The sparse runner's extension can change without any version."""
    if model.suffix == ".gguf":
        return f"llama-cpp-python {version('llama-cpp-python')}"
    if model.suffix == ".safetensors":
        kernels = sha256_file(native.EXTENSION) if native.EXTENSION else ""
        return f"zoo {__version__}, {native.ISA}, {keys.stage_key(kernels, code=keys.RUNNER_CODE)[:16]}"
    from pipelines.evaluate import arithmetic

    return f"transformers {version('transformers')}, torch {version('torch')}, {arithmetic(model)}"


def _workers(work: Work, left: int) -> int:
    """How many processes are to answer so many shards.

    Several of one thread are faster than one of several, which wait for the slowest at every matrix; but
    each has to import and read a model first.
    """
    if work.workers is not None:
        return min(work.workers, left)
    import torch

    if torch.cuda.is_available():
        return 1
    fit = int(psutil.virtual_memory().available * 0.7 / _memory(work.model))
    return max(1, min(_cores(), fit, left // SHARDS_WORTH_A_WORKER))


def _cores() -> int:
    """That this process may use."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else this_machine().cores


def _memory(model: Path) -> int:
    """Bytes that a process needs to evaluate a model, about: float16 weights become float32."""
    if model.is_dir():
        return (2 << 30) + 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return (1 << 30) + 2 * model.stat().st_size


def shards(kind: Kind, requests: Sequence[Sequence[Any]], documents: Sequence[Any]) -> tuple[Shard, ...]:
    """Cut requests into shards, none within a document. documents: of each request; equal ones are adjacent.

    The cuts depend on the requests before them only: those of the first 500 questions are there again when
    1,000 are asked.
    """
    found: list[Shard] = []
    gathered: list[list[Any]] = []
    size = 0
    for _, group in groupby(zip(documents, requests, strict=True), key=lambda pair: pair[0]):
        gathered += (asked := [list(request) for _, request in group])
        size += sum(map(_size, asked)) + (ANSWER_CHARACTERS * len(asked) if kind == "generate_until" else 0)
        if size >= SHARD_CHARACTERS:
            found.append(Shard(kind=kind, requests=gathered))
            gathered, size = [], 0
    return (*found, Shard(kind=kind, requests=gathered)) if gathered else tuple(found)


def _size(request: Sequence[Any]) -> int:
    """In characters; a token of a window is about four."""
    return sum(
        len(part) * (1 if isinstance(part, str) else 4) for part in request if not isinstance(part, dict)
    )


def merge(work: Work, store: Store) -> Answers:
    """The answers to all requests, in order. Raises ZooError if one is missing."""
    parts = [_read(store, work.shard_key(shard), shard) for shard in work.shards]
    missing = [number for number, part in enumerate(parts) if part is None]
    found = [part for part in parts if part is not None]
    if missing:
        raise ZooError(
            f"{len(missing)} of {len(parts)} parts of an evaluation of {work.model.name} are not done",
            try_="run it again: it goes on where it was",
        )
    by = sorted({(part.context_length, part.dtype) for part in found})
    if len(by) > 1:
        raise ZooError(
            f"{work.model.name} was evaluated differently by different machines",
            saw=" and ".join(f"context {context}, {dtype}" for context, dtype in by),
            try_="machines that are alike, or one alone",
        )
    return Answers(
        answers=[answer for part in found for answer in part.answers],
        context_length=by[0][0],
        dtype=by[0][1],
    )


def _read(store: Store, key: str, shard: Shard) -> Answers | None:
    folder = store.get(key)
    if folder is None:
        return None
    found = Answers.model_validate(json.loads((folder / ANSWERS).read_bytes()))
    if len(found.answers) != len(shard.requests):
        raise FormatError(
            f"{folder / ANSWERS} does not answer what was asked",
            saw=f"{len(found.answers)} answers",
            expected=f"{len(shard.requests)}",
        )
    return found


def answered(work: Work, tell: Callable[[int], None]) -> Answers:
    """The answers to all of the work: those that the store has, and the others from this machine's workers.

    `tell` is told of requests as they are done. One worker is this very process.
    """
    store = work.open_store()
    left = [shard for shard in work.shards if store.get(work.shard_key(shard)) is None]
    done = sum(len(shard.requests) for shard in work.shards) - sum(len(shard.requests) for shard in left)
    tell(done)
    if left:
        rest = work.model_copy(update={"shards": tuple(left)})
        tell = _in_turn(tell)
        with _helped(rest, tell):
            workers = _workers(work, len(left))
            if workers == 1:
                answer(rest, _cores(), tell)
            else:
                _in_processes(rest, workers, store, tell)
    return merge(work, store)


def answer(work: Work, threads: int, tell: Callable[[int], None], model: _Model | None = None) -> None:
    """Be a worker: answer every shard that is not answered; return when all are. model: None means work's."""
    store = work.open_store()
    pending = [(work.shard_key(shard), shard) for shard in work.shards]
    random.Random().shuffle(pending)  # machines that cannot see each other's locks rarely do the same
    for wait in (False, True):
        for key, shard in pending:
            if store.get(key) is not None or (store.is_locked(key) and not wait):
                continue
            with store.locked(key):
                if store.get(key) is not None:
                    continue
                model = model or _open(work, shard.kind, threads)
                found = model(shard, tell)
                with store.writing(key) as folder:
                    (folder / ANSWERS).write_text(canonical_json(found.model_dump()))


_Model = Callable[[Shard, Callable[[int], None]], Answers]


def _open(work: Work, kind: Kind, threads: int) -> _Model:
    """The model, as a function from a shard to its answers. All shards of one work are of one sort."""
    if kind == "windows" and work.model.suffix == ".gguf":
        return _open_gguf_for_windows(work, threads)
    if kind == "windows":
        return _open_for_windows(work, threads)
    if kind == "fidelity":
        return _open_for_fidelity(work, threads)
    from lm_eval.api.instance import Instance

    from pipelines import lm

    model, dtype = lm.open_lm(work.model, threads, work.batch_size)

    def ask(shard: Shard, tell: Callable[[int], None]) -> Answers:
        lm.watched(_bar(tell, len(shard.requests)))
        instances = [Instance(shard.kind, {}, tuple(args), i) for i, args in enumerate(shard.requests)]
        return Answers(
            answers=list(getattr(model, shard.kind)(instances)),
            context_length=model.max_length,
            dtype=dtype,
        )

    return ask


def _open_for_windows(work: Work, threads: int) -> _Model:
    import numpy as np
    import torch

    from pipelines.evaluate import batches, load_model, mean_losses

    torch.set_num_threads(threads)
    model, _ = load_model(work.model)

    def ask(shard: Shard, tell: Callable[[int], None]) -> Answers:
        ids = np.array([window for (window,) in shard.requests], np.int64)
        losses = []
        for loss in mean_losses(model, batches(ids)):
            losses.append(loss)
            tell(1)
        return Answers(
            answers=losses, context_length=ids.shape[1], dtype=str(model.dtype).removeprefix("torch.")
        )

    return ask


def _open_gguf_for_windows(work: Work, threads: int) -> _Model:
    from pipelines import lm

    model, dtype = lm.open_lm(work.model, threads, None)

    def ask(shard: Shard, tell: Callable[[int], None]) -> Answers:
        losses = []
        for (window,) in shard.requests:
            losses.append(model.mean_loss(window))
            tell(1)
        return Answers(answers=losses, context_length=len(window), dtype=dtype)

    return ask


def _open_for_fidelity(work: Work, threads: int) -> _Model:
    import numpy as np
    import torch

    from pipelines.evaluate import divergences

    torch.set_num_threads(threads)
    assert work.base is not None
    base, _ = work.base

    def ask(shard: Shard, tell: Callable[[int], None]) -> Answers:
        ids = np.array([window for (window,) in shard.requests], np.int64)
        pairs, dtype = divergences(base, work.model, ids, tell)
        return Answers(answers=pairs, context_length=ids.shape[1], dtype=dtype)

    return ask


def _bar(tell: Callable[[int], None], total: int) -> type:
    """A stand-in for tqdm that tells how many of a shard's `total` requests are done."""
    left = total

    class Bar:
        def __init__(self, items: Iterable[Any] = (), **_: Any) -> None:
            self.items = items

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)

        def update(self, count: int = 1) -> None:
            nonlocal left  # of long texts, every window is counted
            tell(min(count, left))
            left -= min(count, left)

        def close(self) -> None:
            self.update(left)

    return Bar


# --- workers on a cluster ---


class Answerer:
    """The actor: a model in another worker of the cluster, which answers one shard at a time."""

    def __init__(self, reserved: str) -> None:
        cluster.hide_gpus_of_others()
        self._theirs = Reserved.model_validate_json(reserved)
        self._model: _Model | None = None

    def answer(self, work: str) -> str:
        """The answers to the one shard of a work, both as JSON."""
        asked = Work.model_validate_json(work)
        (shard,) = asked.shards
        if self._model is None:  # which is that of all works that come
            model, base = cluster.here(asked.model, self._theirs), asked.base
            if base is not None:
                base = (cluster.here(base[0], self._theirs), base[1])
            threads = max(1, int(self._theirs.needs.cpus))
            self._model = _open(asked.model_copy(update={"model": model, "base": base}), shard.kind, threads)
        return self._model(shard, lambda _: None).model_dump_json()


@contextmanager
def _helped(work: Work, tell: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile, every other worker that the stage has on the cluster is handed shards.

    For each, a thread here takes shards as any worker of this machine does, and has that one answer them. If
    it is lost, the thread ends, and with it its lock: the shard is another's.
    """
    over = threading.Event()

    def hand_over(other: Any) -> None:
        def ask(shard: Shard, tell: Callable[[int], None]) -> Answers:
            order = work.model_copy(update={"shards": (shard,)}).model_dump_json()
            (said,) = cluster.answers([other.answer.remote(order)], None)
            tell(len(shard.requests))
            return Answers.model_validate_json(said)

        try:
            answer(work, 0, tell, ask)
        except Exception as error:  # whatever it is, others have the work; if they cannot, they will say why
            if not over.is_set():
                reason = " ".join(str(error).split())[:300]
                say(f"  the evaluation goes on with a worker less: {reason}", event="worker-lost")

    with cluster.others(Answerer, len(work.shards) - 1) as others:
        threads = [threading.Thread(target=hand_over, args=(other,), daemon=True) for other in others]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:  # all is answered, or the work has failed
            over.set()
            cluster.end(others)
            for thread in threads:
                thread.join(THREAD_ENDS_S)


def _in_turn(tell: Callable[[int], None]) -> Callable[[int], None]:
    """The same for several threads."""
    turn = threading.Lock()

    def one_by_one(count: int) -> None:
        with turn:
            tell(count)

    return one_by_one


# --- worker processes ---------------------------------------------------------------------------------


def _in_processes(work: Work, workers: int, store: Store, tell: Callable[[int], None]) -> None:
    """Have worker processes answer all shards."""
    with tempfile.TemporaryDirectory(prefix="zoo-shards-") as scratch:
        for _ in range(TRIES):
            left = [shard for shard in work.shards if store.get(work.shard_key(shard)) is None]
            if not left:
                return
            _round(work.model_copy(update={"shards": tuple(left)}), workers, Path(scratch), tell)
            if told := sorted(Path(scratch).glob("*.error")):
                error = json.loads(told[0].read_bytes())
                raise ZooError(
                    error["what"], saw=error["saw"], expected=error["expected"], try_=error["try_"]
                )
        log = (Path(scratch) / "log").read_text(errors="replace").strip().splitlines()
        raise ZooError(
            f"the workers that evaluate {work.model.name} ended before they were done",
            saw=log[-1][:300] if log else "nothing was said: somebody killed them, or memory ran out",
            try_="run it again: it goes on where it was; evaluation.workers=1 needs the least memory",
        )


def _round(work: Work, workers: int, scratch: Path, tell: Callable[[int], None]) -> None:
    """Start the workers and wait until all have ended, one way or another."""
    order = scratch / "work.json"
    order.write_text(work.model_dump_json())
    threads = max(1, _cores() // workers)
    reader, writer = os.pipe()
    lifeline, ours = os.pipe()  # when this process is gone, so are they
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    processes = []
    try:
        with (scratch / "log").open("ab") as log:
            for _ in range(workers):
                command = [
                    sys.executable,
                    "-P",
                    "-m",
                    "pipelines.shards",
                    *map(str, (order, scratch, threads)),
                ]
                processes.append(
                    subprocess.Popen(command, stdin=lifeline, stdout=writer, stderr=log, env=environment)
                )
        os.close(writer)
        with os.fdopen(reader) as said:
            for line in said:
                tell(int(line))
    finally:
        for process in processes:
            process.kill()
            process.wait()
        os.close(ours)
        os.close(lifeline)


def _main(order: Path, scratch: Path, threads: int) -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_lifeline, daemon=True).start()
    try:
        work = Work.model_validate_json(order.read_bytes())
        answer(work, threads, lambda count: print(count, file=told, flush=True))
    except ZooError as error:
        said = vars(error)
        (scratch / f"{os.getpid()}.error").write_text(json.dumps(said))
    # Nothing that native destructors do on the way out can matter now.
    told.flush()
    os._exit(0)


def _end_with_lifeline() -> None:
    while os.read(0, 1 << 10):
        pass
    os._exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
