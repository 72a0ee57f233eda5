"""Measure a model folder: perplexity, fidelity to the base model, and the tasks of lm-eval."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from pipelines import shards
from pipelines.shards import Answers, Kind, Work
from pipelines.text import Ids, Text
from zoo import __version__
from zoo.entry import Measurement
from zoo.errors import FormatError, NumericsError, SourceError, ZooError, last_line
from zoo.files import Store
from zoo.formats import check_safetensors, weight_files
from zoo.progress import counting, track

HARNESS = f"zoo {__version__}"
BATCH_TOKENS = 2048  # per forward pass: a CPU is busy with these, and a 7B's activations stay small
POSITIONS = 128  # whose logits exist at a time
Subject = Literal["entry", "base"]
Values = npt.NDArray[np.float64]


def load_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model in `folder`, in evaluation mode, and its tokenizer.

    If `dtype` is None, that of `arithmetic`. Only safetensors are read, nothing is downloaded, and no code in
    the folder is run. Raises SourceError or FormatError when the folder does not hold a whole model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} is not a model folder", saw="no config.json in it")
    logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or arithmetic(folder),
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(folder.name) from error
    except Exception as error:  # transformers tells of a damaged folder in every type of exception
        raise FormatError(f"{folder} cannot be loaded", saw=last_line(error)) from error
    # transformers only warns of these, and goes on with random weights.
    wrong = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if wrong:
        raise FormatError(f"{folder} does not hold a whole model", saw=f"no usable {', '.join(wrong[:3])}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def arithmetic(folder: Path) -> torch.dtype:
    """In what a model is evaluated here: bfloat16 on a GPU, if there is one; on the CPU float32 if that takes
    at most half of the memory, else bfloat16."""
    weights = [tensor for path in weight_files(folder) for tensor in check_safetensors(path)]
    bytes_ = 4 * sum(math.prod(tensor.shape) for tensor in weights)
    fits = bytes_ <= psutil.virtual_memory().total / 2
    return torch.float32 if fits and not torch.cuda.is_available() else torch.bfloat16


def perplexity(model: Any, ids: Ids, *, text: Text, subject: Subject) -> list[Measurement]:
    """exp(mean negative log-likelihood) of the predicted tokens of `ids` (windows, length).

    Windows do not see each other and the first token of each is not predicted. The standard error is that of
    the mean over windows, carried through exp (delta method).
    """
    losses = list(mean_losses(model, track(batches(ids), f"perplexity on {text.name}")))
    return perplexity_of(losses, ids, text=text, subject=subject, dtype=_dtype(model))


def perplexity_in_shards(work: Work, ids: Ids, *, text: Text, subject: Subject) -> list[Measurement]:
    """The very same of a model folder, by as many processes as `work` says; what is done survives a kill."""
    found = _in_shards(work, "windows", ids, f"perplexity on {text.name}")
    return perplexity_of(found.answers, ids, text=text, subject=subject, dtype=found.dtype)


def _in_shards(work: Work, kind: Kind, ids: Ids, title: str) -> Answers:
    """The answers of each window of `ids`, cut between batches: they are those of one process, every bit."""
    size = _batch_size(ids)
    requests = [[window.tolist()] for window in ids]
    cut = shards.shards(kind, requests, [number // size for number in range(len(ids))])
    with counting(title, len(ids)) as tell:
        return shards.answered(work.model_copy(update={"shards": cut}), tell)


def perplexity_of(
    losses: Sequence[float], ids: Ids, *, text: Text, subject: Subject, dtype: str
) -> list[Measurement]:
    """The figure from each window's mean negative log-likelihood in nats."""
    nll = np.array(losses)
    value = float(np.exp(nll.mean()))
    error = _stderr(nll)
    return [
        _measurement(
            metric="perplexity",
            value=value,
            stderr=None if error is None else value * error,
            direction="lower_is_better",
            ids=ids,
            text=text,
            subject=subject,
            dtype=dtype,
        )
    ]


def mean_losses(model: Any, batches: Iterable[Ids]) -> Iterator[float]:
    """Mean negative log-likelihood in nats of each window (length,) of batches (windows, length)."""
    head = model.get_output_embeddings()
    for window, hidden in _hidden_states(model, batches):
        yield _negative_log_likelihood(head, hidden[:-1], window[1:])


def fidelity(base: Path, folder: Path, ids: Ids, *, text: Text) -> list[Measurement]:
    """How near the model in `folder` is to `base` at every position of `ids` (windows, length).

    Mean KL(base || entry) of the next-token distributions in nats, and the share of positions at which both
    rank the same token first; standard errors over windows.
    """
    with counting(f"fidelity on {text.name}", len(ids)) as tell:
        pairs, dtype = divergences(base, folder, ids, tell)
    return fidelity_of(pairs, ids, text=text, dtype=dtype)


def fidelity_in_shards(work: Work, base: Path, base_key: str, ids: Ids, *, text: Text) -> list[Measurement]:
    """The very same of a model folder, by as many processes as `work` says; what is done survives a kill.

    `base_key` is the hash of the base.
    """
    work = work.model_copy(update={"base": (base.absolute(), base_key)})
    found = _in_shards(work, "fidelity", ids, f"fidelity on {text.name}")
    return fidelity_of(found.answers, ids, text=text, dtype=found.dtype)


def divergences(
    base: Path, folder: Path, ids: Ids, tell: Callable[[int], None]
) -> tuple[list[tuple[float, float]], str]:
    """Of each window of `ids` (windows, length): mean KL(base || entry) and top-1 agreement; the dtype.

    One model is in memory at a time: of the base only its head and last hidden states (windows, length,
    hidden) are kept, and few logits exist at a time. `tell` is told of windows that are done. Raises ZooError
    for models of two vocabularies.
    """
    with _loaded(base) as model:
        base_head = model.get_output_embeddings()
        base_states = [hidden for _, hidden in _hidden_states(model, batches(ids))]
    with _loaded(folder) as model:
        head = model.get_output_embeddings()
        if head.weight.shape[0] != base_head.weight.shape[0]:
            raise ZooError(
                "the entry and its base do not share a vocabulary",
                saw=f"{head.weight.shape[0]} tokens in {folder.name}",
                expected=f"{base_head.weight.shape[0]} as in {base.name}",
            )
        pairs = []
        states = _hidden_states(model, batches(ids))
        for reference, (_, hidden) in zip(base_states, states, strict=True):
            pairs.append(_compare(base_head, reference, head, hidden))
            tell(1)
        return pairs, _dtype(model)


def fidelity_of(
    pairs: Sequence[tuple[float, float]], ids: Ids, *, text: Text, dtype: str
) -> list[Measurement]:
    """The figures from each window's `divergences`."""
    divergence, agreement = np.array(pairs).T
    common: dict[str, Any] = {"ids": ids, "text": text, "subject": "entry", "dtype": dtype}
    return [
        _measurement(
            metric="kl_divergence",
            value=float(divergence.mean()),
            stderr=_stderr(divergence),
            unit="nats",
            direction="lower_is_better",
            **common,
        ),
        _measurement(
            metric="top1_agreement",
            value=float(agreement.mean()),
            stderr=_stderr(agreement),
            direction="higher_is_better",
            **common,
        ),
    ]


def lm_eval_tasks(
    model: Path,
    tasks: list[str],
    *,
    subject: Subject,
    few_shot: int | None = None,
    limit: int | None = None,
    data: Path | None = None,
    work: Work | None = None,
) -> list[Measurement]:
    """Run lm-eval's `tasks` (and `zoo_choice`, which is ours) on a model: a folder, a GGUF or a packed file.

    `few_shot` None means as the task says; `limit` is of questions per task (per subtask of a group); `data`
    is a folder laid out like the Hub, used instead of it; `work` says which processes answer and where their
    answers are kept, None: one, and nowhere. A group yields its aggregate. lm-eval runs in a process of its
    own, because data sets are found through the working directory and offline mode is fixed at import.
    """
    if data is not None and not data.is_dir():
        raise ZooError(f"there is no folder {data} to take data sets from", expected="org/name folders in it")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if data is not None:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        work = work or shards.work_on(model, "", Store(Path(scratch, "store")), workers=1)
        request = {
            "work": work.model_dump(mode="json"),
            "tasks": tasks,
            "subject": subject,
            "few_shot": few_shot,
            "limit": limit,
        }
        asked, answered, log = (Path(scratch, name) for name in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps(request))
        # -P: the working directory, full of folders with other people's names, must not be imported from.
        command = [sys.executable, "-P", "-m", "pipelines.harness", str(asked), str(answered)]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=data, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            assert process.stdout is not None
            _relay(process.stdout)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if not answered.is_file():
            if code == -9:
                raise _out_of_memory(", ".join(tasks))
            noise = log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
            raise ZooError(f"lm-eval ended with code {code} on {', '.join(tasks)}", saw=noise[-1][:300])
        answer = json.loads(answered.read_text())
    if error := answer.get("error"):
        raise ZooError(error["what"], saw=error["saw"], expected=error["expected"], try_=error["try_"])
    return [Measurement.model_validate(item) for item in answer["measurements"]]


def _out_of_memory(doing: str) -> ZooError:
    return ZooError(
        f"memory ran out on {doing}",
        try_="evaluation.workers=1, shorter windows, fewer few-shot examples, or more memory",
    )


def _relay(lines: Iterator[str]) -> None:
    """Show the harness's progress: a line ["title", total], then one line for each of `total` done."""
    for line in lines:
        title, total = json.loads(line)
        for _ in track(islice(lines, total), title, total):
            pass


@contextmanager
def _loaded(folder: Path) -> Iterator[Any]:
    """The model in `folder`, for the block. What the block keeps of it, it must hold itself."""
    holder = [load_model(folder)[0]]
    try:
        yield holder[0]
    finally:
        holder.clear()
        gc.collect()


def _batch_size(ids: Ids) -> int:
    length: int = ids.shape[1]
    return max(1, BATCH_TOKENS // length)


def batches(ids: Ids) -> list[Ids]:
    """Windows (windows, length) in as many at a time as one forward pass takes."""
    size = _batch_size(ids)
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _hidden_states(model: Any, batches: Iterable[Ids]) -> Iterator[tuple[Tensor, Tensor]]:
    """Per window: its tokens (length,) and the input of the head (length, hidden)."""
    with torch.inference_mode():
        start = 0
        for windows in batches:
            batch = torch.from_numpy(windows).to(model.device)
            hidden = model.base_model(batch, use_cache=False).last_hidden_state
            if not hidden.isfinite().all():
                raise NumericsError(
                    f"the hidden states of {model.name_or_path} are not finite",
                    saw=f"NaN or infinity in windows {start} to {start + len(batch) - 1}",
                )
            start += len(batch)
            yield from zip(batch, hidden, strict=True)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _positions(length: int) -> Iterator[slice]:
    return (slice(start, start + POSITIONS) for start in range(0, length, POSITIONS))


@torch.inference_mode()
def _negative_log_likelihood(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> float:
    """Mean in nats over hidden states (length, hidden) of the tokens (length,) that follow them."""
    total = 0.0
    for at in _positions(len(hidden)):
        logits = head(hidden[at]).float()
        total += torch.nn.functional.cross_entropy(logits, targets[at], reduction="sum").item()
    return total / len(hidden)


@torch.inference_mode()
def _compare(
    base_head: torch.nn.Module, base_hidden: Tensor, head: torch.nn.Module, hidden: Tensor
) -> tuple[float, float]:
    """Mean KL(base || entry) and top-1 agreement over the positions of hidden states (length, hidden).

    The families' heads have no scale and no soft cap: transformers does not apply MPT's `logit_scale` either.
    """
    divergence, agreement = 0.0, 0
    for at in _positions(len(hidden)):
        p: Tensor = base_head(base_hidden[at]).float().log_softmax(-1)
        q: Tensor = head(hidden[at]).float().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        agreement += int((p.argmax(-1) == q.argmax(-1)).sum())
    return divergence / len(hidden), agreement / len(hidden)


def _stderr(per_window: Values) -> float | None:
    if len(per_window) < 2:
        return None
    return float(per_window.std(ddof=1) / np.sqrt(len(per_window)))


def _measurement(*, ids: Ids, text: Text, **fields: Any) -> Measurement:
    windows, length = ids.shape
    return Measurement(
        task=text.name,
        data_revision=text.revision,
        context_length=length,
        stride=length,
        samples=windows,
        sample_unit="windows",
        harness=HARNESS,
        **fields,
    )
