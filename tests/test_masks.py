"""Masks against brute force over every legal mask, and against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.masks import (
    Grouped,
    Unstructured,
    best_mask,
    magnitude_scores,
    top_fraction,
    wanda_scores,
)
from tests import reference
from zoo.errors import PatternError
from zoo.runner.format import window_starts

COLUMNS = (16, 64, 128, 144, 256, 320)
KEEPS, WINDOWS = (4, 6, 8, 10, 12), (4, 8)


def scores_of(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    noise = torch.randn(rows, columns, generator=generator)
    match kind:
        case "squares":
            return noise.square()
        case "wide":  # thirteen orders of magnitude
            return torch.exp(noise * 10 - 10)
        case "ties":
            return noise.mul(2).round().abs()
        case "zeros":
            return torch.zeros(rows, columns)
    raise AssertionError(kind)


KINDS = ("squares", "wide", "ties", "zeros")


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_follow_the_formula_and_can_reach_every_column(keep: int, window: int) -> None:
    starts = window_starts(keep, window)
    assert starts == reference.band_starts(keep, window)
    if keep * window >= 16:
        assert {c for start in starts for c in range(start, start + window)} == set(range(16))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_banded_mask_is_the_best_of_all_legal_masks(keep: int, window: int, kind: str) -> None:
    scores = scores_of(kind, 7, 48)
    mask = best_mask(scores, Grouped(keep, 16, window)).reshape(-1, 16).numpy()
    legal = reference.banded_masks(keep, window)
    known = {row.tobytes() for row in legal}
    assert all(row.tobytes() in known for row in mask)
    blocks = scores.double().reshape(-1, 16).numpy()
    found = (blocks * mask).sum(axis=1)
    np.testing.assert_allclose(found, (legal @ blocks.T).max(axis=0), rtol=1e-6)


def test_a_large_matrix_has_the_mask_of_its_rows() -> None:
    """Masks are found in pieces, whose ends are not those of rows."""
    scores = torch.rand(1030, 1040, generator=torch.Generator().manual_seed(0))
    rows = [best_mask(part, Grouped(8, 16, window=8)) for part in torch.split(scores, 10)]
    assert torch.equal(best_mask(scores, Grouped(8, 16, window=8)), torch.cat(rows))


@pytest.mark.parametrize("keep", [4, 8, 12])
def test_scores_that_overflow_leave_no_block_empty(keep: int) -> None:
    """Whose weights would all be zero, and hide that the activations are not finite."""
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    for column in (3, 6, 7, 40, 41, 42):
        scores[:, column] = torch.inf
    for every in (scores, torch.full_like(scores, torch.inf)):
        mask = best_mask(every, Grouped(keep, 16, window=8))
        assert (mask.view(-1, 16).sum(dim=1) == keep).all()


def test_window_of_four_holds_every_two_of_four_mask() -> None:
    halves = [row for row in np.ndindex(2, 2, 2, 2) if sum(row) == 2]
    for choice in np.ndindex(6, 6, 6, 6):
        if len(set(choice)) < 3:  # a sample
            continue
        scores = torch.tensor([[x for c in choice for x in halves[c]]], dtype=torch.float32)
        assert torch.equal(best_mask(scores, Grouped(8, 16, 4)), scores > 0)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep, group", [(2, 4), (4, 8), (8, 16), (4, 16), (1, 2), (16, 16)])
def test_grouped_mask_keeps_the_largest_of_every_group(
    rows: int, columns: int, kind: str, keep: int, group: int
) -> None:
    scores = scores_of(kind, rows, columns)
    mask = best_mask(scores, Grouped(keep, group))
    assert mask.shape == scores.shape
    groups, kept = scores.view(-1, group), mask.view(-1, group)
    assert (kept.sum(dim=1) == keep).all()
    largest = groups.sort(dim=1, descending=True).values[:, :keep]
    torch.testing.assert_close((groups * kept).sum(dim=1), largest.sum(dim=1))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_unstructured_mask_keeps_the_largest_of_every_row(columns: int, kind: str, sparsity: float) -> None:
    scores = scores_of(kind, 5, columns)
    keep = columns - round(sparsity * columns)
    mask = best_mask(scores, Unstructured(sparsity))
    assert (mask.sum(dim=1) == keep).all()
    largest = scores.sort(dim=1, descending=True).values[:, :keep]
    torch.testing.assert_close((scores * mask).sum(dim=1), largest.sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_top_fraction_compares_the_whole_matrix(kind: str) -> None:
    scores = scores_of(kind, 9, 144)
    mask = top_fraction(scores, 0.6)
    keep = scores.numel() - round(0.6 * scores.numel())
    assert int(mask.sum()) == keep
    assert scores[mask].min() >= scores[~mask].max()


def test_scores_are_those_of_the_papers() -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.normal(size=(5, 24)), rng.normal(size=(40, 24))
    norms = torch.from_numpy(inputs).square().sum(dim=0).sqrt()
    found = wanda_scores(torch.from_numpy(weight), norms)
    np.testing.assert_allclose(found.numpy(), reference.wanda(weight, inputs), rtol=1e-12)
    found = magnitude_scores(torch.from_numpy(weight))
    np.testing.assert_array_equal(found.numpy(), reference.magnitude(weight))


@pytest.mark.parametrize(
    "pattern, columns",
    [(Grouped(2, 4), 18), (Grouped(8, 16), 24), (Grouped(8, 16, 8), 24), (Grouped(5, 7), 128)],
)
def test_a_pattern_that_does_not_divide_is_refused(pattern: Grouped, columns: int) -> None:
    with pytest.raises(PatternError, match=rf"{pattern.group}.*{columns} columns"):
        best_mask(torch.ones(2, columns), pattern)
