"""Tiny packed models of random integers, in every layout; without torch, so that they are there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.runner.format import BLOCK, KEEPS, Layout, pack, window_starts
from zoo.runner.packed import Architecture, Packed, Text, packed_writer

Fields = dict[str, Any]  # of a Layout, but for its size and group


def _every_layout() -> dict[str, Fields]:
    found: dict[str, Fields] = {
        "dense 4": {"kind": "dense", "bits": 4},
        "dense 4 with zeros": {"kind": "dense", "bits": 4, "zeros": True},
        "dense 6": {"kind": "dense", "bits": 6},
        "dense 8": {"kind": "dense", "bits": 8},
        "mask 4": {"kind": "mask", "bits": 4},
        "mask 8": {"kind": "mask", "bits": 8},
    }
    for keep in KEEPS:
        for kind, bits, offset_bits in (
            ("banded", 6, 2),
            ("banded", 5, 3),
            ("banded", 4, 4),
            ("planes", 4, 2),
            ("planes", 8, 4),
        ):
            name = f"{kind} {keep}:16, {bits} + {offset_bits} bits"
            found[name] = {"kind": kind, "bits": bits, "keep": keep, "offset_bits": offset_bits}
    return found


LAYOUTS = _every_layout()

_LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocabulary": 211,
    "hidden": 96,
    "intermediate": 200,
    "layers": 2,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 16,
    "context": 4096,
    "norm": "rms",
    "norm_eps": 1e-5,
    "activation": "silu",
    "gated": True,
    "tied": True,
    "rope": {"rope_type": "default", "rope_theta": 1e4},
    "softmax_scale": 0.25,
}
LLAMA = Architecture(**_LLAMA)
MISTRAL = Architecture(**_LLAMA | {"family": "mistral", "sliding_window": 7, "tied": False})
MPT = Architecture(
    **_LLAMA
    | {
        "family": "mpt",
        "hidden": 80,
        "heads": 5,
        "kv_heads": 5,
        "norm": "layer",
        "activation": "gelu",
        "gated": False,
        "rope": None,
        "alibi_bias_max": 8.0,
        "clip_qkv": 1.5,
        "logit_scale": 0.7,
    }
)


def random_integers(rng: np.random.Generator, layout: Layout) -> NDArray[np.int64]:
    """(rows, columns) integers of all values that the layout holds, in a pattern that it holds."""
    half = 1 << (layout.bits - 1)
    low, high = (0, 15) if layout.zeros else (max(-half, -127), half - 1)
    q = rng.integers(low, high, (layout.rows, layout.columns), endpoint=True)
    if layout.kind == "mask":
        return np.asarray(q * (rng.random(q.shape) < 0.35))
    if layout.kind == "dense":
        return q
    blocks = -(-layout.columns // BLOCK)
    kept = np.zeros((layout.rows * blocks, BLOCK), bool)
    starts = window_starts(layout.keep, layout.window)
    last = np.full(len(kept), -1)
    for k in range(layout.keep):  # each column behind the one before, leaving room for those to come
        first = np.maximum(last + 1, starts[k])
        end = min(starts[j] + layout.window - (j - k) for j in range(k, layout.keep))
        last = rng.integers(first, end)
        kept[np.arange(len(kept)), last] = True
    return np.asarray(q * kept.reshape(layout.rows, -1)[:, : layout.columns])


def random_model(
    path: Path,
    architecture: Architecture,
    fields: Fields,
    *,
    outer: Fields | None = None,
    group: int = 32,
    seed: int = 0,
) -> Packed:
    """A model whose inner matrices have a layout of `fields`; embeddings and head are dense, by default of
    8 bits."""
    rng = np.random.default_rng(seed)
    layouts = {}
    for name, (rows, columns) in architecture.matrices.items():
        ends = name in ("embed", "head")
        layouts[name] = Layout(
            rows=rows,
            columns=columns,
            **((outer or LAYOUTS["dense 8"]) | {"group": 32} if ends else fields | {"group": group}),
        )
    with packed_writer(path, architecture, layouts, Text()) as writer:
        for name, layout in layouts.items():
            deviation = np.sqrt(layout.columns) * 2.0 ** (layout.bits - 2)
            scales = rng.uniform(0.5, 1.5, (layout.rows, layout.groups)) / deviation
            minima = -7.5 * scales if layout.zeros else None
            writer.matrix(name, pack(layout, random_integers(rng, layout), scales, minima))
            if name.endswith((".q", ".up")):
                writer.vectors([(f"{name}.bias", rng.normal(size=layout.rows) / 4)])
        for name in architecture.norms:
            writer.vectors([(f"{name}.weight", rng.normal(1, 0.1, architecture.hidden))])
            if architecture.norm == "layer":
                writer.vectors([(f"{name}.bias", rng.normal(0, 0.1, architecture.hidden))])
    return Packed(path)


def random_product(
    path: Path, rows: int, columns: int, fields: Fields, *, group: int, seed: int
) -> tuple[Packed, NDArray[np.float64], NDArray[np.float64]]:
    """A model that is one matrix: its only layer adds nothing, so logits are head @ norm(embedding).

    Also gives those normed embeddings (rows, columns), some with outliers, and the head, both in float64.
    """
    rng = np.random.default_rng(seed)
    architecture = Architecture(
        **_LLAMA
        | {"vocabulary": rows, "hidden": columns, "intermediate": 1, "layers": 1, "tied": False}
        | {"heads": 1, "kv_heads": 1, "head_dim": 2}
    )
    layouts = {
        name: Layout(rows=shape[0], columns=shape[1], **{"kind": "dense", "bits": 8, "group": 32})
        for name, shape in architecture.matrices.items()
    }
    layouts["head"] = head = Layout(rows=rows, columns=columns, group=group, **fields)
    loud = rng.choice([1.0, 1.0, 8.0], (rows, layouts["embed"].groups)) / 64
    scales = {"embed": loud, "head": rng.uniform(0.5, 1.5, (rows, head.groups)) / 64}
    minima = rng.uniform(-0.1, 0.1, scales["head"].shape) if head.zeros else None
    integers = {name: random_integers(rng, layouts[name]) for name in scales}
    norm = rng.uniform(0.5, 1.5, columns).astype(
        np.float32
    )  # so that no activation lies between two integers
    with packed_writer(path, architecture, layouts, Text()) as writer:
        for name, layout in layouts.items():
            q = integers.get(name, np.zeros((layout.rows, layout.columns), int))
            scale = scales.get(name, np.zeros((layout.rows, layout.groups)))
            writer.matrix(name, pack(layout, q, scale, minima if name == "head" else None))
        writer.vectors((f"{name}.weight", norm) for name in architecture.norms)
    exact = {}
    for name, q in integers.items():
        width = layouts[name].group or columns
        exact[name] = q * np.repeat(scales[name].astype(np.float16).astype(float), width, 1)[:, :columns]
    if minima is not None:
        exact["head"] += np.repeat(minima.astype(np.float16).astype(float), group or columns, 1)[:, :columns]
    x = exact["embed"]
    return (
        Packed(path),
        x / np.sqrt(np.square(x).mean(1, keepdims=True) + architecture.norm_eps) * norm,
        exact["head"],
    )


def instruction_sets() -> list[str]:
    """Those of the C++ engine that this processor has."""
    from zoo.runner import native

    ones = ["vocabulary", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"]
    ones += ["slots", "context", "threads"]
    rest = dict.fromkeys(("rms", "silu", "gated", "tied", "int8_cache"), False) | {"sliding_window": 0}
    floats = dict.fromkeys(("norm_eps", "softmax_scale", "logit_scale", "clip_qkv"), 1.0)
    found = []
    for isa in ("scalar", "avx2", "avx512", "neon"):
        try:
            native._native.Model(**dict.fromkeys(ones, 1), **rest, **floats, isa=isa)
        except ValueError:
            continue
        found.append(isa)
    return found
