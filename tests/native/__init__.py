"""Building and running `check_kernels.cpp`, which checks the C++ kernels without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CANNOT_RUN = 77  # status for a table of kernels that the processor cannot run


def need(packages: dict[str, str]) -> None:
    """Skip unless every program is there. packages: program -> Debian package that has it."""
    if missing := [package for program, package in packages.items() if shutil.which(program) is None]:
        pytest.skip(f"not installed: {' '.join(missing)}")


def build(out: Path, **variables: str) -> Path:
    """The check program, made in `out` with these variables of its Makefile."""
    settings = [f"{name}={value}" for name, value in (variables | {"OUT": str(out)}).items()]
    done = run("make", "-j2", "-C", str(HERE), *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "check_kernels"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
