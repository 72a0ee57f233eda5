"""Evaluation in shards: the very figures of one process, whoever answers, is killed, or goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from pipelines import shards
from pipelines.evaluate import lm_eval_tasks, load_model, perplexity, perplexity_in_shards
from pipelines.export_gguf import export_gguf
from pipelines.shards import SHARD_CHARACTERS, Answers, Work, answered, merge, work_on
from pipelines.text import Text
from tests.packs import pack_folder
from tests.process import PATIENCE_S
from tests.test_evaluate import IDS, SHARED, needs_shared
from tests.tiny import SENTENCES, tiny_llama
from zoo.entry import Measurement
from zoo.errors import FormatError, ZooError
from zoo.files import Store
from zoo.shared_store import Remote, SharedStore

DATA = SHARED / "data" / "hub"


@given(st.lists(st.integers(0, SHARD_CHARACTERS), max_size=30), st.integers(1, 3))
def test_cuts_keep_order_and_documents_and_depend_on_what_was_before_only(
    sizes: list[int], choices: int
) -> None:
    asked = [["x" * size, str(choice)] for size in sizes for choice in range(choices)]
    documents = [number for number in range(len(sizes)) for _ in range(choices)]
    found = shards.shards("loglikelihood", asked, documents)
    assert [request for shard in found for request in shard.requests] == asked
    assert all(shard.requests and len(shard.requests) % choices == 0 for shard in found)
    half = len(sizes) // 2 * choices
    fewer = shards.shards("loglikelihood", asked[:half], documents[:half])
    assert fewer[:-1] == found[: len(fewer[:-1])]


def test_perplexity_is_that_of_one_process_to_the_last_digit(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    text = Text(("nothing",), "a text", "0" * 64)
    ids = IDS.repeat(10, axis=0)  # of two shards and a bit
    model, _ = load_model(folder)
    expected = perplexity(model, ids, text=text, subject="entry")
    for workers in (1, 2):
        work = work_on(folder, "model", Store(tmp_path / f"store-{workers}"), workers)
        found = perplexity_in_shards(work, ids, text=text, subject="entry")
        assert found == expected
        assert len(Store(tmp_path / f"store-{workers}").keys()) > 2


def answers_of(work: Work) -> Answers:
    told: list[int] = []
    found = answered(work, told.append)
    assert sum(told) == sum(len(shard.requests) for shard in work.shards)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, Answers]:
    """Log-likelihoods of a tiny model, answered by this process."""
    folder = tiny_llama(tmp_path_factory.mktemp("model"))
    contexts = [f"{number}. {SENTENCES[number % 6]}" * 10 for number in range(90)]
    asked = [[context, f" {word}"] for context in contexts for word in ("dog", "moon", "x")]
    cut = shards.shards("loglikelihood", asked, [number // 3 for number in range(len(asked))])
    assert len(cut) > 3
    work = work_on(folder, "model", Store(tmp_path_factory.mktemp("store")), workers=1)
    work = work.model_copy(update={"shards": cut})
    return work, answers_of(work)


def elsewhere(work: Work, folder: Path, **changes: Any) -> Work:
    return work.model_copy(update={"store": folder, **changes})


def test_what_is_done_is_not_done_again(done: tuple[Work, Answers], tmp_path: Path) -> None:
    work, expected = done
    gone = elsewhere(work, work.store, model=tmp_path / "gone")
    assert answers_of(gone) == expected  # without a model
    store = Store(shutil.copytree(work.store, tmp_path / "store"))
    lost = work.shard_key(work.shards[1])
    store.discard(lost)
    damaged = store.path(work.shard_key(work.shards[2])) / shards.ANSWERS
    damaged.chmod(0o644)
    damaged.write_text(damaged.read_text().replace("1", "2", 1))
    with pytest.raises(ZooError, match=r"2 of \d+ parts"):
        merge(elsewhere(work, store.root), store)
    before = {path: path.stat().st_mtime_ns for path in store.root.glob("objects/*/*/*")}
    assert answers_of(elsewhere(work, store.root)) == expected
    after = {path: path.stat().st_mtime_ns for path in store.root.glob("objects/*/*/*")}
    assert {path.parent.name for path in after if after[path] != before.get(path)} == {
        lost, damaged.parent.name
    }  # fmt: skip


def test_machines_that_share_a_store_share_the_work(done: tuple[Work, Answers], tmp_path: Path) -> None:
    work, expected = done
    remote = Remote(f"file://{tmp_path}/shared")
    here = SharedStore(tmp_path / "here", remote)
    mine = elsewhere(work, here.root, shared=remote.url, shards=work.shards[:2])
    answers_of(mine)
    there = elsewhere(work, tmp_path / "there", shared=remote.url)
    assert answers_of(there) == expected
    keys = [work.shard_key(shard) for shard in work.shards]
    assert set(remote.outputs()) == set(keys)
    # What the first had done was fetched: to be done in the third it would need the model.
    assert answers_of(elsewhere(there, tmp_path / "third", model=tmp_path / "gone")) == expected


def test_answers_that_do_not_fit_are_refused(done: tuple[Work, Answers], tmp_path: Path) -> None:
    work, _ = done
    store = Store(shutil.copytree(work.store, tmp_path / "store"))
    work = elsewhere(work, store.root)
    key = work.shard_key(work.shards[0])

    def replace(**changes: Any) -> None:
        found = json.loads((store.path(key) / shards.ANSWERS).read_text())
        store.discard(key)
        with store.writing(key) as folder:
            (folder / shards.ANSWERS).write_text(json.dumps(found | changes))

    replace(dtype="bfloat16")
    with pytest.raises(ZooError, match="differently by different machines") as caught:
        answers_of(work)
    assert "bfloat16" in str(caught.value) and "float32" in str(caught.value)
    replace(answers=[[0.0, True]])
    with pytest.raises(FormatError, match="does not answer what was asked"):
        answers_of(work)


def test_a_model_that_no_worker_can_open_is_told(done: tuple[Work, Answers], tmp_path: Path) -> None:
    broken = tiny_llama(tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ZooError, match=r"broken.*not a sound safetensors file"):
        answers_of(elsewhere(done[0], tmp_path / "cut", model=broken, workers=2))
    (broken / "model.safetensors").write_bytes(data)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    work = elsewhere(done[0], tmp_path / "store", model=broken, workers=2)
    with pytest.raises(ZooError, match="broken does not hold a whole model"):
        answers_of(work)


@contextmanager
def evaluating(work: Work, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`answered(work)` in a process of its own."""
    (folder / "work.json").write_text(work.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from pipelines.shards import Work, answered\n"
        "work = Work.model_validate_json(Path(sys.argv[1]).read_bytes())\n"
        "Path(sys.argv[2]).write_text(answered(work, lambda _: None).model_dump_json())\n"
    )
    command = [sys.executable, "-c", code, folder / "work.json", folder / "answers.json"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def busy_worker(process: subprocess.Popen[bytes], store: Path) -> psutil.Process:
    """A worker that has begun a shard and not finished it; stopped there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for worker in psutil.Process(process.pid).children(recursive=True):
            worker.suspend()
            held = [Path(file.path) for file in worker.open_files() if "/locks/" in file.path]
            if any(not Store(store).path(lock.name).exists() for lock in held):
                return worker
            worker.resume()
        assert process.poll() is None, "all was done before a worker was seen at work"
        time.sleep(0.001)
    raise AssertionError("no worker began")


def test_a_worker_killed_in_mid_shard_changes_nothing(done: tuple[Work, Answers], tmp_path: Path) -> None:
    work, expected = done
    mine = elsewhere(work, tmp_path / "store", workers=3)
    with evaluating(mine, tmp_path) as process:
        busy_worker(process, mine.store).send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 0
    assert Answers.model_validate_json((tmp_path / "answers.json").read_bytes()) == expected


def test_an_evaluation_that_is_killed_takes_its_workers_along_and_is_continued(
    done: tuple[Work, Answers], tmp_path: Path
) -> None:
    work, expected = done
    mine = elsewhere(work, tmp_path / "store", workers=2)
    with evaluating(mine, tmp_path) as process:
        while not Store(mine.store).keys():
            assert process.poll() is None
            time.sleep(0.001)
        busy = busy_worker(process, mine.store)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        busy.resume()
        _, alive = psutil.wait_procs(workers, PATIENCE_S)
        assert not alive
    store = Store(mine.store)
    finished = {path: path.stat().st_mtime_ns for path in map(store.path, store.keys())}
    assert 0 < len(finished) < len(work.shards)
    assert answers_of(elsewhere(mine, mine.store, workers=1)) == expected
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())


def in_one_and_in_many(folder: Path, tasks: list[str], store: Path, **settings: Any) -> list[Measurement]:
    """The figures, after checking that one process and one per shard find the very same."""
    found = []
    for workers in (1, 99):
        work = work_on(folder, "model", Store(store / f"{workers}"), workers)
        found.append(lm_eval_tasks(folder, tasks, subject="entry", work=work, **settings))
    assert found[0] == found[1]
    assert len(Store(store / "99").keys()) >= 2
    return found[0]


def test_a_task_in_two_processes_has_the_figures_of_one(tmp_path: Path) -> None:
    found = in_one_and_in_many(tiny_llama(tmp_path / "model"), ["zoo_choice"], tmp_path)
    assert [(f.samples, f.context_length, f.dtype) for f in found] == [(284, 512, "float32")] * 2


@pytest.mark.real
@needs_shared
@pytest.mark.parametrize("kind", ["folder", "gguf", "packed"])
def test_every_kind_of_model_has_the_figures_of_one_process(kind: str, tmp_path: Path) -> None:
    """Of real questions, with examples before them, which lm-eval draws one after the other."""
    model = tiny_llama(tmp_path / "model")
    if kind == "gguf":
        model = export_gguf(model, tmp_path / "out", ["Q8_0"], name="tiny", license=None)["Q8_0"]
    if kind == "packed":
        model = pack_folder(model, tmp_path)[0].path
    settings: dict[str, Any] = {"few_shot": 2, "limit": 60, "data": DATA}  # three shards
    found = in_one_and_in_many(model, ["arc_easy"], tmp_path, **settings)
    assert [f.samples for f in found] == [60, 60]


@pytest.mark.real
@needs_shared
def test_every_kind_of_task_has_the_figures_of_lm_eval_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path / "model")
    tasks = ["arc_easy", "wikitext", "gsm8k", "blimp_causative"]
    work = work_on(folder, "model", Store(tmp_path / "store"), workers=3)
    found = lm_eval_tasks(folder, tasks, subject="entry", limit=8, data=DATA, work=work)
    monkeypatch.chdir(DATA)
    model, tokenizer = load_model(folder)
    alone = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1),
        tasks=tasks,
        limit=8,
        bootstrap_iters=1000,
        num_fewshot=None,
    )
    assert tokenizer is not None and {f.task for f in found} == set(tasks)
    for figure in found:
        name, _, kind = figure.metric.partition(",")
        metric = {"accuracy": "acc", "accuracy_norm": "acc_norm"}.get(name, name)
        theirs = alone["results"][figure.task]
        assert figure.value == pytest.approx(theirs[f"{metric},{kind or 'none'}"], rel=1e-4)
        assert figure.samples == alone["n-samples"][figure.task]["effective"]
