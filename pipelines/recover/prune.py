"""Which layers are pruned in training, what their next masks are, and what becomes of what these drop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.checkpoint import Checkpoint
from pipelines.masks import Grouped, Pattern, check_divides
from pipelines.recipe import PruneInTraining, SparsityPattern, override_of
from pipelines.recover.masks import (
    best_together,
    fits,
    pattern_at,
    regrown_fraction,
    rigl_mask,
    saliency,
    snip_masks,
)
from pipelines.recover.rounding import keep
from pipelines.recover.shards import apply_mask, sharded_like, shrink, whole
from pipelines.recover.state import Progress
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
            other = override_of(name, step.overrides)
            pattern = step.pattern if other is None else other.pattern
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


class Sparsity:
    """The masks of a running training: the layers compute with what these keep alone, but what a `prune` with
    `decay` has dropped goes on learning behind them until they stay."""

    def __init__(
        self,
        step: PruneInTraining | None,
        model: nn.Module,
        names: list[str],
        masks: dict[str, Tensor],
        progress: Progress,
        accelerator: Any,
    ) -> None:
        self.model, self.progress, self.accelerator = model, progress, accelerator
        self.pruner = Pruner(step, names) if step else None
        # what the gradients of weights that are not kept are multiplied by, in layers that `prune` prunes and
        # in others
        self._passing, self._closed = torch.zeros(2, device=accelerator.device).unbind()
        self._take(masks)

    @property
    def learning(self) -> Set[str]:
        """The layers whose pruned weights go on learning for now."""
        if self.pruner is None or self.pruner.step.decay is None or self.progress.pruned:
            return frozenset()
        return self.pruner.targets.keys() & self.masks.keys()

    @property
    def needs_gradients_first(self) -> bool:
        """Whether `snip` is to be called before the first step, with the gradients of all weights."""
        return self.pruner is not None and self.pruner.step.method == "snip" and not self.progress.pruned

    def begin_step(self, done: float) -> None:
        """Let the gradients of weights that are not kept pass at this step, where anything needs them."""
        self._passing.fill_(bool(self.learning) or self._regrows(done))

    def changes(self, done: float) -> bool:
        """Whether `update` is to be called at this step, after `done` of the budget."""
        if self.pruner is None or self.progress.pruned or self.pruner.step.method == "snip":
            return False
        return self.progress.step % self.pruner.step.every == 0 or done >= self.pruner.step.until

    def snip(self) -> None:
        """The masks of before the first step, by the gradients that the parameters hold."""
        assert self.pruner is not None
        self.progress.pruned = True
        self._prune(self.pruner.snip(self.model, self.masks))

    def update(self, done: float, student: nn.Module, batches: Iterable[Tensor]) -> None:
        """New masks, by weights and gradients as they are, and for wanda by the inputs in `batches`.

        Raises PatternError if a pattern does not fit its layer.
        """
        assert self.pruner is not None
        fraction = min(done / self.pruner.step.until, 1.0)
        # momentum from before a weight was pruned has moved it on, and it may be kept again
        self._zero(self._shards.keys() - self.learning)
        norms = None
        if self.pruner.step.method == "wanda":
            norms = self.pruner.input_norms(self.model, student, batches, self.accelerator)
        masks = self.pruner.update(self.model, self.masks, fraction, norms)
        if self._regrows(done):  # and only what is kept next is to learn from these gradients
            for name, mask in masks.items():
                apply_mask(self._weight(name).grad, sharded_like(mask, self._weight(name)))
        step = self.pruner.step
        # weights at zero stay the smallest: another time would find the same masks
        settled = step.schedule == "once" and step.decay is None and step.method != "rigl"
        self.progress.pruned = settled or fraction >= 1.0
        self._prune(masks)

    def decay(self, rate: float, done: float) -> None:
        """Shrink what goes on learning behind its mask, as in steps whose learning rates add up to `rate`."""
        if self.pruner is None or self.pruner.step.decay is None:
            return
        loss = rate * self.pruner.step.decay * min(done / self.pruner.step.until, 1.0)
        for name in self.learning:
            shrink(self._weight(name), self._shards[name], max(1 - loss, 0.0))

    def zero(self) -> None:
        """Set to zero what the masks do not keep; the layers compute so anyway."""
        self._zero(self._shards)

    def check(self) -> None:
        """Raise NumericsError unless every layer that is pruned in training has reached its pattern."""
        if self.pruner is not None:
            self.pruner.check(self.model, self.masks)

    def _regrows(self, done: float) -> bool:
        """Whether this step's update needs the gradients of all weights."""
        return self.pruner is not None and self.pruner.step.method == "rigl" and self.changes(done)

    def _prune(self, masks: dict[str, Tensor]) -> None:
        self._take(masks)
        self._zero(self._shards.keys() - self.learning)

    def _zero(self, names: Iterable[str]) -> None:
        for name in names:
            apply_mask(self._weight(name), self._shards[name])

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(f"{name}.weight")

    def _take(self, masks: dict[str, Tensor]) -> None:
        """Bring the masks to where the weights are, and to the layers, which compute with what they keep."""
        self.masks = masks
        self._shards = {name: sharded_like(mask, self._weight(name)) for name, mask in masks.items()}
        pruned = self.pruner.targets.keys() if self.pruner is not None else set()
        for name, mask in masks.items():
            passing = self._passing if name in pruned else self._closed
            keep(self.model.get_submodule(name), mask.to(self.accelerator.device), passing)
