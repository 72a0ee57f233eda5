"""A model that another machine trained, as this store's output of a recipe's last step, or of another.

`zoo run` then goes on from there: it measures, exports and verifies here. What is not known here is whether
the training was the recipe's, so what can be seen of it is checked: shapes, zeros, grids and the loss curve.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines import keys, sources
from pipelines.checkpoint import Checkpoint
from pipelines.grids import Grid
from pipelines.recipe import (
    Average,
    Prune,
    Recipe,
    Recover,
    Rounding,
    SparsityPattern,
    Step,
    leading,
    override_of,
)
from pipelines.recover.student import grids_of, linear_names
from pipelines.recover.write import history
from zoo.entry import Layer
from zoo.errors import UsageError
from zoo.files import Store
from zoo.progress import track


def adopt(recipe: Recipe, folder: Path, store: Store, number: str | None = None) -> str:
    """Put the model in `folder`, made by the recipe's steps elsewhere, into the store; returns its key.

    `folder` is what `python -m pipelines.recover` left (its `model/` is taken), or the model itself. `number`
    is that of the step that made it, by default the last. Raises UsageError if that is no training, or the
    model is not what the steps up to it make.
    """
    steps = leading(recipe.steps)
    trainings = [one for one, led in steps.items() if isinstance(led[-1], Recover)]
    number = number or str(len(recipe.steps))
    if number not in trainings:
        raise UsageError(
            "only what a recover step made can be adopted",
            saw=f"step {number} of {recipe.name}"
            + ("" if number in steps else ", which has none of this number"),
            try_=f"--step {' or '.join(trainings)}" if trainings else None,
        )
    led = steps[number]
    model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    base = sources.resolve(recipe.base, store)
    _check(recipe.base, led, Checkpoint(model), Checkpoint(base.folder))
    windows = keys.calibration(recipe, base.sha256)
    made = keys.steps(recipe, base.sha256, windows, lambda s: sources.resolve(s, store).sha256)
    key = next(one.key for one in made if one.number == number)
    with store.locked(key):
        if store.get(key) is None:
            with store.writing(key) as out:
                for path in sorted(path for path in model.iterdir() if path.is_file()):
                    shutil.copyfile(path, out / path.name)  # no link: the folder is its owner's to change
    return key


def _check(name: str, steps: Sequence[Step], model: Checkpoint, base: Checkpoint) -> None:
    """Raise UsageError unless it can be what the steps, the last a training, make of the base `name`."""
    step = steps[-1]
    assert isinstance(step, Recover)
    where = model.folder
    if model.shapes() != base.shapes():
        raise UsageError(f"{where} is no model of {name}", expected="matrices of the same shapes")
    curve = history(where).training
    budget = step.budget
    rest = curve[-1].tokens - budget.tokens if curve and budget.tokens is not None else -1
    in_time = bool(curve) and budget.seconds is not None and curve[-1].seconds >= budget.seconds
    if not (0 <= rest < step.batch * step.length or in_time):
        raise UsageError(
            f"the training of {where} did not take the recipe's budget",
            saw=f"{curve[-1].tokens:,} tokens, {curve[-1].seconds:.0f} s" if curve else "no training.json",
            expected=", ".join(f"{name} {value:,}" for name, value in budget.model_dump().items() if value),
            try_="python -m pipelines.recover ... --resume",
        )
    patterns = patterns_of(steps, model)
    grids, scales = grids_of(step, model), model.grids()
    for name in track(sorted({*patterns, *grids}), f"checking {where.name}"):
        weight = model.tensors([f"{name}.weight"])[f"{name}.weight"].float()
        pattern = patterns.get(name)
        if pattern is not None and not _fits(weight, pattern):
            kept = f"{pattern.keep} of {pattern.group} kept" if pattern.keep else f"{pattern.sparsity} of all"
            raise UsageError(f"{where}: {name} does not have the recipe's zeros", expected=kept)
        if name not in grids:
            continue
        if not _on_grid(weight, scales.get(f"{name}.scale"), scales.get(f"{name}.zero_point"), grids[name]):
            group = f"groups of {grids[name].group}" if grids[name].group else "a scale per row"
            raise UsageError(
                f"{where}: {name} is not on the recipe's grid", expected=f"{grids[name].bits} bits, {group}"
            )


def patterns_of(steps: Sequence[Step], model: Checkpoint) -> dict[str, SparsityPattern]:
    """What the zeros of each layer are like after the last of the steps that prunes it: as the recipe says,
    or, where an allocation decided, as the model's own record does."""
    found: dict[str, SparsityPattern] = {}
    records = {record.name: record for record in model.compression()}
    for step in steps:
        if isinstance(step, Average) and step.prunes:
            found.clear()
        prune = step if isinstance(step, Prune) else step.prune if isinstance(step, Recover) else None
        if prune is None:
            continue
        for name in linear_names(model):
            other = override_of(name, prune.overrides)
            pattern = prune.pattern if other is None else other.pattern
            allocated = other is None and isinstance(prune, Prune) and prune.allocation != "uniform"
            if allocated and name in records:
                pattern = _recorded(records[name])
            if pattern is not None:
                found[name] = pattern
    return found


def _recorded(layer: Layer) -> SparsityPattern:
    keep, grouped, group = (layer.pattern or "").partition(":")
    if not grouped:
        return SparsityPattern(sparsity=layer.sparsity)
    return SparsityPattern(keep=int(keep), group=int(group))


def _on_grid(
    weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, rounding: Rounding
) -> bool:
    """Whether weights (rows, columns) are float16 of values on the grid of scale and zero (rows, groups)."""
    rows, columns = weight.shape
    group = rounding.group or columns
    shape = (rows, columns // group)
    if columns % group or scale is None or scale.shape != shape or (zero is None) != rounding.symmetric:
        return False
    if zero is not None and zero.shape != shape:
        return False
    rounded = Grid(rounding.bits, group, scale, None if zero is None else zero.float()).round(weight)
    if zero is None:
        return torch.equal(rounded.to(torch.float16).float(), weight)
    # training adds a float16 minimum: the same but for the last bits, of float16 or of what cancels out
    return torch.allclose(rounded, weight, rtol=2**-10, atol=1e-5 * float(scale.abs().max()))


def _fits(weight: torch.Tensor, pattern: SparsityPattern) -> bool:
    if pattern.keep is None:
        return float((weight == 0).float().mean()) >= (pattern.sparsity or 0.0) - 1e-3
    if weight.shape[1] % (pattern.group or 1):
        return False
    kept = (weight != 0).view(len(weight), -1, pattern.group or 1).sum(-1)
    return int(kept.max()) == pattern.keep
