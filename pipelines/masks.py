"""Which weights stay: masks of every sparsity pattern, from scores.

Scores say how much a weight matters (larger stays). All functions take scores (rows, columns) and
return a bool mask of the same shape, True where the weight is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import PatternError

BLOCK = 16  # columns of a block of the banded pattern


def magnitude_scores(weight: Tensor) -> Tensor:
    return weight.abs()


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2. weight (rows, columns), input_norm (columns,). Source: Wanda, arXiv:2306.11695."""
    return weight.abs() * input_norm


def top_fraction(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the lowest `sparsity` of the scores, compared across the whole matrix."""
    drop = round(scores.numel() * sparsity)
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    if drop:
        # argpartition by way of kthvalue is not stable under ties; topk of the lowest drops exactly `drop`
        mask[scores.flatten().topk(drop, largest=False, sorted=False).indices] = False
    return mask.view_as(scores)


def top_fraction_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but the lowest `sparsity` of each row, as Wanda does."""
    drop = round(scores.shape[1] * sparsity)
    mask = torch.ones_like(scores, dtype=torch.bool)
    if drop:
        mask.scatter_(1, scores.topk(drop, dim=1, largest=False, sorted=False).indices, False)
    return mask


def top_of_group(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keep the `keep` best of every `group` consecutive columns of a row (2:4 is keep 2, group 4)."""
    check_divides(scores.shape[1], group, "sparsity pattern")
    grouped = scores.view(scores.shape[0], -1, group)
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(2, grouped.topk(keep, dim=2, sorted=False).indices, True)
    return mask.view_as(scores)


def window_starts(keep: int, window: int) -> list[int]:
    """First column of the window of the k-th kept weight of a block of 16, k = 0 .. keep-1.

    s_k = clip(round(16 k / keep - (window - 16 / keep) / 2), 0, 16 - window)
    """
    spread = BLOCK / keep
    centred = (round(k * spread - (window - spread) / 2) for k in range(keep))
    return [min(max(start, 0), BLOCK - window) for start in centred]


def top_of_bands(scores: Tensor, keep: int, window: int) -> Tensor:
    """The best mask under the banded pattern: the k-th kept column of a block lies in window k.

    Maximises the sum of scores over strictly increasing columns by dynamic programming over k:
    best_k(c) = score(c) + max over c' < c in window k-1 of best_{k-1}(c'), for all blocks at once.
    """
    check_divides(scores.shape[1], BLOCK, "banded pattern")
    blocks = scores.reshape(-1, BLOCK).t().float()  # (16, blocks): a column of all blocks is contiguous
    starts = window_starts(keep, window)
    count = blocks.shape[1]
    none = torch.full((count,), float("-inf"), device=scores.device)
    best: list[Tensor] = []  # of the previous k, one per column of its window
    came_from: list[list[Tensor]] = []
    for k, start in enumerate(starts):
        reached, origins = [], []
        run, run_column = none, torch.zeros(count, dtype=torch.int8, device=scores.device)
        offset = 0
        for column in range(start, start + window):
            if k:
                while offset < window and starts[k - 1] + offset < column:
                    better = best[offset] > run
                    run = torch.where(better, best[offset], run)
                    run_column = torch.where(better, torch.full_like(run_column, offset), run_column)
                    offset += 1
                origins.append(run_column)
                reached.append(blocks[column] + run)
            else:
                reached.append(blocks[column])
        best, came_from = reached, [*came_from, origins]
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    choice = torch.stack(best).argmax(dim=0)
    for k in range(keep - 1, -1, -1):
        mask.scatter_(0, (choice + starts[k])[None], True)
        if k:
            choice = torch.stack(came_from[k]).gather(0, choice[None])[0].long()
    return mask.t().reshape(scores.shape)


def check_divides(columns: int, group: int, what: str) -> None:
    if columns % group:
        raise PatternError(
            f"a {what} of groups of {group} does not fit a layer of {columns} columns",
            expected=f"a group that divides {columns}",
            try_="choose another group, or leave the layer out with `overrides`",
        )
