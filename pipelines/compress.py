"""Runs a prune or quantize step over a model, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pipelines.allocate import owl_sparsities
from pipelines.checkpoint import COMPRESSION, GRID, Checkpoint, CheckpointWriter, copy_side_files
from pipelines.grids import Grid, absmax_grid, searched_grid, zero_point_grid
from pipelines.layers import LayerForward, LayerRun, Pause, check_shapes, final_norm, layer_forward
from pipelines.masks import (
    Grouped,
    Pattern,
    Unstructured,
    best_mask,
    magnitude_scores,
    top_fraction,
    wanda_scores,
)
from pipelines.recipe import Prune, Quantize, Rounding, SparsityPattern, override_of
from pipelines.solve import Curvature, Drift, Gram, admm, gptq, output_error, sparsegpt
from zoo.entry import Layer
from zoo.errors import PatternError
from zoo.files import write_json
from zoo.progress import track

BATCH_TOKENS = 4096
SOLVER_DTYPE = torch.float32


@dataclass(frozen=True)
class Linear:
    """A linear layer before this step: weight float32 (rows, columns), and what earlier steps did to it."""

    name: str
    weight: Tensor
    before: Layer | None

    @property
    def mask(self) -> Tensor | None:
        """Where pruned weights must stay zero."""
        pruned = self.before is not None and self.before.pattern is not None
        return self.weight != 0 if pruned else None


@dataclass(frozen=True)
class Compressed:
    weight: Tensor
    grid: Grid | None
    record: Layer


# Compresses one linear layer. `target` is the weight to approximate: the layer's own, or a corrected one.
Compress = Callable[[Linear, Tensor, Curvature | None], Compressed | None]


def run_step(step: Prune | Quantize, folder: Path, out: Path, windows: Tensor | None) -> None:
    """Apply `step` to the model in `folder` and write the result to `out`.

    windows (count, length) of token ids, for the steps that are calibrated. Memory: one decoder layer
    (or the embeddings, or the head), its Hessians, and the activations of the windows, whatever the number of
    layers.
    """
    checkpoint = Checkpoint(folder)
    check_shapes(checkpoint.config, checkpoint.shapes())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = CheckpointWriter(out)
    copy_side_files(folder, out)
    records = {record.name: record for record in checkpoint.compression()}
    grids = checkpoint.grids()
    with torch.inference_mode():
        stream = None
        sparsity_of: Mapping[int, float] = {}
        if step.calibrated:
            assert windows is not None
            if isinstance(step, Prune) and step.allocation != "uniform":
                sparsity_of = owl_sparsities(
                    checkpoint, _embed(checkpoint, windows, device), step.allocation, step.pattern, device
                )
            stream = Stream(checkpoint, windows, device, step.correction)
        for index in track(range(checkpoint.layer_count), f"{step.kind} ({step.method})"):
            prefix = checkpoint.family.layer_prefix(index)
            stored = checkpoint.layer(index)
            weights = {name: tensor.to(device, SOLVER_DTYPE) for name, tensor in stored.items()}
            linears = {
                name: Linear(prefix + name, weights[f"{name}.weight"], records.get(prefix + name))
                for name in checkpoint.family.linears
            }
            compress = _compressor(step, sparsity_of.get(index))
            if stream is not None:
                done = stream.through(weights, linears, compress, step.damping, stored)
            else:
                done = {name: compress(linear, linear.weight, None) for name, linear in linears.items()}
            for name, result in done.items():
                if result is None:
                    continue
                records[prefix + name] = result.record
                stored[f"{name}.weight"] = result.weight.to(stored[f"{name}.weight"].dtype)
                if result.record.bits == 16 or result.grid is not None:
                    _replace_grid(grids, prefix + name, result.grid)
            for name, tensor in stored.items():
                writer.add(prefix + name, tensor)
            del stored, weights, linears, done, result, tensor  # before the next layer is read
        for name in checkpoint.outer_names():
            tensor = checkpoint.tensors([name])[name]
            grid = _outer_grid(step, checkpoint, name)
            if grid is not None:
                assert isinstance(step, Quantize)
                module = name.removesuffix(".weight")
                curvature = None
                if stream is not None and (checkpoint.tied or module == checkpoint.family.head):
                    curvature = stream.of_head(step.damping)
                # Without: not calibrated, or only looked up, so that each weight counts by itself.
                method = "rtn" if curvature is None else "gptq"
                where = tensor.device if curvature is None else device
                outer = Linear(module, tensor.to(where, SOLVER_DTYPE), None)
                with _named(outer):
                    result = _round(
                        outer, outer.weight, grid, method, curvature, activation_order=step.activation_order
                    )
                tensor = result.weight.to(tensor.device, tensor.dtype)
                records[module] = result.record
                _replace_grid(grids, module, result.grid)
            writer.add(name, tensor)
    writer.finish()
    if grids:
        save_file({name: grids[name].contiguous() for name in sorted(grids)}, out / GRID)
    write_json(out / COMPRESSION, {"layers": [records[name].model_dump() for name in sorted(records)]})


class Stream:
    """The calibration activations on their way through the model, with the original's beside if needed."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Tensor, device: torch.device, correction: float
    ) -> None:
        self.family = checkpoint.family
        self.device = device
        self.correction = correction
        self.forward: LayerForward = layer_forward(
            checkpoint.family, checkpoint.config, windows.shape[1], device
        )
        weight, bias = f"{self.family.norm}.weight", f"{self.family.norm}.bias"
        norms = checkpoint.tensors(
            name for name in (weight, bias) if name == weight or name in checkpoint.names
        )
        norms = {name: tensor.to(device, SOLVER_DTYPE) for name, tensor in norms.items()}
        self.norm = final_norm(checkpoint.family, checkpoint.config, norms[weight], norms.get(bias))
        self.hidden = _embed(checkpoint, windows, device)
        self.original = list(self.hidden) if correction else []

    def through(
        self,
        weights: Mapping[str, Tensor],
        linears: Mapping[str, Linear],
        compress: Compress,
        damping: float,
        stored: Mapping[str, Tensor],
    ) -> dict[str, Compressed | None]:
        """Compress one decoder layer and move the activations past it."""
        runs = Lockstep([self.forward(x, weights) for x in self.hidden])
        originals = Lockstep([self.forward(x, weights) for x in self.original])
        self.hidden = []
        done: dict[str, Compressed | None] = {}
        for names in self.family.shared_inputs:
            group = [linears[name] for name in names]
            columns = group[0].weight.shape[1]
            gram = Gram(columns, self.device)
            for pause in runs.at:
                gram.add(pause.inputs)
            curvature = Curvature(gram.hessian(), damping)
            targets = [linear.weight for linear in group]
            biases = [weights.get(f"{name}.bias") for name in names]
            if self.correction:
                targets = self._corrected(runs, originals, targets, curvature)
                originals.advance([linear.weight for linear in group], biases)
            outputs = []
            for name, linear, target in zip(names, group, targets, strict=True):
                result = compress(linear, target, curvature)
                done[name] = result
                weight = linear.weight if result is None else result.weight
                # what is stored is what the next layers must live with
                outputs.append(weight.to(stored[f"{name}.weight"].dtype).to(SOLVER_DTYPE))
            runs.advance(outputs, biases)
        self.hidden, self.original = runs.results, originals.results
        return done

    def of_head(self, damping: float) -> Curvature:
        """The curvature of the output head, once the activations have passed all layers."""
        gram = Gram(self.hidden[0].shape[-1], self.device)
        for x in self.hidden:
            gram.add(self.norm(x))
        return Curvature(gram.hessian(), damping)

    def _corrected(
        self, runs: Lockstep, originals: Lockstep, weights: list[Tensor], curvature: Curvature
    ) -> list[Tensor]:
        residual = runs.at[0].residual
        drift = Drift(weights[0].shape[1], None if residual is None else residual.shape[-1], self.device)
        for ours, theirs in zip(runs.at, originals.at, strict=True):
            gap = (
                None if ours.residual is None or theirs.residual is None else theirs.residual - ours.residual
            )
            drift.add(ours.inputs, theirs.inputs, gap)
        return drift.corrected(weights, curvature, self.correction)


class Lockstep:
    """The forward passes of all batches through one layer, stopped before the same linear layers."""

    def __init__(self, runs: Sequence[LayerRun]) -> None:
        self._runs = runs
        self.at: list[Pause] = [next(run) for run in runs]
        self.results: list[Tensor] = []

    def advance(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Send every pass the outputs of its linear layers and stop before the next ones."""
        paused, self.at = self.at, []
        paused.reverse()
        for run in self._runs:
            inputs = paused.pop().inputs
            outputs = [F.linear(inputs, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            del inputs
            try:
                self.at.append(run.send(outputs))
            except StopIteration as end:
                self.results.append(end.value)


def _embed(checkpoint: Checkpoint, windows: Tensor, device: torch.device) -> list[Tensor]:
    """Token embeddings of the windows, in batches (batch, length, width)."""
    name = f"{checkpoint.family.embeddings}.weight"
    table = checkpoint.tensors([name])[name]
    batch = max(1, BATCH_TOKENS // windows.shape[1])
    batches = torch.split(windows, batch)
    return [F.embedding(ids, table).to(device, SOLVER_DTYPE) for ids in batches]


def _pattern(setting: SparsityPattern, sparsity: float | None) -> Pattern:
    """The pattern asked for, at the layer's own sparsity if the allocation gives one."""
    if setting.keep is None or setting.group is None:
        return Unstructured(sparsity if sparsity is not None else setting.sparsity or 0.0)
    if sparsity is None:
        return Grouped(setting.keep, setting.group, setting.window)
    keep = min(max(round(setting.group * (1 - sparsity)), 1), setting.group)
    if setting.window is not None:
        keep = min((4, 6, 8, 10, 12), key=lambda allowed: abs(allowed - 16 * (1 - sparsity)))
    return Grouped(keep, setting.group, setting.window)


def _compressor(step: Prune | Quantize, sparsity: float | None) -> Compress:
    def prune(linear: Linear, target: Tensor, curvature: Curvature | None) -> Compressed | None:
        assert isinstance(step, Prune)
        other = override_of(linear.name, step.overrides)
        setting = step.pattern if other is None else other.pattern
        if setting is None:
            return None
        with _named(linear):
            pattern = _pattern(setting, sparsity if other is None else None)
            return _prune(step, linear, target, pattern, curvature)

    def quantize(linear: Linear, target: Tensor, curvature: Curvature | None) -> Compressed | None:
        assert isinstance(step, Quantize)
        other = override_of(linear.name, step.overrides)
        rounding = step.grid if other is None else other.grid
        if rounding is None:
            return None
        with _named(linear):
            return _round(
                linear, target, rounding, step.method, curvature, activation_order=step.activation_order
            )

    return prune if isinstance(step, Prune) else quantize


class _named:
    """Adds the layer's name to a PatternError."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PatternError) and self.linear.name not in error.what:
            error.what = f"{self.linear.name}: {error.what}"


def _prune(
    step: Prune, linear: Linear, target: Tensor, pattern: Pattern, curvature: Curvature | None
) -> Compressed:
    weight = linear.weight
    grid = None
    if step.method == "magnitude":
        scores = magnitude_scores(weight)
        unstructured = isinstance(pattern, Unstructured)
        mask = top_fraction(scores, pattern.sparsity) if unstructured else best_mask(scores, pattern)
        pruned = weight * mask
    else:
        assert curvature is not None
        if step.method == "wanda":
            mask = best_mask(wanda_scores(weight, curvature.hessian.diagonal().sqrt()), pattern)
            pruned = weight * mask
        elif step.method == "sparsegpt":
            if step.quantize:
                grid = make_grid(target, step.quantize, "gptq", curvature)
            pruned, mask = sparsegpt(target, curvature, pattern, grid)
        else:
            pruned, mask = admm(target, curvature, pattern)
            if step.quantize:
                grid = make_grid(pruned, step.quantize, "gptq", curvature)
                pruned = gptq(pruned, curvature, grid, mask, activation_order=step.quantize.activation_order)
    method = f"{step.method}+gptq" if step.quantize else step.method
    record = _record(linear, pruned, method, curvature, pattern, step.quantize)
    return Compressed(pruned, grid, record)


def _round(
    linear: Linear,
    target: Tensor,
    rounding: Rounding,
    method: str,
    curvature: Curvature | None,
    *,
    activation_order: bool,
) -> Compressed:
    mask = linear.mask
    if mask is not None:
        target = target * mask
    grid = make_grid(target, rounding, method, curvature)
    if method == "gptq":
        assert curvature is not None
        rounded = gptq(target, curvature, grid, mask, activation_order=activation_order)
    else:
        rounded = grid.round(target)
        if mask is not None:
            rounded = rounded * mask  # a grid with a float16 minimum does not hold 0
    return Compressed(rounded, grid, _record(linear, rounded, method, curvature, None, rounding))


def make_grid(weight: Tensor, rounding: Rounding, method: str, curvature: Curvature | None) -> Grid:
    """The grid of `rounding` that a method gives a weight (rows, columns) before anything is rounded."""
    columns, bits = weight.shape[1], rounding.bits
    integer = _zero_point(rounding, method) == "integer"
    if rounding.per == "tensor":
        flat, size = weight.reshape(1, -1), weight.numel()
        whole = (
            absmax_grid(flat, bits, size)
            if rounding.symmetric
            else zero_point_grid(flat, bits, size, integer=integer)
        )
        shape = (weight.shape[0], 1)
        zero = None if whole.zero_point is None else whole.zero_point.expand(shape).contiguous()
        return Grid(bits, columns, whole.scale.expand(shape).contiguous(), zero)
    group = columns if rounding.group is None else rounding.group
    if method == "absmax":
        return absmax_grid(weight, bits, group)
    if method == "zeropoint" or (method == "rtn" and not rounding.symmetric):
        return zero_point_grid(weight, bits, group, integer=integer)
    importance = None if curvature is None else curvature.hessian.diagonal()
    return searched_grid(
        weight, bits, group, symmetric=rounding.symmetric, integer=integer, importance=importance
    )


def _zero_point(rounding: Rounding, method: str) -> Literal["integer", "float16"] | None:
    if rounding.symmetric:
        return None
    return rounding.zero_point or ("integer" if method == "zeropoint" else "float16")


def _record(
    linear: Linear,
    weight: Tensor,
    method: str,
    curvature: Curvature | None,
    pattern: Pattern | None,
    rounding: Rounding | None,
) -> Layer:
    """What was done, as the registry keeps it. Without calibration the error is that of the weights."""
    before = linear.before
    rows, columns = weight.shape
    hessian = curvature.hessian if curvature is not None else None
    error = (
        output_error(linear.weight, weight, hessian)
        if hessian is not None
        else float((linear.weight - weight).square().sum() / linear.weight.square().sum().clamp_min(1e-30))
    )
    # only masks leave weights on the grid of an earlier step
    grid = rounding or (before if before and method in ("magnitude", "wanda") else None)
    name = before.pattern if before else None
    window = before.window if before else None
    if isinstance(pattern, Grouped):
        name, window = f"{pattern.keep}:{pattern.group}", pattern.window
    elif isinstance(pattern, Unstructured):
        name, window = "unstructured", None
    return Layer(
        name=linear.name,
        rows=rows,
        columns=columns,
        sparsity=float((weight == 0).sum()) / weight.numel(),
        pattern=name,
        window=window,
        bits=grid.bits if grid else 16,
        group=grid.group if grid else None,
        symmetric=grid.symmetric if grid else None,
        zero_point=_zero_point(rounding, method) if rounding else grid.zero_point if grid else None,
        method="+".join(filter(None, [before.method if before else None, method])),
        error=error,
    )


def _outer_grid(step: Prune | Quantize, checkpoint: Checkpoint, name: str) -> Rounding | None:
    if not isinstance(step, Quantize):
        return None
    family = checkpoint.family
    return {f"{family.embeddings}.weight": step.embeddings, f"{family.head}.weight": step.head}.get(name)


def _replace_grid(grids: dict[str, Tensor], module: str, grid: Grid | None) -> None:
    """Put a layer's grid in the place of the one it had before, if it had one."""
    for name in ("scale", "zero_point"):
        grids.pop(f"{module}.{name}", None)
    if grid is None:
        return
    grids[f"{module}.scale"] = grid.scale.float().cpu()
    if grid.zero_point is not None:
        integer = bool((grid.zero_point == grid.zero_point.round()).all())
        kind = torch.int32 if integer else torch.float32
        grids[f"{module}.zero_point"] = grid.zero_point.to(kind).cpu()
