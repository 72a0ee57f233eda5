"""Models of a known shape with random weights, to measure speed without downloading anything.

How fast a kernel runs depends on a model's shape and on how its weights are packed, not on their values. So a
matrix is drawn from a pool of small random pieces, each packed by `zoo.runner.format` itself: a file is
sound by construction, keeps exactly as many weights as its pattern says, and is ready at the speed of the
disk. Weights are about N(0, 1 / columns), so that activations neither vanish nor explode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import UsageError
from zoo.runner.format import BLOCK, KEEPS, PAIR, ROWS, Kind, Layout, pack, window_starts
from zoo.runner.packed import Architecture, Text, packed_writer

POOL = 2048  # different pieces of a matrix
GROUP = 64  # columns that share a scale, unless a pattern says otherwise
_DTYPE_BYTES = {"U8": 1, "F16": 2, "F32": 4, "U64": 8}


def _llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, **more: Any
) -> Architecture:
    kv_heads, context = more.pop("kv_heads", heads), more.pop("context", 4096)
    theta = more.pop("theta", 10000.0)
    head_dim = hidden // heads
    return Architecture(
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        rope={"rope_type": "default", "rope_theta": theta},
        softmax_scale=head_dim**-0.5,
        **{"family": "llama", "tied": False} | more,
    )


def _mpt(vocabulary: int, hidden: int, layers: int, heads: int, context: int) -> Architecture:
    return Architecture(
        family="mpt",
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        context=context,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated=False,
        tied=True,
        alibi_bias_max=8.0,
        softmax_scale=(hidden // heads) ** -0.5,
    )


# Sizes as in each model's own config.json; RoPE scaling, which costs nothing at run time, is left out.
SHAPES = {
    "tiny": _llama(512, 128, 256, 2, 4, kv_heads=2, context=1024),
    "tiny-mpt": _mpt(512, 128, 2, 4, context=1024),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, kv_heads=3, context=8192, theta=1e5, tied=True),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, kv_heads=5, context=8192, theta=1e5, tied=True),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, context=8192, theta=130000.0, tied=True),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, kv_heads=8, context=131072, theta=5e5, tied=True),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, kv_heads=8, context=131072, theta=5e5, tied=True),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, kv_heads=8, context=8192, theta=5e5),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40),
    "mistral-7b": _llama(
        32000, 4096, 14336, 32, 32, kv_heads=8, context=32768, family="mistral", sliding_window=4096
    ),
    "mpt-7b": _mpt(50432, 4096, 32, 32, context=2048),
}


def shape(name: str, layers: int | None = None) -> Architecture:
    """The architecture called `name`, cut to its first `layers` decoder layers. Raises UsageError."""
    if (found := SHAPES.get(name)) is None:
        raise UsageError(f"there is no shape {name!r}", expected=", ".join(SHAPES))
    if layers is None:
        return found
    if not 1 <= layers <= found.layers:
        raise UsageError(f"{name} cannot have {layers} layers", expected=f"1 to {found.layers}")
    return found.model_copy(update={"layers": layers})


# Patterns


@dataclass(frozen=True)
class Pattern:
    """How the matrices of a decoder are packed; `str` is its notation."""

    kind: Kind
    bits: int
    group: int = GROUP
    keep: int = 0  # of 16; banded kinds only
    sparsity: float = 0.0  # mask only
    head_bits: int = 8  # of embeddings and head, which are dense

    def __str__(self) -> str:
        first = {"dense": "dense", "mask": f"{100 * self.sparsity:g}%"}.get(self.kind, f"{self.keep}:16")
        planes = "/planes" if self.kind == "planes" else ""
        group = f"@{self.group}" if self.group != GROUP else ""
        head = f"/head{self.head_bits}" if self.head_bits != 8 else ""
        return f"{first}/{self.bits}{planes}{group}{head}"

    @property
    def density(self) -> float:
        """Kept weights / weights."""
        return self.keep / BLOCK if self.keep else 1 - self.sparsity

    def layout(self, rows: int, columns: int) -> Layout:
        offset_bits = {"banded": 8 - self.bits, "planes": 2 if self.bits == 4 else 4}.get(self.kind, 0)
        return Layout(self.kind, rows, columns, self.bits, self.group, self.keep, offset_bits)


_NOTATION = re.compile(
    r"(?:(?P<dense>dense)|(?P<keep>\d+):16|(?P<percent>\d+(?:\.\d+)?)%)"
    r"(?:/(?P<bits>\d))?(?P<planes>/planes)?(?:@(?P<group>\d+))?(?:/head(?P<head>[468]))?"
)


def parse_pattern(text: str, bits: int | None = None) -> Pattern:
    """Read `dense`, `KEEP:16` or `PERCENT%`, perhaps with /BITS, /planes (KEEP:16 alone), @GROUP, /head4.

    `bits`: of a pattern that names none. Otherwise 4 for dense and planes, 5 for KEEP:16 (so a window
    of 8 columns), 8 for PERCENT% (an unstructured mask). Raises UsageError for anything else.
    """
    found = _NOTATION.fullmatch(text.strip())
    kind: Kind
    allowed: tuple[int, ...]
    if found is None:
        kind, allowed = "dense", ()
    elif found["dense"]:
        kind, allowed = "dense", (4, 6, 8)
    elif found["percent"]:
        kind, allowed = "mask", (8, 4)
    else:
        kind, allowed = ("planes", (4, 8)) if found["planes"] else ("banded", (5, 4, 6))
    chosen = int(found["bits"]) if found and found["bits"] else bits or next(iter(allowed), 0)
    keep = int(found["keep"] or 0) if found else 0
    sparsity = float(found["percent"] or 0) / 100 if found else 0.0
    group = int(found["group"] or GROUP) if found else 0
    misplaced = found is not None and found["planes"] and kind != "planes"
    keeps = kind in ("dense", "mask") or keep in KEEPS
    if misplaced or chosen not in allowed or not keeps or not 0 <= sparsity < 1 or group % PAIR:
        raise UsageError(
            f"there is no pattern {text!r}" + (f" with {bits} bits" if bits else ""),
            expected="dense/4, dense/6, dense/8, K:16/4, K:16/5, K:16/6, K:16/4/planes, K:16/8/planes (K "
            f"{', '.join(map(str, KEEPS))}), P%/4 or P%/8 (unstructured), "
            f"@GROUP (a multiple of {PAIR}), /head4, /head6 or /head8",
        )
    return Pattern(kind, chosen, group, keep, sparsity, int((found and found["head"]) or 8))


# Random weights


def draw(pool: NDArray[Any], count: int, random: np.random.Generator) -> NDArray[Any]:
    """`count` items of `pool`, at random, with repetition."""
    return pool[random.integers(0, len(pool), count)]


def _integers(pattern: Pattern, rows: int, columns: int, random: np.random.Generator) -> NDArray[np.int16]:
    """A (rows, columns) matrix of non-zero integers that keeps exactly what the pattern says."""
    high = (1 << (pattern.bits - 1)) - 1
    q = random.integers(1, high + 1, (rows, columns), np.int16)
    q *= random.choice(np.array([-1, 1], np.int16), (rows, columns))
    if pattern.kind == "dense":
        return q
    if pattern.kind == "mask":  # a piece has ROWS rows: the same number in each, so that all are equally long
        pieces = q.reshape(-1, ROWS * columns)
        dropped = round(pattern.sparsity * pieces.shape[1])
        order = np.argsort(random.random(pieces.shape), axis=1)[:, :dropped]
        np.put_along_axis(pieces, order, 0, axis=1)
        return q
    blocks = q.reshape(-1, BLOCK)
    kept = np.zeros(blocks.shape, bool)
    np.put_along_axis(kept, _columns(pattern.layout(ROWS, BLOCK), len(blocks), random), True, axis=1)
    return np.where(kept, blocks, 0).astype(np.int16).reshape(rows, columns)


def _columns(layout: Layout, blocks: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Kept columns of each block, strictly increasing, each in its window: (blocks, keep)."""
    starts = window_starts(layout.keep, layout.window)
    found = np.empty((blocks, layout.keep), np.int64)
    last = np.full(blocks, -1)
    for k, start in enumerate(starts):
        low = np.maximum(last + 1, start)
        # Room for those that follow: the next ones need a column each, and their windows end too.
        high = min(starts[j] + layout.window - 1 - (j - k) for j in range(k, layout.keep))
        last = found[:, k] = low + (random.random(blocks) * (high - low + 1)).astype(np.int64)
    return found


class Weights:
    """Draws random packed matrices from pools of pieces, which it packs once."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[Pattern, int], dict[str, NDArray[Any]]] = {}

    def matrix(self, pattern: Pattern, rows: int, columns: int) -> dict[str, NDArray[Any]]:
        """The parts of a matrix of about N(0, 1 / columns), for `zoo.runner.format` and `Writer.matrix`."""
        layout = pattern.layout(rows, columns)
        width = PAIR * layout.pairs_per_chunk  # of a piece: what the layout keeps together
        chunks = layout.pairs // layout.pairs_per_chunk
        parts = {
            name: draw(pool, layout.row_blocks * chunks, self._random).reshape(layout.row_blocks, chunks, -1)
            for name, pool in self._pieces(pattern, width).items()
        }
        if columns % width:  # what lies beyond the last column must be zero
            for name, pool in self._pieces(pattern, columns % width).items():
                parts[name][:, -1] = draw(pool, layout.row_blocks, self._random)
        high = (1 << (pattern.bits - 1)) - 1
        mean_square = (high + 1) * (2 * high + 1) / 6 * pattern.density  # of 1 .. high
        spread = self._random.uniform(0.75, 1.25, (layout.row_blocks, layout.groups, ROWS))
        parts["scales"] = (spread / (mean_square * columns) ** 0.5).astype(np.float16)
        return {name: parts[name].reshape(size or -1) for name, (_, size) in layout.shapes.items()}

    def _pieces(self, pattern: Pattern, columns: int) -> dict[str, NDArray[Any]]:
        """A pool of pieces of 16 rows x `columns`, packed: part -> (POOL, ...)."""
        if (pattern, columns) not in self._pools:
            layout = pattern.layout(ROWS * POOL, columns)
            q = _integers(pattern, layout.rows, columns, self._random)
            parts = pack(layout, q, np.ones((layout.rows, layout.groups), np.float32))
            self._pools[pattern, columns] = {
                name: array.reshape(POOL, -1) for name, array in parts.items() if name != "scales"
            }
        return self._pools[pattern, columns]


def _pattern_of(matrix: str, pattern: Pattern) -> Pattern:
    return pattern if matrix.startswith("layers.") else Pattern("dense", pattern.head_bits)


def write_random(path: Path, architecture: Architecture, pattern: Pattern, seed: int = 0) -> None:
    """Write a packed file of this architecture with random weights and no tokenizer."""
    layouts = {name: _pattern_of(name, pattern).layout(*size) for name, size in architecture.matrices.items()}
    weights = Weights(seed)
    with packed_writer(path, architecture, layouts, Text()) as writer:
        for name, size in architecture.matrices.items():
            writer.matrix(name, weights.matrix(_pattern_of(name, pattern), *size))
        ones = np.ones(architecture.hidden, np.float32)
        writer.vectors((f"{name}.weight", ones) for name in architecture.norms)


def random_size(architecture: Architecture, pattern: Pattern) -> int:
    """About how many bytes `write_random` writes."""
    total = 0
    for name, size in architecture.matrices.items():
        layout = _pattern_of(name, pattern).layout(*size)
        for dtype, part in layout.shapes.values():
            kept = prod(size) * layout.bits // 8 * (1 - pattern.sparsity)  # the values of a mask
            total += _DTYPE_BYTES[dtype] * prod(part) if part else int(kept)
    return total
