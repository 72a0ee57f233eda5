"""Sparsity and bits per weight, against independent counts and someone else's packers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_llama
from zoo.analyze import Analysis, analyze, smallest_bits
from zoo.entry import Layer
from zoo.errors import FormatError, UsageError
from zoo.runner.pack import pack_folder


def prune(folder: Path, fraction: float) -> dict[str, torch.Tensor]:
    """Zero a random `fraction` of every decoder matrix of a model folder; some zeros negative."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensor[torch.rand(tensor.shape, generator=generator) < fraction] = 0.0
            tensor[0, tensor[0] == 0] = -0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_llama(tmp_path / "m", dtype=dtype)
    tensors = prune(folder, 0.6)
    found = analyze(folder)
    assert {t.name for t in found.tensors} == set(tensors)
    for t in found.tensors:
        expected = (tensors[t.name] == 0).double().mean().item()
        assert t.sparsity == pytest.approx(expected, abs=1e-12)
        assert t.bits_per_weight == 8 * dtype.itemsize
    linear = [t for n, t in tensors.items() if n.endswith("_proj.weight")]
    zeros = sum(int((t == 0).sum()) for t in linear)
    assert found.sparsity == pytest.approx(zeros / sum(t.numel() for t in linear))
    assert found.weights == sum(t.numel() for t in tensors.values())
    assert found.format == "safetensors"
    assert Analysis.model_validate_json(found.model_dump_json()) == found
    assert analyze(folder / "model.safetensors").tensors == found.tensors


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    """Blocks written by gguf-py; values read back by gguf-py and counted with numpy."""
    values = np.random.default_rng(0).normal(size=(37, 256)).astype(np.float32)
    values[values < 0.3] = 0
    ggml = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(values, ggml)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=ggml)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = analyze(tmp_path / "m.gguf")
    expected = float((gguf.dequantize(data, ggml) == 0).mean())
    assert expected > 0.1
    assert found.sparsity == pytest.approx(expected)
    matrix, norm = found.tensors
    assert (matrix.dtype, matrix.shape, matrix.linear) == (kind, [37, 256], True)
    assert matrix.bits_per_weight == data.nbytes * 8 / values.size
    assert (norm.linear, norm.sparsity) == (False, 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """Weights packed by compressed-tensors' own code."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns, group = 40, 96, 32
    generator = torch.Generator().manual_seed(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (rows, columns), generator=generator).to(torch.int8)
    zero = torch.zeros(rows, columns // group, dtype=torch.int8)
    if not symmetric:
        zero = torch.randint(low, high, zero.shape, generator=generator).to(torch.int8)
    own = zero.repeat_interleave(group, dim=1)
    drop = torch.rand(rows, columns, generator=generator) < 0.5
    values[drop] = own[drop]
    name = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{name}.weight_packed": pack_to_int32(values, bits),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
        f"{name}.weight_scale": torch.ones(rows, columns // group, dtype=torch.float16),
        "model.norm.weight": torch.ones(columns, dtype=torch.float16),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = analyze(tmp_path)
    assert found.format == "compressed-tensors"
    assert found.sparsity == pytest.approx((values == own).double().mean().item())
    assert [t.name for t in found.tensors] == [f"{name}.weight", "model.norm.weight"]
    stored = sum(t.nbytes for n, t in tensors.items() if n.startswith(name) and "shape" not in n)
    assert found.tensors[0].bytes == stored


def test_int8_weights(tmp_path: Path) -> None:
    values = torch.randint(-2, 3, (32, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: values, f"{name}_scale": torch.ones(32, 1)}, tmp_path / "model.safetensors")
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert analyze(tmp_path).sparsity == pytest.approx((values == 0).double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values.view(torch.uint8)[:, ::4] = 0x00
    values.view(torch.uint8)[:, 1::4] = 0x80  # negative zero
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: values, f"{name}_scale": torch.ones(32, 1)}, tmp_path / "model.safetensors")
    weight, scale = analyze(tmp_path).tensors
    assert weight.sparsity == pytest.approx((values.float() == 0).double().mean().item())
    assert 0.5 <= weight.sparsity < 0.6
    assert (weight.name, weight.bits_per_weight, weight.linear) == (name, 8, True)
    assert (scale.name, scale.sparsity) == (f"{name}_scale", 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_other_types_are_listed_without_a_sparsity(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": torch.ones(32, 8).to(dtype),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(8, 32),
        "model.empty": torch.zeros(0).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = analyze(tmp_path)
    down, up = found.tensors
    assert (down.sparsity, up.sparsity, found.sparsity) == (1, None, None)
    assert (up.linear, up.weights, up.bits_per_weight) == (True, 256, 8 * dtype.itemsize)
    assert found.weights == 512


def layer(**changes: object) -> Layer:
    settings: dict[str, object] = {
        "name": "model.layers.0.mlp.up_proj", "rows": 256, "columns": 128, "sparsity": 0.0, "bits": 16,
    }  # fmt: skip
    return Layer.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 16),
        ({"sparsity": 0.5}, 16 * 0.5 + 1),
        ({"sparsity": 0.01}, 16 * 0.99 + 1 if 16 * 0.99 + 1 < 16 else 16),
        ({"sparsity": 0.5, "pattern": "2:4"}, 8 + 3 / 4),  # 6 codes: 3 bits for four weights
        ({"sparsity": 0.5, "pattern": "8:16"}, 8 + math.ceil(math.log2(12870)) / 16),
        ({"sparsity": 0.1, "pattern": "8:16"}, 16 * 0.9 + 1),  # the mask does not keep to the pattern
        ({"sparsity": 0.625, "pattern": "6:16", "window": 4}, 6 / 16 * (16 + 2)),
        ({"bits": 4, "group": 64, "symmetric": True}, 4 + 16 / 64),
        ({"bits": 4, "group": 64, "symmetric": False}, 4 + (16 + 4) / 64),
        ({"bits": 8, "symmetric": True}, 8 + 16 / 128),
        ({"bits": 4, "group": 64, "symmetric": True, "sparsity": 0.5}, 3 + 16 / 64),
        ({"bits": 4, "group": 64, "sparsity": 0.5, "pattern": "2:4"}, 2 + 3 / 4 + 16 / 64),
    ],
)
def test_smallest_bits(changes: dict[str, object], bits: float) -> None:
    assert smallest_bits(layer(**changes)) == pytest.approx(bits)


def test_model_folder(tmp_path: Path) -> None:
    """compression.json says how small a layer can be; grid.safetensors is no weight."""
    folder = tiny_llama(tmp_path / "m")
    described = layer(bits=4, group=32, symmetric=True, sparsity=0.5, pattern="2:4", rows=256)
    (folder / "compression.json").write_text(json.dumps({"layers": [described.model_dump()]}))
    save_file({"model.layers.0.mlp.up_proj.scale": torch.ones(256, 4)}, folder / "grid.safetensors")
    found = analyze(folder)
    smallest = {t.name: t.smallest_bits_per_weight for t in found.tensors}
    assert smallest["model.layers.0.mlp.up_proj.weight"] == smallest_bits(described)
    assert smallest["model.layers.0.mlp.down_proj.weight"] == 16
    saved = 256 * 128 * (16 - smallest_bits(described))
    assert found.smallest_bits_per_weight == pytest.approx(16 - saved / found.weights)
    assert found.compression_ratio == pytest.approx(16 / found.smallest_bits_per_weight)


def test_packed(tmp_path: Path) -> None:
    """A packed file has the zeros of the folder it was made of, and is no shard of that folder."""
    folder = tiny_llama(tmp_path / "m")
    tensors = prune(folder, 0.7)
    beside = analyze(folder)
    report = pack_folder(folder)
    assert analyze(folder).model_copy(update={"path": ""}) == beside.model_copy(update={"path": ""})
    found = analyze(folder / "packed.safetensors")
    assert found.format == "packed"
    by_name = {t.name: t for t in found.tensors}
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    packed = by_name["layers.1.up"]
    assert (packed.dtype, packed.shape, packed.linear) == ("int8 mask", list(up.shape), True)
    # Rounding to int8 makes a few more zeros.
    zeros = (up == 0).double().mean().item()
    assert zeros <= (packed.sparsity or 0) < zeros + 0.01
    assert packed.bits_per_weight == next(m.bits_per_weight for m in report.matrices if m.name == packed.name)
    assert by_name["embed"].sparsity == next(m.sparsity for m in report.matrices if m.name == "embed")
    assert by_name["norm.weight"].dtype == "F32"
    assert not by_name["embed"].linear
    (folder / "model.safetensors").unlink()
    assert analyze(folder).tensors == found.tensors
    with (folder / "packed.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FormatError):
        analyze(folder)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        analyze(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no"):
        analyze(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0))
    with pytest.raises(FormatError, match="count"):
        analyze(tmp_path / "m.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="neither"):
        analyze(tmp_path / "weights.bin")
    save_file({"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no description"):
        analyze(tmp_path / "model.safetensors")
