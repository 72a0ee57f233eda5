"""`zoo jobs run` in a process of its own, whose workers need no torch (`tests.job_worker`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from zoo.registry import Registry, open_registry
from zoo.registry.job_runs import JobRun, history

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
# `zoo ARGUMENTS` with workers that need no torch.
QUICK = (
    "import sys, pipelines.executors as e\n"
    "e.Local.__init__.__defaults__ = ('tests.job_worker',)\n"
    "from zoo.cli import main; main()"
)


@dataclass
class Place:
    """A job list, a store, a registry, and `zoo jobs run` on them."""

    folder: Path
    registry_url: str

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def registry(self) -> Registry:
        return open_registry(self.registry_url)

    def start(
        self, *options: str | Path, environment: Mapping[str, str] | None = None, store: Path | None = None
    ) -> subprocess.Popen[str]:
        given = ["--jobs", self.folder / "jobs.yaml", "--store", store or self.store]
        return subprocess.Popen(
            [sys.executable, "-c", QUICK, *self.before, "jobs", "run", *given, *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"ZOO_REGISTRY": self.registry_url} | (environment or {}),
        )  # fmt: skip

    before: tuple[str, ...] = ()

    def run(self, *options: str | Path, **given: Any) -> Done:
        return end(self.start(*options, **given))

    def runs(self, job: str) -> list[JobRun]:
        return history(self.registry, job)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str

    @property
    def results(self) -> list[dict[str, Any]]:
        assert self.stdout, self.stderr
        found: list[dict[str, Any]] = json.loads(self.stdout)["results"]
        return found

    @property
    def outcomes(self) -> dict[str, str]:
        return {r["job"]: r["outcome"] for r in self.results}

    def of(self, job: str) -> dict[str, Any]:
        return next(r for r in self.results if r["job"] == job)


def end(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err, err
    return Done(process.returncode, out, err)


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """It is gone at the end, whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def freeze(process: subprocess.Popen[str], place: Place) -> None:
    """SIGSTOP between two of its transactions: a process that stops within one holds a database's lock."""

    def stopped() -> bool:
        threads = Path(f"/proc/{process.pid}/task").glob("*/stat")
        return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)

    def locked() -> bool:
        if "://" in place.registry_url:
            url, patience = place.registry_url, {"options": "-c lock_timeout=100"}
        else:
            url, patience = f"sqlite:///{place.registry_url}", {"timeout": 0}
        engine = create_engine(url, connect_args=patience, poolclass=NullPool)
        try:
            with engine.connect() as connection:
                connection.execute(text("UPDATE leases SET beat = beat"))
        except OperationalError:
            return True
        return False

    process.send_signal(signal.SIGSTOP)
    until(stopped, "the process to stop")
    while locked():
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        until(stopped, "the process to stop")


def until(happened: Any, what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def working(place: Place, job: str, count: int = 1) -> bool:
    """Whether the worker of a job has begun its `count`-th attempt."""
    logs = sorted((place.store / "jobs").glob(f"{job}-*.log"))
    return sum(log.read_text().count("working as told") for log in logs) >= count


def worker_of(place: Place, job: str) -> int:
    """The worker's process id, as it recorded it."""
    return max((run for run in place.registry.runs() if run.recipe_name == job), key=lambda r: r.id).pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
