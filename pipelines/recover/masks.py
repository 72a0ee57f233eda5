"""Pruning while a model trains, or just before: how sparse at which moment, and which weights then stay.

Masks are bool (rows, columns), True where a weight is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipelines.masks import Grouped, Pattern, Unstructured, best_mask, top_fraction, wanda_scores
from pipelines.recipe import PruneInTraining, SparsityPattern
from zoo.runner.format import KEEPS

SURVIVOR = 32.0  # more than all the 16 columns of a block can score by their gradients


def cubic(fraction: float, final: float) -> float:
    """Sparsity after `fraction` of the pruning: steep at first, when most weights are redundant.

    Source: Zhu and Gupta, arXiv:1710.01878, with an initial sparsity of 0.
    """
    return final - final * (1 - fraction) ** 3


def pattern_at(step: PruneInTraining, target: SparsityPattern, fraction: float, mask: Tensor) -> Pattern:
    """The pattern of a layer after `fraction` (0 to 1) of the pruning; never looser than its mask now."""
    kept = int(mask.sum()) / mask.numel()  # exactly: float32 cannot tell apart the counts of large layers
    if target.keep is None or target.group is None:
        final = target.sparsity or 0.0
        return Unstructured(max(cubic(fraction, final) if step.schedule == "cubic" else final, 1 - kept))
    keep, group = target.keep, target.group
    if step.schedule == "cubic":
        keep = group - math.floor((group - keep) * cubic(fraction, 1.0) + 1e-9)
    elif step.schedule == "stages":
        keep = step.stages[min(int(fraction * len(step.stages)), len(step.stages) - 1)]
    fullest = int(mask.view(-1, group).sum(dim=1).max())
    keep = max(min(keep, fullest), target.keep)
    banded = keep == target.keep or keep in KEEPS
    return Grouped(keep, group, target.window if banded else None)


def best(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask with the largest sum of scores; unstructured ones compete across the whole matrix."""
    if isinstance(pattern, Unstructured):
        return top_fraction(scores, pattern.sparsity)
    return best_mask(scores, pattern)


def best_together(scores: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The best mask of every layer. Layers of one grouped pattern are taken together: a GPU then needs a few
    hundred steps for all of them, not for each."""
    found: dict[str, Tensor] = {}
    for pattern in dict.fromkeys(patterns.values()):
        names = [name for name, own in patterns.items() if own == pattern]
        if isinstance(pattern, Unstructured):
            found |= {name: best(scores[name], pattern) for name in names}
            continue
        groups = [scores[name].reshape(-1, pattern.group) for name in names]
        pieces = torch.split(best(torch.cat(groups), pattern), [len(group) for group in groups])
        found |= {name: piece.view_as(scores[name]) for name, piece in zip(names, pieces, strict=True)}
    return found


def saliency(
    weight: Tensor, mask: Tensor, *, input_norm: Tensor | None = None, revive: bool = False
) -> Tensor:
    """What decides which weights of a layer are kept, (rows, columns): the magnitude, times `input_norm`
    (columns,) for wanda. Only with `revive` do weights that `mask` does not keep compete."""
    magnitude = weight.detach().abs().float()
    if not revive:
        magnitude = magnitude * mask
    return magnitude if input_norm is None else wanda_scores(magnitude, input_norm)


def rigl_mask(
    weight: Tensor, mask: Tensor, pattern: Pattern, gradient: Tensor | None, regrow: float
) -> Tensor:
    """The next mask of one layer. weight, mask, gradient (rows, columns): the gradient is that of the loss
    with respect to all weights, pruned ones too. Of the weights that the pattern keeps, the `regrow` smallest
    give way to those with the largest gradient, as far as the pattern allows. Source: RigL, arXiv:1911.11134.
    """
    magnitude = saliency(weight, mask)
    kept = best(magnitude, pattern)
    if regrow == 0.0 or gradient is None:
        return kept
    survivors = math.ceil(int(kept.sum()) * (1 - regrow))
    stay = top_fraction(magnitude * kept, 1 - survivors / weight.numel()) & kept
    wanted = gradient.detach().abs().float()
    wanted = wanted / wanted.max().clamp_min(1e-30)
    return best(torch.where(stay, torch.full_like(wanted, SURVIVOR), wanted), pattern)


def snip_masks(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], patterns: Mapping[str, Pattern]
) -> dict[str, Tensor]:
    """Masks before training by connection sensitivity |dL/dW * W| / sum of all of them.

    Unstructured layers of one sparsity compete with one another, as in the paper; groups within themselves.
    Source: SNIP, arXiv:1810.02340.
    """
    scores = {n: (gradients[n].float() * weights[n].detach().float()).abs() for n in patterns}
    total = torch.stack([score.sum() for score in scores.values()]).sum().clamp_min(1e-30)
    scores = {name: score / total for name, score in scores.items()}
    masks = {name: best_mask(scores[name], p) for name, p in patterns.items() if isinstance(p, Grouped)}
    for sparsity in sorted({p.sparsity for p in patterns.values() if isinstance(p, Unstructured)}):
        names = [n for n, p in patterns.items() if isinstance(p, Unstructured) and p.sparsity == sparsity]
        flat = top_fraction(torch.cat([scores[name].reshape(-1) for name in names])[None], sparsity)[0]
        pieces = torch.split(flat, [scores[name].numel() for name in names])
        masks |= {n: piece.view_as(scores[n]) for n, piece in zip(names, pieces, strict=True)}
    return masks


def regrown_fraction(regrow: float, fraction: float) -> float:
    """How much rigl replaces after `fraction` of the pruning: a cosine from `regrow` to 0."""
    return regrow / 2 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def fits(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a mask keeps no more than the pattern allows (of its windows: the packer tells)."""
    if isinstance(pattern, Unstructured):
        return int((~mask).sum()) >= round(mask.numel() * pattern.sparsity)
    return int(mask.reshape(-1, pattern.group).sum(dim=1).max()) <= pattern.keep
