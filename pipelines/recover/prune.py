"""Which layers are pruned in training and what their next masks are: the loop's hand on recover_masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.checkpoint import Checkpoint
from pipelines.masks import Grouped, Pattern, check_divides
from pipelines.recipe import PruneInTraining, SparsityPattern
from pipelines.recover.masks import (
    best_together,
    fits,
    pattern_at,
    regrown_fraction,
    rigl_mask,
    saliency,
    snip_masks,
)
from pipelines.recover.shards import whole
from pipelines.recover.student import pruned_layers
from zoo.errors import NumericsError, PatternError


def masks_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the layers that earlier steps pruned have kept, by layer name."""
    return {
        name: whole(model.get_parameter(f"{name}.weight")) != 0 for name in sorted(pruned_layers(checkpoint))
    }


TOGETHER = 1 << 27  # weights whose masks are found at once: some gigabytes of scores and choices


class Pruner:
    """The layers that a `prune` in training takes part in, each with its pattern."""

    def __init__(self, step: PruneInTraining, names: list[str]) -> None:
        self.step = step
        self.targets: dict[str, SparsityPattern] = {}
        for name in names:
            pattern: SparsityPattern | None = step.pattern
            for override in step.overrides:  # the last that matches counts
                pattern = override.pattern if fnmatchcase(name, override.layers) else pattern
            if pattern is not None:
                self.targets[name] = pattern

    def update(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        fraction: float,
        norms: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """All masks after `fraction` of the pruning; for rigl, the parameters hold their full gradients."""
        step = self.step
        assert step.method != "snip"
        found = dict(masks)
        scores: dict[str, Tensor] = {}
        patterns: dict[str, Pattern] = {}
        for name in self.targets:
            weight, gradient = self._of(model, name)
            mask = masks.get(name, torch.ones_like(weight, dtype=torch.bool)).to(weight.device)
            pattern = self._pattern(name, fraction, mask)
            if step.method == "rigl":
                regrow = regrown_fraction(step.regrow, fraction)
                found[name] = rigl_mask(weight, mask, pattern, gradient, regrow)
                continue
            norm = None if norms is None else norms[name]
            scores[name] = saliency(weight, mask, input_norm=norm, revive=step.decay is not None)
            patterns[name] = pattern
            if sum(score.numel() for score in scores.values()) >= TOGETHER:
                found |= best_together(scores, patterns)
                scores, patterns = {}, {}
        return found | best_together(scores, patterns)

    def snip(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All masks before training, from the gradients that the parameters hold."""
        weights, gradients, patterns = {}, {}, {}
        for name in self.targets:
            weights[name], gradient = self._of(model, name)
            assert gradient is not None
            gradients[name] = gradient
            every = torch.ones_like(weights[name], dtype=torch.bool)
            patterns[name] = self._pattern(name, 1.0, masks.get(name, every))
        return {**masks, **snip_masks(weights, gradients, patterns)}

    def _pattern(self, name: str, fraction: float, mask: Tensor) -> Pattern:
        target = self.targets[name]
        if target.group is not None:
            try:
                check_divides(mask.shape[1], target.group, "sparsity pattern")
            except PatternError as error:
                error.what = f"{name}: {error.what}"
                raise
        return pattern_at(self.step, target, fraction, mask)

    def _of(self, model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        parameter = model.get_parameter(f"{name}.weight")
        gradient = parameter.grad if self.step.method in ("rigl", "snip") else None
        return whole(parameter), None if gradient is None else whole(gradient)

    def input_norms(
        self, model: nn.Module, student: nn.Module, batches: Iterable[Tensor], accelerator: Any
    ) -> dict[str, Tensor]:
        """L2 norms of the layers' inputs, (columns,) each, over the batches of all processes."""
        sums: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                own = inputs[0].detach().float().flatten(0, -2).square().sum(dim=0)
                sums[name] = sums[name] + own if name in sums else own

            return model.get_submodule(name).register_forward_pre_hook(hook)

        hooks = [watch(name) for name in self.targets]
        try:
            # compiled layers would not call the hooks
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                for ids in batches:
                    student(ids, None)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: accelerator.reduce(value, "sum").sqrt() for name, value in sums.items()}

    def check(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Raise NumericsError unless every layer has reached its pattern."""
        for name, target in self.targets.items():
            mask = masks[name]
            final = self._pattern(name, 1.0, mask)
            if not fits(mask, final):
                most = final.keep if isinstance(final, Grouped) else f"{1 - final.sparsity:.1%}"
                raise NumericsError(
                    f"{name} did not reach its pattern", saw=str(target), expected=f"at most {most} kept"
                )
