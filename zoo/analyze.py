"""What is in a model's files: sparsity and bits per weight, tensor by tensor.

Reads any safetensors file or folder (dense, compressed-tensors, or our own model folder with a
`compression.json`), any GGUF file and the sparse runner's packed file. One piece of one tensor is in
memory at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from zoo.compressed_tensors import PARTS, compressed_names, open_matrix, stored_bits
from zoo.entry import Layer, Record
from zoo.errors import FormatError, UsageError
from zoo.formats import TensorInfo, check_gguf, check_safetensors, check_safetensors_header, weight_files
from zoo.progress import track
from zoo.runner.format import BLOCK, ROWS, Layout, dequantize
from zoo.runner.packed import FILE, Packed

CHUNK_BYTES = 16 << 20
SCALE_BITS = 16
_DECODER_LAYER = re.compile(r"(^|\.)(layers|blocks|h|blk)\.\d+\.")
# Floating-point types, in which all bits but the sign are clear of a zero, as unsigned integers.
_FLOATS = {"F8_E4M3": "u1", "F8_E5M2": "u1", "F16": "<u2", "BF16": "<u2", "F32": "<u4", "F64": "<u8"}

Format = Literal["safetensors", "compressed-tensors", "gguf", "packed"]
Bytes = NDArray[np.uint8]


class TensorAnalysis(Record):
    """One weight tensor (for compressed-tensors: the matrix it stands for)."""

    name: str
    shape: list[int]
    dtype: str  # as stored: F16, Q4_K, "int4 packed" ...
    weights: int  # elements as stored: of integers that pack several weights, those integers
    bytes: int  # with its scales and zero points where they are tensors of their own
    bits_per_weight: float
    smallest_bits_per_weight: float  # of the smallest exact encoding, see `smallest_bits`
    sparsity: float | None  # fraction exactly zero; None if this type cannot be read
    linear: bool  # a matrix of a decoder layer: counts for the sparsity of the whole


class Analysis(Record):
    """A model's files as a whole. `tensors` in the order of their names."""

    path: str
    format: Format
    weights: int
    bytes: int  # of the files
    # zeros / weights over the decoder's linear layers; None if there are none, or of one it is not known
    sparsity: float | None
    bits_per_weight: float  # stored tensor bits / weights
    smallest_bits_per_weight: float
    compression_ratio: float  # 16 / smallest_bits_per_weight
    tensors: list[TensorAnalysis]


def smallest_bits(layer: Layer) -> float:
    """Bits per weight of the smallest encoding that stores `layer` exactly.

    The least of, with b = `layer.bits`, s = `layer.sparsity` and for a pattern of k in g

        dense          b
        bitmask        b (1 - s) + 1
        pattern        (k / g) b + ceil(log2 C(g, k)) / g      if at most k of g are kept
        banded         (k / g) (b + log2 window)               if there is a window besides

    plus, for quantized weights, one 16-bit scale per group (per row without a group) and, when
    asymmetric, one zero point with it, of b bits if an integer and of 16 otherwise. A pattern stores
    k values in every group even where some are zero, so its cost does not fall with s as the
    bitmask's does.
    """
    candidates = [layer.bits, layer.bits * (1 - layer.sparsity) + 1]
    if layer.pattern is not None and (found := re.fullmatch(r"(\d+):(\d+)", layer.pattern)):
        keep, group = int(found[1]), int(found[2])
        density = keep / group
        if 1 - layer.sparsity <= density + 1e-9:
            candidates.append(layer.bits * density + math.ceil(math.log2(math.comb(group, keep))) / group)
            if layer.window:
                candidates.append(density * (layer.bits + math.log2(layer.window)))
    grid = 0.0
    if layer.bits < 16:
        zero_point_bits = 0.0
        if layer.symmetric is False:
            zero_point_bits = 16.0 if layer.zero_point == "float16" else layer.bits
        grid = (SCALE_BITS + zero_point_bits) / (layer.group or layer.columns)
    return min(candidates) + grid


def analyze(path: Path) -> Analysis:
    """Measure a safetensors, packed or GGUF file, or a model folder.

    Raises UsageError for a path that is neither and FormatError for files that are not sound.
    """
    files = _files(path)
    kind: Format
    if files[0].suffix == ".gguf":
        kind, tensors = "gguf", _analyze_gguf(files[0])
    elif is_packed(files[0]):
        kind, tensors = "packed", _analyze_packed(files[0])
    else:
        kind, tensors = _analyze_safetensors(path, files)
    if not tensors:
        raise FormatError(f"{path} holds no weights", saw="no floating-point or quantized tensors")
    tensors.sort(key=lambda tensor: _natural(tensor.name))
    weights = sum(t.weights for t in tensors)
    linear = [t for t in tensors if t.linear]
    known = linear and all(t.sparsity is not None for t in linear)
    smallest = sum(t.smallest_bits_per_weight * t.weights for t in tensors) / weights
    return Analysis(
        path=str(path),
        format=kind,
        weights=weights,
        bytes=sum(file.stat().st_size for file in files),
        sparsity=(
            sum((t.sparsity or 0.0) * t.weights for t in linear) / sum(t.weights for t in linear)
            if known
            else None
        ),
        bits_per_weight=8 * sum(t.bytes for t in tensors) / weights,
        smallest_bits_per_weight=smallest,
        compression_ratio=16 / smallest,
        tensors=tensors,
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".gguf", ".safetensors"):
            raise UsageError(f"{path} is neither .gguf nor .safetensors", try_="name a model file or folder")
        return [path]
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}", try_="check the path")
    found = weight_files(path)
    if not found and (path / FILE).is_file():
        return [path / FILE]
    if not found and len(found := sorted(path.glob("*.gguf"))) > 1:
        names = ", ".join(p.name for p in found)
        raise UsageError(f"{path} holds several GGUF files", saw=names, try_=f"zoo analyze {found[0]}")
    if not found:
        raise UsageError(f"{path} holds no *.safetensors and no *.gguf", try_="name a model file or folder")
    return found


def is_packed(path: Path) -> bool:
    """Whether a safetensors file is one of the sparse runner's."""
    return check_safetensors_header(path)[1].get("format") == "zoo-packed"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and min(shape) > 1 and _DECODER_LAYER.search(name) is not None


def _tensor(
    name: str, shape: Sequence[int], dtype: str, size: int, zeros: int | None, layer: Layer | None = None
) -> TensorAnalysis:
    weights = math.prod(shape)
    bits = 8 * size / weights
    sparsity = None if zeros is None else zeros / weights
    if layer is not None:
        smallest = smallest_bits(layer)
    elif dtype in _FLOATS and sparsity is not None:
        smallest = min(bits, bits * (1 - sparsity) + 1)
    else:
        smallest = bits
    return TensorAnalysis(
        name=name,
        shape=list(shape),
        dtype=dtype,
        weights=weights,
        bytes=size,
        bits_per_weight=bits,
        smallest_bits_per_weight=smallest,
        sparsity=sparsity,
        linear=_is_linear(name, shape),
    )


def _map(path: Path) -> Bytes:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _pieces(data: Bytes, tensor: TensorInfo, step: int) -> Iterator[Bytes]:
    """The tensor's bytes, about CHUNK_BYTES at a time, in multiples of `step`."""
    size = max(CHUNK_BYTES // step, 1) * step
    for start in range(tensor.offset, tensor.offset + tensor.size, size):
        yield data[start : min(start + size, tensor.offset + tensor.size)]


def _zero_floats(data: Bytes, tensor: TensorInfo) -> int:
    """How many values are +0 or -0: all bits but the sign are clear."""
    dtype = np.dtype(_FLOATS[tensor.dtype])
    no_sign = dtype.type(2 ** (8 * dtype.itemsize - 1) - 1)
    return sum(
        piece.size // dtype.itemsize - int(np.count_nonzero(piece.view(dtype) & no_sign))
        for piece in _pieces(data, tensor, dtype.itemsize)
    )


# GGUF


def _analyze_gguf(path: Path) -> list[TensorAnalysis]:
    tensors, data = check_gguf(path), _map(path)
    return [
        _tensor(t.name, t.shape, t.dtype, t.size, _zero_gguf(data, t))
        for t in track(tensors, f"reading {path.name}")
        if t.name.endswith((".weight", ".bias")) and not t.name.startswith("rope_")
    ]


def _zero_gguf(data: Bytes, tensor: TensorInfo) -> int | None:
    if tensor.dtype in _FLOATS:
        return _zero_floats(data, tensor)
    kind = gguf.GGMLQuantizationType[tensor.dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = tensor.shape[-1] // block * block_bytes
    zeros = 0
    try:
        for piece in _pieces(data, tensor, row_bytes):
            values = gguf.dequantize(piece.reshape(-1, row_bytes), kind)
            zeros += values.size - int(np.count_nonzero(values))
    except NotImplementedError:
        return None
    return zeros


# safetensors


def _analyze_safetensors(path: Path, files: list[Path]) -> tuple[Format, list[TensorAnalysis]]:
    where = {tensor.name: (file, tensor) for file in files for tensor in check_safetensors(file)}
    folder = path if path.is_dir() else path.parent
    layers = _layers(folder) if path.is_dir() else {}
    maps = {file: _map(file) for file in files}
    compressed = compressed_names(where)
    widths = stored_bits(folder) if compressed else set()
    tensors = []
    for name, (file, tensor) in track(where.items(), f"reading {path.name}"):
        base = name.removesuffix("_packed")
        if base in compressed:
            tensors.append(_compressed_tensor(base, where, widths))
        elif tensor.size and not any(name.removesuffix(part) in compressed for part in PARTS):
            zeros = _zero_floats(maps[file], tensor) if tensor.dtype in _FLOATS else None
            module = name.rpartition(".")[0]
            layer = layers.get(module) if name.endswith(".weight") else None
            tensors.append(_tensor(name, tensor.shape, tensor.dtype, tensor.size, zeros, layer))
    return ("compressed-tensors" if compressed else "safetensors"), tensors


def _layers(folder: Path) -> dict[str, Layer]:
    """The layers of `compression.json`, by module name; none where there is no such file."""
    path = folder / "compression.json"
    if not path.is_file():
        return {}
    try:
        layers = [Layer.model_validate(entry) for entry in json.loads(path.read_bytes())["layers"]]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise FormatError(
            f"{path} does not describe layers", saw=str(error).splitlines()[0], expected='{"layers": [...]}'
        ) from error
    return {layer.name: layer for layer in layers}


def _compressed_tensor(
    name: str, where: dict[str, tuple[Path, TensorInfo]], widths: set[int]
) -> TensorAnalysis:
    """One compressed-tensors matrix. A weight is zero where its value equals its group's zero point."""
    matrix = open_matrix(name, where, widths)
    zeros = 0
    step = max(CHUNK_BYTES // (16 * matrix.columns), 1)
    for start in range(0, matrix.rows, step):
        values = matrix.integers(start, start + step)
        zero = matrix.zero_points(start, start + step)
        zeros += int(np.count_nonzero(values == (0 if zero is None else matrix.by_column(zero))))
    parts = (part for part in PARTS if part != "_shape" and name + part in where)
    size = sum(where[name + part][1].size for part in parts)
    stored = f"int{matrix.bits}{' packed' if matrix.packed else ''}"
    return _tensor(name, (matrix.rows, matrix.columns), stored, size, zeros)


# the packed format of the sparse runner


def _analyze_packed(path: Path) -> list[TensorAnalysis]:
    packed = Packed(path)
    tensors = []
    for name, layout in track(packed.layouts.items(), f"reading {path.name}"):
        size = sum(packed.tensors[f"{name}.{part}"].size for part in layout.shapes)
        found = _tensor(
            name, (layout.rows, layout.columns), layout_name(layout), size, _packed_zeros(packed, name)
        )
        tensors.append(found.model_copy(update={"linear": name.startswith("layers.")}))
    for tensor in packed.tensors.values():
        if tensor.dtype == "F32" and tensor.size:
            zeros = tensor.size // 4 - int(np.count_nonzero(packed.read(tensor.name)))
            tensors.append(_tensor(tensor.name, tensor.shape, "F32", tensor.size, zeros))
    return tensors


def layout_name(layout: Layout) -> str:
    """In few words: "int4", "int5 8:16 window 8", "int8 mask"."""
    words = f"int{layout.bits}"
    if layout.kind == "mask":
        return f"{words} mask"
    return f"{words} {layout.keep}:{BLOCK} window {layout.window}" if layout.keep else words


def _packed_zeros(packed: Packed, name: str) -> int:
    layout, parts = packed.layouts[name], packed.parts(name)
    weights = layout.rows * layout.columns
    if layout.kind == "mask":
        kept = int(np.unpackbits(parts["mask"].view(np.uint8)).sum())
        return max(weights - kept, 0)
    step = max(CHUNK_BYTES // (16 * ROWS * layout.columns), 1)
    by_block = {part: array.reshape(layout.row_blocks, -1) for part, array in parts.items()}
    for start in range(0, layout.row_blocks, step):
        rows = min(layout.rows - start * ROWS, step * ROWS)
        piece = {part: array[start : start + step].ravel() for part, array in by_block.items()}
        weights -= int(np.count_nonzero(dequantize(replace(layout, rows=rows), piece)))
    return weights
