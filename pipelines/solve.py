"""The second-order solvers: compress a linear layer so that its outputs change least.

All minimise ||X (W - W')^T||^2 for a weight W (rows, columns) and calibration inputs X (tokens, columns), of
which only the Hessian H = X^T X (columns, columns) is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.grids import Grid
from zoo.errors import NumericsError

LAZY_COLUMNS = 128  # columns eliminated before the rest of the matrix is updated, as in GPTQ
GRAM_TILE = 512


class Gram:
    """Accumulates X^T X in float32. Only tiles on and above the diagonal are computed."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs (..., columns)."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += x.shape[0]
        for top in range(0, x.shape[1], GRAM_TILE):
            rows = slice(top, top + GRAM_TILE)
            self.sum[rows, top:].addmm_(x[:, rows].t(), x[:, top:])

    def hessian(self) -> Tensor:
        """X^T X / tokens, (columns, columns), symmetric."""
        upper = self.sum.triu() / max(self.tokens, 1)
        return upper + upper.triu(1).t()


def output_error(weight: Tensor, compressed: Tensor, hessian: Tensor) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2."""
    delta = weight - compressed
    lost = ((delta @ hessian) * delta).sum(dtype=torch.float64)
    whole = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(lost / whole) if whole > 0 else 0.0


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U.

    One Cholesky factorisation of H with its order reversed and one triangular inverse, instead of
    factorise, invert, factorise. Damping grows tenfold until the factorisation succeeds.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    identity = torch.eye(hessian.shape[0], device=hessian.device)
    for attempt in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        damped.diagonal()[diagonal == 0] = mean if mean > 0 else 1.0
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)  # H = R R^T with R upper triangular
            return torch.linalg.solve_triangular(upper, identity, upper=True)
    raise NumericsError(
        "the Hessian of a layer cannot be factorised",
        expected="finite, varied calibration activations",
        try_="use more calibration windows or a larger `damping`",
    )


@dataclass(frozen=True)
class MaskRule:
    """Chooses a mask for `span` consecutive columns at a time from their scores (rows, span)."""

    span: int
    choose: Callable[[Tensor], Tensor]


# Chooses the grid of one group of columns, from (weight (rows, group), importance (group,)).
GridRule = Callable[[Tensor, Tensor], Grid]


@dataclass(frozen=True)
class Solution:
    weight: Tensor  # (rows, columns), zeros where pruned, on the grid where quantized
    mask: Tensor | None  # (rows, columns) bool
    grid: Grid | None


def solve(
    weight: Tensor,
    factor: Tensor,
    *,
    mask: Tensor | MaskRule | None = None,
    group: int | None = None,
    grid_rule: GridRule | None = None,
    static_grid: Grid | None = None,
) -> Solution:
    """Eliminate column after column: prune, round, and spread the error over the columns to come.

    weight (rows, columns) float32; factor U of `inverse_factor`. `mask` is fixed, or chosen on the way from
    w^2 / U_jj^2. The grid is static, or chosen per `group` of columns when the solver reaches it.
    Source: SparseGPT, arXiv:2301.00774, and GPTQ, arXiv:2210.17323; here both in one pass.
    """
    rows, columns = weight.shape
    remaining = weight.t().contiguous()  # (columns, rows): a column of the weight is contiguous
    fixed = mask.t().contiguous() if isinstance(mask, Tensor) else None
    chosen = torch.empty_like(remaining, dtype=torch.bool) if isinstance(mask, MaskRule) else None
    result = torch.empty_like(remaining)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    grid = static_grid
    step = _aligned(
        LAZY_COLUMNS, group if grid_rule else None, mask.span if isinstance(mask, MaskRule) else None
    )
    diagonal = factor.diagonal()
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block = remaining[start:stop]
        local = factor[start:stop, start:stop].contiguous()
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = start + j
            if isinstance(mask, MaskRule) and chosen is not None and column % mask.span == 0:
                end = min(column + mask.span, columns)
                scores = (block[j : j + end - column] / diagonal[column:end, None]).square_()
                chosen[column:end] = mask.choose(scores.t()).t()
            if grid_rule and group and column % group == 0:
                ahead = block[j : j + group] if group <= step else remaining[column : column + group]
                kept = (
                    ahead
                    if chosen is None and fixed is None
                    else ahead * _rows_of(chosen, fixed, column, group)
                )
                grid = grid_rule(kept.t().contiguous(), diagonal[column : column + group].pow(-2))
                scales.append(grid.scale)
                if grid.zero_point is not None:
                    zeros.append(grid.zero_point)
            w = block[j]
            value = w
            if grid is not None:
                value = grid.column(column // group if static_grid and group else 0, w)
            keep = chosen[column] if chosen is not None else fixed[column] if fixed is not None else None
            if keep is not None:
                value = value * keep
            result[column] = value
            error = (w - value).div_(local[j, j])
            errors[j] = error
            if j + 1 < stop - start:
                block[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        if stop < columns:
            remaining[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    final_mask = chosen if chosen is not None else fixed
    if static_grid is None and grid_rule and grid is not None:
        grid = Grid(grid.bits, torch.cat(scales, dim=1), torch.cat(zeros, dim=1) if zeros else None)
    return Solution(
        result.t().contiguous(), None if final_mask is None else final_mask.t().contiguous(), grid
    )


def _aligned(step: int, group: int | None, span: int | None) -> int:
    """The number of columns nearest below `step` (at least one) that whole groups and spans fill."""
    unit = max(group or 1, span or 1)
    return max(step // unit, 1) * unit


def _rows_of(chosen: Tensor | None, fixed: Tensor | None, column: int, group: int) -> Tensor:
    mask = chosen if chosen is not None else fixed
    assert mask is not None
    return mask[column : column + group]
