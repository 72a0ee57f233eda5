"""A compressed model folder in the compressed-tensors format, which transformers and vLLM read.

Every quantized linear layer becomes `weight_packed` (the integers, 4 or 8 bits each, in int32 words),
`weight_scale`, `weight_shape` and, if asymmetric, `weight_zero_point`; config.json says which layer has
which grid. Format: https://github.com/vllm-project/compressed-tensors, `pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoint import COMPRESSION, GRID, Checkpoint, CheckpointWriter, copy_side_files
from pipelines.grids import Grid, grouped
from zoo.entry import Layer
from zoo.errors import FormatError
from zoo.files import write_json
from zoo.progress import track


@dataclass(frozen=True)
class Storage:
    """How the integers of a layer are written."""

    bits: int  # 4 or 8: kernels exist for these
    symmetric: bool  # without a zero point
    group: int | None  # columns that share a scale; None: one scale per row


def export_compressed_tensors(folder: Path, out: Path) -> None:
    """Write the model in `folder` to `out` with its quantized linear layers packed.

    Values are unchanged, but for scales in a bfloat16 model, which readers keep in bfloat16. Grids of 2, 3
    and 5 to 7 bits are stored in 4 and 8 bits: the same integers and scales. A grid per tensor is stored as
    one per channel, which is all that vLLM reads. Embeddings and head stay dense, tied ones tied. Memory:
    one tensor and a shard. Raises FormatError if nothing is quantized, or if weights are not on the grid
    that the folder says they are on.
    """
    checkpoint = Checkpoint(folder)
    grids = checkpoint.grids()
    records = {record.name: record for record in checkpoint.compression()}
    linears = [
        checkpoint.family.layer_prefix(index) + name
        for index in range(checkpoint.layer_count)
        for name in checkpoint.family.linears
    ]
    quantized = [name for name in linears if f"{name}.scale" in grids]
    if not quantized:
        raise FormatError(
            f"{folder} has no quantized linear layer to pack",
            expected=f"the output of a step that quantizes, with {GRID}",
            try_="add a quantize step to the recipe, or drop the export compressed-tensors",
        )
    if unknown := [name for name in quantized if name not in records or records[name].bits > 8]:
        raise FormatError(f"{folder} has a grid of {unknown[0]}, but does not say of how many bits")
    storage = _storage([records[name] for name in quantized])
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(folder, out)
    writer = CheckpointWriter(out)
    for name in track(checkpoint.names, "compressed-tensors"):
        tensor = checkpoint.tensors([name])[name]
        module = name.removesuffix(".weight")
        if module in storage:
            record = records[module]
            for part, packed in _packed(record, tensor, _grid(record, grids), storage[module]).items():
                writer.add(f"{module}.{part}", packed)
        else:
            writer.add(name, tensor)
    writer.finish()
    dense = [name for name in linears if name not in storage]
    settings = _quantization_config(storage, [*dense, checkpoint.family.head])
    write_json(out / "config.json", checkpoint.config | {"quantization_config": settings})


def _storage(quantized: Sequence[Layer]) -> dict[str, Storage]:
    """The storage of every layer, by module.

    transformers un-packs zero points only if the whole model is stored in one way. In a mixed model an
    asymmetric grid is therefore stored as symmetric integers q - zero_point, of 8 bits.
    """
    own = {
        record.name: Storage(4 if record.bits <= 4 else 8, bool(record.symmetric), record.group)
        for record in quantized
    }
    if len(set(own.values())) == 1:
        return own
    return {name: to if to.symmetric else Storage(8, True, to.group) for name, to in own.items()}


def _grid(record: Layer, grids: Mapping[str, Tensor]) -> Grid:
    """The layer's grid, checked: the file may come from elsewhere."""
    groups = 1 if record.group is None else record.columns // record.group
    names = (
        [f"{record.name}.scale"]
        if record.symmetric
        else [f"{record.name}.scale", f"{record.name}.zero_point"]
    )
    for name in names:
        shape = tuple(grids[name].shape) if name in grids else "nothing"
        if shape != (record.rows, groups):
            raise FormatError(
                f"{GRID} does not fit its layer: {name}", saw=str(shape), expected=f"{(record.rows, groups)}"
            )
    if record.zero_point == "float16":
        raise FormatError(
            f"{record.name} has a zero point that is no integer, which compressed-tensors cannot hold",
            try_="quantize it with `zero_point: integer` or `symmetric: true`",
        )
    zero_point = None if record.symmetric else grids[names[1]].float()
    grid = Grid(int(record.bits), record.columns // groups, grids[names[0]].float(), zero_point)
    if zero_point is not None and not ((zero_point >= grid.lowest) & (zero_point <= grid.highest)).all():
        raise FormatError(
            f"{GRID} has a zero point of {record.name} outside of {grid.lowest} to {grid.highest}"
        )
    return grid


def _packed(record: Layer, weight: Tensor, grid: Grid, to: Storage) -> dict[str, Tensor]:
    """The tensors that stand for `weight` (rows, columns), named relative to the module."""
    from compressed_tensors.compressors import pack_to_int32

    if weight.shape != (record.rows, record.columns):
        raise FormatError(
            f"{record.name} is not of the shape that {COMPRESSION} says",
            saw=str(tuple(weight.shape)),
            expected=f"{(record.rows, record.columns)}",
        )
    exact = weight.float()
    off = int((grid.round(exact).to(weight.dtype) != weight).sum())
    if off:
        raise FormatError(
            f"the weights of {record.name} are not on their grid, so packing would change them",
            saw=f"{off} of {weight.numel()} weights between its {grid.bits}-bit levels",
            try_="make the step that quantizes the last one that moves weights",
        )
    integers = grid.integers(exact)
    parts = {"weight_scale": grid.scale.to(weight.dtype), "weight_shape": torch.tensor(weight.shape)}
    if grid.zero_point is not None and to.symmetric:
        integers = (grouped(integers, grid.group) - grid.zero_point[..., None]).view_as(integers)
        if integers.min() < -128 or integers.max() > 127:
            raise FormatError(
                f"{record.name} has an asymmetric {grid.bits}-bit grid beside layers with other grids, "
                "which transformers cannot read",
                try_="quantize it with `symmetric: true`, or all layers in the same way",
            )
    elif grid.zero_point is not None:
        half = 1 << (to.bits - 1)  # stored integers are signed, a grid's with zero point are not
        integers = integers - half
        zero_point = (grid.zero_point - half).to(torch.int8)
        parts["weight_zero_point"] = pack_to_int32(zero_point, to.bits, packed_dim=0)
    parts["weight_packed"] = pack_to_int32(integers.to(torch.int8), to.bits)
    return parts


def _quantization_config(storage: Mapping[str, Storage], ignore: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`: one group per kind of storage, with the layers that have it."""
    targets: dict[Storage, list[str]] = {}
    for name, kind in storage.items():
        targets.setdefault(kind, []).append(name)
    groups = {}
    for number, (kind, names) in enumerate(targets.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(targets) == 1 else names,
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": kind.symmetric,
                "strategy": "channel" if kind.group is None else "group",
                "group_size": kind.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # transformers un-packs zero points only while it loads, not in the first forward pass
        "dequantize": not all(kind.symmetric for kind in targets),
    }
