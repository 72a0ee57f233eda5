"""A zoo server in a process of its own, for tests that speak to it with real clients."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0


@dataclass
class Server:
    endpoint: str  # http://127.0.0.1:PORT
    token: str  # may write
    process: subprocess.Popen[str]
    store: Path

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which any client of the Hub talks to this server, its caches below `home`.

        `token` "" makes the client anonymous; without one it may write.
        """
        given = self.token if token is None else token
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "ZOO_"))}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "MODEL_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"HF_TOKEN": given} if given else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}),
        }


def zoo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`zoo ARGUMENTS` in a process of its own, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "zoo.cli", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def new_token(store: Path, name: str, scope: str = "write") -> str:
    return zoo("token", "create", "--name", name, "--scope", scope, "--store", store).stdout.split()[0]


def start(
    store: Path, token: str, *arguments: str | Path, log: Path | None = None, before: str = ""
) -> Server:
    """`zoo serve` over `store`, on a free port of this machine, once it accepts connections.

    `log`: a file for what it writes to stderr. `before`: Python that runs first, to shorten its time limits.
    """
    program = f"{before}\nfrom zoo.cli import main\nmain()"
    with contextlib.ExitStack() as files:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", "--port", "0", "--store", store, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=files.enter_context(log.open("a")) if log else None,
            text=True,
        )
    assert process.stdout is not None
    alarm = threading.Timer(PATIENCE_S, process.kill)
    alarm.start()
    try:
        line = process.stdout.readline()
    finally:
        alarm.cancel()
    if not line.startswith("zoo: serving http://"):
        process.kill()
        raise AssertionError(f"`zoo serve` began with {line!r}")
    return Server(line.split()[2], token, process, store)


@contextmanager
def serving(
    store: Path,
    *arguments: str | Path,
    token: str | None = None,
    log: Path | None = None,
    before: str = "",
) -> Iterator[Server]:
    """A running server over `store`, stopped at the end; `token` is one that was made for it before."""
    token = token or new_token(store, f"tester-{os.urandom(4).hex()}")
    server = start(store, token, *arguments, log=log, before=before)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
        if server.process.stdout is not None:
            server.process.stdout.close()
