"""Speeds measured here go into the registry, beside those of other machines; nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.publish import still_known
from tests import example
from tests.tiny_entry import ID, Shelf, model_files, shelve
from zoo.errors import ZooError
from zoo.machine import this_machine
from zoo.runner.bench import Bench
from zoo.speeds import record, together

QUICK = ["--threads", "1", "--prompt", "16", "--generate", "4", "--repeat", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def shelf(tmp_path: Path, files: Path) -> Shelf:
    return shelve(tmp_path, files)


def bench(shelf: Shelf, *arguments: str | Path, disturbance: float = 1e9) -> subprocess.CompletedProcess[str]:
    """`zoo bench --record`, where others may take `disturbance` cores: the machine of a test is not idle."""
    code = (
        "import zoo.runner.bench as bench\n"
        f"bench.BUSY_CORES = {disturbance}\n"
        "from zoo.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "bench", *arguments, "--record", *shelf.options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_speeds_of_an_entry_are_recorded(shelf: Shelf) -> None:
    """Of its packed file and its GGUF, as printed; a second time they are replaced, others' stay."""
    elsewhere = example.entry().benchmarks
    shelf.registry.put(shelf.entry().model_copy(update={"benchmarks": elsewhere}))
    gguf = shelf.folder() / f"{ID}-F16.gguf"
    for _ in range(2):
        done = bench(shelf, ID, gguf, *QUICK, "--json")
        assert done.returncode == 0, done.stderr
        assert f"recorded: {ID}\n" in done.stderr
        here = shelf.entry().benchmarks[len(elsewhere) :]
        rows = json.loads(done.stdout)["rows"]
        assert [(b.runner, b.artifact) for b in here] == [
            ("zoo", "packed.safetensors"),
            ("llama.cpp", gguf.name),
        ]
        for b, row in zip(here, rows, strict=True):
            assert (b.prefill_tokens_per_s, b.decode_tokens_per_s) == (
                row["prefill_tok_s"],
                row["decode_tok_s"],
            )
            assert (b.load_s, b.peak_memory_bytes) == (row["load_s"], row["peak_memory_bytes"])
        assert {(b.threads, b.prompt_tokens, b.generated_tokens, b.repeats) for b in here} == {(1, 16, 4, 1)}
        assert all(b.machine == this_machine() for b in here)
        assert shelf.entry().benchmarks[: len(elsewhere)] == elsewhere


def test_a_disturbed_measurement_is_not_recorded(shelf: Shelf) -> None:
    done = bench(shelf, ID, *QUICK, disturbance=-1)
    assert done.returncode == 1 and "nothing was recorded" in done.stderr
    assert "decode tok/s" in done.stdout  # it is shown all the same
    assert shelf.entry().benchmarks == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([ID, "--kv", "int8"], 2, "keys and values in f16"),
        ([ID, "--context-at", "8"], 2, "--context-at 8"),
        (["--shape", "tiny"], 2, "needs an entry"),
    ],
)
def test_what_has_no_place_in_a_record_is_refused(
    shelf: Shelf, arguments: list[str], code: int, words: str
) -> None:
    done = bench(shelf, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_is_not_the_entrys_is_refused(shelf: Shelf) -> None:
    with (shelf.folder() / "packed.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    done = bench(shelf, ID, *QUICK)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not the packed.safetensors that" in done.stderr and "zoo fsck" in done.stderr


def test_an_entry_that_is_not_in_the_registry_is_refused(shelf: Shelf) -> None:
    shelf.folder().rename(shelf.folder("another"))
    done = bench(shelf, "another", *QUICK)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no entry 'another' in the registry" in done.stderr


def test_made_again_an_entry_keeps_the_speeds_of_other_machines(shelf: Shelf) -> None:
    """Of the same files only: of others they say nothing."""
    ours, other = example.entry().benchmarks[0], this_machine()
    elsewhere = ours.model_copy(update={"machine": other})
    slower = ours.model_copy(update={"decode_tokens_per_s": 1.0})
    known = shelf.entry().model_copy(update={"benchmarks": [slower, elsewhere]})
    shelf.registry.put(known)
    again = known.model_copy(update={"benchmarks": [ours]})
    assert still_known(again, shelf.registry).benchmarks == [ours, elsewhere]
    changed = again.model_copy(update={"artifacts": known.artifacts[1:]})
    assert still_known(changed, shelf.registry).benchmarks == [ours]
    threads = ours.model_copy(update={"threads": ours.threads + 1})
    assert together([ours], [threads]) == [ours, threads]


def test_an_entry_that_is_made_anew_meanwhile_gets_no_speed_of_the_old_file(shelf: Shelf) -> None:
    entry = shelf.entry()
    old = next(a for a in entry.artifacts if a.kind == "packed")
    shelf.registry.put(entry.model_copy(update={"artifacts": [a for a in entry.artifacts if a != old]}))
    measured = Bench.model_construct(cores_taken=0.0, rows=[])
    with pytest.raises(ZooError, match="made anew meanwhile"):
        record(measured, {0: (ID, old)}, shelf.registry)
    assert shelf.entry().benchmarks == []
