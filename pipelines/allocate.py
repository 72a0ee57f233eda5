"""How much to prune each decoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.checkpoint import Checkpoint
from pipelines.layers import layer_forward
from pipelines.masks import wanda_scores
from pipelines.recipe import Owl, SparsityPattern
from zoo.progress import track


def owl_sparsities(
    checkpoint: Checkpoint,
    hidden: list[Tensor],
    setting: Owl,
    pattern: SparsityPattern,
    device: torch.device,
) -> Mapping[int, float]:
    """Sparsity of every decoder layer: less where more weights are outliers.

    One pass of the uncompressed model; hidden are embedded windows, (batch, length, width) each.
    Source: OWL, arXiv:2310.05175.
    """
    if pattern.keep is not None and pattern.group is not None:
        mean = 1 - pattern.keep / pattern.group
    else:
        mean = pattern.sparsity or 0.0
    forward = layer_forward(checkpoint.family, checkpoint.config, hidden[0].shape[1], device)
    ratios = []
    for index in track(range(checkpoint.layer_count), "outliers of each layer"):
        weights = {name: tensor.to(device, torch.float32) for name, tensor in checkpoint.layer(index).items()}
        squares = {
            names[0]: torch.zeros(weights[f"{names[0]}.weight"].shape[1], device=device)
            for names in checkpoint.family.shared_inputs
        }
        for batch, x in enumerate(hidden):
            run = forward(x, weights)
            pause = next(run)
            for names in checkpoint.family.shared_inputs:
                squares[names[0]] += pause.inputs.square().sum(dim=(0, 1))
                outputs = [
                    F.linear(pause.inputs, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in names
                ]
                try:
                    pause = run.send(outputs)
                except StopIteration as end:
                    hidden[batch] = end.value
        scores = [
            wanda_scores(weights[f"{name}.weight"], squares[names[0]].sqrt())
            for names in checkpoint.family.shared_inputs
            for name in names
        ]
        ratios.append(outlier_ratio(scores, setting.threshold))
        del weights, scores  # before the next layer is read
    return dict(enumerate(spread_around(mean, ratios, setting.spread)))


def outlier_ratio(scores: Sequence[Tensor], threshold: float) -> float:
    """Fraction of a decoder layer's scores that exceed `threshold` times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def spread_around(mean: float, ratios: Sequence[float], spread: float) -> list[float]:
    """Sparsities with the given mean, within `spread` of it, falling as the outlier ratio rises.

    The paper's bound, [mean - spread, mean + spread]; its published code lets a layer leave it. Less than
    `spread` is used where a sparsity would fall below 0 or rise above 0.99.
    """
    if max(ratios) == min(ratios):
        return [mean] * len(ratios)
    centre = sum(ratios) / len(ratios)
    furthest = max(abs(ratio - centre) for ratio in ratios)
    spread = min(spread, mean, max(0.99 - mean, 0.0))
    return [max(mean - spread * (ratio - centre) / furthest, 0.0) for ratio in ratios]
