"""Jobs per hour on 1 and 2 workers, the scheduler's overhead per job, and the time to recover from a kill.

    python -m benchmarks.jobs            # tiny models with random weights: what is measured is the scheduling

The overhead is the time of `zoo jobs run` on one worker, less that of the same recipes by `zoo run`, one
process each, per job. Recovery: from kill -9 of a worker to the first line of the one that takes its place,
and from kill -9 of a scheduler to the first line of the next scheduler's worker, which is started at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.tiny import tiny_llama
from zoo.registry import open_registry

ROOT = Path(__file__).parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_jobs(folder: Path, count: int) -> Path:
    """A job list of `count` recipes that have no stage in common but the base's measurement."""
    base = tiny_llama(folder / "llama")
    for number in range(count):
        recipe = {
            "name": f"tiny-{number}",
            "base": str(base),
            "calibration": {"windows": 8, "length": 32, "seed": number},
            "steps": [{"kind": "quantize", "method": "gptq", "grid": {"bits": 8, "group": 32}}],
            "evaluation": {"perplexity": [{"windows": 2, "length": 64}], "fidelity": None, "tasks": []},
            "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
            "verification": {"threads": 1},
        }
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(recipe))
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"jobs": [{"recipes": [f"{n}.yaml" for n in range(count)]}]}))
    return path


def zoo(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", *arguments],
        cwd=ROOT, env=os.environ | QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def seconds_of(*processes: subprocess.Popen[str]) -> float:
    began = time.monotonic()
    for process in processes:
        _, told = process.communicate()
        if process.returncode:
            sys.exit(told)
    return time.monotonic() - began


def places(folder: Path) -> list[str | Path]:
    folder.mkdir()
    open_registry(str(folder / "registry.db"))
    return ["--store", folder / "store", "--registry", folder / "registry.db"]


def wait_for(pattern: str, folder: Path, count: int) -> float:
    """When `count` workers have said how they begin."""
    while True:
        said = sum(path.read_text().count("base model") for path in folder.glob(pattern))
        if said >= count:
            return time.monotonic()
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=6)
    count = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = write_jobs(folder, count)
        alone = places(folder / "alone")
        by_hand = sum(seconds_of(zoo("run", folder / f"{n}.yaml", *alone)) for n in range(count))
        took = {}
        for workers in (1, 2):
            options = places(folder / f"by-{workers}")
            command = ["jobs", "run", "--jobs", path, "--max-parallel", str(workers)]
            took[workers] = seconds_of(zoo(*command, *options))
            rate = 3600 * count / took[workers]
            print(f"{workers} workers: {count} jobs in {took[workers]:.1f} s, {rate:.0f} per hour")
        print(f"zoo run, one after the other: {by_hand:.1f} s")
        print(f"overhead per job: {(took[1] - by_hand) / count:.2f} s")

        options = places(folder / "killed")
        logs = "killed/store/jobs/*.log"
        first = zoo("jobs", "run", "--jobs", path, *options)
        wait_for(logs, folder, 1)
        registry = open_registry(str(folder / "killed" / "registry.db"))
        os.kill(registry.runs()[0].pid, signal.SIGKILL)
        killed = time.monotonic()
        print(f"a killed worker: its job goes on after {wait_for(logs, folder, 2) - killed:.1f} s")
        first.kill()
        killed = time.monotonic()
        second = zoo("jobs", "run", "--jobs", path, *options)
        print(f"a killed scheduler: its job goes on after {wait_for(logs, folder, 3) - killed:.1f} s")
        second.send_signal(signal.SIGTERM)
        second.wait()


if __name__ == "__main__":
    main()
