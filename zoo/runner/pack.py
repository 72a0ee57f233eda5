"""`zoo pack`: a Hugging Face model folder becomes one packed file, matrix by matrix.

Weights that lie on a grid keep their integers: the packed file then says the same as the folder, but for
the rounding of float16. Others are rounded, and the report says which. Every matrix gets the layout with
which a token costs least.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.entry import Record
from zoo.errors import FormatError, PatternError, UsageError
from zoo.files import told_plainly
from zoo.progress import track
from zoo.runner.checkpoint import Checkpoint, Matrix
from zoo.runner.config import architecture_of, modules_of, text_of
from zoo.runner.format import BLOCK, KEEPS, ROWS, Kind, Layout, fits, pack
from zoo.runner.grid import Quantized, find, on_grid, rounded
from zoo.runner.packed import FILE, TOKENIZER, Architecture, packed_writer

CHUNK = 1 << 19  # weights converted at once
SAMPLE_ROWS = 8  # tell whether a matrix lies on a grid
EXACT = 2.0**-10  # of a group's largest weight: what float16 leaves of a weight
# An int8 grid of others may use -128, for which the packed format has -127.
CLIPPED = 1 / 126
# What a byte costs beside a byte of a banded layout, whose kernels read as fast as memory goes and do the
# fewest operations. A mask's kernel first has to expand the weights.
COST = {"banded": 1.0, "planes": 1.0, "dense": 1.02, "mask": 1.5}

Choice = Literal["auto", "dense", "banded", "planes", "mask"]
Source = Literal["recorded", "found", "rounded"]


class Settings(NamedTuple):
    """What may be chosen. `bits` and `group` are for weights on no grid, but for embeddings and head."""

    bits: int = 8
    group: int = 32
    head_bits: int | None = None  # None: their own grid, or int8
    layout: Choice = "auto"
    window: int | None = None


class PackedMatrix(Record):
    """One matrix of a packed file, and how well it says what the folder says."""

    name: str
    rows: int
    columns: int
    kind: Kind
    bits: int
    group: int | None  # columns that share a scale; None: whole rows
    minimum: bool
    keep: int | None  # of 16
    window: int | None
    size: int  # bytes
    bits_per_weight: float
    sparsity: float
    grid: Source  # the folder's own, found in its weights, or none, so that they were rounded
    exact: bool  # the same weights but for the rounding of float16
    max_error: float  # in units of the largest weight of a group
    error: float  # ||W - W'||^2 / ||W||^2


class PackReport(Record):
    """What `pack_folder` made."""

    path: str
    size: int  # bytes of the file
    weights: int
    bits_per_weight: float  # of all matrices, their scales, masks and padding included
    tokenizer: bool  # whether the folder had a tokenizer.json to put into the file
    matrices: list[PackedMatrix]


def pack_folder(folder: Path, out: Path | None = None, settings: Settings | None = None) -> PackReport:
    """Write the model in `folder` to the packed file `out` (by default beside its weights).

    At most one matrix is in memory, in 8 bits, but a temporary file beside `out` takes as much room as
    `out` itself. Raises SourceError, FormatError or NumericsError for a folder that cannot be packed, and
    leaves no file then.
    """
    settings = settings or Settings()
    out = folder / FILE if out is None else out
    checkpoint = Checkpoint(folder)
    architecture, biased = architecture_of(checkpoint.config)
    architecture = _really_tied(architecture, checkpoint)
    modules = modules_of(architecture)
    text = text_of(folder, checkpoint.config)
    vectors = list(_vectors(checkpoint, architecture, biased))
    tokenizer = folder / TOKENIZER
    with _scratch(out) as scratch:
        layouts, done = {}, []
        for name, shape in track(architecture.matrices.items(), "packing", len(architecture.matrices)):
            source = _source(checkpoint, architecture, modules[name], name, shape)
            layouts[name], report, parts = _pack_matrix(name, source, settings)
            done.append(report)
            scratch.put(name, parts)
            del parts
        if settings.layout != "auto" and all(matrix.kind != settings.layout for matrix in done):
            raise PatternError(
                f"no matrix of {folder} can be packed as {settings.layout} without loss",
                saw=", ".join(sorted({matrix.kind for matrix in done})),
                try_="zoo pack without --layout and --window",
            )
        with packed_writer(out, architecture, layouts, text) as writer:
            for name in layouts:
                writer.matrix(name, scratch.get(name))
            writer.vectors(vectors)
            if tokenizer.is_file():
                writer.tokenizer(tokenizer.read_bytes())
    weights = sum(matrix.rows * matrix.columns for matrix in done)
    return PackReport(
        path=str(out),
        size=out.stat().st_size,
        weights=weights,
        bits_per_weight=8 * sum(matrix.size for matrix in done) / weights,
        tokenizer=tokenizer.is_file(),
        matrices=done,
    )


def _really_tied(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """As transformers does: a head in the file that differs from the embeddings is not tied to them."""
    modules = modules_of(architecture)
    embed, head = (f"{modules[name][0]}.weight" for name in ("embed", "head"))
    if not architecture.tied or head not in checkpoint:
        return architecture
    if embed in checkpoint:
        shape = architecture.matrices["embed"]
        one, other = (checkpoint.matrix(name.removesuffix(".weight"), *shape) for name in (embed, head))
        if all(np.array_equal(one.weights(*rows), other.weights(*rows)) for rows in _chunks(*shape)):
            return architecture
    return architecture.model_copy(update={"tied": False})


def _source(
    checkpoint: Checkpoint,
    architecture: Architecture,
    module: tuple[str, int],
    name: str,
    shape: tuple[int, int],
) -> Matrix:
    where, first = module
    fused = architecture.family == "mpt" and name.rpartition(".")[2] in ("q", "k", "v")
    return checkpoint.matrix(where, *shape, first=first, of=3 * shape[0] if fused else None)


def _vectors(
    checkpoint: Checkpoint, architecture: Architecture, biased: frozenset[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Norms and biases by their names in the packed file.

    Raises FormatError for a bias in the folder that config.json does not speak of.
    """
    modules = modules_of(architecture)
    wanted = {
        f"{modules[norm][0]}.weight": (f"{norm}.weight", architecture.hidden) for norm in architecture.norms
    }
    for name, (rows, _) in architecture.matrices.items():
        if name.rpartition(".")[2] in biased:
            wanted[f"{modules[name][0]}.bias"] = (f"{name}.bias", rows)
    known = {module for module, _ in modules.values()}
    for tensor in checkpoint.tensors:
        if tensor.endswith(".bias") and tensor.removesuffix(".bias") in known and tensor not in wanted:
            raise FormatError(
                f"{checkpoint.folder} has a bias that its config.json does not speak of",
                saw=tensor,
                expected="attention_bias or mlp_bias: true; MPT and Mistral without biases",
            )
    for tensor, (name, length) in wanted.items():
        yield name, checkpoint.vector(tensor, length)


def _pack_matrix(
    name: str, source: Matrix, settings: Settings
) -> tuple[Layout, PackedMatrix, dict[str, NDArray[Any]]]:
    quantized, grid = _quantized(name, source, settings)
    for layout in _layouts(quantized, settings):
        try:
            parts, size = _parts(layout, quantized)
            break
        except PatternError:  # its columns do not find a window each
            continue
    else:
        raise AssertionError("dense fits all")
    stored = quantized if quantized.minimum is not None or not layout.zeros else _with_minimum(quantized)
    worst, off, norm, zeros = 0.0, 0.0, 0.0, 0
    for start, stop in _chunks(source.rows, source.columns):
        weights = source.weights(start, stop)
        piece = _rows(stored, start, stop)
        ours = piece.weights()
        zeros += ours.size - int(np.count_nonzero(ours))
        worst = max(worst, piece.error(weights))
        off += float(np.square(ours - weights, dtype=np.float64).sum())
        norm += float(np.square(weights, dtype=np.float64).sum())
    banded = layout.kind in ("banded", "planes")
    report = PackedMatrix(
        name=name,
        rows=layout.rows,
        columns=layout.columns,
        kind=layout.kind,
        bits=layout.bits,
        group=layout.group or None,
        minimum=layout.zeros,
        keep=layout.keep if banded else None,
        window=layout.window if banded else None,
        size=size,
        bits_per_weight=8 * size / quantized.q.size,
        sparsity=zeros / quantized.q.size,
        grid=grid,
        exact=worst <= EXACT,
        max_error=worst,
        error=off / norm if norm else 0.0,
    )
    return layout, report, parts


# --- the grid ---------------------------------------------------------------------------------------


def _quantized(name: str, source: Matrix, settings: Settings) -> tuple[Quantized, Source]:
    """The whole matrix as integers of 8 bits with their scales."""
    outer = name in ("embed", "head")
    wanted = settings.head_bits if outer else None
    if source.quantized is not None and wanted is None:
        recorded = _recorded(source)
        if recorded is not None:
            return recorded, "recorded"
    step = max(source.rows // SAMPLE_ROWS, 1)
    sample = np.concatenate([source.weights(row, row + 1) for row in range(0, source.rows, step)])
    grid = find(sample, source.rounding)
    if grid is not None and (wanted is None or grid.bits <= wanted):
        pieces = []
        for start, stop in _chunks(source.rows, source.columns):
            piece = on_grid(source.weights(start, stop), grid, source.rounding)
            if piece is None:
                break
            pieces.append(_small(piece))
        else:
            return _joined(pieces), "found"
    bits, group = ((wanted or 8), 32) if outer else (settings.bits, settings.group)
    pieces = [
        _small(rounded(source.weights(start, stop), bits, group, minimum=outer and bits == 4))
        for start, stop in _chunks(source.rows, source.columns)
    ]
    return _joined(pieces), "rounded"


def _recorded(source: Matrix) -> Quantized | None:
    """On the folder's own grid; None if no layout has its groups, or the weights have moved since."""
    assert source.quantized is not None
    pieces = []
    for start, stop in _chunks(source.rows, source.columns):
        piece = source.quantized(start, stop)
        if not piece.packable or piece.error(source.weights(start, stop)) > CLIPPED:
            return None
        if piece.minimum is not None and not (piece.q.min() >= 0 and piece.q.max() <= 15):
            return None
        pieces.append(_small(piece))
    return _joined(pieces)


def _small(piece: Quantized) -> Quantized:
    return replace(piece, q=piece.q.astype(np.int8))


def _joined(pieces: list[Quantized]) -> Quantized:
    first = pieces[0]
    minimum = None
    if first.minimum is not None:
        minimum = np.concatenate([piece.minimum for piece in pieces if piece.minimum is not None])
    return Quantized(
        np.concatenate([piece.q for piece in pieces]),
        np.concatenate([piece.scale for piece in pieces]),
        minimum,
        first.group,
    )


def _rows(quantized: Quantized, start: int, stop: int) -> Quantized:
    minimum = None if quantized.minimum is None else quantized.minimum[start:stop]
    return replace(quantized, q=quantized.q[start:stop], scale=quantized.scale[start:stop], minimum=minimum)


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Whole row blocks of about CHUNK weights."""
    step = max(CHUNK // columns // ROWS, 1) * ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


# --- the layout -------------------------------------------------------------------------------------


def _layouts(quantized: Quantized, settings: Settings) -> list[Layout]:
    """The layouts that may hold the integers exactly, the cheapest first; the last surely does."""
    q, group = quantized.q, quantized.group
    rows, columns = q.shape
    low, high = int(q.min()), int(q.max())
    fours = low >= -8 and high <= 7

    def layout(kind: Kind, bits: int, **more: Any) -> Layout:
        return Layout(kind, rows, columns, bits, group, **more)

    if quantized.minimum is not None:
        return [layout("dense", 4, zeros=True)]
    found = [layout("dense", 8), layout("mask", 8)]
    if fours:
        found += [layout("dense", 4), layout("mask", 4)]
    if low >= -32 and high <= 31:
        found.append(layout("dense", 6))
    if not fours and _spans(quantized).max(initial=0) <= 15:
        found.append(layout("dense", 4, zeros=True))
    fullest = int(_kept(q).max())
    for keep in (keep for keep in KEEPS if keep >= fullest):
        for offset_bits in (3, 2, 4):
            if low >= -(1 << 7 - offset_bits) and high < 1 << 7 - offset_bits:
                found.append(layout("banded", 8 - offset_bits, keep=keep, offset_bits=offset_bits))
        if fours:
            found.append(layout("planes", 4, keep=keep, offset_bits=2))
        found.append(layout("planes", 8, keep=keep, offset_bits=4))
    if settings.layout != "auto":
        found = [one for one in found if one.kind in (settings.layout, "dense")]
    if settings.window is not None:
        found = [one for one in found if not one.keep or one.window == settings.window]
    kept = int(np.count_nonzero(q))
    preferred = settings.layout
    found.sort(key=lambda one: (one.kind != preferred if preferred != "auto" else False, _cost(one, kept)))
    top = q[: 4 * ROWS]
    return [one for one in found if not one.keep or fits(replace(one, rows=len(top)), top)]


def _cost(layout: Layout, kept: int) -> float:
    size = layout.values_size
    if size is None:
        size = kept * layout.bits // 8 + layout.row_blocks * layout.pairs * 64
    scales = layout.row_blocks * layout.groups * ROWS * 2 * (1 + layout.zeros)
    return (size + scales) * COST[layout.kind]


def _kept(q: NDArray[np.integer]) -> NDArray[np.int64]:
    """Non-zeros of every block, chunk by chunk the largest."""
    found = []
    for start, stop in _chunks(*q.shape):
        piece = q[start:stop] != 0
        padded = np.pad(piece, ((0, 0), (0, -q.shape[1] % BLOCK)))
        found.append(padded.reshape(len(piece), -1, BLOCK).sum(axis=2).max())
    return np.array(found, np.int64)


def _spans(quantized: Quantized) -> NDArray[np.int64]:
    """max - min of the integers of every group, chunk by chunk the largest."""
    found = []
    for start, stop in _chunks(*quantized.q.shape):
        groups = _grouped(quantized.q[start:stop], quantized.group)
        found.append((groups.max(axis=2).astype(np.int64) - groups.min(axis=2)).max())
    return np.array(found, np.int64)


def _grouped(q: NDArray[np.integer], group: int) -> NDArray[np.integer]:
    if group and (missing := -q.shape[1] % group):
        q = np.pad(q, ((0, 0), (0, missing)), mode="edge")
    return q.reshape(len(q), -1, group or q.shape[1])


def _with_minimum(quantized: Quantized) -> Quantized:
    """The same weights with q from 0 to 15 and a minimum."""
    lowest = _grouped(quantized.q, quantized.group).min(axis=2)
    width = quantized.group or quantized.q.shape[1]
    shift = np.repeat(lowest, width, axis=1)[:, : quantized.q.shape[1]]
    minimum = quantized.scale * lowest.astype(np.float32)
    made = Quantized.of(quantized.q - shift, quantized.scale, minimum, width)
    return replace(made, q=made.q.astype(np.int8), group=quantized.group)


def _parts(layout: Layout, quantized: Quantized) -> tuple[dict[str, NDArray[Any]], int]:
    """All parts, packed chunk by chunk of row blocks, which follow each other in each; and their bytes."""
    found: dict[str, list[NDArray[Any]]] = {}
    for start, stop in _chunks(*quantized.q.shape):
        piece = _rows(quantized, start, stop)
        if layout.zeros and piece.minimum is None:
            piece = _with_minimum(piece)
        packed = pack(replace(layout, rows=stop - start), piece.q, piece.scale, piece.minimum)
        for part, array in packed.items():
            found.setdefault(part, []).append(array)
    parts = {part: np.concatenate(arrays) for part, arrays in found.items()}
    return parts, sum(array.nbytes for array in parts.values())


# --- packed matrices until the header can be written --------------------------------------------------


class _Scratch:
    """Keeps arrays in a file without a name: the packed file's header needs every layout first."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._where: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]] = {}

    def put(self, name: str, parts: dict[str, NDArray[Any]]) -> None:
        where = self._where[name] = {}
        for part, array in parts.items():
            where[part] = (array.dtype, array.shape, self._file.tell())
            self._file.write(np.ascontiguousarray(array).tobytes())

    def get(self, name: str) -> dict[str, NDArray[Any]]:
        found = {}
        for part, (dtype, shape, offset) in self._where[name].items():
            self._file.seek(offset)
            size = int(np.prod(shape)) * dtype.itemsize
            found[part] = np.frombuffer(self._file.read(size), dtype).reshape(shape)
        return found


@contextmanager
def _scratch(out: Path) -> Iterator[_Scratch]:
    if out.is_dir():
        raise UsageError(f"{out} is a folder", try_=f"zoo pack ... -o {out / FILE}")
    with told_plainly(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            yield _Scratch(file)
