"""The trained model as a folder: its zeros, its integers and their grids as they were in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import keys
from pipelines.checkpoint import (
    COMPRESSION,
    GRID,
    TRAINING,
    Checkpoint,
    CheckpointWriter,
    copy_side_files,
)
from pipelines.grids import Grid
from pipelines.recipe import Recover, SparsityPattern
from pipelines.recover.prune import Pruner
from pipelines.recover.rounding import Rounder, check_exact
from pipelines.recover.shards import whole
from pipelines.recover.state import Progress
from pipelines.recover.student import linear_names, rounders
from zoo.entry import Layer, Record, TrainingPoint, TrainingRun
from zoo.errors import NumericsError
from zoo.files import write_json
from zoo.machine import this_machine


@torch.no_grad()
def write_model(
    step: Recover,
    model: nn.Module,
    source: Path,
    out: Path,
    masks: Mapping[str, Tensor],
    pruner: Pruner | None,
    progress: Progress,
    accelerator: Any,
) -> None:
    """Write weights, grids, the record of every layer and the loss curve to `out`; the rest is `source`'s.

    Every process calls it, the first writes. Raises NumericsError if a pruned weight is not zero, a weight
    does not fit its type, or a rounded one would not lead back to its integer.
    """
    writes = accelerator.is_main_process
    checkpoint = Checkpoint(source)
    grids = rounders(model)
    dtype = getattr(torch, step.stored)
    writer = CheckpointWriter(out)
    stored_grids: dict[str, Tensor] = {}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    zeros: dict[str, float] = {}
    for name in checkpoint.names:
        if name not in known:  # a buffer that the file keeps, and the model computes
            writer.add(name, checkpoint.tensors([name])[name])
            continue
        layer = name.removesuffix(".weight")
        weight = whole(model.get_parameter(name)).float()
        rounder = grids.get(layer)
        if rounder is not None and rounder.on:
            with _whole_scales(rounder):
                stored = _rounded(layer, weight, rounder, dtype, stored_grids)
        else:
            stored = weight.to(dtype)
        if not torch.isfinite(stored).all():
            raise NumericsError(
                f"{name} does not fit {step.stored}", saw=f"a weight of {float(weight.abs().max()):g}"
            )
        if layer in masks:
            _check_zeros(layer, stored, masks[layer])
            zeros[layer] = float((stored == 0).float().mean())
        if writes:
            writer.add(name, stored)
    if not writes:
        return
    writer.finish()
    copy_side_files(source, out)
    _say_type(out / "config.json", step.stored)
    if stored_grids:
        save_file({name: stored_grids[name].contiguous() for name in sorted(stored_grids)}, out / GRID)
    records = _records(step, checkpoint, grids, zeros, pruner)
    write_json(out / COMPRESSION, {"layers": [record.model_dump() for record in records]})
    before = history(source)
    run = TrainingRun(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else this_machine().cpu,
        processes=progress.processes,
        versions=keys.library_versions(),
        tokens=progress.tokens,
        seconds=progress.seconds,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    after = History(training=before.training + progress.curve, runs=[*before.runs, run])
    write_json(out / TRAINING, after.model_dump())


class History(Record):
    """The trainings that made a folder, one after the other."""

    training: list[TrainingPoint] = Field(default_factory=list)  # their curves
    runs: list[TrainingRun] = Field(default_factory=list)


def history(folder: Path) -> History:
    path = folder / TRAINING
    return History.model_validate_json(path.read_bytes()) if path.is_file() else History()


def _rounded(
    layer: str, weight: Tensor, rounder: Rounder, dtype: torch.dtype, grids: dict[str, Tensor]
) -> Tensor:
    stored = rounder(weight).to(dtype)
    q, _, _ = rounder.integers(weight)
    grid: Grid = rounder.exported()
    check_exact(layer, stored, q, grid)
    grids[f"{layer}.scale"] = grid.scale.float().cpu()
    if grid.zero_point is not None:
        kind = torch.int32 if rounder.integer else torch.float32
        grids[f"{layer}.zero_point"] = grid.zero_point.to(kind).cpu()
    return stored  # type: ignore[no-any-return]


@contextmanager
def _whole_scales(rounder: Rounder) -> Iterator[None]:
    """With all of the learned scales where each process holds a part of them."""
    own = rounder.delta
    rounder.delta = nn.Parameter(whole(own), requires_grad=False)
    try:
        yield
    finally:
        rounder.delta = own


def _check_zeros(layer: str, stored: Tensor, mask: Tensor) -> None:
    moved = int((stored[~mask.to(stored.device)] != 0).sum())
    if moved:
        raise NumericsError(f"{layer}: {moved} pruned weights are no longer zero", expected="none")


def _say_type(config: Path, stored: str) -> None:
    found = json.loads(config.read_bytes())
    for key in {"dtype", "torch_dtype"} & found.keys() or {"dtype"}:
        found[key] = stored
    write_json(config, found)


def _records(
    step: Recover,
    checkpoint: Checkpoint,
    grids: Mapping[str, Rounder],
    zeros: Mapping[str, float],
    pruner: Pruner | None,
) -> list[Layer]:
    """What is known of every layer now. Its error is that of no layer alone any more, so it is left out."""
    before = {record.name: record for record in checkpoint.compression()}
    shapes = checkpoint.shapes()
    found = []
    for name in sorted({*linear_names(checkpoint), *grids, *before}):
        rows, columns = shapes[f"{name}.weight"]
        old = before.get(name)
        target = pruner.targets.get(name) if pruner else None
        pattern, window = (old.pattern, old.window) if old else (None, None)
        if target is not None:
            pattern, window = _named(target)
        rounder = grids.get(name)
        grid = rounder.rounding if rounder is not None and rounder.on else None
        done = "recover+qat" if grid else "recover"
        found.append(
            Layer(
                name=name,
                rows=rows,
                columns=columns,
                sparsity=zeros.get(name, 0.0),
                pattern=pattern,
                window=window,
                bits=grid.bits if grid else 16,
                group=grid.group if grid else None,
                symmetric=grid.symmetric if grid else None,
                zero_point=(grid.zero_point or "float16") if grid and not grid.symmetric else None,
                method="+".join(filter(None, [old.method if old else None, done])),
            )
        )
    return found


def _named(pattern: SparsityPattern) -> tuple[str, int | None]:
    if pattern.keep is None:
        return "unstructured", None
    return f"{pattern.keep}:{pattern.group}", pattern.window
