"""The engine in NumPy and float32: the readable reference, and the way out where no C++ is to be had."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from zoo.errors import FormatError, NumericsError, ZooError
from zoo.runner import rope
from zoo.runner.engine import check_call
from zoo.runner.format import dequantize
from zoo.runner.packed import Packed

Floats = NDArray[np.float32]


class NumpyEngine:
    """`zoo.runner.engine.Engine` with the weights de-quantized once."""

    def __init__(self, packed: Packed, *, slots: int = 1, context: int) -> None:
        """Raises NumericsError for weights that are not finite, FormatError for masks without values."""
        self.architecture = a = packed.architecture
        self.slots = slots
        self.context = context
        self._weights = _read(packed)
        self._slopes = None if a.alibi_bias_max is None else alibi_slopes(a.heads, a.alibi_bias_max)
        self._rotations: tuple[Floats, Floats] | None = None
        if a.rope is not None and not rope.depends_on_length(a):
            self._rotations = rope.tables(a, context, context)
        try:  # pages of zeros take no memory until they are written
            self._keys: Floats = np.zeros((a.layers, slots, a.kv_heads, context, a.head_dim), np.float32)
            self._values: Floats = np.zeros(self._keys.shape, np.float32)
        except (MemoryError, ValueError) as error:
            raise ZooError(
                f"there is no memory for {slots} x {context} tokens", try_="a smaller context, or fewer slots"
            ) from error
        self._filled = np.zeros(slots, np.int64)

    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        wanted: NDArray[np.int32],
    ) -> Floats:
        check_call(self, self._filled, tokens, slots, positions, wanted)
        a, weights = self.architecture, self._weights
        # (slot, its tokens' indices into the call, their positions)
        sequences = [
            (int(slot), at, positions[at])
            for slot in np.unique(slots)
            for at in [np.flatnonzero(slots == slot)]
        ]
        with np.errstate(all="ignore"):  # what is not finite is found in the end
            hidden = weights["embed"][tokens]
            for i in range(a.layers):
                normed = self._norm(hidden, f"layers.{i}.attention_norm")
                q, k, v = (
                    self._linear(normed, f"layers.{i}.{name}").reshape(len(tokens), -1, a.head_dim)
                    for name in "qkv"
                )
                if a.clip_qkv is not None:
                    q, k, v = (np.clip(x, -a.clip_qkv, a.clip_qkv) for x in (q, k, v))
                context = np.empty_like(q)
                for slot, at, where in sequences:
                    context[at] = self._attend(i, slot, where, q[at], k[at], v[at])
                hidden = hidden + self._linear(context.reshape(len(tokens), -1), f"layers.{i}.o")
                hidden = hidden + self._mlp(self._norm(hidden, f"layers.{i}.mlp_norm"), i)
            final = self._norm(hidden[wanted], "norm")
            logits = self._linear(final, "embed" if a.tied else "head") * np.float32(a.logit_scale)
        for slot, _, where in sequences:
            self._filled[slot] = where[-1] + 1
        if not np.isfinite(logits).all():
            raise NumericsError("the model's logits are not finite")
        return logits

    def _linear(self, x: Floats, name: str) -> Floats:
        """x (tokens, columns) -> (tokens, rows)."""
        y: Floats = x @ self._weights[name].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Floats, name: str) -> Floats:
        if self.architecture.norm == "layer":
            x = x - x.mean(axis=1, keepdims=True)
        variance = np.square(x).mean(axis=1, keepdims=True)
        y: Floats = (
            x / np.sqrt(variance + np.float32(self.architecture.norm_eps)) * self._weights[f"{name}.weight"]
        )
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _mlp(self, x: Floats, layer: int) -> Floats:
        activate = _silu if self.architecture.activation == "silu" else _gelu
        up = self._linear(x, f"layers.{layer}.up")
        if self.architecture.gated:
            up = activate(self._linear(x, f"layers.{layer}.gate")) * up
        else:
            up = activate(up)
        return self._linear(up, f"layers.{layer}.down")

    def _attend(
        self, layer: int, slot: int, positions: NDArray[np.int32], q: Floats, k: Floats, v: Floats
    ) -> Floats:
        """Attention of one sequence: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim)."""
        a = self.architecture
        end = int(positions[-1]) + 1
        if a.rope is not None:
            # Keys stay as they were rotated when they came, as in transformers with a cache.
            cos, sin = self._rotations or rope.tables(a, end, end)
            q, k = (_rotate(x, cos[positions], sin[positions]) for x in (q, k))
        self._keys[layer, slot, :, positions] = k
        self._values[layer, slot, :, positions] = v
        distances = positions[:, None] - np.arange(end)  # (tokens, keys), from the key to the token
        seen = distances >= 0
        if a.sliding_window is not None:
            seen &= distances < a.sliding_window
        context = np.empty_like(q)
        shared = a.heads // a.kv_heads
        for kv_head in range(a.kv_heads):
            keys, values = (cache[layer, slot, kv_head, :end] for cache in (self._keys, self._values))
            for head in range(kv_head * shared, (kv_head + 1) * shared):
                scores = q[:, head] @ keys.T * np.float32(a.softmax_scale)
                if self._slopes is not None:
                    scores -= self._slopes[head] * distances
                scores[~seen] = -np.inf
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                context[:, head] = scores / scores.sum(axis=1, keepdims=True) @ values
        return context


def alibi_slopes(heads: int, bias_max: float) -> Floats:
    """Slope of each head's linear bias (heads,), as MPT has them.

    Source: ALiBi, arXiv:2108.12409; the order of heads that are no power of two is that of MPT.
    """
    power = 1 << math.ceil(math.log2(heads))
    slopes = 2.0 ** -(np.arange(1, power + 1) * bias_max / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x (tokens, heads, head_dim); cos, sin (tokens, head_dim / 2)."""
    first, second = np.split(x, 2, axis=2)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def _silu(x: Floats) -> Floats:
    y: Floats = x / (1 + np.exp(-x))
    return y


def _gelu(x: Floats) -> Floats:
    """x times the normal distribution's cumulative function, by erf as in Abramowitz and Stegun, 7.1.26."""
    z = np.abs(x.astype(np.float64)) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = series * np.exp(-z * z) / 2  # the probability beyond |x|; its error is below 1e-7
    y: Floats = (x * np.where(x > 0, 1 - tail, tail)).astype(np.float32)
    return y


def _read(packed: Packed) -> dict[str, Floats]:
    """All weights in float32, by the names that they have in the file."""
    needed = 4 * sum(rows * columns for rows, columns in packed.architecture.matrices.values())
    available = psutil.virtual_memory().available
    if needed > available:
        raise ZooError(
            f"{packed.path} does not fit into memory without the C++ engine",
            saw=f"{available / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB, as NumPy needs every weight in float32",
            try_="zoo doctor says how to get the C++ engine",
        )
    weights: dict[str, Any] = {}
    for name, layout in packed.layouts.items():
        try:
            weights[name] = dequantize(layout, packed.parts(name))
        except (IndexError, ValueError) as error:
            raise FormatError(f"{packed.path}: {name} holds fewer weights than its mask says") from error
    for name, tensor in packed.tensors.items():
        if tensor.dtype == "F32":
            weights[name] = packed.read(name)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise NumericsError(f"{packed.path}: {name} is not finite", saw="NaN or infinity in it")
    return weights
