"""Layers whose forward pass sees other weights than those that learn: pruned ones as zeros, and all of them
rounded to the very grid that is exported.

Gradients go straight through both; scales are learned, or searched anew now and then. What leaves
training are the integers and float16 scales of the last forward pass, not a rounding of the result.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.compress import make_grid
from pipelines.grids import Grid, grouped
from pipelines.recipe import Rounding
from zoo.errors import NumericsError, PatternError

LARGEST_INTEGER = 127  # of int8: the runner's format has no -128


class _Round(torch.autograd.Function):
    """Nearest integer; the gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        grad: Tensor = grads[0]
        return grad


class _Half(torch.autograd.Function):
    """The nearest float16, which is what files keep of a scale; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        grad: Tensor = grads[0]
        return grad


class Rounder(nn.Module):
    """The grid of one weight (rows, columns): scale * q, or scale * q + minimum, per group of a row.

    A learned scale is the searched one times exp(delta), so that the learning rate is a relative one for
    scales of any size. Its gradient is that of LSQ (arXiv:1902.08153), from the straight-through rounding.
    """

    base: Tensor  # (rows, groups) float32: the searched scale; it may be negative
    floor: Tensor | None  # (rows, groups) float32: the minimum, or the integer zero point; None if symmetric

    def __init__(self, weight: Tensor, rounding: Rounding, learned: bool) -> None:
        super().__init__()
        self.rounding = rounding
        columns = weight.shape[1]
        self.group = columns if rounding.group is None else rounding.group
        groups = grouped(weight, self.group).shape[1]
        shape = (weight.shape[0], groups)
        self.integer = rounding.zero_point == "integer"
        low = 0 if not rounding.symmetric else max(-(1 << rounding.bits - 1), -LARGEST_INTEGER)
        self.lowest = low
        self.highest = (1 << rounding.bits) - 1 if not rounding.symmetric else (1 << rounding.bits - 1) - 1
        self.register_buffer("base", torch.ones(shape, device=weight.device))
        floor = None if rounding.symmetric else torch.zeros(shape, device=weight.device)
        self.register_buffer("floor", floor)
        self.delta = nn.Parameter(torch.zeros(shape, device=weight.device), requires_grad=learned)
        self.on = False  # a plain attribute, so that torch.compile sees a constant

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Search the grid for `weight` as it is now, and round from now on."""
        # 8 bits need no smaller range, and absmax keeps -128 out of it
        absmax = self.rounding.symmetric and self.rounding.bits == 8
        grid = make_grid(weight.float(), self.rounding, "absmax" if absmax else "rtn", None)
        self.base.copy_(grid.scale)
        self.delta.zero_()
        if grid.zero_point is not None and self.floor is not None:
            self.floor.copy_(grid.zero_point if self.integer else -grid.zero_point * grid.scale)
        self.on = True

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and what is added, (rows, groups), as files hold them."""
        scale: Tensor = _Half.apply(self.base * self.delta.exp())  # type: ignore[no-untyped-call]
        # a scale that float16 cannot hold would make weights of 0 / 0
        tiny = 2.0**-24
        scale = torch.where(scale.abs() < tiny, torch.full_like(scale, tiny).copysign(self.base), scale)
        if self.floor is None:
            return scale, None
        if self.integer:
            return scale, -self.floor * scale
        return scale, self.floor.to(torch.float16).to(scale.dtype)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q (rows, groups, group) and the grid that they are on."""
        scale, low = self.grid()
        x = weight.view(weight.shape[0], scale.shape[1], -1)
        if self.integer and self.floor is not None:
            x = x / scale[..., None] + self.floor[..., None]
        elif low is not None:
            x = (x - low[..., None]) / scale[..., None]
        else:
            x = x / scale[..., None]
        q: Tensor = _Round.apply(x.clamp(self.lowest, self.highest))  # type: ignore[no-untyped-call]
        return q, scale, low

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        q, scale, low = self.integers(weight)
        if self.integer and self.floor is not None:
            rounded = (q - self.floor[..., None]) * scale[..., None]
        else:
            rounded = q * scale[..., None]
            if low is not None:
                rounded = rounded + low[..., None]
        return rounded.view_as(weight).to(weight.dtype)

    def exported(self) -> Grid:
        """The grid in the pipeline's form."""
        scale, low = self.grid()
        zero = None if low is None else self.floor if self.integer else -low / scale
        zero = None if zero is None else zero.detach().clone()
        return Grid(self.rounding.bits, self.group, scale.detach().clone(), zero)


class _Keep(torch.autograd.Function):
    """Zero where the mask does not keep; there the gradient is multiplied by `passing`.

    With 1 it goes straight through (SR-STE, arXiv:2102.04010), with 0 only kept weights learn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, passing: Tensor) -> Tensor:
        ctx.save_for_backward(mask, passing)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        mask, passing = ctx.saved_tensors
        grad: Tensor = grads[0]
        return torch.where(mask, grad, grad * passing), None, None


class EffectiveLinear(nn.Linear):
    """A linear layer that computes with its weights masked by `kept` and then rounded, if so."""

    rounder: Rounder | None  # no default: a class attribute would hide the module
    # (out, in) bool, and a number; no buffers, which DDP would send around at every step
    kept: Tensor | None = None
    passing: Tensor

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.kept is not None:
            weight = _Keep.apply(weight, self.kept, self.passing)  # type: ignore[no-untyped-call]
        if self.rounder is not None:
            weight = self.rounder(weight)
        return F.linear(input, weight, self.bias)


class RoundedEmbedding(nn.Embedding):
    rounder: Rounder

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.rounder(self.weight))


def add_rounder(module: nn.Module, name: str, rounding: Rounding, learned: bool, masked: bool) -> None:
    """Give a linear or embedding layer a grid, not yet in use. Raises PatternError if it does not fit."""
    if masked and not rounding.symmetric and rounding.zero_point != "integer":
        raise PatternError(
            f"{name} has pruned weights, which must be 0, and this grid need not hold 0",
            expected="`symmetric: true` or `zero_point: integer`",
        )
    try:
        rounder = Rounder(module.get_parameter("weight"), rounding, learned)
    except PatternError as error:
        error.what = f"{name}: {error.what}"
        raise
    # the class alone changes: names and parameters stay, so checkpoints and tied weights do too
    module.__class__ = RoundedEmbedding if isinstance(module, nn.Embedding) else EffectiveLinear
    module.rounder = rounder


def keep(module: nn.Module, mask: Tensor, passing: Tensor) -> None:
    """Let a linear layer compute with the weights that `mask` keeps alone, whatever the others are.

    passing (): what the gradients of the others are multiplied by.
    """
    layer = cast(EffectiveLinear, module)
    if not isinstance(module, EffectiveLinear):
        module.__class__ = EffectiveLinear
        layer.rounder = None
    layer.kept, layer.passing = mask, passing


def check_exact(name: str, stored: Tensor, q: Tensor, grid: Grid) -> None:
    """Raise NumericsError unless a file's weights lead back to the integers q (rows, groups, group)."""
    groups = stored.float().view(stored.shape[0], grid.scale.shape[1], -1)
    zero = 0.0 if grid.zero_point is None else grid.zero_point[..., None]
    found = (groups / grid.scale[..., None] + zero).round()
    if not torch.equal(found, q):
        off = int((found != q).sum())
        raise NumericsError(
            f"{name}: the stored weights are not the trained integers", saw=f"{off} of {q.numel()} differ"
        )
