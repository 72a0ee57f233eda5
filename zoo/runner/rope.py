"""Rotary position embeddings: the cosines and sines of every scaling type that transformers knows.

RoPE is arXiv:2104.09864; each scaling cites its own source. Frequencies and attention factors are those
of `transformers.modeling_rope_utils`, for Llama's layout: dimension i of a head turns with i + head_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError
from zoo.runner.packed import Architecture

Frequencies = NDArray[np.float64]


def tables(
    architecture: Architecture, length: int, positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, (positions, head_dim / 2) each, attention factor included.

    `length` is the number of tokens of the sequence so far; only `depends_on_length` types look at it.
    Raises FormatError for parameters that are missing or make no sense.
    """
    frequencies, factor = _frequencies(architecture, length)
    # float32 from here on, because transformers rounds the frequencies and the angles to it.
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def depends_on_length(architecture: Architecture) -> bool:
    """Whether a token's rotation depends on how long its sequence is."""
    return architecture.rope is not None and _type(architecture.rope) in ("dynamic", "longrope")


def _frequencies(architecture: Architecture, length: int) -> tuple[Frequencies, float]:
    """Radians per position (head_dim / 2,) and the factor of cosines and sines."""
    rope = architecture.rope
    if rope is None:
        raise FormatError("the model has no rotary embeddings")
    kind = _type(rope)
    if kind not in _TYPES:
        raise FormatError(f"RoPE of type {kind[:40]!r} is not known", expected=", ".join(_TYPES))
    # Llama's default ignores a partial rotation; the other types would rotate fewer dimensions than it has.
    partial = 1.0 if kind == "default" else _number(rope, "partial_rotary_factor", 1.0)
    if kind != "proportional" and int(architecture.head_dim * partial) != architecture.head_dim:
        raise FormatError(
            f"RoPE of type {kind} that turns a part of each head is not supported",
            saw=f"partial_rotary_factor {partial}",
        )
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = _TYPES[kind](architecture, rope, length)
    except (ArithmeticError, ValueError) as error:
        raise FormatError(
            f"the parameters of RoPE of type {kind} make no sense", saw=str(rope)[:200]
        ) from error
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise FormatError(f"the parameters of RoPE of type {kind} make no sense", saw=str(rope)[:200])
    return frequencies, factor


def _default(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    return _powers(_number(rope, "rope_theta"), architecture.head_dim), 1.0


def _linear(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """Position interpolation, arXiv:2306.15595."""
    return _default(architecture, rope, length)[0] / _number(rope, "factor"), 1.0


def _proportional(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """Only the fastest dimensions turn, at the speeds they would have if all did."""
    turning = int(_number(rope, "partial_rotary_factor", 1.0, zero=True) * architecture.head_dim // 2)
    frequencies = _powers(_number(rope, "rope_theta"), architecture.head_dim)
    frequencies[turning:] = 0
    return frequencies / _number(rope, "factor", 1.0), 1.0


def _dynamic(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """NTK-aware scaling that grows with the text, from the end of the model's own context on."""
    factor, dim = _number(rope, "factor"), architecture.head_dim
    stretch = factor * max(length, architecture.context) / architecture.context - (factor - 1)
    return _powers(_number(rope, "rope_theta") * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """YaRN, arXiv:2309.00071: slow dimensions are interpolated, fast ones are not."""
    dim, theta = architecture.head_dim, _number(rope, "rope_theta")
    original = _number(rope, "original_max_position_embeddings", architecture.context)
    factor = _number(rope, "factor", architecture.context / original)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, weight_all = (_number(rope, key, 0.0, zero=True) for key in ("mscale", "mscale_all_dim"))
    inferred = scale(weight) / scale(weight_all) if weight and weight_all else scale(1)
    attention = _number(rope, "attention_factor", inferred)

    def dimension(turns: float) -> float:
        """The dimension that turns so many times within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_number(rope, "beta_fast", 0.0, zero=True) or 32)
    high = dimension(_number(rope, "beta_slow", 0.0, zero=True) or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    frequencies = _powers(theta, dim)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated), attention


def _longrope(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """LongRoPE, arXiv:2402.13753: a factor per dimension, one set for short texts and one for long."""
    original = _number(rope, "original_max_position_embeddings", architecture.context)
    factor = _number(rope, "factor", architecture.context / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = _number(rope, "attention_factor", attention)
    key = "long_factor" if length > original else "short_factor"
    factors = rope.get(key)
    count = architecture.head_dim // 2
    if not isinstance(factors, list) or len(factors) != count:
        raise FormatError(f"RoPE's {key} is not a list of {count} numbers", saw=str(factors)[:100])
    by_dimension = [_number({key: value}, key) for value in factors]
    return _powers(_number(rope, "rope_theta"), architecture.head_dim) / by_dimension, attention


def _llama3(architecture: Architecture, rope: dict[str, Any], length: int) -> tuple[Frequencies, float]:
    """Llama 3.1: long waves are interpolated, short ones are not, with a smooth passage between."""
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(rope, "original_max_position_embeddings", architecture.context)
    frequencies = _powers(_number(rope, "rope_theta"), architecture.head_dim)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(turns < low, frequencies / factor, np.where(turns > high, frequencies, between))
    return scaled, 1.0


def _powers(theta: float, dim: int) -> Frequencies:
    return theta ** -(np.arange(0, dim, 2) / dim)


def _type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _number(rope: dict[str, Any], key: str, default: float | None = None, *, zero: bool = False) -> float:
    """A positive number (or zero); null counts as absent."""
    value = rope.get(key)
    if value is None:
        value = default
    try:
        number = math.nan if isinstance(value, bool | str | None) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise FormatError(
            f"RoPE's {key} is missing or not a positive number", saw=str(value)[:60], expected="a number"
        )
    return number


_TYPES: dict[str, Callable[[Architecture, dict[str, Any], int], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
