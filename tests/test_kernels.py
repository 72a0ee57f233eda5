"""Every C++ kernel that this processor runs, against float64.

A C++ program does it, `tests/native/check_kernels.cpp`. It packs its matrices itself, from the words of the
format; `zoo.runner.format` reads them here.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.native import CANNOT_RUN, build, need, run
from zoo.runner.format import ROWS, Layout, pack, unpack

TABLES = ["scalar", "avx2", "avx512", "neon"]
FUNCTIONS = {
    "multiply",
    "quantize",
    "rms_norm",
    "layer_norm",
    "gate",
    "silu",
    "gelu",
    "rotate",
    "store",
    "attend",
}
SANITIZED = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need({"make": "make", "c++": "g++"})
    return build(tmp_path_factory.mktemp("native"), CXX="c++")


@pytest.mark.parametrize("table", TABLES)
def test_every_kernel_agrees_with_float64(program: Path, table: str) -> None:
    done = run(program, table)
    if done.returncode == CANNOT_RUN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.real  # most of a minute, to compile
def test_no_kernel_leaves_its_memory(tmp_path: Path) -> None:
    need({"make": "make", "c++": "g++"})
    sanitized = build(tmp_path, CXX="c++", CXXFLAGS=SANITIZED)
    for table in TABLES:
        done = run(sanitized, table)
        assert done.returncode in (0, CANNOT_RUN), done.stdout + done.stderr


def test_a_small_error_in_any_function_is_found(program: Path) -> None:
    done = run(program, "broken")
    assert done.returncode == 1, done.stderr
    assert set(re.findall(r"^FAIL (\w+):", done.stdout, re.MULTILINE)) == FUNCTIONS


def test_matrices_of_the_check_are_packed_as_the_format_says(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "matrices"
    done = run(program, "matrices", path)
    assert done.returncode == 0, done.stderr
    seen = set()
    with path.open("rb") as file:
        while line := file.readline().split():
            rows, columns, bits, group, keep, offset_bits, zeros, size, mask_size = map(int, line[1:])
            layout = Layout(line[0].decode(), rows, columns, bits, group, keep, offset_bits, bool(zeros))  # type: ignore[arg-type]
            q = np.frombuffer(file.read(2 * rows * columns), np.int16).reshape(rows, columns)
            shape = (layout.row_blocks, layout.groups, ROWS)
            count = 2 * layout.row_blocks * layout.groups * ROWS
            parts: dict[str, NDArray[np.generic]] = {}
            parts["scales"] = np.frombuffer(file.read(count), np.float16).reshape(shape)
            if layout.zeros:
                parts["minima"] = np.frombuffer(file.read(count), np.float16).reshape(shape)
            parts["values"] = np.frombuffer(file.read(size), np.uint8)
            if layout.kind == "mask":
                parts["mask"] = np.frombuffer(file.read(mask_size), np.uint64).reshape(layout.row_blocks, -1)
            assert layout.values_size in (None, size), layout
            read, scales, minima = unpack(layout, parts)
            np.testing.assert_array_equal(read, q, err_msg=str(layout))
            again = pack(layout, q, scales, minima)  # what zoo itself would have packed
            np.testing.assert_array_equal(again["scales"], parts["scales"])
            if layout.kind in ("dense", "mask"):  # the others may choose among slots
                np.testing.assert_array_equal(again["values"], parts["values"])
            seen.add((layout.kind, bits, keep, offset_bits, layout.zeros))
    assert len(seen) == 6 + 5 * 3 + 5 * 2  # dense and mask, banded, planes
