"""Quantization grids against slow float64 ones, and the scale search against trying everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.grids import Grid, absmax_grid, searched_grid, zero_point_grid
from tests import reference
from zoo.errors import PatternError

minimum_grid = partial(zero_point_grid, integer=False)
SHAPES = [(1, 16, 16), (3, 64, 32), (5, 144, 16), (2, 256, 64), (4, 320, 320), (7, 128, 128)]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """float64, so that only the algorithm counts; with a row of zeros, a positive one and a negative one."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight *= 0.05
    if rows > 2:
        weight[0] = 0.0
        weight[1].abs_()
        weight[2] = -weight[2].abs()
    return weight


@pytest.mark.parametrize("rows, columns, group", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("make", ["absmax", "zero_point", "minimum"])
def test_grid_is_the_paper_s(make: str, bits: int, rows: int, columns: int, group: int) -> None:
    weight = weights(rows, columns)
    makers = {"absmax": absmax_grid, "zero_point": zero_point_grid, "minimum": minimum_grid}
    found = makers[make](weight, bits, group)
    wanted = getattr(reference, make)(weight.numpy(), bits, group)
    assert found.scale.shape == (rows, columns // group)
    live = weight.reshape(rows, -1, group).abs().amax(dim=2) > 0
    np.testing.assert_array_equal(found.scale[live].numpy(), wanted.scale[live.numpy()])
    assert (found.lowest, found.highest) == (wanted.lowest, wanted.highest)
    if found.zero_point is not None:
        np.testing.assert_allclose(found.zero_point[live].numpy(), wanted.zero[live.numpy()], rtol=1e-6)
    np.testing.assert_allclose(found.round(weight).numpy(), wanted.round(weight.numpy()), atol=1e-7)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("make", [absmax_grid, zero_point_grid, minimum_grid])
def test_small_weights_keep_their_precision(make: Callable[..., Grid], size: float) -> None:
    """Scales of small int8 rows fall below the normal numbers of float16, 6.1e-5; rows that small occur."""
    weight = weights(1, 64) * (size / 0.05)
    error = (make(weight, 8, 64).round(weight) - weight).square().sum() / weight.square().sum()
    assert error < {1e-2: 1e-4, 1e-3: 1e-4, 1e-4: 3e-4, 1e-5: 1e-2}[size]


def grids(weight: Tensor, bits: int, group: int) -> list[Grid]:
    return [
        absmax_grid(weight, bits, group),
        zero_point_grid(weight, bits, group),
        searched_grid(weight, bits, group, symmetric=True),
        searched_grid(weight, bits, group, symmetric=False),
        searched_grid(weight, bits, group, symmetric=False, integer=False),
        minimum_grid(weight, bits, group),
    ]


@pytest.mark.parametrize("rows, columns, group", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grid_can_be_stored_and_agrees_with_itself(
    rows: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    weight = weights(rows, columns).to(dtype)
    for grid in grids(weight, 4, group):
        q, rounded = grid.integers(weight), grid.round(weight)
        assert torch.equal(q, q.round())
        assert grid.lowest <= q.min() and q.max() <= grid.highest
        assert torch.equal(grid.scale, grid.scale.half().float())  # what the files keep
        assert (grid.scale != 0).all() and torch.isfinite(grid.scale).all()
        zero = torch.zeros(()) if grid.zero_point is None else grid.zero_point.repeat_interleave(group, dim=1)
        scale = grid.scale.repeat_interleave(group, dim=1)
        torch.testing.assert_close(rounded, (scale * (q - zero)).to(dtype))
        if torch.equal(zero, zero.round()):
            assert torch.equal(grid.round(torch.zeros_like(weight)), torch.zeros_like(weight))
        else:  # the minimum is a float16
            torch.testing.assert_close(scale * zero, (scale * zero).half().float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grid.round(rounded), rounded)
        for column in range(columns):
            torch.testing.assert_close(grid.column(column, weight[:, column]), rounded[:, column])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric, integer", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_never_does_worse_than_the_plain_grid(
    bits: int, symmetric: bool, integer: bool, weighted: bool
) -> None:
    weight = weights(40, 128, seed=1)
    cost = torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).square()
    importance = cost if weighted else torch.ones_like(cost)
    plain = absmax_grid(weight, bits, 32) if symmetric else zero_point_grid(weight, bits, 32, integer=integer)
    found = searched_grid(
        weight, bits, 32, symmetric=symmetric, integer=integer, importance=cost if weighted else None
    )

    def loss(grid: Grid) -> Tensor:
        return ((grid.round(weight) - weight).square() * importance).view(40, -1, 32).sum(dim=2)

    assert (loss(found) <= loss(plain) * (1 + 1e-9)).all()
    if bits < 8:
        assert loss(found).sum() < 0.97 * loss(plain).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_large_matrix_has_the_grid_of_its_rows(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = torch.randn(40, 64), torch.rand(64)
    whole = searched_grid(weight, 4, 32, symmetric=symmetric, importance=importance)
    monkeypatch.setattr("pipelines.grids.PIECE", 64 * 7)
    pieces = searched_grid(weight, 4, 32, symmetric=symmetric, importance=importance)
    assert torch.equal(whole.scale, pieces.scale)
    assert torch.equal(whole.round(weight), pieces.round(weight))


def test_a_peak_on_the_positive_side_gets_the_extra_level() -> None:
    """Levels -8 ... 7 times a negative scale hold +8 steps."""
    steps = torch.tensor([[8.0, -7, 3, 1, -2, 5, -6, 4]])
    for sign in (1.0, -1.0):
        weight = sign * 0.25 * steps
        grid = searched_grid(weight, 4, 8, symmetric=True)
        assert torch.equal(grid.round(weight), weight)
        assert grid.scale.item() == -0.25 * sign


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_that_are_on_a_grid_stay_where_they_are(bits: int) -> None:
    """Q4_1's own weights, d * q + m with float16 d and m, come out as they went in."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 2**bits, (50, 64), generator=g)
    q[:, ::32], q[:, 1::32] = 0, 2**bits - 1
    d, m = [(torch.rand(50, 2, generator=g) * 0.01).half().float().repeat_interleave(32, dim=1) for _ in "dm"]
    weight = d * q - m
    for grid in (
        minimum_grid(weight, bits, 32),
        searched_grid(weight, bits, 32, symmetric=False, integer=False),
    ):
        torch.testing.assert_close(grid.round(weight), weight, rtol=1e-6, atol=1e-8)


def test_a_group_that_does_not_divide_is_refused() -> None:
    for make in (absmax_grid, zero_point_grid):
        with pytest.raises(PatternError, match=r"groups of 64.*144 columns"):
            make(torch.ones(2, 144), 4, 64)
