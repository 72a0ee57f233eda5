"""The second-order solvers: compress a linear layer so that its outputs change least.

All minimise ||X (W - W')^T||^2 for a weight W (rows, columns) and calibration inputs X (tokens, columns), of
which only the Hessian H = X^T X / tokens (columns, columns) is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pipelines.grids import Grid
from pipelines.masks import Grouped, Pattern, Unstructured, best_mask
from zoo.errors import NumericsError

LAZY_COLUMNS = 128  # columns eliminated before the rest of the matrix is updated, as in GPTQ
GRAM_TILE = 512
ADMM_ITERATIONS = 30
ADMM_RAMP = 20  # iterations over which the pattern tightens
ADMM_FREEZE = 8  # last iterations, with the mask fixed
REFIT_ITERATIONS = 20


class Gram:
    """Accumulates X^T X in float32. Only tiles on and above the diagonal are computed."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs (..., columns)."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self._tokens += x.shape[0]
        for top in range(0, x.shape[1], GRAM_TILE):
            rows = slice(top, top + GRAM_TILE)
            self._sum[rows, top:].addmm_(x[:, rows].t(), x[:, top:])

    def hessian(self) -> Tensor:
        """X^T X / tokens, (columns, columns), symmetric."""
        upper = self._sum.triu_().div_(max(self._tokens, 1))
        return upper + upper.triu(1).t()


class Drift:
    """How the inputs of a layer differ from the uncompressed model's, and what to do about it.

    Accumulates, for inputs X' (compressed model so far) and X (original), X'^T X, and where the layer adds to
    the residual stream, X'^T (r - r') for the residuals r, r' it adds to.
    """

    def __init__(self, columns: int, width: int | None, device: torch.device) -> None:
        self._cross = torch.zeros(columns, columns, device=device)
        self._residual = None if width is None else torch.zeros(columns, width, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor, original: Tensor, residual_gap: Tensor | None) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self._cross.addmm_(x.t(), original.reshape(x.shape).float())
        if self._residual is not None and residual_gap is not None:
            self._residual.addmm_(x.t(), residual_gap.reshape(x.shape[0], -1).float())
        self._tokens += x.shape[0]

    def corrected(self, weights: list[Tensor], curvature: Curvature, fraction: float) -> list[Tensor]:
        """Weights that, applied to X', come closest to what the original layer gives for X.

        W* minimises ||X W^T + r - (X' W*^T + r')||^2, ridge-regularised towards W by five times the damping;
        `fraction` of the way from W to W* is taken, since all of it fits the calibration text too closely.
        Source: the asymmetric calibration of GPTAQ, arXiv:2504.02692, in closed form, and here with the
        residual stream's error too.
        """
        ridge = 5 * curvature.damping * curvature.hessian.diagonal().mean()
        damped = curvature.hessian.clone()
        damped.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(damped)
        shift = self._cross / self._tokens - curvature.hessian
        corrected = []
        for weight in weights:
            gap = shift @ weight.t()  # X'^T (X - X') W^T / tokens
            if self._residual is not None:
                gap += self._residual / self._tokens
            corrected.append(weight + fraction * torch.cholesky_solve(gap, factor).t())
        return corrected


class Curvature:
    """The Hessian of one input and the factorisations that the solvers of its layers share."""

    def __init__(self, hessian: Tensor, damping: float) -> None:
        """hessian (columns, columns); damping is a fraction of the mean of its diagonal."""
        self.hessian = hessian
        self.damping = damping
        if not torch.isfinite(hessian.abs().sum()):  # nor what the solvers add up
            raise NumericsError(
                "the activations of a layer are not finite", try_="check the base model's weights"
            )

    @cached_property
    def factor(self) -> Tensor:
        return inverse_factor(self.hessian, self.damping)

    @cached_property
    def order(self) -> Tensor:
        """Columns by falling diagonal of the Hessian: GPTQ's activation order."""
        return torch.argsort(self.hessian.diagonal(), descending=True, stable=True)

    @cached_property
    def ordered_factor(self) -> Tensor:
        return inverse_factor(self.hessian[self.order][:, self.order], self.damping)

    @cached_property
    def scale(self) -> Tensor:
        """Square roots of the damped diagonal: the norm of each input column."""
        diagonal = self.hessian.diagonal()
        floor = max(self.damping * float(diagonal.mean()), 1e-20)
        return torch.sqrt(diagonal + floor)

    @cached_property
    def normalized(self) -> Tensor:
        """The Hessian of inputs scaled to unit norm, damped."""
        normalized = self.hessian / self.scale[:, None] / self.scale
        normalized.diagonal().add_(self.damping)
        return normalized

    @cached_property
    def normalized_inverse(self) -> Tensor:
        """(normalized + I)^-1: the penalty of the alternating directions is 1."""
        shifted = self.normalized.clone()
        shifted.diagonal().add_(1.0)
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        return inverse


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
        damped.diagonal()[damped.diagonal() == 0] = mean if mean > 0 else 1.0
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)  # H = R R^T with R upper triangular
            factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
            return factor
    raise NumericsError(
        "the Hessian of a layer cannot be factorised",
        expected="finite, varied calibration activations",
        try_="use more calibration windows or a larger `damping`",
    )


def sparsegpt(
    weight: Tensor, curvature: Curvature, pattern: Pattern, grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Prune and, with a grid, quantize in one pass. Returns the weight and its mask, (rows, columns).

    The mask is chosen as the solver comes by, from w^2 / U_jj^2: per row within 128 columns if unstructured,
    per group otherwise. Source: SparseGPT, arXiv:2301.00774.
    """
    if isinstance(pattern, Unstructured):
        span = LAZY_COLUMNS
    else:
        span = pattern.group
        if weight.shape[1] % span:
            best_mask(weight, pattern)  # raises the PatternError that says so

    mask = torch.empty_like(weight.t(), dtype=torch.bool)
    diagonal = curvature.factor.diagonal()

    def choose(column: int, block: Tensor) -> None:
        if column % span == 0:
            ahead = block[:span]
            scores = (ahead / diagonal[column : column + len(ahead), None]).square_()
            mask[column : column + len(ahead)] = best_mask(scores.t().contiguous(), pattern).t()

    def value(column: int, w: Tensor) -> Tensor:
        rounded = w if grid is None else grid.column(column, w)
        return rounded * mask[column]

    step = max(LAZY_COLUMNS // span, 1) * span
    result = _eliminate(weight.t().contiguous(), curvature.factor, step, value, choose)
    return result.t().contiguous(), mask.t().contiguous()


def gptq(
    weight: Tensor,
    curvature: Curvature,
    grid: Grid,
    mask: Tensor | None = None,
    *,
    activation_order: bool = True,
) -> Tensor:
    """Round column by column onto the grid, spreading each error over the columns to come.

    mask (rows, columns) keeps pruned weights at zero. The grid is fixed beforehand, so that the order of
    elimination does not change how the result is stored. Source: GPTQ, arXiv:2210.17323.
    """
    order = curvature.order if activation_order else torch.arange(weight.shape[1], device=weight.device)
    factor = curvature.ordered_factor if activation_order else curvature.factor
    columns = order.tolist()
    kept = None if mask is None else mask.t()[order]

    def value(column: int, w: Tensor) -> Tensor:
        rounded = grid.column(columns[column], w)
        return rounded if kept is None else rounded * kept[column]

    result = torch.empty_like(weight)
    result[:, order] = _eliminate(weight.t()[order], factor, LAZY_COLUMNS, value).t()
    return result


def _eliminate(
    remaining: Tensor,
    factor: Tensor,
    step: int,
    value: Callable[[int, Tensor], Tensor],
    before: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Replace column after column by `value(column, w)` and spread the error over the columns to come.

    remaining (columns, rows), so that a column of the weight is contiguous; it is used up. `before` sees each
    column and, within the block, those after it. Returns the new weight (columns, rows).
    """
    columns = remaining.shape[0]
    result = torch.empty_like(remaining)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block = remaining[start:stop]
        local = factor[start:stop, start:stop].contiguous()
        errors = torch.empty_like(block)
        for j, pivot in enumerate(local.diagonal().tolist()):
            if before is not None:
                before(start + j, block[j:])
            result[start + j] = value(start + j, block[j])
            torch.sub(block[j], result[start + j], out=errors[j])
            errors[j].div_(pivot)
            if j + 1 < stop - start:
                block[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        if stop < columns:
            remaining[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return result


def admm(weight: Tensor, curvature: Curvature, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune by alternating directions, then refit. Returns the weight and its mask, (rows, columns).

    Splits min ||X (W - Z)^T||^2 with Z in the pattern into a ridge step for W and a projection for Z, on
    inputs scaled to unit norm, while the pattern tightens cubically from dense. All work is matrix
    products, and all columns compete at once, which SparseGPT's single sweep does not allow.
    Source: Boza, "Fast and effective weight update for pruned LLMs", arXiv:2401.02938; refit as in ALPS,
    arXiv:2406.07831.
    """
    target = weight * curvature.scale
    pull = target @ curvature.normalized
    dense, kept, dual = target, target, torch.zeros_like(target)
    mask = torch.ones_like(target, dtype=torch.bool)
    for iteration in range(ADMM_ITERATIONS):
        if iteration:
            dense = (pull + kept - dual) @ curvature.normalized_inverse
        wanted = dense + dual
        if iteration <= ADMM_ITERATIONS - ADMM_FREEZE:
            progress = 1 - max(0.0, 1 - (iteration + 1) / ADMM_RAMP) ** 3
            mask = best_mask(wanted.square(), _relaxed(pattern, progress))
        kept = wanted * mask
        dual = wanted - kept
    return refit(target, kept, mask, curvature.normalized) / curvature.scale, mask


def _relaxed(pattern: Pattern, progress: float) -> Pattern:
    """The pattern at a progress from 0 (dense) to 1 (as asked for)."""
    if isinstance(pattern, Unstructured):
        return Unstructured(pattern.sparsity * progress)
    keep = pattern.group - round((pattern.group - pattern.keep) * progress)
    return pattern if keep == pattern.keep else Grouped(keep, pattern.group)


def refit(target: Tensor, start: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Conjugate gradients for all rows at once on min (x - target) H (x - target)^T over x under the mask.

    target, start, mask (rows, columns); hessian (columns, columns), of about unit diagonal, so that no
    preconditioner is needed. Rows are independent problems.
    """
    x = start * mask
    residual = ((target - x) @ hessian) * mask
    direction = residual.clone()
    power = residual.square().sum(dim=1, keepdim=True)
    for _ in range(REFIT_ITERATIONS):
        curved = (direction @ hessian) * mask
        length = power / (direction * curved).sum(dim=1, keepdim=True).clamp_min(1e-30)
        x += length * direction
        residual -= length * curved
        new_power = residual.square().sum(dim=1, keepdim=True)
        direction = residual + direction * (new_power / power.clamp_min(1e-30))
        power = new_power
    return x
