"""Signals that a command cannot hear in time: it ends all the same, and says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.worker import Ended, Task
from tests.process import ROOT
from tests.scheduler import alive
from zoo.registry import open_registry

# `zoo run`, whose main thread waits outside Python, for a lock that it holds itself, where it would compute.
DEAF = """
import ctypes, os, signal, socket, subprocess, sys, types
from zoo import cli, signals
signals.GRACE_S = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)

def deaf(recipe, store, registry):
    registry.start_run("deaf", "0" * 64, os.getpid(), socket.gethostname())
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

sys.modules["pipelines.run"] = types.SimpleNamespace(run=deaf)
cli.main()
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_one_that_is_deaf_is_ended(tmp_path: Path, number: int, name: str) -> None:
    url = str(tmp_path / "registry.db")
    registry = open_registry(url)
    recipe = ROOT / "pipelines" / "recipes" / "smollm2-135m-w8.yaml"
    with subprocess.Popen(
        [sys.executable, "-c", DEAF, "run", recipe, "--store", tmp_path / "store", "--registry", url],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            time.sleep(0.2)  # into the wait
            asked = time.monotonic()
            process.send_signal(number)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number and 0.4 < time.monotonic() - asked < 10
    assert told.count("\n") == 1 and f"interrupted by {name}; what was finished is kept" in told
    assert [run.status for run in registry.runs()] == ["interrupted"]
    assert not alive(child)


# Without a signal the block leaves everything as it was; after one, its error is `Stopped`, whatever it was.
QUIET = """
import os, signal
from zoo.errors import Stopped, ZooError
from zoo.signals import stoppable

before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
with stoppable(print):
    pass
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert signal.set_wakeup_fd(-1) == -1
try:
    with stoppable(print):
        raise ZooError("its own")
except ZooError as error:
    print(error)
try:
    with stoppable(print):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("what a library makes of it")
except Stopped as error:
    print(error.signal)
"""


def test_only_what_was_stopped_is_said_to_be() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "its own\n15\n", "")


# Ctrl-C just when a command closes its registry, which takes the longest where a disk is slow.
CLOSING = """
import signal
from sqlalchemy.engine.default import DefaultDialect
from zoo import cli

close = DefaultDialect.do_close

def interrupted(self, connection):
    close(self, connection)
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
DefaultDialect.do_close = interrupted
cli.main()
"""


def test_one_that_closes_its_registry_ends_without_a_traceback(tmp_path: Path) -> None:
    url = str(tmp_path / "registry.db")
    open_registry(url)
    done = subprocess.run(
        [sys.executable, "-c", CLOSING, "list", "--registry", url],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.count("\n") == 1 and "interrupted" in done.stderr


# A job's worker that is asked to end just as it begins, or ends, to hear of signals.
ASKED = """
import os, signal, sys
from pipelines import worker

set_handler = signal.signal

def asked(number, handler):
    if (number, handler) == (signal.SIGINT, {handler}):
        os.kill(os.getpid(), signal.{number})
    return set_handler(number, handler)

signal.signal = asked
worker.main(lambda task: worker.Ended(status="done"))
"""


@pytest.mark.parametrize(
    ("handler", "number"), [("signal.default_int_handler", "SIGTERM"), ("signal.SIG_IGN", "SIGINT")]
)
def test_a_worker_that_begins_or_ends_answers(handler: str, number: str) -> None:
    task = Task(
        job="one", recipe="one.yaml", overrides=[], store="store", registry="registry.db",
        lease_token=1, lease_holder="nobody",
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", ASKED.format(handler=handler, number=number)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(task.model_dump_json() + "\n")
        process.stdin.flush()  # it stays open: the worker would end with it
        answer = process.stdout.read()
        assert (process.wait(60), process.stderr.read()) == (0, "")
    assert Ended.model_validate_json(answer).status == "interrupted"
