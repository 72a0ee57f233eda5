"""Model folders read and written a few tensors at a time, and every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines import checkpoint as module
from pipelines.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, side_files
from tests.tiny import tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError, NumericsError, SourceError, ZooError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", num_hidden_layers=2)


def shard(source: Path, target: Path, shards: int) -> Path:
    """The same model in several files with an index."""
    tensors = load_file(source / "model.safetensors")
    copy_side_files(source, target)
    table = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(part, target / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_sharded_and_single_files_hold_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    single, sharded = Checkpoint(folder), Checkpoint(shard(folder, tmp_path / "sharded", 4))
    held = load_file(folder / "model.safetensors")
    assert single.names == sharded.names == sorted(held)
    assert single.layer_count == sharded.layer_count == 2
    for index in range(2):
        a, b = single.layer(index), sharded.layer(index)
        assert a.keys() == b.keys() and len(a) == 9
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(torch.equal(a[name], held[f"model.layers.{index}.{name}"]) for name in a)
    assert single.outer_names() == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path, num_hidden_layers=11, hidden_size=16, intermediate_size=16))
    assert len(checkpoint.layer(1)) == len(checkpoint.layer(10)) == 9
    assert not torch.equal(
        checkpoint.layer(1)["mlp.up_proj.weight"], checkpoint.layer(10)["mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_mpt])
def test_tied_means_that_the_file_has_no_head(make: Callable[..., Path], tmp_path: Path) -> None:
    tied = make(tmp_path / "tied", tie_word_embeddings=True)
    assert Checkpoint(tied).tied
    if make is not tiny_mpt:
        assert not Checkpoint(make(tmp_path / "untied", tie_word_embeddings=False)).tied


@pytest.mark.parametrize("shard_bytes", [1, 100_000, 1 << 30])
def test_what_is_written_is_what_transformers_reads(
    shard_bytes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    out = tmp_path / "out"
    out.mkdir()
    copy_side_files(folder, out)
    source, writer = Checkpoint(folder), CheckpointWriter(out)
    for name, tensor in source.tensors(source.names).items():
        writer.add(name, tensor)
    writer.finish()
    files = {path.name for path in out.glob("*.safetensors")}
    assert (len(files) == 1) == (shard_bytes == 1 << 30)
    assert not list(out.glob("part-*"))
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_all(out).values())


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def test_side_files_are_all_but_weights_and_records(folder: Path) -> None:
    for name in ("compression.json", "grid.safetensors", "old.bin", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"{}")
    names = {path.name for path in side_files(folder)}
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(n.endswith((".safetensors", ".bin", ".index.json")) or "compression" in n for n in names)


# --- What can be wrong


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, dtype: torch.dtype, folder: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value

    rewrite(folder, poison)
    checkpoint = Checkpoint(folder)
    checkpoint.layer(0)
    with pytest.raises(NumericsError, match=name) as caught:
        checkpoint.layer(1)
    assert caught.value.saw == "1 of 32768 values"


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"lacks the tensor nothing\.weight"):
        Checkpoint(folder).tensors(["nothing.weight"])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize("shard_number", [0, 1])
def test_a_truncated_shard_is_refused(shard_number: int, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    sharded = shard(folder, tmp_path / "sharded", 2)
    path = sorted(sharded.glob("*.safetensors"))[shard_number]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match=path.name):
        Checkpoint(sharded)


def test_a_hostile_header_is_refused(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(FormatError):
        Checkpoint(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + header)
    with pytest.raises(FormatError):
        Checkpoint(folder)


INDEX_FAULTS: dict[str, Any] = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe{}",
    "a list": [],
    "no map": {"metadata": {}},
    "map of numbers": {"weight_map": {"model.norm.weight": 1}},
    "map is a list": {"weight_map": ["model.norm.weight"]},
    "empty map": {"weight_map": {}},
    "shard elsewhere": {"weight_map": {"model.norm.weight": "../model/model-00001-of-00002.safetensors"}},
    "absolute shard": {"weight_map": {"model.norm.weight": "/etc/passwd"}},
    "shard missing": {"weight_map": {"model.norm.weight": "model-00009-of-00002.safetensors"}},
    "no name": {"weight_map": {"model.norm.weight": ""}},
    "null character": {"weight_map": {"model.norm.weight": "a\0b"}},
    "tensor elsewhere": {"weight_map": {"no.such.weight": "model-00001-of-00002.safetensors"}},
}


@pytest.mark.parametrize("fault", INDEX_FAULTS, ids=str)
def test_a_faulty_index_is_told_plainly(fault: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    sharded = shard(folder, tmp_path / "sharded", 2)
    content = INDEX_FAULTS[fault]
    index = sharded / "model.safetensors.index.json"
    if isinstance(content, bytes):
        index.write_bytes(content)
    else:
        index.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ZooError):
        Checkpoint(sharded).layer(0)


CONFIG_FAULTS: dict[str, Any] = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe{}",
    "a list": [],
    "a string": "llama",
    "unknown architecture": {"architectures": ["GPT2LMHeadModel"]},
    "architectures is a number": {"architectures": 7},
    "architectures holds a list": {"architectures": [["LlamaForCausalLM"]]},
    "no layer count": {"architectures": ["LlamaForCausalLM"]},
    "layer count is a word": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": "many"},
    "layer count is negative": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": -2},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS, ids=str)
def test_a_faulty_config_is_told_plainly(fault: str, folder: Path) -> None:
    content = CONFIG_FAULTS[fault]
    if isinstance(content, bytes):
        (folder / "config.json").write_bytes(content)
    else:
        (folder / "config.json").write_text(json.dumps(content) if fault != "not JSON" else content)
    with pytest.raises(ZooError):
        _ = Checkpoint(folder).layer_count


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"layers": 3}', '{"layers": [{"name": "x"}]}'])
def test_a_faulty_record_of_compression_is_told_plainly(content: str, folder: Path) -> None:
    (folder / "compression.json").write_text(content)
    with pytest.raises(ZooError, match=r"compression\.json"):
        Checkpoint(folder).compression()


def test_a_folder_without_a_model_is_told_plainly(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a model folder"):
        Checkpoint(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(folder / "config.json", bare / "config.json")
    with pytest.raises(SourceError, match="lacks its weights"):
        Checkpoint(bare)
