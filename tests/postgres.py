"""A PostgreSQL server of the tests' own: Debian's programs, an unprivileged user, a socket of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import make_url

USER = "nobody"  # that the server runs as where the tests run as root, which PostgreSQL refuses
_numbers = count()
_running = ExitStack()
stop = _running.close  # for the end of the tests: a process of pytest-xdist ends without `atexit`


def database(template: str | None = None) -> str:
    """The URL of a new, empty database, or of a copy of another one; the test is skipped without a server."""
    socket = _server()
    if not isinstance(socket, Path):
        pytest.skip(socket)
    import psycopg

    name = f"zoo{os.getpid()}_{next(_numbers)}"
    copied = f" TEMPLATE {make_url(template).database}" if template else ""
    with psycopg.connect(f"host={socket} dbname=postgres user=zoo", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}{copied}")  # type: ignore[arg-type]
    return f"postgresql+psycopg://zoo@/{name}?host={socket}"


@cache
def _server() -> Path | str:
    """The folder of a running server's socket; or, in words, why there is none."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed: pip install '.[postgres]' in a checkout"
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    found = shutil.which("initdb")
    folder = Path(found).parent if found else programs[-1] if programs else None
    if folder is None:
        return "PostgreSQL's server is not installed: apt-get install postgresql"
    root = Path(tempfile.mkdtemp(prefix="zoo-pg-"))
    become = {}
    if os.geteuid() == 0:
        known = pwd.getpwnam(USER)
        os.chown(root, known.pw_uid, known.pw_gid)
        become = {"user": known.pw_uid, "group": known.pw_gid, "extra_groups": []}
    data = root / "data"
    options = ["--username=zoo", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
    made = subprocess.run(
        [folder / "initdb", *options, data], cwd=root, capture_output=True, text=True, check=False, **become
    )
    if made.returncode:
        return f"initdb fails: {made.stderr.strip()[-300:]}"
    settings = ("listen_addresses=", f"unix_socket_directories={root}", "fsync=off", "max_connections=50")
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [folder / "postgres", "-D", data, *(x for s in settings for x in ("-c", s))],
            cwd=root,
            stdout=log,
            stderr=log,
            **become,
        )

    _running.callback(shutil.rmtree, root, ignore_errors=True)
    _running.callback(process.wait, 30)
    _running.callback(process.send_signal, signal.SIGINT)  # a fast shutdown
    deadline = time.monotonic() + 30
    while not (root / ".s.PGSQL.5432").exists() or _starting(root):
        if process.poll() is not None or time.monotonic() > deadline:
            return f"postgres does not start: {(root / 'log').read_text()[-300:]}"
        time.sleep(0.05)
    return root


def _starting(socket: Path) -> bool:
    import psycopg

    try:
        psycopg.connect(f"host={socket} dbname=postgres user=zoo").close()
    except psycopg.OperationalError:
        return True
    return False
