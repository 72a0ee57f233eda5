"""A real S3-compatible server, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.process import PATIENCE_S

BUCKET = "zoo-test"
SECRET = "planted/secret+access0key"


@dataclass(frozen=True)
class Server:
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """By which every client of S3 finds the server and its credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "planted-access-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Moto's server with an empty bucket; the test is skipped without it."""
    pytest.importorskip("moto", reason="needs moto: pip install '.[dev]' in a checkout")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[s3]' in a checkout")
    with (folder / "s3.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"no_proxy": "*"},
        )
    try:
        server = Server(_endpoint(folder / "s3.log", process))
        with urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/{BUCKET}", method="PUT")):
            pass
        yield server
    finally:
        process.kill()
        process.wait()


def _endpoint(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it listens, as it says itself."""
    deadline = time.monotonic() + PATIENCE_S
    while "Running on" not in (said := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.02)
    return said.partition("Running on ")[2].split()[0]
