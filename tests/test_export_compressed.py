"""The compressed-tensors export, read back by transformers and by the compressed-tensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.checkpoint import GRID, Checkpoint
from pipelines.compress import run_step
from pipelines.export_compressed import export_compressed_tensors
from pipelines.families import FAMILIES
from pipelines.recipe import Prune, Quantize
from tests.tiny import tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError

MAKE = {"llama": tiny_llama, "mistral": tiny_mistral, "mpt": tiny_mpt}
INT4_SYMMETRIC = {"bits": 4, "group": 32, "symmetric": True}
INT4_ASYMMETRIC = {"bits": 4, "group": 64, "symmetric": False, "zero_point": "integer"}
INT8_CHANNEL = {"bits": 8, "per": "channel", "group": None, "symmetric": True}
IDS = torch.arange(5, 69).reshape(2, 32)


def quantized(base: Path, out: Path, grid: dict[str, Any], method: str = "rtn", **more: Any) -> Path:
    out.mkdir()
    step = Quantize.model_validate({"kind": "quantize", "method": method, "grid": grid} | more)
    run_step(step, base, out, None)
    return out


def exported(folder: Path, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    export_compressed_tensors(folder, out)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def decompressed(folder: Path) -> torch.nn.Module:
    """The folder as transformers loads it, and the compressed-tensors library un-packs it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(IDS)  # un-packs what loading has not
    return model


def same_model(dense: Path, packed: Path) -> None:
    """Equal weights, and equal logits, of both folders as transformers reads them."""
    ours = AutoModelForCausalLM.from_pretrained(dense)
    theirs = AutoModelForCausalLM.from_pretrained(packed)
    assert theirs.dtype == ours.dtype
    with torch.inference_mode():
        expected, logits = ours(IDS).logits.float(), theirs(IDS).logits.float()
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)
    expected_weights, weights = ours.state_dict(), decompressed(packed).state_dict()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("grid", [INT4_SYMMETRIC, INT4_ASYMMETRIC, INT8_CHANNEL], ids=["w4", "w4z", "w8"])
def test_transformers_reads_the_same_model(family: str, grid: dict[str, Any], tmp_path: Path) -> None:
    dense = quantized(MAKE[family](tmp_path / "base"), tmp_path / "dense", grid)
    _, config = exported(dense, tmp_path / "packed")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["num_bits"] == grid["bits"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    same_model(dense, tmp_path / "packed")
    assert (tmp_path / "packed" / "tokenizer.json").is_file()


@pytest.mark.parametrize("grid", [INT4_SYMMETRIC, INT4_ASYMMETRIC, INT8_CHANNEL], ids=["w4", "w4z", "w8"])
def test_integers_and_scales_give_the_weights(grid: dict[str, Any], tmp_path: Path) -> None:
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", grid)
    tensors, _ = exported(dense, tmp_path / "packed")
    weights = load_file(dense / "model.safetensors")
    bits = grid["bits"]
    for module in (name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")):
        shape = tensors[f"{module}_shape"]
        q = unpack_from_int32(tensors[f"{module}_packed"], bits, torch.Size(shape.tolist())).double()
        # the same by hand: little-endian fields of the word, offset by half the range
        words = tensors[f"{module}_packed"].numpy().view(np.uint32)
        fields = (words[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
        np.testing.assert_array_equal(fields.reshape(words.shape[0], -1) - 2.0 ** (bits - 1), q.numpy())
        scale = tensors[f"{module}_scale"]
        assert scale.dtype == torch.float16
        spread = q.shape[1] // scale.shape[1]
        zero = torch.zeros(scale.shape)
        if not grid["symmetric"]:
            zero = unpack_from_int32(
                tensors[f"{module}_zero_point"], bits, torch.Size((q.shape[0], scale.shape[1])), packed_dim=0
            )
        zero, scale = (x.double().repeat_interleave(spread, dim=1) for x in (zero, scale))
        torch.testing.assert_close(((q - zero) * scale).half(), weights[module], rtol=0, atol=0)
    assert len(tensors) > len(weights)


def test_a_layer_has_its_own_grid_or_none(tmp_path: Path) -> None:
    overrides = [
        {"layers": "*.down_proj", "grid": INT8_CHANNEL},
        {"layers": "model.layers.1.self_attn.*", "grid": INT4_ASYMMETRIC},
        {"layers": "*.2.mlp.up_proj", "grid": None},
    ]
    base = tiny_llama(tmp_path / "base")
    dense = quantized(base, tmp_path / "dense", INT4_SYMMETRIC, overrides=overrides)
    tensors, config = exported(dense, tmp_path / "packed")
    groups = QuantizationConfig.model_validate(config["quantization_config"]).config_groups
    of = {target: group.weights for group in groups.values() for target in group.targets}
    assert of["model.layers.0.mlp.down_proj"].num_bits == 8
    beside_others = of["model.layers.1.self_attn.k_proj"]  # asymmetric 4 bits, as q - zero_point in 8
    assert (beside_others.symmetric, beside_others.num_bits, beside_others.group_size) == (True, 8, 64)
    assert of["model.layers.0.self_attn.k_proj"].group_size == 32
    assert len(of) == 3 * 7 - 1
    assert config["quantization_config"]["ignore"] == ["model.layers.2.mlp.up_proj", "lm_head"]
    assert "model.layers.2.mlp.up_proj.weight" in tensors
    same_model(dense, tmp_path / "packed")


def test_asymmetric_8_bit_beside_other_grids_is_refused(tmp_path: Path) -> None:
    zero_points = {"bits": 8, "group": 64, "symmetric": False, "zero_point": "integer"}
    overrides = [{"layers": "*.down_proj", "grid": INT8_CHANNEL}]
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", zero_points, overrides=overrides)
    with pytest.raises(FormatError, match="asymmetric 8-bit grid beside layers with other grids"):
        export_compressed_tensors(dense, tmp_path / "packed")


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_widths_go_into_the_next_wider_integer(bits: int, symmetric: bool, tmp_path: Path) -> None:
    zero_point = None if symmetric else "integer"
    grid = {"bits": bits, "group": 64, "symmetric": symmetric, "zero_point": zero_point}
    dense = quantized(tiny_llama(tmp_path / "base", num_hidden_layers=1), tmp_path / "dense", grid)
    _, config = exported(dense, tmp_path / "packed")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == (4 if bits < 4 else 8)
    same_model(dense, tmp_path / "packed")


def test_a_grid_per_tensor_is_stored_per_channel(tmp_path: Path) -> None:
    grid = {"bits": 8, "per": "tensor", "group": None, "symmetric": False, "zero_point": "integer"}
    dense = quantized(tiny_mpt(tmp_path / "base"), tmp_path / "dense", grid, method="zeropoint")
    _, config = exported(dense, tmp_path / "packed")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["strategy"] == "channel"
    same_model(dense, tmp_path / "packed")


def test_pruned_zeros_stay_zero_and_embeddings_dense(tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune = {"kind": "prune", "method": "magnitude", "pattern": {"keep": 8, "group": 16, "window": 8}}
    run_step(Prune.model_validate(prune), tiny_mistral(tmp_path / "base"), pruned, None)
    embeddings = {"bits": 8, "group": 64, "symmetric": True}
    dense = quantized(pruned, tmp_path / "dense", INT4_ASYMMETRIC, embeddings=embeddings, head=embeddings)
    assert "lm_head.scale" in Checkpoint(dense).grids()
    tensors, _ = exported(dense, tmp_path / "packed")
    assert "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors
    same_model(dense, tmp_path / "packed")
    weight = decompressed(tmp_path / "packed").model.layers[0].mlp.up_proj.weight
    assert ((weight != 0).reshape(-1, 16).sum(dim=1) <= 8).all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    dense = quantized(base, tmp_path / "dense", INT4_SYMMETRIC)
    tensors, _ = exported(dense, tmp_path / "packed")
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    same_model(dense, tmp_path / "packed")


def test_bfloat16_differs_by_the_rounding_of_the_scale_only(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    dense = quantized(base, tmp_path / "dense", INT4_SYMMETRIC)
    exported(dense, tmp_path / "packed")
    ours = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    theirs = decompressed(tmp_path / "packed").state_dict()
    for name, weight in ours.items():
        assert theirs[name].dtype == torch.bfloat16
        # two roundings to 8 bits, of scale and product, against one
        torch.testing.assert_close(theirs[name].float(), weight.float(), rtol=2**-7, atol=0)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.checkpoint.SHARD_BYTES", 100_000)
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", INT4_SYMMETRIC)
    export_compressed_tensors(dense, tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 2
    same_model(dense, tmp_path / "packed")


def test_size_is_what_the_bits_say(tmp_path: Path) -> None:
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", INT4_SYMMETRIC)
    tensors, _ = exported(dense, tmp_path / "packed")
    linears = [name for name in tensors if name.endswith(("weight_packed", "weight_scale"))]
    weights = sum(layer.rows * layer.columns for layer in Checkpoint(dense).compression())
    bits = 8 * sum(tensors[name].nbytes for name in linears) / weights
    assert bits == 4 + 16 / 32


def test_nothing_quantized_is_said(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no quantized linear layer"):
        export_compressed_tensors(tiny_llama(tmp_path / "base"), tmp_path / "out")


def test_weights_that_left_the_grid_are_refused(tmp_path: Path) -> None:
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", INT4_SYMMETRIC)
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj are not on their grid") as refusal:
        export_compressed_tensors(dense, tmp_path / "out")
    assert refusal.value.saw == "1 of 32768 weights between its 4-bit levels"


@pytest.mark.parametrize("harm", ["shape", "zero_point", "absent", "nan"])
def test_a_grid_file_that_does_not_fit_is_refused(harm: str, tmp_path: Path) -> None:
    dense = quantized(tiny_llama(tmp_path / "base"), tmp_path / "dense", INT4_ASYMMETRIC)
    grids = load_file(dense / GRID)
    module = "model.layers.0.self_attn.q_proj"
    if harm == "shape":
        grids[f"{module}.scale"] = grids[f"{module}.scale"][:, :1].contiguous()
    elif harm == "zero_point":
        grids[f"{module}.zero_point"][0, 0] = 300
    elif harm == "absent":
        del grids[f"{module}.zero_point"]
    else:
        grids[f"{module}.scale"][0, 0] = float("nan")
    save_file(grids, dense / GRID)
    with pytest.raises(FormatError, match=module):
        export_compressed_tensors(dense, tmp_path / "out")


def test_every_family_is_covered() -> None:
    assert set(MAKE) == set(FAMILIES)
