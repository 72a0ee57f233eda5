"""Where workers run. An executor starts a task and returns a handle that tells when and how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pydantic import ValidationError

from pipelines.worker import GRACE_S, Ended, Task
from zoo import logs

# A worker that ends by one of these was ended by someone: the operator, a machine short of memory.
_ENDED_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ROOT = Path(__file__).parents[1]


class Handle(Protocol):
    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""

    def stop(self) -> None:
        """Ask it to end; in a few seconds it has. May be called again."""

    def kill(self) -> None:
        """End it now."""


class Executor(Protocol):
    def start(self, task: Task, log: Path, tell: Callable[[str], None]) -> Handle:
        """Start a worker. What it says goes, without secrets, to the file `log` and, by lines, to `tell`."""

    def close(self) -> None:
        """Let go of whatever it holds; no worker runs any more."""


@dataclass(frozen=True)
class Local:
    """Workers as processes of this machine."""

    module: str = "pipelines.worker"

    def start(self, task: Task, log: Path | None, tell: Callable[[str], None]) -> Handle:
        """As of any executor; without `log`, there is no such file."""
        return LocalHandle(self.module, task, log, tell)

    def close(self) -> None:
        pass


class LocalHandle:
    def __init__(self, module: str, task: Task, log: Path | None, tell: Callable[[str], None]) -> None:
        self._stopped: float | None = None
        self._answer = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_inherited()])},
            start_new_session=True,  # Ctrl-C is for the scheduler; and all that it starts can be ended
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._threads = [
            threading.Thread(target=_follow, args=(self._process.stderr, log, tell), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        with suppress(BrokenPipeError):  # it ended already, as `poll` will say
            self._process.stdin.write(task.model_dump_json() + "\n")
            self._process.stdin.flush()

    def poll(self) -> Ended | None:
        code = self._process.poll()
        if code is None:
            if self._stopped is not None and time.monotonic() - self._stopped > GRACE_S:
                self.kill()
            return None
        self._end_group()
        for thread in self._threads:
            thread.join(1.0)
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        return self._ended(code)

    def stop(self) -> None:
        if self._stopped is None:
            self._stopped = time.monotonic()
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stopped = self._stopped or time.monotonic()
        self._end_group()

    def _end_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._answer = line

    def _ended(self, code: int) -> Ended:
        with suppress(ValidationError):
            return Ended.model_validate_json(self._answer)
        if self._stopped is not None:
            return Ended(status="interrupted", failure="stopped")
        if code < 0:
            name = signal.Signals(-code).name
            return Ended(
                status="failed",
                transient=-code in _ENDED_BY_OTHERS,
                failure=f"its worker was ended by {name}",
            )
        return Ended(status="failed", failure=f"its worker ended with code {code} and without a word")


def _inherited() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


def _follow(pipe: IO[str], log: Path | None, tell: Callable[[str], None]) -> None:
    """Pass on what a worker says, until it ends."""
    for line in pipe:
        said = logs.redact(line.rstrip("\n"))
        tell(said)
        if log is not None:
            append(log, said)


def append(log: Path, line: str) -> None:
    """Add a line to a log. A full disk loses that line, and nothing else."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8", errors="replace") as file:
            print(line, file=file)


def is_event(line: str) -> bool:
    """Whether a worker's line is an event of `zoo.logs` already, not a library's words."""
    if not line.startswith("{"):
        return False
    try:
        return "event" in json.loads(line)
    except ValueError:
        return False
