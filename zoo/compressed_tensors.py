"""Reading a matrix in the compressed-tensors format, a few rows at a time and without torch.

A matrix is either `weight_packed` (integers of a few bits in int32 words, with a `weight_shape`) or an
int8 `weight`; beside it stand `weight_scale` and perhaps `weight_zero_point` and `weight_g_idx`:

    weight = weight_scale * (integer - weight_zero_point)

Source: https://github.com/vllm-project/compressed-tensors, formats `pack-quantized` and `int-quantized`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError
from zoo.formats import SAFETENSORS_BITS, TensorInfo

PARTS = ("_packed", "", "_scale", "_zero_point", "_g_idx", "_shape")  # after the name `<module>.weight`
Tensors = Mapping[str, tuple[Path, TensorInfo]]
Integers = NDArray[np.int16]


def compressed_names(tensors: Tensors) -> set[str]:
    """The matrices that are stored in this format, by their names as `<module>.weight`."""
    packed = {name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")}
    return packed | {
        n for n, (_, tensor) in tensors.items() if n.endswith(".weight") and tensor.dtype == "I8"
    }


def stored_bits(folder: Path) -> set[int]:
    """All widths of packed weights, from `config.json` (compressed-tensors keeps them nowhere else)."""
    path = folder / "config.json"
    try:
        quantization = json.loads(path.read_bytes())["quantization_config"]
        bits = {group["weights"]["num_bits"] for group in quantization["config_groups"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{folder} holds packed weights but no description of them",
            saw=f"{type(error).__name__}: {error}",
            expected="quantization_config with config_groups in config.json beside the weights",
        ) from error
    if not bits or any(type(width) is not int or not 1 <= width <= 8 for width in bits):
        raise FormatError(f"{path}: packed weights of an unknown width", expected="num_bits from 1 to 8")
    return bits


@dataclass(frozen=True)
class CompressedMatrix:
    """One matrix. Integers are signed, as are zero points: packed ones are stored with 2^(bits-1) added."""

    name: str
    rows: int
    columns: int
    bits: int
    packed: bool
    _stored: NDArray[Any]  # words or int8, mapped from the file
    _zero: Integers | None  # (1 or rows, groups)
    group_of: NDArray[np.int64] | None  # the group of each column, where it is not the next one in turn

    def integers(self, start: int, stop: int) -> Integers:
        """Rows start .. stop - 1, (rows, columns)."""
        part = self._stored[start:stop]
        if not self.packed:
            return part.astype(np.int16)
        words = np.ascontiguousarray(part).view(np.uint32)
        return _unpack(words, self.bits, self.columns).astype(np.int16) - (1 << self.bits - 1)

    def zero_points(self, start: int, stop: int) -> Integers | None:
        """Of the same rows, (rows, groups); None for a symmetric grid."""
        if self._zero is None:
            return None
        rows = np.broadcast_to(self._zero, (self.rows, self._zero.shape[1]))
        return np.asarray(rows[start:stop], np.int16)

    def by_column(self, grouped: NDArray[Any]) -> NDArray[Any]:
        """Values per group, (rows, groups), for every column: (rows, columns)."""
        if self.group_of is not None:
            return grouped[:, self.group_of]
        return np.repeat(grouped, self.columns // grouped.shape[1], axis=1)


def open_matrix(name: str, tensors: Tensors, widths: set[int]) -> CompressedMatrix:
    """The matrix `name`, its shapes checked against each other. Raises FormatError."""

    def fail(saw: str) -> FormatError:
        return FormatError(f"compressed-tensors layer {name} does not fit together", saw=saw)

    def read(suffix: str) -> NDArray[Any] | None:
        if (found := tensors.get(name + suffix)) is None:
            return None
        file, tensor = found
        if tensor.dtype not in ("I8", "I32", "I64"):
            raise fail(f"{tensor.dtype} in {name}{suffix}")
        if not tensor.size:
            raise fail(f"nothing in {name}{suffix}")
        raw = np.memmap(file, np.uint8, "r", tensor.offset, tensor.size)
        return np.frombuffer(raw, f"<i{SAFETENSORS_BITS[tensor.dtype] // 8}").reshape(tensor.shape)

    packed = name + "_packed" in tensors
    stored = read("_packed" if packed else "")
    shape = read("_shape") if packed else None
    if stored is None or stored.ndim != 2 or (packed and (shape is None or shape.size != 2)):
        raise fail("no matrix of words with a weight_shape")
    rows, columns = (int(n) for n in (stored.shape if shape is None else shape.ravel()))
    fitting = [bits for bits in widths if -(-columns * bits // 32) == stored.shape[1]] if packed else [8]
    if rows != len(stored) or columns < 1 or len(fitting) != 1:
        raise fail(f"{stored.shape} words for {rows} x {columns} weights of {sorted(widths)} bits")
    (bits,) = fitting
    zero = read("_zero_point")
    if zero is not None and (zero.ndim != 2 or zero.size == 0 or columns % zero.shape[1]):
        raise fail(f"zero points of shape {zero.shape}")
    if zero is not None and packed and zero.dtype == np.int32 and len(zero) == -(-rows * bits // 32):
        words = np.ascontiguousarray(zero.T).view(np.uint32)  # they are packed down the rows
        zero = _unpack(words, bits, rows).T.astype(np.int16) - (1 << bits - 1)
    if zero is not None and len(zero) not in (1, rows):
        raise fail(f"zero points of shape {zero.shape} for {rows} rows")
    if zero is not None and (zero.min() < -128 or zero.max() > 127):
        raise fail(f"zero points from {zero.min()} to {zero.max()}")
    group_of = read("_g_idx")
    if group_of is not None and group_of.max() < 0:
        group_of = None  # left empty
    if group_of is not None:
        scale = tensors.get(f"{name}_scale")
        groups = scale[1].shape[-1] if scale is not None and scale[1].shape else 0
        groups = groups if zero is None else min(groups or zero.shape[1], zero.shape[1])
        if group_of.shape != (columns,) or group_of.min() < 0 or group_of.max() >= groups:
            raise fail("a group index out of range")
    return CompressedMatrix(
        name,
        rows,
        columns,
        bits,
        packed,
        stored,
        None if zero is None else zero.astype(np.int16),
        None if group_of is None else group_of.astype(np.int64),
    )


def _unpack(words: NDArray[np.uint32], bits: int, columns: int) -> NDArray[np.uint8]:
    """Values of `bits` bits, packed back to back from the least significant bit of each row's words.

    words (rows, ceil(columns * bits / 32)) -> (rows, columns).
    """
    flat = words.view(np.uint8)
    if bits == 4:
        return np.stack([flat & 15, flat >> 4], axis=2).reshape(len(words), -1)[:, :columns]
    if bits == 8:
        return flat[:, :columns]
    every = np.unpackbits(flat, axis=1, bitorder="little", count=columns * bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    values: NDArray[np.uint8] = (every.reshape(len(words), columns, bits) * weights).sum(-1, dtype=np.uint8)
    return values
