"""Quantization grids: weight = scale * (q - zero_point), with integer q.

Weights are (rows, columns) and are seen as (rows, groups, group): consecutive columns of a row that
share a scale. Symmetric grids have no zero point and q in [-2^(bits-1), 2^(bits-1) - 1]; asymmetric ones
q in [0, 2^bits - 1] and either an integer zero point inside, so that 0.0 is on the grid, or one that makes
the minimum a float16, as in GGUF's Q4_1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipelines.masks import check_divides

PIECE = 1 << 24  # weights of whole rows that are searched at a time: a search needs many times their memory
SHRINK = tuple(1.0 - 0.02 * step for step in range(26))  # candidates of the scale search: 1.00 ... 0.50


@dataclass(frozen=True)
class Grid:
    """scale and zero_point (rows, groups) float32; zero_point is None if symmetric."""

    bits: int
    group: int  # columns
    scale: Tensor
    zero_point: Tensor | None

    @property
    def lowest(self) -> int:
        return 0 if self.zero_point is not None else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    def integers(self, weight: Tensor) -> Tensor:
        """Nearest q of every weight, (rows, columns) float32 of integers."""
        groups = weight.view(weight.shape[0], self.scale.shape[1], -1)
        return self._nearest(groups, self.scale[..., None], self._zero()).view_as(weight)

    def round(self, weight: Tensor) -> Tensor:
        """Nearest representable weight, (rows, columns)."""
        groups = weight.view(weight.shape[0], self.scale.shape[1], -1)
        q = self._nearest(groups, self.scale[..., None], self._zero())
        return ((q - self._zero()) * self.scale[..., None]).view_as(weight)

    def column(self, column: int, weight: Tensor) -> Tensor:
        """`round` for one column of all rows, (rows,)."""
        scales, zeros = self._by_group
        group = column // self.group
        q = weight / scales[group]
        if zeros is None:
            return q.round_().clamp_(self.lowest, self.highest).mul_(scales[group])
        q = (q + zeros[group]).round_().clamp_(self.lowest, self.highest)
        return q.sub_(zeros[group]).mul_(scales[group])

    @cached_property
    def _by_group(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as (groups, rows), each group contiguous."""
        zeros = None if self.zero_point is None else self.zero_point.t().contiguous()
        return self.scale.t().contiguous(), zeros

    def _zero(self) -> Tensor | float:
        return self.zero_point[..., None] if self.zero_point is not None else 0.0

    def _nearest(self, groups: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        return (groups / scale + zero).round_().clamp_(self.lowest, self.highest)


def storable(scale: Tensor) -> Tensor:
    """The scale as files keep it: rounded to float16, never 0."""
    rounded = scale.to(torch.float16).float()
    return torch.where(rounded == 0, torch.full_like(rounded, 2.0**-24), rounded)  # float16's smallest


def absmax_grid(weight: Tensor, bits: int, group: int) -> Grid:
    """Symmetric, q = round((2^(bits-1) - 1) / max|x| * x), as in LLM.int8 (arXiv:2208.07339)."""
    groups = grouped(weight, group)
    return Grid(bits, group, storable(groups.abs().amax(dim=2) / (2 ** (bits - 1) - 1)), None)


def zero_point_grid(weight: Tensor, bits: int, group: int, *, integer: bool = True) -> Grid:
    """Asymmetric from min(x) to max(x); with an integer zero point, over a range that includes 0."""
    groups = grouped(weight, group)
    return _between(groups.amin(dim=2), groups.amax(dim=2), bits, group, integer)


def _between(low: Tensor, high: Tensor, bits: int, group: int, integer: bool) -> Grid:
    if integer:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = storable((high - low) / (2**bits - 1))
        return Grid(bits, group, scale, (-low / scale).round_().clamp_(0, 2**bits - 1))
    scale = storable((high - low) / (2**bits - 1))
    return Grid(bits, group, scale, -low.to(torch.float16).float() / scale)


def searched_grid(
    weight: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    integer: bool = True,
    importance: Tensor | None = None,
) -> Grid:
    """The grid with the least weighted rounding error among shrunken ranges.

    `integer` is the kind of zero point, if asymmetric. importance (columns,) weighs the squared error of
    each column, as the diagonal of the Hessian does; None: all alike. A symmetric grid may have a negative
    scale, so that the side with the larger weight gets the extra level -2^(bits-1).
    """
    if weight.numel() > PIECE and len(weight) > 1:
        grids = [
            searched_grid(part, bits, group, symmetric=symmetric, integer=integer, importance=importance)
            for part in torch.split(weight, max(1, PIECE // weight.shape[1]))
        ]
        zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
        return Grid(
            bits, group, torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None
        )
    groups = grouped(weight, group)
    cost = torch.ones_like(groups[:1]) if importance is None else importance.view(1, -1, groups.shape[2])
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    candidates = []
    if symmetric:
        peak = torch.maximum(high, -low)
        side = torch.where(high > -low, -1.0, 1.0)  # the sign that sends the peak to -2^(bits-1)
        half = 2 ** (bits - 1)
        for shrink in SHRINK:
            candidates.append(Grid(bits, group, storable(peak * (shrink / half)) * side, None))
            candidates.append(Grid(bits, group, storable(peak * (shrink / (half - 1))), None))
    else:
        candidates += [_between(low * shrink, high * shrink, bits, group, integer) for shrink in SHRINK]
    best = candidates[0]
    least: Tensor | None = None
    for grid in candidates:
        scale, zero = grid.scale[..., None], grid._zero()
        rounded = (grid._nearest(groups, scale, zero) - zero) * scale
        error = ((rounded - groups).square_() * cost).sum(dim=2)
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            bits,
            group,
            torch.where(better, grid.scale, best.scale),
            None
            if best.zero_point is None or grid.zero_point is None
            else torch.where(better, grid.zero_point, best.zero_point),
        )
    return best


def grouped(weight: Tensor, group: int) -> Tensor:
    check_divides(weight.shape[1], group, "quantization")
    return weight.view(weight.shape[0], -1, group)
