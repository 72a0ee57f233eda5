"""`python -m pipelines.lifeline COMMAND...`: a command that ends, with all that it started, when we do.

Launchers put what they start into sessions of its own, so no signal to a process group reaches it, and if
the launcher itself is killed it goes on for ever. The end of standard input reaches this process whatever
became of the one that held the other end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parents[1]


def start(command: Sequence[str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start a command that can import the project. output: where all that it says goes, or a pipe."""
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.lifeline", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])},
        start_new_session=True,  # whoever ends our group must not end this before it has ended its own
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command, if it runs still, and wait until all of it is gone."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def main() -> None:
    child = psutil.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_lifeline, args=(child,), daemon=True).start()
    code = child.wait()
    _kill_below(child)
    os._exit(code if code >= 0 else 128 - code)


def _end_with_lifeline(child: psutil.Process) -> None:
    while os.read(0, 1 << 10):
        pass
    _kill_below(child)
    os._exit(128 + signal.SIGKILL)


def _kill_below(child: psutil.Process) -> None:
    """Kill a process and its descendants; it is stopped first, so that it starts no more."""
    with suppress(psutil.NoSuchProcess):
        child.suspend()
        for process in [*child.children(recursive=True), child]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main()
