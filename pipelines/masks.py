"""Which weights stay: masks of every sparsity pattern, from scores.

Scores say how much a weight matters (larger stays). All functions take scores (rows, columns) and
return a bool mask of the same shape, True where the weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from zoo.errors import PatternError
from zoo.runner.format import BLOCK, window_starts


@dataclass(frozen=True)
class Unstructured:
    """Any weights of a row: `sparsity` of them are removed."""

    sparsity: float


@dataclass(frozen=True)
class Grouped:
    """`keep` of every `group` consecutive columns; with a `window`, the banded pattern (group 16)."""

    keep: int
    group: int
    window: int | None = None

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group


Pattern = Unstructured | Grouped


def magnitude_scores(weight: Tensor) -> Tensor:
    return weight.abs()


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2. weight (rows, columns), input_norm (columns,). Source: Wanda, arXiv:2306.11695."""
    return weight.abs() * input_norm


def best_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of `pattern` with the largest sum of scores."""
    rows, columns = scores.shape
    if isinstance(pattern, Unstructured):
        return _largest(scores, columns - round(columns * pattern.sparsity))
    if pattern.window is not None:
        return top_of_bands(scores, pattern.keep, pattern.window)
    check_divides(columns, pattern.group, "sparsity pattern")
    return _largest(scores.reshape(-1, pattern.group), pattern.keep).view(rows, columns)


def top_fraction(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the lowest `sparsity` of the scores, compared across the whole matrix."""
    return _largest(scores.reshape(1, -1), scores.numel() - round(scores.numel() * sparsity)).view_as(scores)


def _largest(scores: Tensor, keep: int) -> Tensor:
    """True at exactly the `keep` largest of each row; of equal scores, any."""
    columns = scores.shape[1]
    if keep in (0, columns):
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    if scores.device.type != "cpu":
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter_(1, scores.topk(keep, dim=1, sorted=False).indices, True)
    # NumPy's vectorised selection is 7-10 times as fast as topk on a CPU; it gives the threshold only.
    cut = columns - keep
    threshold = np.partition(scores.numpy(), cut, axis=1)[:, cut : cut + 1]
    mask = scores >= torch.from_numpy(threshold)
    tied = mask.sum(dim=1) != keep
    if tied.any():
        exact = torch.zeros_like(scores[tied], dtype=torch.bool)
        mask[tied] = exact.scatter_(1, scores[tied].topk(keep, dim=1, sorted=False).indices, True)
    return mask


def top_of_bands(scores: Tensor, keep: int, window: int) -> Tensor:
    """The best mask under the banded pattern: the k-th kept column of a block lies in window k.

    Maximises the sum of scores over strictly increasing columns by dynamic programming over k:
    best_k(c) = score(c) + max over c' < c in window k-1 of best_{k-1}(c'), for many blocks at once. No
    score is NaN.
    """
    check_divides(scores.shape[1], BLOCK, "banded pattern")
    # A piece needs about 40 times the memory of its mask; on a GPU it is the number of calls that takes time.
    piece = 1 << 15 if scores.device.type == "cpu" else 1 << 20
    pieces = torch.split(scores.reshape(-1, BLOCK), piece)
    return torch.cat([_top_of_bands(blocks, keep, window) for blocks in pieces]).view(scores.shape)


def _top_of_bands(scores: Tensor, keep: int, window: int) -> Tensor:
    """scores and mask (blocks, 16)."""
    highest = torch.finfo(torch.float32).max / BLOCK  # so that sums are finite, also of infinite scores
    blocks = scores.t().float().clamp(max=highest).contiguous()
    starts = window_starts(keep, window)
    best = [blocks[starts[0] : starts[0] + window]]  # of every k, by column of its window: (window, blocks)
    running: list[Tensor] = []  # the maximum of best_k over the columns up to this one: (window, blocks)
    for k in range(1, keep):
        running.append(best[-1].clone())
        for left, here in pairwise(running[-1]):
            torch.maximum(left, here, out=here)
        best.append(blocks[starts[k] : starts[k] + window].clone())
        for offset, here in enumerate(best[-1]):
            before = min(starts[k] + offset - starts[k - 1], window)  # columns of window k-1 left of this one
            here += running[-1][before - 1] if before else float("-inf")
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    sought = best[-1].amax(dim=0)  # the k-th kept column is the first that reaches it
    for k in range(keep - 1, -1, -1):
        reached = best[k] == sought
        missing = torch.ones_like(reached[0])
        for offset, here in enumerate(reached):
            here &= missing
            missing ^= here
            mask[starts[k] + offset] |= here
            before = min(starts[k] + offset - starts[k - 1], window) if k else 0
            if before:
                sought = torch.where(here, running[k - 1][before - 1], sought)
    return mask.t()


def check_divides(columns: int, group: int, what: str) -> None:
    if columns % group:
        raise PatternError(
            f"a {what} of groups of {group} does not fit a layer of {columns} columns",
            expected=f"a group that divides {columns}",
            try_="choose another group, or leave the layer out with `overrides`",
        )
