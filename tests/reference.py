"""Slow float64 references, written from the papers' formulas: what the solvers are checked against.

Weights are (rows, columns), a Hessian is X^T X / tokens, (columns, columns), a mask is True where a weight
stays. One weight, one column, one mask at a time; inverses are explicit, and eliminated columns leave
the inverse Hessian by a Gaussian elimination step, not through a Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

SPAN = 128  # columns within which unstructured SparseGPT ranks the weights of a row


# --- Grids


@dataclass(frozen=True)
class StaticGrid:
    """weight = scale * (q - zero), lowest <= q <= highest; scale and zero (rows, groups)."""

    scale: Array
    zero: Array
    lowest: int
    highest: int

    def integer(self, row: int, column: int, columns: int, value: float) -> int:
        group = column * self.scale.shape[1] // columns
        q = round(value / self.scale[row, group] + self.zero[row, group])
        return min(max(q, self.lowest), self.highest)

    def nearest(self, row: int, column: int, columns: int, value: float) -> float:
        group = column * self.scale.shape[1] // columns
        q = self.integer(row, column, columns, value)
        return float(self.scale[row, group] * (q - self.zero[row, group]))

    def round(self, weight: Array) -> Array:
        """The nearest point of the grid to every weight."""
        rows, columns = weight.shape
        return np.array(
            [[self.nearest(i, j, columns, weight[i, j]) for j in range(columns)] for i in range(rows)]
        )


def stored(scale: float) -> float:
    """A scale as files keep it: float16. Of a group of zeros any scale will do, but not 0."""
    return float(np.float16(scale)) or 1.0


def absmax(weight: Array, bits: int, group: int) -> StaticGrid:
    """LLM.int8, arXiv:2208.07339, eq. 1: q = round(127 / max|x| * x), for any number of bits."""
    rows, columns = weight.shape
    highest = 2 ** (bits - 1) - 1
    scale = np.empty((rows, columns // group))
    for i in range(rows):
        for g in range(columns // group):
            scale[i, g] = stored(np.abs(weight[i, g * group : (g + 1) * group]).max() / highest)
    return StaticGrid(scale, np.zeros_like(scale), -highest - 1, highest)


def zero_point(weight: Array, bits: int, group: int) -> StaticGrid:
    """LLM.int8, eqs. 2-4: the range, widened to hold 0, is stretched over all 2^bits integers."""
    rows, columns = weight.shape
    highest = 2**bits - 1
    scale = np.empty((rows, columns // group))
    zero = np.empty_like(scale)
    for i in range(rows):
        for g in range(columns // group):
            x = weight[i, g * group : (g + 1) * group]
            low, high = min(x.min(), 0.0), max(x.max(), 0.0)
            scale[i, g] = stored((high - low) / highest)
            zero[i, g] = min(max(round(-low / scale[i, g]), 0), highest)
    return StaticGrid(scale, zero, 0, highest)


def minimum(weight: Array, bits: int, group: int) -> StaticGrid:
    """GGUF's Q4_1, for any number of bits: the range starts at the minimum, which is kept as a float16."""
    rows, columns = weight.shape
    highest = 2**bits - 1
    scale = np.empty((rows, columns // group))
    zero = np.empty_like(scale)
    for i in range(rows):
        for g in range(columns // group):
            x = weight[i, g * group : (g + 1) * group]
            scale[i, g] = stored((x.max() - x.min()) / highest)
            zero[i, g] = -float(np.float16(x.min())) / scale[i, g]
    return StaticGrid(scale, zero, 0, highest)


# --- Masks


def magnitude(weight: Array) -> Array:
    return np.abs(weight)


def wanda(weight: Array, inputs: Array) -> Array:
    """arXiv:2306.11695, eq. 1: S_ij = |W_ij| * ||X_j||_2, X (tokens, columns)."""
    norms = [np.sqrt(sum(x * x for x in inputs[:, j])) for j in range(inputs.shape[1])]
    return np.array([[abs(w) * norms[j] for j, w in enumerate(row)] for row in weight])


def band_starts(keep: int, window: int) -> list[int]:
    """s_k = clip(round(k*16/K - (w - 16/K)/2), 0, 16 - w), in exact fractions."""
    step = Fraction(16, keep)
    return [min(max(round(k * step - (window - step) / 2), 0), 16 - window) for k in range(keep)]


@cache
def banded_masks(keep: int, window: int) -> Mask:
    """Every legal mask of a block of 16, (masks, 16): the k-th kept column lies in window k."""
    starts = band_starts(keep, window)
    legal = [
        columns
        for columns in combinations(range(16), keep)
        if all(starts[k] <= c < starts[k] + window for k, c in enumerate(columns))
    ]
    return np.array([[c in columns for c in range(16)] for columns in legal])


def best_banded(scores: Array, keep: int, window: int) -> Mask:
    """Of all legal masks of one block of 16, one with the largest sum of scores."""
    masks = banded_masks(keep, window)
    best: Mask = masks[np.argmax(masks @ scores)]
    return best


def outlier_ratio(scores: list[Array], threshold: float) -> float:
    """OWL, arXiv:2310.05175, eq. 2: the share of a layer's scores above M times the layer's mean."""
    flat = [float(s) for matrix in scores for s in matrix.ravel()]
    mean = sum(flat) / len(flat)
    return sum(s > threshold * mean for s in flat) / len(flat)


# --- Second-order solvers


def output_error(weight: Array, compressed: Array, hessian: Array) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2."""
    gap = weight - compressed
    return float(np.trace(gap @ hessian @ gap.T) / np.trace(weight @ hessian @ weight.T))


def damped(hessian: Array, damping: float) -> Array:
    return hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def without(inverse: Array, j: int) -> Array:
    """The inverse Hessian of the other columns once j is fixed. Optimal Brain Compression, eq. 4."""
    return inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]


def eliminate(
    weight: Array,
    hessian: Array,
    value: Callable[[int, int, float], float],
    *,
    order: list[int] | None = None,
    before: Callable[[int, Array, Array], None] | None = None,
) -> Array:
    """Fix column after column at value(row, column, w); the free columns move to make up for it.

    Optimal Brain Surgeon: fixing w_j at v moves the free weights by -(w_j - v) / [H^-1]_jj * H^-1_:j, with H
    of the free columns only (OBQ, arXiv:2208.11580, eq. 2; GPTQ, arXiv:2210.17323, eq. 2).
    `before` sees each column, the weights as they are then, and [H_F^-1]_cc of each later column c in its
    turn, with F the columns that are free then (SparseGPT, arXiv:2301.00774, eq. 5).
    """
    rows, columns = weight.shape
    order = order or list(range(columns))
    inverse = np.linalg.inv(hessian)
    pivot_row, diagonal = np.empty((columns, columns)), np.empty(columns)
    for j in order:
        pivot_row[j], diagonal[j] = inverse[j], inverse[j, j]
        inverse = without(inverse, j)

    moving = weight.copy()
    result = np.empty_like(weight)
    for step, j in enumerate(order):
        if before is not None:
            before(j, moving, diagonal)
        for i in range(rows):
            result[i, j] = value(i, j, moving[i, j])
            error = (moving[i, j] - result[i, j]) / diagonal[j]
            free = order[step + 1 :]
            moving[i, free] -= error * pivot_row[j, free]
    return result


def gptq(
    weight: Array,
    hessian: Array,
    grid: StaticGrid,
    *,
    mask: Mask | None = None,
    activation_order: bool = False,
) -> Array:
    """Round each column to a grid that was fixed beforehand; masked weights become 0."""
    columns = weight.shape[1]
    order = sorted(range(columns), key=lambda j: -hessian[j, j]) if activation_order else None

    def value(i: int, j: int, w: float) -> float:
        return 0.0 if mask is not None and not mask[i, j] else grid.nearest(i, j, columns, w)

    return eliminate(weight, hessian, value, order=order)


def sparsegpt(
    weight: Array,
    hessian: Array,
    *,
    keep: int | None = None,
    group: int | None = None,
    sparsity: float | None = None,
    window: int | None = None,
    grid: StaticGrid | None = None,
) -> tuple[Array, Mask]:
    """Choose a mask at the start of every group by w^2 / [H_F^-1]_jj, and eliminate.

    Unstructured: the lowest `sparsity` of each row's scores in a span of 128 columns goes.
    """
    rows, columns = weight.shape
    mask = np.ones((rows, columns), dtype=bool)
    span = group or SPAN

    def choose(j: int, moving: Array, diagonal: Array) -> None:
        if j % span:
            return
        here = slice(j, min(j + span, columns))
        for i in range(rows):
            scores = moving[i, here] ** 2 / diagonal[here]
            mask[i, here] = choose_row(scores)

    def choose_row(scores: Array) -> Mask:
        if window is not None:
            assert keep is not None
            return best_banded(scores, keep, window)
        chosen = np.zeros(len(scores), dtype=bool)
        survivors = keep if keep is not None else len(scores) - round((sparsity or 0.0) * len(scores))
        chosen[np.argsort(-scores, kind="stable")[:survivors]] = True
        return chosen

    def value(i: int, j: int, w: float) -> float:
        if not mask[i, j]:
            return 0.0
        return w if grid is None else grid.nearest(i, j, columns, w)

    return eliminate(weight, hessian, value, before=choose), mask


def least_squares(weight: Array, mask: Mask, hessian: Array) -> Array:
    """The weights under the mask with the least ||X (W - W')^T||^2: normal equations, row by row.

    With S the kept columns of a row: H_SS x_S = H_S: w.
    """
    result = np.zeros_like(weight)
    for i, row in enumerate(weight):
        kept = np.flatnonzero(mask[i])
        if len(kept):
            result[i, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ row)
    return result


def corrected(
    weight: Array, inputs: Array, original: Array, residual_gap: Array | None, damping: float, fraction: float
) -> Array:
    """The ridge regression that makes X' W*^T + r' most like X W^T + r, `fraction` of the way from W.

    min ||X W^T + (r - r') - X' W*^T||^2 / tokens + lambda ||W* - W||^2 with lambda = damping * mean diag H,
    H = X'^T X' / tokens; inputs X' and original X (tokens, columns), residual_gap r - r' (tokens, rows).
    """
    tokens, columns = inputs.shape
    target = original @ weight.T + (0.0 if residual_gap is None else residual_gap)
    hessian = inputs.T @ inputs / tokens
    ridge = damping * np.mean(np.diag(hessian)) * np.eye(columns)
    best: Any = np.linalg.solve(hessian + ridge, inputs.T @ target / tokens + ridge @ weight.T).T
    return np.asarray(weight + fraction * (best - weight))
