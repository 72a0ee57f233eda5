"""Averages models that were made apart of the same one: a model soup (Wortsman et al., arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.checkpoint import COMPRESSION, TRAINING, Checkpoint, CheckpointWriter, copy_side_files
from pipelines.recipe import Average, Recover
from pipelines.recover.write import History, history
from zoo.entry import Layer, curves, ran
from zoo.errors import FormatError
from zoo.files import write_json
from zoo.progress import track


def run_step(step: Average, folders: Sequence[Path], out: Path) -> None:
    """Write the mean of models to `out`: of those in all folders but the first, which they were made of.

    Each tensor is the weighted mean in float64, stored in the first branch's type. Memory: one tensor of each
    model. Raises FormatError if the branches are not alike.
    """
    before, branches = Checkpoint(folders[0]), [Checkpoint(folder) for folder in folders[1:]]
    for branch in branches:
        if branch.shapes() != before.shapes():
            raise FormatError(f"{branch.folder} cannot be averaged", expected="tensors of the same shapes")
    weights = step.weights or [1.0] * len(branches)
    writer = CheckpointWriter(out)
    zeros: dict[str, float] = {}
    for name in track(before.names, "average"):
        parts = [branch.tensors([name])[name] for branch in branches]
        if parts[0].is_floating_point():
            total = torch.zeros_like(parts[0], dtype=torch.float64)
            for weight, part in zip(weights, parts, strict=True):
                total += weight * part.double()
            mean = (total / sum(weights)).to(parts[0].dtype)
        else:  # a buffer
            mean = parts[0]
        zeros[name.removesuffix(".weight")] = float((mean == 0).double().mean())
        writer.add(name, mean)
    writer.finish()
    copy_side_files(branches[0].folder, out)
    layers = _records(step, before, branches, zeros)
    write_json(out / COMPRESSION, {"layers": [layer.model_dump() for layer in layers]})
    write_json(out / TRAINING, _history(step, folders).model_dump())


def _records(
    step: Average, before: Checkpoint, branches: Sequence[Checkpoint], zeros: dict[str, float]
) -> list[Layer]:
    """What is known of every layer: its pattern if it had one already and no branch chose its zeros anew."""
    patterns = {} if step.prunes else {layer.name: layer for layer in before.compression()}
    known = {layer.name: layer for branch in reversed(branches) for layer in branch.compression()}
    return [
        Layer(
            name=name,
            rows=layer.rows,
            columns=layer.columns,
            sparsity=zeros[name] if layer.pattern else 0.0,
            pattern=patterns[name].pattern if name in patterns else None,
            window=patterns[name].window if name in patterns else None,
            bits=16,
            method="+".join(filter(None, [layer.method, "average"])),
        )
        for name, layer in sorted(known.items())
    ]


def _history(step: Average, folders: Sequence[Path]) -> History:
    """The trainings of the model before, then each branch's own: its last ones, as many as its steps."""
    found = history(folders[0])
    for steps, folder in zip(step.branches, folders[1:], strict=True):
        past = history(folder)
        trained = sum(isinstance(one, Recover) for one in steps)
        own = list(zip(curves(past.training), ran(past.training, past.runs), strict=True))
        for curve, run in own[max(len(own) - trained, 0) :]:
            found.training.extend(curve)
            found.runs.extend([run] if run is not None else [])
    return found
