"""`zoo` in processes of its own, which tests can kill, stop and race.

A fresh interpreter needs five seconds to import torch and transformers. So a server process imports them
once and forks: each command is still a process with its own id, signals, output and exit code. What must
begin with a fresh interpreter uses `program`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240.0  # for anything on a machine that does other things too
# One thread each: a tiny model gains nothing from more, and loses much where others use them.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(
    ["tests.process", "pipelines.run", "pipelines.export_compressed", "zoo.cli", "alembic.command", "sqlite3"]
    + [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "mistral", "mpt")]
)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def _main(arguments: tuple[str, ...], out: Path, err: Path, environment: dict[str, str], user: int) -> None:
    """In the forked process: become `zoo ARGUMENTS`, the leader of a process group."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(environment)
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["zoo", *arguments]
    import torch

    from zoo.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    main()


@dataclass
class Zoo:
    """Runs commands in `folder`, where their output lies too."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: int = 0

    def start(self, *arguments: str | Path, user: int = 0) -> Running:
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        err.touch()
        environment = QUIET | self.environment
        process = _forking.Process(
            target=_main, args=(tuple(map(str, arguments)), out, err, environment, user), daemon=False
        )
        process.start()
        return Running(process, out, err)

    def __call__(self, *arguments: str | Path, user: int = 0) -> Done:
        return self.start(*arguments, user=user).end()


@dataclass
class Running:
    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    @property
    def told(self) -> str:
        return self.err.read_text()

    def until(self, happened: Callable[[], object], what: str) -> None:
        """Wait until `happened()`; an error if the command ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.is_alive(), f"ended before {what}:\n{self.told}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.told}"
            time.sleep(0.002)

    def until_told(self, words: str) -> None:
        self.until(lambda: words in self.told, repr(words))

    def kill(self) -> None:
        """kill -9 of the command and of all that it started."""
        pid = self.process.pid
        assert pid is not None and self.process.is_alive(), f"ended before the kill:\n{self.told}"
        os.killpg(pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == -signal.SIGKILL

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM to the command alone, as a service manager sends it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> Done:
        self.process.join(PATIENCE_S)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"did not end within {PATIENCE_S:.0f} s:\n{self.told}")
        return Done(code, self.out.read_text(), self.told)


def program(
    *arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The installed program `zoo ARGUMENTS`, from nothing, in `folder`."""
    return subprocess.run(
        [Path(sys.executable).with_name("zoo"), *arguments],
        cwd=folder,
        env=os.environ | QUIET | (environment or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def refused(done: Done | subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """The complaint of a command that must fail well: a `zoo: ` message with `words`, no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    before, marker, complaint = done.stderr.rpartition("zoo: ")
    assert marker and (not before or before.endswith("\n")), done.stderr
    for word in words:
        assert word in complaint, f"{word!r} is not in: {complaint}"
    return complaint


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system of `size` bytes of its own; the test is skipped where none can be mounted."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("a small file system can be mounted by the superuser only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()
