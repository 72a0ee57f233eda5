"""Integers behind weights: weight = scale * q, or scale * q + minimum, for consecutive groups of columns.

`find` tells whether given weights lie on such a grid at all, as those of a model that was quantized and
then stored dense do; `on_grid` recovers the integers; `rounded` makes a grid where there is none.
Weights are float32 (rows, columns); a group of 0 columns is a whole row. `rounding` is how far from its grid
a weight may be in relation to itself: half a unit in the last place of the type that it was stored in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.runner.format import PAIR

GROUPS = (0, 128, 64, 32)
SEARCHED = tuple(1.0 - 0.02 * step for step in range(16))  # how far a range is shrunk to round less
LEVELS_WITH_MINIMUM = 15  # of the one width of such a grid: 4 bits

Floats = NDArray[np.float32]
Integers = NDArray[np.int16]


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix: q (rows, columns); scale and minimum (rows, groups), values of float16."""

    q: Integers
    scale: Floats
    minimum: Floats | None
    group: int

    @classmethod
    def of(
        cls,
        q: NDArray[np.number],
        scale: NDArray[np.floating],
        minimum: NDArray[np.floating] | None,
        group: int,
    ) -> Quantized:
        """Scales and minima get rounded to float16, as the packed file keeps them; q clipped to 8 bits."""
        return cls(
            np.clip(q, -127, 127).astype(np.int16),
            _half(scale),
            None if minimum is None else _half(minimum),
            0 if scale.shape[1] == 1 else group,
        )

    @property
    def packable(self) -> bool:
        """Whether the groups are among those that the packed layouts have."""
        return self.group % PAIR == 0

    def weights(self) -> Floats:
        width = self.group or self.q.shape[1]
        columns = self.q.shape[1]
        found = self.q * np.repeat(self.scale, width, axis=1)[:, :columns]
        if self.minimum is not None:
            found += np.repeat(self.minimum, width, axis=1)[:, :columns]
        return found

    def error(self, weights: Floats) -> float:
        """Largest difference from `weights` in units of the largest weight of the group."""
        peak = np.abs(_grouped(weights, self.group)).max(axis=2)
        off = np.abs(_grouped(self.weights() - weights, self.group)).max(axis=2)
        return float(np.divide(off, peak, out=np.zeros_like(off), where=peak > 0).max(initial=0))


@dataclass(frozen=True)
class Grid:
    """What kind of grid a matrix lies on. `levels`: largest |q| of a group, the commonest first."""

    bits: int
    group: int
    minimum: bool
    levels: tuple[int, ...]

    @property
    def overhead(self) -> float:
        """Bits per weight but for the scales of whole rows."""
        return self.bits + (16 * (1 + self.minimum) / self.group if self.group else 0)


def find(weights: Floats, rounding: float) -> Grid | None:
    """The smallest grid on which all of `weights` lie, or None. A few rows of a matrix are enough to tell."""
    found = []
    for group in GROUPS:
        if group >= weights.shape[1]:
            continue
        groups = _grouped(weights, group).reshape(-1, group or weights.shape[1])
        for bits in (4, 5, 6, 8):
            levels = _fit(groups, _levels(bits), bits, rounding)[1]
            if levels is not None:
                found.append(Grid(bits, group, False, _by_frequency(levels, _levels(bits))))
                break
        every = tuple(range(LEVELS_WITH_MINIMUM, 0, -1))
        levels = _fit_with_minimum(groups, every, rounding)[2]
        if levels is not None:
            found.append(Grid(4, group, True, _by_frequency(levels, every)))
    return min(found, key=lambda grid: grid.overhead, default=None)


def on_grid(weights: Floats, grid: Grid, rounding: float) -> Quantized | None:
    """The integers of weights on `grid`; None if they are not on it."""
    groups = _grouped(weights, grid.group)
    flat = groups.reshape(-1, groups.shape[2])
    minimum = None
    if grid.minimum:
        scale, minimum, levels = _fit_with_minimum(flat, grid.levels, rounding)
    else:
        scale, levels = _fit(flat, grid.levels, grid.bits, rounding)
    if levels is None:
        return None
    shifted = flat if minimum is None else flat - minimum[:, None]
    q = np.rint(shifted * _inverse(scale)[:, None])
    shape = groups.shape[:2]
    return Quantized.of(
        q.reshape(len(weights), -1)[:, : weights.shape[1]],
        scale.reshape(shape),
        None if minimum is None else minimum.reshape(shape),
        grid.group,
    )


def rounded(weights: Floats, bits: int, group: int, *, minimum: bool = False) -> Quantized:
    """Round to nearest, on the grid with the least squared error among shrunken ranges.

    With 8 bits the range is not shrunken. Zeros stay zeros without a minimum.
    """
    groups = _grouped(weights, group)
    low = groups.min(axis=2) if minimum else np.zeros(groups.shape[:2], np.float32)
    span = groups.max(axis=2) - low if minimum else np.abs(groups).max(axis=2)
    lowest, highest = (0, (1 << bits) - 1) if minimum else (-(1 << bits - 1), (1 << bits - 1) - 1)
    lowest = max(lowest, -127)
    best: tuple[Floats, ...] | None = None
    for shrink in SEARCHED if bits < 8 else (1.0,):
        scale = _half(span * (shrink / highest))
        start = _half(low + span * ((1 - shrink) / 2)) if minimum else low
        q = np.clip(np.rint((groups - start[..., None]) * _inverse(scale)[..., None]), lowest, highest)
        error = np.square(q * scale[..., None] + start[..., None] - groups).sum(axis=2)
        if best is None:
            best = (error, scale, start, q)
        else:
            better = error < best[0]
            new = (error, scale, start, q)
            best = tuple(np.where(better if a.ndim == 2 else better[..., None], a, b)
                         for a, b in zip(new, best, strict=True))  # fmt: skip
    assert best is not None
    _, scale, start, q = best
    q = q.reshape(len(weights), -1)[:, : weights.shape[1]]
    return Quantized.of(q, scale, start if minimum else None, group)


def _fit(groups: Floats, levels: Iterable[int], bits: int, rounding: float) -> tuple[Floats, Integers | None]:
    """Scale of every group (n, columns), and the level that its peak has, or None if one lies on no grid."""
    half = 1 << bits - 1
    at = np.abs(groups).argmax(axis=1)
    peak = groups[np.arange(len(groups)), at]
    scale = np.zeros(len(groups), np.float32)
    level = np.zeros(len(groups), np.int16)
    nearest = np.full(len(groups), np.inf, np.float32)
    left = np.flatnonzero(peak)
    for n in levels:
        if not left.size:
            break
        own = groups[left]
        # There is one more level below zero than above, so its peak may need a negative scale.
        first = -peak[left] / n if n == half else np.abs(peak[left]) / n
        q = np.rint(own * _inverse(first)[:, None])
        refined = _half((own * q).sum(axis=1) / np.maximum(np.square(q).sum(axis=1), 1))
        q = np.rint(own * _inverse(refined)[:, None])
        fits = (
            _off(own, q, refined) <= 3 * rounding
        )  # of the weights, of the scale fitted to them, of the scale
        fits &= (q.max(axis=1) < half) & (q.min(axis=1) >= max(-half, -127))
        some = left[fits]
        for nudge in (0, 1, -1):  # the scale that was meant is a float16 nearby
            tried = (refined[fits].astype(np.float16).view(np.int16) + np.int16(nudge)).view(np.float16)
            off = _off(own[fits], q[fits], tried.astype(np.float32))
            better = off < nearest[some]
            nearest[some[better]], scale[some[better]] = off[better], tried[better]
            level[some[better]] = n
        left = left[nearest[left] > 1.25 * rounding]  # an unlikelier level may yet fit a short group better
    found = np.isfinite(nearest) | (peak == 0)
    return scale, level if found.all() else None


def _off(weights: Floats, q: Floats, scale: Floats) -> Floats:
    """Largest difference of every group's weights (n, columns) from q * scale, relative to the weight."""
    off = np.abs(weights - q * scale[:, None])
    size = np.abs(weights)
    # A weight of zero has a q of zero, and no difference.
    relative: Floats = np.divide(off, size, out=np.zeros_like(off), where=size > 0)
    return np.asarray(relative.max(axis=1, initial=0))


def _fit_with_minimum(
    groups: Floats, levels: Iterable[int], rounding: float
) -> tuple[Floats, Floats, Integers | None]:
    """Scale and minimum of every group of 4-bit integers from 0, and how many levels it spans, or None."""
    low, high = groups.min(axis=1), groups.max(axis=1)
    peak = np.maximum(np.abs(low), np.abs(high))
    scale, minimum = np.zeros_like(low), _half(low)
    level = np.zeros(len(groups), np.int16)
    limit = peak * np.float32(4 * rounding)  # the minimum, the scale and up to twice the weight are rounded
    left = np.flatnonzero(np.abs(high - minimum) > limit)
    for n in levels:
        if not left.size:
            break
        own, start = groups[left], low[left]
        first = (high[left] - start) / n
        q = np.rint((own - start[:, None]) * _inverse(first)[:, None])
        mean_q, mean_w = q.mean(axis=1), own.mean(axis=1)
        centred = q - mean_q[:, None]
        slope = (centred * own).sum(axis=1) / np.maximum(np.square(centred).sum(axis=1), 1e-6)
        step, base = _half(slope), _half(mean_w - slope * mean_q)
        off = np.abs(own - q * step[:, None] - base[:, None]).max(axis=1)
        again = np.rint((own - base[:, None]) * _inverse(step)[:, None])
        fits = (off <= limit[left]) & (again == q).all(axis=1)
        scale[left[fits]], minimum[left[fits]], level[left[fits]] = step[fits], base[fits], n
        left = left[~fits]
    return scale, minimum, None if left.size else level


def _levels(bits: int) -> tuple[int, ...]:
    """Levels that the peak of a group can have, the likeliest first."""
    half = 1 << bits - 1
    return (half - 1, *((half,) if bits < 8 else ()), *range(half - 2, 0, -1))


def _by_frequency(found: Integers, every: Sequence[int]) -> tuple[int, ...]:
    counts = np.bincount(found, minlength=max(every) + 1)
    return tuple(sorted(every, key=lambda n: -int(counts[n])))


def _grouped(weights: Floats, group: int) -> Floats:
    """(rows, groups, columns of a group); a last group that is not full repeats its last column."""
    rows, columns = weights.shape
    if group and (missing := -columns % group):
        weights = np.pad(weights, ((0, 0), (0, missing)), mode="edge")
    return weights.reshape(rows, -1, group or columns)


def _half(values: NDArray[np.floating]) -> Floats:
    """Rounded to float16; what is beyond it stays, and is refused by the packed format."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(half), half, values).astype(np.float32)


def _inverse(scale: Floats) -> Floats:
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
