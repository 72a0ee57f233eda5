"""The packed layouts: what is packed comes back, and lies where `zoo.runner.format` says that it lies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native_fuzz.models import LAYOUTS, random_integers
from zoo.errors import FormatError, PatternError
from zoo.runner.format import KEEPS, Layout, dequantize, fits, pack, unpack, window_starts

Parts = dict[str, NDArray[Any]]


# --- the layouts once more, value by value in plain Python ------------------------------------------


def starts_of(keep: int, window: int) -> list[int]:
    """The formula of the design, its rounding (halves to even) in whole numbers."""
    found = []
    for k in range(keep):
        twice_keep = 2 * keep
        numerator = 2 * 16 * k - window * keep + 16  # of k 16 / keep - (window - 16 / keep) / 2
        whole, rest = divmod(numerator, twice_keep)
        if 2 * rest > twice_keep or (2 * rest == twice_keep and whole % 2):
            whole += 1
        found.append(min(max(whole, 0), 16 - window))
    return found


def stored(layout: Layout, parts: Parts) -> Iterator[tuple[int, int, int]]:
    """(row, column, integer) of everything that the bytes hold, padding included."""
    values = parts["values"].tobytes()
    pairs = -(-layout.columns // 32)
    blocks = -(-layout.rows // 16)
    keep, bits, offset_bits = layout.keep, layout.bits, layout.offset_bits
    if layout.kind == "planes":
        # As few pairs as fill whole vectors of both planes make a chunk.
        chunk = 1
        while chunk * keep // 2 * offset_bits % 8 or chunk * keep // 2 * bits % 8:
            chunk *= 2
        pairs = -(-pairs // chunk) * chunk
    at = 0  # of masks: the next nibble or byte
    for block, pair in product(range(blocks), range(pairs)):
        if layout.kind == "dense":
            for row, column in product(range(16), range(32)):
                quad = column // 4
                if bits == 6:  # three quads below, the fourth above them, two bits in each
                    first = ((block * pairs + pair) * 6 + quad // 4 * 3) * 64 + row * 4 + column % 4
                    three = [values[first + 64 * i] for i in range(3)]
                    low = [byte % 64 for byte in three] + [sum(b // 64 * 4**i for i, b in enumerate(three))]
                    yield block * 16 + row, pair * 32 + column, low[quad % 4] - 32
                    continue
                vector = (block * pairs + pair) * bits + (quad if bits == 8 else quad // 2)
                byte = values[vector * 64 + row * 4 + column % 4]
                if bits == 8:
                    integer = byte - 256 * (byte > 127)
                else:
                    integer = (byte >> 4 if quad % 2 else byte & 15) - (0 if layout.zeros else 8)
                yield block * 16 + row, pair * 32 + column, integer
        elif layout.kind == "mask":
            for quad in range(8):
                mask = int(parts["mask"][block, pair * 8 + quad])
                for bit in (bit for bit in range(64) if mask >> bit & 1):
                    if bits == 8:
                        integer = values[at] - 256 * (values[at] > 127)
                    else:
                        integer = (values[at // 2] >> at % 2 * 4 & 15) - 8
                    at += 1
                    yield block * 16 + bit // 4, pair * 32 + quad * 4 + bit % 4, integer
            at += at % 2 if bits == 4 else 0  # each pair of a row block begins with a byte of its own
        else:
            starts = starts_of(keep, 1 << offset_bits)
            for row, half, k in product(range(16), range(2), range(keep)):
                slot = half * keep + k
                quad, lane = slot // 4, row * 4 + slot % 4
                if layout.kind == "banded":
                    byte = values[((block * pairs + pair) * (keep // 2) + quad) * 64 + lane]
                    integer, offset = byte >> offset_bits, byte & (1 << offset_bits) - 1
                else:
                    quads = chunk * keep // 2  # of a chunk
                    quad += pair % chunk * keep // 2
                    base = (block * pairs + pair // chunk * chunk) * keep // 2 * (bits + offset_bits) * 8
                    offset = from_plane(values, base, quad, lane, offset_bits)
                    integer = from_plane(values, base + quads * offset_bits * 8, quad, lane, bits)
                column = pair * 32 + half * 16 + starts[k] + offset
                yield block * 16 + row, column, integer - (1 << bits - 1)


def from_plane(values: bytes, base: int, quad: int, lane: int, bits: int) -> int:
    """Vectors that need `bits` bits share one of bytes, the first in the lowest bits."""
    together = 8 // bits
    byte = values[base + quad // together * 64 + lane]
    return byte >> quad % together * bits & (1 << bits) - 1


def read_plainly(layout: Layout, parts: Parts) -> NDArray[np.int64]:
    """The integers (rows, columns); what was padded must be zero."""
    q = np.zeros((-(-layout.rows // 16) * 16, -(-layout.columns // 32) * 32 + 96), np.int64)
    for row, column, integer in stored(layout, parts):
        q[row, column] += integer  # an empty slot holds zero, and any column
    assert not q[layout.rows :].any() and not q[:, layout.columns :].any()
    return q[: layout.rows, : layout.columns]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, int]:
    fields = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    rows, columns = draw(st.integers(1, 36)), draw(st.integers(1, 150))
    group = draw(st.sampled_from([0, 32, 64, 128]))
    return Layout(rows=rows, columns=columns, group=group, **fields), draw(st.integers(0, 2**32))


def matrix(layout: Layout, seed: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any] | None]:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(-2, 2, (layout.rows, layout.groups))
    minima = rng.uniform(-2, 2, scales.shape) if layout.zeros else None
    return random_integers(rng, layout), scales, minima


# --- there and back ---------------------------------------------------------------------------------


@given(cases())
@settings(max_examples=150, deadline=None)
def test_what_is_packed_comes_back(case: tuple[Layout, int]) -> None:
    layout, seed = case
    q, scales, minima = matrix(layout, seed)
    parts = pack(layout, q, scales, minima)
    assert parts.keys() == layout.shapes.keys()
    names = {"U8": np.uint8, "U64": np.uint64, "F16": np.float16}
    for part, (dtype, shape) in layout.shapes.items():
        assert parts[part].dtype == names[dtype]
        if shape is not None:
            assert parts[part].shape == shape
    if layout.kind == "mask":
        assert np.unpackbits(parts["mask"].view(np.uint8)).sum() == np.count_nonzero(q)
    back, scales_back, minima_back = unpack(layout, parts)
    np.testing.assert_array_equal(back, q)
    half = scales.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(scales_back, half)
    weights = q * np.repeat(half, layout.group or layout.columns, axis=1)[:, : layout.columns]
    if minima is not None:
        low = minima.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(minima_back, low)
        weights = weights + np.repeat(low, layout.group or layout.columns, axis=1)[:, : layout.columns]
    np.testing.assert_allclose(dequantize(layout, parts), weights, rtol=1e-6, atol=1e-6)
    assert layout.keep == 0 or fits(layout, q)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows, columns, group", [(16, 32, 32), (19, 170, 64), (1, 1, 0)])
def test_the_bytes_say_what_the_format_says(name: str, rows: int, columns: int, group: int) -> None:
    layout = Layout(rows=rows, columns=columns, group=group, **LAYOUTS[name])
    q, scales, minima = matrix(layout, 3)
    parts = pack(layout, q, scales, minima)
    np.testing.assert_array_equal(read_plainly(layout, parts), q)
    for part, written in (("scales", scales), ("minima", minima)):
        if written is not None:  # [row block][group][row of the block]
            for row, group_ in product(range(rows), range(layout.groups)):
                assert parts[part][row // 16, group_, row % 16] == np.float16(written[row, group_])


@pytest.mark.parametrize("name", [name for name, fields in LAYOUTS.items() if fields["kind"] == "mask"])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_masks_of_any_density(name: str, density: float) -> None:
    layout = Layout(rows=20, columns=70, group=32, **LAYOUTS[name])
    rng = np.random.default_rng(0)
    q = rng.choice([-7, 3, 7], (20, 70)) * (rng.random((20, 70)) < density)
    parts = pack(layout, q, np.ones((20, layout.groups)))
    np.testing.assert_array_equal(unpack(layout, parts)[0], q)
    np.testing.assert_array_equal(read_plainly(layout, parts), q)


# --- the pattern ------------------------------------------------------------------------------------


def test_window_starts() -> None:
    assert window_starts(8, 8) == [0, 0, 1, 3, 5, 7, 8, 8]
    assert window_starts(4, 4) == [0, 4, 8, 12]
    for keep, offset_bits in product(KEEPS, (2, 3, 4)):
        window = 1 << offset_bits
        starts = window_starts(keep, window)
        assert starts == starts_of(keep, window)
        assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] <= 16 - window
        assert {c for s in starts for c in range(s, s + window)} == set(range(16))


def places(columns: list[int], starts: list[int], window: int) -> bool:
    """Whether there is a slot for each column, in order: every way is tried."""
    if not columns or not starts:
        return not columns
    here = starts[0] <= columns[0] < starts[0] + window and places(columns[1:], starts[1:], window)
    return here or places(columns, starts[1:], window)


@given(
    st.sampled_from(sorted(name for name, fields in LAYOUTS.items() if "keep" in fields)),
    st.lists(st.lists(st.booleans(), min_size=16, max_size=16), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_it_fits_where_any_way_fits(name: str, mask: list[list[bool]]) -> None:
    layout = Layout(rows=1, columns=16 * len(mask), group=0, **LAYOUTS[name])
    q = np.array(mask, int).reshape(1, -1)
    possible = all(
        places(np.flatnonzero(block).tolist(), starts_of(layout.keep, layout.window), layout.window)
        for block in mask
    )
    assert fits(layout, q) == possible
    if possible:
        np.testing.assert_array_equal(unpack(layout, pack(layout, q, np.ones((1, 1))))[0], q)
    else:
        with pytest.raises(PatternError, match=r"row 0, block \d+ "):
            pack(layout, q, np.ones((1, 1)))


def test_two_of_four_is_a_band() -> None:
    pairs = list(combinations(range(4), 2))
    q = np.zeros((len(pairs) ** 4, 4, 4), int)
    for row, choice in enumerate(product(pairs, repeat=4)):
        for quad, columns in enumerate(choice):
            q[row, quad, list(columns)] = 1
    assert fits(Layout("banded", len(q), 16, 6, 0, keep=8, offset_bits=2), q.reshape(-1, 16))


def test_a_misfit_is_named() -> None:
    layout = Layout("banded", 40, 64, 5, 32, keep=4, offset_bits=3)
    q = np.zeros((40, 64), int)
    q[33, 48:53] = 1
    with pytest.raises(PatternError, match="row 33, block 3 of 16 columns") as caught:
        pack(layout, q, np.ones((40, 2)))
    assert caught.value.saw == "non-zeros in columns [0, 1, 2, 3, 4] of it"
    assert caught.value.expected == "4 of 16, each in a window of 8"


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "sparse"},
        {"bits": 3},
        {"bits": 5},
        {"kind": "mask", "bits": 5},
        {"keep": 8},
        {"offset_bits": 3},
        {"group": 48},
        {"group": -32},
        {"group": 2**31},
        {"rows": 0},
        {"rows": 2**31},
        {"columns": -1},
        {"columns": 2**31},
        {"bits": 8, "zeros": True},
        {"kind": "mask", "zeros": True},
        {"kind": "banded", "bits": 5, "keep": 5, "offset_bits": 3},
        {"kind": "banded", "bits": 5, "keep": 16, "offset_bits": 3},
        {"kind": "banded", "bits": 4, "keep": 8, "offset_bits": 3},
        {"kind": "banded", "bits": 7, "keep": 8, "offset_bits": 1},
        {"kind": "planes", "bits": 4, "keep": 8, "offset_bits": 3},
        {"kind": "planes", "bits": 8, "keep": 8, "offset_bits": 2},
    ],
)
def test_there_is_no_such_layout(changes: dict[str, Any]) -> None:
    sound: dict[str, Any] = {"kind": "dense", "rows": 16, "columns": 64, "bits": 4, "group": 32}
    Layout(**sound)
    with pytest.raises(FormatError, match="no such packed layout") as caught:
        Layout(**sound | changes)
    assert all(f"{key}={value!r}" in str(caught.value) for key, value in changes.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_integers_beyond_the_bits_are_refused(name: str) -> None:
    layout = Layout(rows=2, columns=16, group=0, **LAYOUTS[name])
    half = 1 << layout.bits - 1
    low, high = (0, 15) if layout.zeros else (max(-half, -127), half - 1)
    ones = np.ones((2, 1))
    for value in (low, high):
        q = np.zeros((2, 16), int)
        q[1, 7] = value
        assert unpack(layout, pack(layout, q, ones, ones))[0][1, 7] == value
    for value in (low - 1, high + 1):
        q[1, 7] = value
        with pytest.raises(FormatError, match="bits") as caught:
            pack(layout, q, ones, ones)
        assert caught.value.expected == f"{low} .. {high}"


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 65520.0])
@pytest.mark.parametrize("part", ["scales", "minima"])
def test_scales_that_are_no_numbers_in_float16_are_refused(scale: float, part: str) -> None:
    layout = Layout("dense", 3, 64, 4, 32, zeros=True)
    both = {"scales": np.ones((3, 2)), "minima": np.ones((3, 2))}
    both[part][2, 1] = scale
    with pytest.raises(FormatError, match="float16"):
        pack(layout, np.zeros((3, 64), int), both["scales"], both["minima"])


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    layout = Layout("dense", 3, 64, 4, 32)
    q, scales = np.zeros((3, 64), int), np.ones((3, 2))
    pack(layout, q, scales)
    for other_q, other_scales in ((q[:2], scales), (q, scales[:, :1]), (q.T, scales)):
        with pytest.raises(FormatError, match="fit the layout"):
            pack(layout, other_q, other_scales)
    with pytest.raises(FormatError, match="minima"):
        pack(Layout("dense", 3, 64, 4, 32, zeros=True), q, scales)
