"""The second-order solvers against explicit elimination, exact least squares and closed forms in float64.

The solvers run in float64 here, where they must agree with the references to rounding; that float32, which
the pipeline uses, costs nothing is a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.grids import Grid, absmax_grid, searched_grid, zero_point_grid
from pipelines.masks import Grouped, Pattern, Unstructured, best_mask
from pipelines.solve import (
    GRAM_TILE,
    Curvature,
    Drift,
    Gram,
    admm,
    gptq,
    inverse_factor,
    output_error,
    refit,
    sparsegpt,
)
from tests import reference
from zoo.errors import NumericsError, PatternError

DAMPING = 0.01
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the matrices are too small to share
    yield
    torch.set_default_dtype(before)


@dataclass(frozen=True)
class Problem:
    weight: Tensor  # (rows, columns)
    inputs: Tensor  # (tokens, columns)

    @property
    def hessian(self) -> Tensor:
        return self.inputs.t() @ self.inputs / len(self.inputs)

    def curvature(self, dtype: torch.dtype = torch.float64) -> Curvature:
        return Curvature(self.hessian.to(dtype), DAMPING)

    def damped(self) -> np.ndarray:
        return reference.damped(self.hessian.numpy(), DAMPING)


def problem(rows: int, columns: int, *, kind: str = "correlated", seed: int = 0) -> Problem:
    """Inputs like activations: few strong directions, columns of very different size."""
    g = torch.Generator().manual_seed(1000 * seed + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tokens = columns // 2 if kind == "few tokens" else 4 * columns
    inputs = normal(tokens, columns // 4) @ normal(columns // 4, columns) / (columns // 4) ** 0.5
    inputs = (inputs + 0.5 * normal(tokens, columns)) * torch.exp(0.7 * normal(columns))
    weight = 0.05 * normal(rows, columns)
    if kind == "dead columns":
        inputs[:, ::7] = 0.0
    if kind == "zero row":
        weight[0] = 0.0
    return Problem(weight, inputs)


KINDS = ("correlated", "few tokens", "dead columns", "zero row")
COLUMNS = (16, 64, 128, 144, 256, 320)
# Every width with ordinary inputs, and the edges of a span with each of the others.
CASES = [("correlated", columns) for columns in COLUMNS]
CASES += [(kind, columns) for kind in KINDS[1:] for columns in (16, 144)]


def as_reference(grid: Grid) -> reference.StaticGrid:
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    return reference.StaticGrid(grid.scale.double().numpy(), zero.double().numpy(), grid.lowest, grid.highest)


def pattern_of(keywords: dict[str, float]) -> Pattern:
    if "sparsity" in keywords:
        return Unstructured(keywords["sparsity"])
    window = keywords.get("window")
    return Grouped(int(keywords["keep"]), int(keywords["group"]), None if window is None else int(window))


# --- GPTQ


@pytest.mark.parametrize("kind, columns", CASES)
@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_is_column_by_column_elimination(columns: int, kind: str, activation_order: bool) -> None:
    p = problem(3, columns, kind=kind)
    grid = absmax_grid(p.weight, 4, 16)
    found = gptq(p.weight, p.curvature(), grid, activation_order=activation_order)
    wanted = reference.gptq(
        p.weight.numpy(), p.damped(), as_reference(grid), activation_order=activation_order
    )
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("make", ["absmax", "zero_point", "searched"])
@pytest.mark.parametrize("masked", [True, False])
def test_gptq_on_every_kind_of_grid(rows: int, bits: int, make: str, masked: bool) -> None:
    p = problem(rows, 144)
    grid = {
        "absmax": lambda: absmax_grid(p.weight, bits, 144),
        "zero_point": lambda: zero_point_grid(p.weight, bits, 48),
        "searched": lambda: searched_grid(
            p.weight, bits, 16, symmetric=True, importance=p.hessian.diagonal()
        ),
    }[make]()
    if make == "searched" and rows == 9:
        assert (grid.scale < 0).any()
    mask = best_mask(p.weight.abs(), Grouped(8, 16)) if masked else None
    found = gptq(p.weight, p.curvature(), grid, mask)
    wanted = reference.gptq(
        p.weight.numpy(),
        p.damped(),
        as_reference(grid),
        mask=None if mask is None else mask.numpy(),
        activation_order=True,
    )
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
    if mask is not None:
        assert (found[~mask] == 0).all()


def test_gptq_beats_rounding_to_nearest() -> None:
    p = problem(32, 256)
    grid = searched_grid(p.weight, 4, 64, symmetric=True)
    nearest = output_error(p.weight, grid.round(p.weight), p.hessian)
    for activation_order in (True, False):
        found = gptq(p.weight, p.curvature(), grid, activation_order=activation_order)
        assert output_error(p.weight, found, p.hessian) < 0.6 * nearest


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = problem(8, 144).weight
    flat = Curvature(torch.eye(144), DAMPING)
    grid = absmax_grid(weight, 4, 48)
    torch.testing.assert_close(gptq(weight, flat, grid), grid.round(weight))
    pruned, mask = sparsegpt(weight, flat, Grouped(8, 16))
    assert torch.equal(mask, best_mask(weight.abs(), Grouped(8, 16)))
    torch.testing.assert_close(pruned, weight * mask)


# --- SparseGPT

PATTERNS: list[dict[str, float]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.3},
    {"keep": 2, "group": 4},
    {"keep": 8, "group": 16},
    {"keep": 6, "group": 16, "window": 4},
    {"keep": 8, "group": 16, "window": 8},
]


@pytest.mark.parametrize("kind, columns", CASES)
@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
def test_sparsegpt_is_elimination_with_a_mask_chosen_on_the_way(
    columns: int, kind: str, keywords: dict[str, float]
) -> None:
    p = problem(3, columns, kind=kind)
    found, mask = sparsegpt(p.weight, p.curvature(), pattern_of(keywords))
    wanted, wanted_mask = reference.sparsegpt(p.weight.numpy(), p.damped(), **keywords)  # type: ignore[arg-type]
    live = p.weight.abs().sum(dim=1) > 0  # of a row of zeros, any mask is as good
    np.testing.assert_array_equal(mask[live].numpy(), wanted_mask[live.numpy()])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize(
    "columns, keywords",
    [
        (144, {"keep": 20, "group": 48}),  # 128 is no multiple of the group
        (256, {"keep": 100, "group": 256}),  # larger than the span of an unstructured mask
        (129, {"sparsity": 0.5}),
        (1, {"sparsity": 0.0}),
    ],
)
def test_sparsegpt_where_groups_and_spans_do_not_align(columns: int, keywords: dict[str, float]) -> None:
    p = problem(2, columns) if columns > 4 else Problem(torch.ones(2, 1), torch.ones(5, 1))
    found, mask = sparsegpt(p.weight, p.curvature(), pattern_of(keywords))
    wanted, wanted_mask = reference.sparsegpt(p.weight.numpy(), p.damped(), **keywords)  # type: ignore[arg-type]
    np.testing.assert_array_equal(mask.numpy(), wanted_mask)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("columns", [64, 144, 320])
@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_pass_prunes_and_rounds(columns: int, keywords: dict[str, float], symmetric: bool) -> None:
    p = problem(3, columns)
    grid = searched_grid(p.weight, 4, 16, symmetric=symmetric, importance=p.hessian.diagonal())
    found, mask = sparsegpt(p.weight, p.curvature(), pattern_of(keywords), grid)
    wanted, wanted_mask = reference.sparsegpt(
        p.weight.numpy(),
        p.damped(),
        grid=as_reference(grid),
        **keywords,  # type: ignore[arg-type]
    )
    np.testing.assert_array_equal(mask.numpy(), wanted_mask)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", [sparsegpt, admm])
def test_equal_scores_still_fill_the_pattern_exactly(solver: object, keywords: dict[str, float]) -> None:
    weight = torch.full((4, 144), 0.1)
    weight[1] = 0.0
    weight[2, ::2] = -0.1
    curvature = Curvature(torch.eye(144), DAMPING)
    pattern = pattern_of(keywords)
    found, mask = solver(weight, curvature, pattern)  # type: ignore[operator]
    assert torch.isfinite(found).all()
    check_pattern(mask, pattern)


# --- ADMM and the refit


def check_pattern(mask: Tensor, pattern: Pattern) -> None:
    if isinstance(pattern, Unstructured):
        spans = mask.split(128, dim=1)
        by_row = mask.sum(dim=1) == mask.shape[1] - round(mask.shape[1] * pattern.sparsity)
        by_span = torch.stack(
            [s.sum(dim=1) == s.shape[1] - round(s.shape[1] * pattern.sparsity) for s in spans]
        )
        assert by_row.all() or by_span.all()
    elif pattern.window is None:
        assert (mask.view(-1, pattern.group).sum(dim=1) == pattern.keep).all()
    else:
        legal = {row.tobytes() for row in reference.banded_masks(pattern.keep, pattern.window)}
        assert all(row.tobytes() in legal for row in mask.view(-1, 16).numpy())


@pytest.mark.parametrize("kind, columns", CASES)
@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
def test_admm_fills_the_pattern_and_beats_sparsegpt(
    columns: int, kind: str, keywords: dict[str, float]
) -> None:
    torch.set_default_dtype(torch.float32)
    p = problem(24, columns, kind=kind)
    pattern, curvature, weight = pattern_of(keywords), p.curvature(torch.float32), p.weight.float()
    found, mask = admm(weight, curvature, pattern)
    rival, _ = sparsegpt(weight, curvature, pattern)
    check_pattern(mask, pattern)
    assert (found[~mask] == 0).all() and torch.isfinite(found).all()
    errors = [output_error(p.weight, w.double(), p.hessian) for w in (found, rival)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("kind, columns", CASES)
def test_refit_solves_the_normal_equations_of_every_row(columns: int, kind: str) -> None:
    p = problem(6, columns, kind=kind)
    curvature = p.curvature()
    mask = best_mask(p.weight.abs(), Grouped(8, 16))
    mask[2] = torch.rand(columns, generator=torch.Generator().manual_seed(3)) < 0.2
    mask[3] = False
    mask[4] = True
    target = p.weight * curvature.scale
    found = refit(target, target * mask, mask, curvature.normalized) / curvature.scale
    # The penalty of this solver is relative to each column's own power, not to their mean.
    hessian = p.hessian.numpy() + DAMPING * np.diag(np.diag(p.damped()))
    wanted = reference.least_squares(p.weight.numpy(), mask.numpy(), hessian)
    assert (found[~mask] == 0).all()
    weight = p.weight.numpy()
    found_error = reference.output_error(weight, found.numpy(), hessian)
    least_error = reference.output_error(weight, wanted, hessian)
    start_error = reference.output_error(weight, weight * mask.numpy(), hessian)
    assert least_error - 1e-12 <= found_error <= 1.001 * least_error
    assert least_error < 0.9 * start_error


# --- Hessians and their factors


@pytest.mark.parametrize("columns", [16, GRAM_TILE, GRAM_TILE + 1, 2 * GRAM_TILE + 76])
def test_gram_is_the_mean_outer_product(columns: int) -> None:
    torch.set_default_dtype(torch.float32)
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 11, columns, generator=g), torch.randn(1, 3, columns, generator=g)]
    gram = Gram(columns, CPU)
    for batch in batches:
        gram.add(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    found = gram.hessian()
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), rows.t() @ rows / 25, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, *COLUMNS])
def test_inverse_factor_factors_the_damped_inverse(columns: int) -> None:
    p = problem(1, columns) if columns > 1 else Problem(torch.ones(1, 1), torch.ones(5, 1))
    factor = inverse_factor(p.hessian, DAMPING)
    assert torch.equal(factor, factor.triu())
    np.testing.assert_allclose(factor.t() @ factor, np.linalg.inv(p.damped()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("hessian", [torch.zeros(8, 8), torch.ones(8, 8), torch.diag(torch.arange(8.0))])
def test_singular_hessians_are_damped_into_solvable_ones(hessian: Tensor) -> None:
    torch.set_default_dtype(torch.float32)
    curvature = Curvature(hessian.float(), 1e-9)  # far below the rounding error of float32
    weight = torch.arange(1.0, 17.0).view(2, 8)
    grid = absmax_grid(weight, 4, 8)
    for found in (
        sparsegpt(weight, curvature, Grouped(2, 4))[0],
        gptq(weight, curvature, grid),
        admm(weight, Curvature(hessian.float(), DAMPING), Grouped(2, 4))[0],
    ):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    hessian = torch.eye(16)
    hessian[3, 3] = bad
    with pytest.raises(NumericsError, match="not finite"):
        Curvature(hessian, DAMPING)


def test_an_indefinite_hessian_is_refused() -> None:
    hessian = torch.eye(16)
    hessian[3, 3] = -100.0
    with pytest.raises(NumericsError, match="cannot be factorised"):
        inverse_factor(hessian, DAMPING)


@pytest.mark.parametrize("solver", [sparsegpt, admm])
@pytest.mark.parametrize("pattern", [Grouped(8, 16), Grouped(8, 16, 8), Grouped(3, 7)])
def test_a_pattern_that_does_not_divide_is_refused(solver: object, pattern: Pattern) -> None:
    p = problem(2, 24)
    with pytest.raises(PatternError, match="24 columns"):
        solver(p.weight, p.curvature(), pattern)  # type: ignore[operator]


def test_output_error_is_that_of_the_outputs() -> None:
    p = problem(5, 64)
    other = p.weight + 0.01 * torch.randn(5, 64, generator=torch.Generator().manual_seed(9))
    outputs = p.inputs @ p.weight.t()
    wanted = (outputs - p.inputs @ other.t()).square().sum() / outputs.square().sum()
    assert output_error(p.weight, other, p.hessian) == pytest.approx(float(wanted), rel=1e-9)
    assert output_error(p.weight, p.weight, p.hessian) == 0.0
    assert output_error(torch.zeros(5, 64), torch.zeros(5, 64), p.hessian) == 0.0


# --- Correction


@pytest.mark.parametrize("columns", [16, 144])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("with_residual", [True, False])
def test_correction_is_the_ridge_regression(columns: int, fraction: float, with_residual: bool) -> None:
    torch.set_default_dtype(torch.float32)
    p = problem(6, columns)
    g = torch.Generator().manual_seed(5)
    original, weight = p.inputs.float(), p.weight.float()
    inputs = original + 0.3 * torch.randn(original.shape, generator=g)
    gap = 0.1 * torch.randn(len(original), 6, generator=g) if with_residual else None
    drift = Drift(columns, 6 if with_residual else None, CPU)
    half = len(original) // 2
    for part in (slice(None, half), slice(half, None)):
        drift.add(inputs[None, part], original[None, part], None if gap is None else gap[None, part])
    curvature = Curvature(inputs.t() @ inputs / len(inputs), DAMPING)
    (found,) = drift.corrected([weight], curvature, fraction)
    wanted = reference.corrected(
        weight.double().numpy(),
        inputs.double().numpy(),
        original.double().numpy(),
        None if gap is None else gap.double().numpy(),
        5 * DAMPING,  # regression onto noisy targets wants more of it than elimination
        fraction,
    )
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5)


# --- float32 is enough


@pytest.mark.parametrize("kind", KINDS)
def test_float32_costs_no_accuracy(kind: str) -> None:
    p = problem(24, 320, kind=kind)
    grid = searched_grid(p.weight, 4, 64, symmetric=True, importance=p.hessian.diagonal())
    errors: dict[torch.dtype, list[float]] = {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        curvature, weight = p.curvature(dtype), p.weight.to(dtype)
        found = [
            gptq(weight, curvature, grid),
            sparsegpt(weight, curvature, Grouped(8, 16))[0],
            sparsegpt(weight, curvature, Unstructured(0.5), grid)[0],
            admm(weight, curvature, Grouped(8, 16))[0],
        ]
        errors[dtype] = [output_error(p.weight, w.double(), p.hessian) for w in found]
    assert errors[torch.float32] == pytest.approx(errors[torch.float64], rel=0.02)
