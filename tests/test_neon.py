"""The NEON kernels against float64: compiled by a cross compiler, run by an emulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native import CANNOT_RUN, build, need, run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need({"make": "make", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"})
    return build(tmp_path_factory.mktemp("native"), CXX="aarch64-linux-gnu-g++", LDFLAGS="-static")


@pytest.mark.parametrize("table", ["neon", "scalar"])
def test_every_kernel_agrees_with_float64(program: Path, table: str) -> None:
    done = run("qemu-aarch64", "-cpu", "max", program, table)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_processor_without_the_dot_product_is_refused(program: Path) -> None:
    done = run("qemu-aarch64", "-cpu", "cortex-a72", program, "neon")
    assert done.returncode == CANNOT_RUN, done.stderr
