"""The packed layouts of one weight matrix: from integers on a grid to the bytes the kernels read, and back.

A weight is `scale * (q - zero)`, with q an integer of `bits` bits. Rows come in blocks of 16 and columns
in *pairs* of 32 (two blocks of 16 columns); both are padded with zero weights. Within a row block, a
64-byte vector holds 16 rows x 4 bytes, so that each 32-bit lane belongs to one row on any instruction
set. `Layout.kind` says which four weights of a row share a lane:

    dense     four neighbouring columns; 4-bit weights put columns 4 further in the high nibbles, and of four
              vectors of 6-bit weights the last lies in the two highest bits of the others
    banded    four kept weights in column order, one byte each: weight and offset into a window of columns
    planes    the same, offsets and weights in vectors of their own (fewer bytes, or 8-bit weights)
    mask      four neighbouring columns, of which a bit mask says which are stored (unstructured)

In the banded kinds every block of 16 columns of a row keeps exactly `keep` weights; the k-th lies in the
window of 2**offset_bits columns that begins at `window_starts(keep, window)[k]`. A free choice of columns
is a window of 16. Blocks with fewer non-zeros are filled up with zero weights.

This file is the definition; the C++ kernels are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError, PatternError

BLOCK = 16  # columns of which `keep` are kept
PAIR = 32  # columns of one step of a kernel; activations are quantized in these groups
ROWS = 16  # rows interleaved in one vector
LANE = 4  # weights of one row in a vector
KEEPS = (4, 6, 8, 10, 12)
SHIFTS = np.array([0, 2, 4], np.uint8).reshape(3, 1, 1)  # where two bits of the fourth vector belong

Kind = Literal["dense", "banded", "planes", "mask"]
Integers = NDArray[np.int16]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How a matrix is packed. `group`: columns that share a scale, a multiple of 32, or 0 for whole rows."""

    kind: Kind
    rows: int
    columns: int
    bits: int
    group: int
    keep: int = 0  # of 16, banded kinds only
    offset_bits: int = 0  # banded kinds only
    zeros: bool = False  # a minimum per group besides the scale; dense only

    def __post_init__(self) -> None:
        allowed = {
            "dense": self.bits in (4, 6, 8) and self.keep == self.offset_bits == 0,
            "banded": self.bits + self.offset_bits == 8 and self.offset_bits in (2, 3, 4),
            "planes": (self.bits, self.offset_bits) in ((4, 2), (8, 4)),
            "mask": self.bits in (4, 8) and self.keep == self.offset_bits == 0,
        }.get(self.kind, False)
        if self.kind in ("banded", "planes"):
            allowed = allowed and self.keep in KEEPS
        if self.zeros:
            allowed = allowed and self.kind == "dense" and self.bits == 4
        sizes = 0 < self.rows < 2**31 and 0 < self.columns < 2**31 and 0 <= self.group < 2**31
        if not allowed or not sizes or self.group % PAIR:
            raise FormatError("there is no such packed layout", saw=str(self))

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def pairs(self) -> int:
        """Column pairs, padded to whole vectors of every plane."""
        pairs = -(-self.columns // PAIR)
        return -(-pairs // self.pairs_per_chunk) * self.pairs_per_chunk

    @property
    def pairs_per_chunk(self) -> int:
        """Pairs whose offsets and weights fill whole vectors of the planes."""
        if self.kind != "planes":
            return 1
        per_offset_vector = 8 // self.offset_bits
        return next(n for n in (1, 2, 4) if n * self.keep // 2 % per_offset_vector == 0)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group) if self.group else 1

    @property
    def window(self) -> int:
        return 1 << self.offset_bits

    @property
    def offset(self) -> int:
        """Added to a signed weight to store it without a sign (8-bit dense and masks keep the sign)."""
        return 0 if self.zeros else 1 << (self.bits - 1)

    @property
    def values_size(self) -> int | None:
        """Bytes of the values; None for masks, where it depends on their bits."""
        quads = self.row_blocks * self.pairs
        if self.kind == "dense":
            return quads * 64 * self.bits
        if self.kind == "banded":
            return quads * self.keep // 2 * 64
        if self.kind == "planes":
            return quads * self.keep * 32 * (self.bits + self.offset_bits) // 8
        return None

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """safetensors dtype and shape of each part; None where the shape depends on the mask's bits."""
        scales = (self.row_blocks, self.groups, ROWS)
        size = self.values_size
        parts: dict[str, tuple[str, tuple[int, ...] | None]] = {
            "values": ("U8", None if size is None else (size,)),
            "scales": ("F16", scales),
        }
        if self.zeros:
            parts["minima"] = ("F16", scales)
        if self.kind == "mask":
            parts["mask"] = ("U64", (self.row_blocks, self.pairs * PAIR // LANE))
        return parts


def window_starts(keep: int, window: int) -> list[int]:
    """First column of the window of the k-th kept weight of a block of 16, k = 0 .. keep-1.

    s_k = clip(round(16 k / keep - (window - 16 / keep) / 2), 0, 16 - window)
    """
    spread = BLOCK / keep
    centred = (round(k * spread - (window - spread) / 2) for k in range(keep))
    return [min(max(start, 0), BLOCK - window) for start in centred]


def pack(
    layout: Layout,
    q: NDArray[np.integer],
    scales: NDArray[np.floating],
    minima: NDArray[np.floating] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Pack the matrix `scale * q` (or `scale * q + minimum`) into the parts of `layout.shapes`.

    q (rows, columns): signed integers, zero where pruned; with minima, 0 .. 15. scales, minima
    (rows, groups). Raises PatternError where a row keeps more than the layout can hold, and FormatError
    for integers outside of its bits or scales that are not finite in float16.
    """
    q = np.asarray(q)
    if q.shape != (layout.rows, layout.columns) or scales.shape != (layout.rows, layout.groups):
        raise FormatError(
            "weights or scales do not fit the layout", saw=f"{q.shape}, {scales.shape}, {layout}"
        )
    low, high = (0, 15) if layout.zeros else (-(1 << (layout.bits - 1)), (1 << (layout.bits - 1)) - 1)
    low = max(low, -127)  # so that |q| has 8 bits too
    if q.size and (q.min() < low or q.max() > high):
        raise FormatError(
            "weights do not fit the layout's bits", saw=f"{q.min()} .. {q.max()}", expected=f"{low} .. {high}"
        )
    padded = np.zeros((layout.row_blocks * ROWS, layout.pairs * PAIR), np.int16)
    padded[: layout.rows, : layout.columns] = q
    parts: dict[str, NDArray[np.generic]] = {"scales": _interleave_scales(layout, scales)}
    if layout.zeros:
        if minima is None:
            raise FormatError("a layout with zeros needs minima")
        parts["minima"] = _interleave_scales(layout, minima)
    if layout.kind == "dense":
        parts["values"] = _pack_dense(layout, padded)
    elif layout.kind == "mask":
        parts["values"], parts["mask"] = _pack_mask(layout, padded)
    else:
        weights, offsets = _slots(layout, padded)
        if layout.kind == "banded":
            parts["values"] = _interleave((weights << layout.offset_bits | offsets).astype(np.uint8)).ravel()
        else:
            parts["values"] = _pack_planes(layout, weights, offsets)
    return parts


def unpack(
    layout: Layout, parts: dict[str, NDArray[np.generic]]
) -> tuple[Integers, NDArray[np.float32], NDArray[np.float32] | None]:
    """Inverse of `pack`: q (rows, columns), scales and minima (rows, groups)."""
    values = np.ascontiguousarray(parts["values"]).view(np.uint8)
    rows, columns = layout.row_blocks * ROWS, layout.pairs * PAIR
    if layout.kind == "dense":
        q = _unpack_dense(layout, values)
    elif layout.kind == "mask":
        q = _unpack_mask(layout, values, np.ascontiguousarray(parts["mask"]).view(np.uint64))
    else:
        if layout.kind == "banded":
            slots = _deinterleave(values, layout)
            weights = slots >> np.uint8(layout.offset_bits)
            offsets = slots & np.uint8(layout.window - 1)
        else:
            weights, offsets = _unpack_planes(layout, values)
        blocks = columns // BLOCK
        starts = np.array(window_starts(layout.keep, layout.window), np.int64)
        where = offsets.reshape(rows, blocks, layout.keep).astype(np.int64) + starts
        q = np.zeros((rows, blocks, BLOCK), np.int16)
        signed = weights.reshape(rows, blocks, layout.keep).astype(np.int16) - np.int16(layout.offset)
        for k in range(
            layout.keep
        ):  # empty slots hold zero, and may point to a column that another slot fills
            at = where[:, :, k : k + 1]
            np.put_along_axis(q, at, np.take_along_axis(q, at, 2) + signed[:, :, k : k + 1], 2)
        q = q.reshape(rows, columns)
    scales = _deinterleave_scales(layout, parts["scales"])
    minima = _deinterleave_scales(layout, parts["minima"]) if layout.zeros else None
    return q[: layout.rows, : layout.columns], scales, minima


def dequantize(layout: Layout, parts: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    """The matrix itself, float32 (rows, columns)."""
    q, scales, minima = unpack(layout, parts)
    group = layout.group or layout.columns
    weights = q * np.repeat(scales, group, axis=1)[:, : layout.columns]
    if minima is not None:
        weights += np.repeat(minima, group, axis=1)[:, : layout.columns]
    return weights.astype(np.float32)


def fits(layout: Layout, q: NDArray[np.integer]) -> bool:
    """Whether every block's non-zeros find a slot, without packing them."""
    try:
        _slots(layout, _padded(layout, q))
    except PatternError:
        return False
    return True


def _padded(layout: Layout, q: NDArray[np.integer]) -> Integers:
    padded = np.zeros((layout.row_blocks * ROWS, layout.pairs * PAIR), np.int16)
    padded[: layout.rows, : layout.columns] = q
    return padded


def _interleave(slots: NDArray[Any]) -> NDArray[Any]:
    """(rows, slots) -> (row blocks, slots / 4, 16, 4)."""
    rows, count = slots.shape
    return np.ascontiguousarray(slots.reshape(rows // ROWS, ROWS, count // LANE, LANE).transpose(0, 2, 1, 3))


def _deinterleave(values: Bytes, layout: Layout) -> Bytes:
    vectors = values.reshape(layout.row_blocks, -1, ROWS, LANE)
    return vectors.transpose(0, 2, 1, 3).reshape(layout.row_blocks * ROWS, -1)


def _interleave_scales(layout: Layout, scales: NDArray[np.floating]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise FormatError("a scale is not a finite float16", saw=f"{scales.min()} .. {scales.max()}")
    padded = np.zeros((layout.row_blocks * ROWS, layout.groups), np.float16)
    padded[: layout.rows] = half
    return np.ascontiguousarray(padded.reshape(layout.row_blocks, ROWS, layout.groups).transpose(0, 2, 1))


def _deinterleave_scales(layout: Layout, scales: NDArray[np.generic]) -> NDArray[np.float32]:
    by_row = np.asarray(scales, np.float16).reshape(layout.row_blocks, layout.groups, ROWS).transpose(0, 2, 1)
    return by_row.reshape(-1, layout.groups)[: layout.rows].astype(np.float32)


def _pack_dense(layout: Layout, q: Integers) -> Bytes:
    if layout.bits == 8:
        stored: Bytes = _interleave(q.astype(np.int8).view(np.uint8)).ravel()
        return stored
    vectors = _interleave((q + layout.offset).astype(np.uint8))
    if layout.bits == 6:
        fours = vectors.reshape(layout.row_blocks, -1, 4, ROWS, LANE)
        packed: Bytes = fours[:, :, :3] | (fours[:, :, 3:] >> SHIFTS & 3) << 6
    else:
        packed = vectors[:, 0::2] | vectors[:, 1::2] << 4
    return packed.ravel()


def _unpack_dense(layout: Layout, values: Bytes) -> Integers:
    if layout.bits == 8:
        return _deinterleave(values, layout).view(np.int8).astype(np.int16)
    if layout.bits == 6:
        threes = values.reshape(layout.row_blocks, -1, 3, ROWS, LANE)
        last = np.bitwise_or.reduce(threes >> 6 << SHIFTS, axis=2, keepdims=True)
        vectors = np.concatenate([threes & 63, last], axis=2)
        return _deinterleave(vectors, layout).astype(np.int16) - layout.offset
    packed = values.reshape(layout.row_blocks, -1, ROWS, LANE)
    vectors = np.stack([packed & 15, packed >> 4], axis=2)
    return _deinterleave(vectors, layout).astype(np.int16) - layout.offset


def _slots(layout: Layout, q: Integers) -> tuple[Bytes, Bytes]:
    """Weights (stored without a sign) and offsets of every slot: (rows, blocks * keep) each.

    Windows are in order and overlap, so giving each non-zero, in column order, the first slot that is
    left and whose window reaches it, finds a place for all wherever there is one.
    """
    rows, columns = q.shape
    starts = np.array(window_starts(layout.keep, layout.window), np.int16)
    blocks = q.reshape(-1, BLOCK)
    weights = np.full((len(blocks), layout.keep), layout.offset, np.uint8)
    offsets = np.zeros((len(blocks), layout.keep), np.uint8)
    # The first slot whose window ends beyond the column: earlier ones cannot reach it.
    first = np.array(
        [np.searchsorted(starts + layout.window, c, side="right") for c in range(BLOCK)], np.int16
    )
    used = np.zeros(len(blocks), np.int16)  # slots given so far
    for column in range(BLOCK):
        here = np.flatnonzero(blocks[:, column])
        slot = np.maximum(used[here], first[column])
        misfit = (slot >= layout.keep) | (starts[np.minimum(slot, layout.keep - 1)] > column)
        if misfit.any():
            row, block = divmod(int(here[misfit.argmax()]), columns // BLOCK)
            raise PatternError(
                f"row {row}, block {block} of {BLOCK} columns does not follow the pattern",
                saw=f"non-zeros in columns {np.flatnonzero(blocks[here[misfit.argmax()]]).tolist()} of it",
                expected=f"{layout.keep} of 16, each in a window of {layout.window}",
            )
        weights[here, slot] = (blocks[here, column] + layout.offset).astype(np.uint8)
        offsets[here, slot] = (column - starts[slot]).astype(np.uint8)
        used[here] = slot + 1
    return weights.reshape(rows, -1), offsets.reshape(rows, -1)


def _pack_planes(layout: Layout, weights: Bytes, offsets: Bytes) -> Bytes:
    """Chunk by chunk, all vectors of offsets, then all vectors of weights."""
    chunks = layout.pairs // layout.pairs_per_chunk
    parts = [
        _merge(_interleave(plane), bits).reshape(layout.row_blocks, chunks, -1)
        for plane, bits in ((offsets, layout.offset_bits), (weights, layout.bits))
    ]
    return np.concatenate(parts, axis=2).ravel()


def _unpack_planes(layout: Layout, values: Bytes) -> tuple[Bytes, Bytes]:
    chunks = layout.pairs // layout.pairs_per_chunk
    quads = layout.pairs_per_chunk * layout.keep // 2
    offset_bytes = quads * 64 * layout.offset_bits // 8
    data = values.reshape(layout.row_blocks, chunks, -1)
    offsets = _split(np.ascontiguousarray(data[:, :, :offset_bytes]), layout.offset_bits, layout)
    weights = _split(np.ascontiguousarray(data[:, :, offset_bytes:]), layout.bits, layout)
    return weights, offsets


def _merge(vectors: Bytes, bits: int) -> Bytes:
    """Put 8 / bits neighbouring vectors into one, the first in the lowest bits."""
    together = 8 // bits
    merged = vectors[:, 0::together].copy()
    for i in range(1, together):
        merged |= vectors[:, i::together] << (i * bits)
    return merged


def _split(vectors: Bytes, bits: int, layout: Layout) -> Bytes:
    together = 8 // bits
    packed = vectors.reshape(layout.row_blocks, -1, ROWS, LANE)
    parts = [packed >> (i * bits) & ((1 << bits) - 1) for i in range(together)]
    return _deinterleave(np.stack(parts, axis=2), layout)


def _pack_mask(layout: Layout, q: Integers) -> tuple[Bytes, NDArray[np.uint64]]:
    """Values in vector order (4-bit ones two to a byte, each row block's pair from a byte of its own)."""
    vectors = _interleave(q)
    kept = vectors != 0
    bits = np.packbits(kept.reshape(layout.row_blocks, -1, 64), axis=2, bitorder="little")
    mask: NDArray[np.uint64] = bits.view(np.uint64)[:, :, 0]
    if layout.bits == 8:
        return vectors[kept].astype(np.int8).view(np.uint8), mask
    counts = kept.reshape(-1, PAIR // LANE * 64).sum(axis=1)
    starts = np.concatenate([[0], np.cumsum((counts + 1) // 2 * 2)])
    nibbles = np.zeros(int(starts[-1]), np.uint8)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    nibbles[np.repeat(starts[:-1], counts) + inside] = (vectors[kept] + layout.offset).astype(np.uint8)
    both: Bytes = nibbles[0::2] | nibbles[1::2] << np.uint8(4)
    return both, mask


def _unpack_mask(layout: Layout, values: Bytes, mask: NDArray[np.uint64]) -> Integers:
    kept = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    flat = np.zeros(kept.size, np.int16)
    if layout.bits == 8:
        flat[kept] = values.view(np.int8)[: int(kept.sum())]
    else:
        nibbles = np.stack([values & 15, values >> 4], axis=1).ravel().astype(np.int16) - layout.offset
        counts = kept.reshape(-1, PAIR // LANE * 64).sum(axis=1)
        starts = np.concatenate([[0], np.cumsum((counts + 1) // 2 * 2)])
        inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        flat[kept] = nibbles[np.repeat(starts[:-1], counts) + inside]
    vectors = flat.reshape(layout.row_blocks, -1, ROWS, LANE)
    return vectors.transpose(0, 2, 1, 3).reshape(layout.row_blocks * ROWS, -1)
