"""A GGUF file as a Hugging Face folder: weights de-quantized, config and tokenizer rebuilt from metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pipelines import gguf_tokenizer
from pipelines.families import FAMILIES, Family
from zoo.errors import FormatError, NumericsError, SourceError
from zoo.formats import check_gguf
from zoo.progress import track

CODE_VERSION = 1  # raise it whenever the folder made from one GGUF changes
SHARD_BYTES = 2 * 10**9
FLOAT16_MAX = float(np.finfo(np.float16).max)
ARCHITECTURES = ("llama", "mpt")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Source:
    """An opened GGUF: its metadata as plain values, its tensors by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]  # gguf.ReaderTensor
    architecture: str

    def number(self, key: str, default: float | None = None) -> float:
        """A metadata number of the architecture. Raises FormatError if it is missing or no number."""
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"{self.path}: {self.architecture}.{key}", saw=repr(value), expected="a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not (isinstance(value, int) and 0 < value < 2**31):
            raise FormatError(f"{self.path}: {self.architecture}.{key}", saw=repr(value), expected="a count")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {name!r} is missing")
        return tuple(reversed(self.tensors[name].shape.tolist()))


def _open(path: Path) -> _Source:
    check_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise SourceError(
            f"{path}: GGUF architecture {architecture!r} is not supported",
            expected=", ".join(f"{a} ({_classes(a)})" for a in ARCHITECTURES),
        )
    return _Source(path, fields, {tensor.name: tensor for tensor in reader.tensors}, architecture)


def _classes(architecture: str) -> str:
    return ", ".join(f.architecture for f in FAMILIES.values() if f.gguf_architecture == architecture)


def dequantize(path: Path, out: Path) -> None:
    """Write the model in GGUF file `path` as a Hugging Face folder into the empty folder `out`.

    Weights are float16, or float32 if any of them does not fit float16. One tensor is in memory at
    a time, and shards hold at most 2 GB. Raises FormatError for a file that is not sound,
    SourceError for a model that is not supported, NumericsError for NaN or infinity in a tensor.
    """
    source = _open(path)
    family, config = (_llama if source.architecture == "llama" else _mpt)(source)
    plan = _plan(source, family, config)
    try:
        _write_weights(source, plan, config, out, np.dtype(np.float16))
        config["dtype"] = "float16"
    except OverflowError:
        for partial in out.glob("*.safetensors"):
            partial.unlink()
        _write_weights(source, plan, config, out, np.dtype(np.float32))
        config["dtype"] = "float32"
    config |= _token_ids(source)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    gguf_tokenizer.read_tokenizer(source.fields, out)
    if re.fullmatch(r"[\w.+-]+", str(license := source.fields.get("general.license", ""))):
        (out / "README.md").write_text(f"---\nlicense: {license}\n---\n")


def _token_ids(source: _Source) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {k: source.fields.get(f"tokenizer.ggml.{name}_token_id") for k, name in names.items()}
    return {key: index for key, index in found.items() if type(index) is int}


# config.json


def _llama(source: _Source) -> tuple[Family, dict[str, Any]]:
    vocabulary, hidden = _matrix(source, "token_embd.weight")
    heads = source.count("attention.head_count")
    if hidden % heads:
        raise FormatError(f"{source.path}: {heads} heads do not divide the width of {hidden}")
    head_dim = source.count("attention.key_length", source.count("rope.dimension_count", hidden // heads))
    window = source.fields.get("llama.attention.sliding_window")
    family = FAMILIES["mistral" if window else "llama"]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _matrix(source, "blk.0.ffn_up.weight")[0],
        "num_hidden_layers": _layers(source),
        "num_attention_heads": heads,
        "num_key_value_heads": source.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.count("context_length"),
        "rms_norm_eps": _decimal(source.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(source, head_dim),
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }
    if window:
        config["sliding_window"] = source.count("attention.sliding_window")
    else:
        config |= {"attention_bias": "blk.0.attn_q.bias" in source.tensors, "mlp_bias": False}
    if source.fields.get("llama.expert_count"):
        raise SourceError(f"{source.path}: a mixture of experts is not supported")
    return family, config


def _decimal(value: float) -> float:
    """A float32 as the decimal it was written as: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope(source: _Source, head_dim: int) -> dict[str, Any]:
    theta = _decimal(source.number("rope.freq_base", 10000.0))
    if "rope_freqs.weight" in source.tensors:
        return _llama3_rope(source, theta, head_dim)
    kind = source.fields.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = source.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = source.count("rope.scaling.original_context_length", source.count("context_length"))
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise SourceError(
        f"{source.path}: rope scaling {kind!r} is not supported", expected="none, linear or yarn"
    )


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Array:
    """What Llama 3.1's RoPE scaling divides each of head_dim / 2 frequencies by.

    `rope` holds rope_theta, factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings as in transformers. Source: Llama 3.1, `apply_scaling`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = 2 * np.pi * np.float64(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    scaled = 1 / ((1 - smooth) / factor + smooth)
    return np.asarray(scaled, dtype=np.float32)


def _llama3_rope(source: _Source, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters behind a `rope_freqs` tensor: its largest factor, and Llama 3's for the others."""
    factors = _values(source, "rope_freqs.weight").reshape(-1)
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": _decimal(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(rope, head_dim)
    if expected.shape != factors.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise SourceError(
            f"{source.path}: its rope_freqs are not those of Llama 3",
            expected="low_freq_factor 1, high_freq_factor 4, original context 8192",
            try_="use the model's own repository or folder instead of the GGUF",
        )
    return rope


def _mpt(source: _Source) -> tuple[Family, dict[str, Any]]:
    vocabulary, hidden = _matrix(source, "token_embd.weight")
    inner = _matrix(source, "blk.0.ffn_up.weight")[0]
    if inner != 4 * hidden:
        raise SourceError(f"{source.path}: an MPT with an inner width of {inner}", expected=f"{4 * hidden}")
    clamp = source.number("attention.clamp_kqv", 0.0)
    head = source.tensors.get("output.weight")
    embeddings = source.tensors["token_embd.weight"]
    tied = head is None or (
        head.tensor_type == embeddings.tensor_type and np.array_equal(head.data, embeddings.data)
    )
    return FAMILIES["mpt"], {
        "architectures": [FAMILIES["mpt"].architecture],
        "model_type": "mpt",
        "vocab_size": vocabulary,
        "d_model": hidden,
        "n_heads": source.count("attention.head_count"),
        "n_layers": _layers(source),
        "expansion_ratio": 4,
        "max_seq_len": source.count("context_length"),
        "layer_norm_epsilon": _decimal(source.number("attention.layer_norm_epsilon")),
        "no_bias": True,
        "tie_word_embeddings": tied,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(source.number("attention.max_alibi_bias")),
            "clip_qkv": clamp or None,
        },
    }


def _matrix(source: _Source, name: str) -> tuple[int, int]:
    if len(shape := source.shape(name)) != 2:
        raise FormatError(f"{source.path}: tensor {name!r}", saw=f"shape {shape}", expected="a matrix")
    return shape[0], shape[1]


def _layers(source: _Source) -> int:
    count = source.count("block_count")
    if count > len(source.tensors):
        raise FormatError(f"{source.path}: block_count", saw=f"{count}, with {len(source.tensors)} tensors")
    return count


# Weights


@dataclass(frozen=True)
class _Weight:
    name: str  # in transformers
    shape: tuple[int, ...]
    source: str  # in GGUF
    heads: int | None  # of the permuted q and k matrices


def _plan(source: _Source, family: Family, config: Mapping[str, Any]) -> list[_Weight]:
    """Every tensor that transformers expects, with the GGUF tensor it comes from.

    The expected names and shapes are transformers' own. Raises FormatError where the file has
    another shape or lacks a tensor, SourceError where it holds one that the model does not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    plan: list[_Weight] = []
    for name, tensor in model.state_dict().items():
        if config["tie_word_embeddings"] and name.startswith(family.head + "."):
            continue
        origin, expected = family.gguf_name(name), tuple(tensor.shape)
        if origin is None:
            raise SourceError(f"{source.path}: {name} has no place in GGUF")
        if (shape := source.shape(origin)) != expected:
            raise FormatError(
                f"{source.path}: tensor {origin!r}", saw=f"shape {shape}", expected=f"{expected}"
            )
        plan.append(_Weight(name, expected, origin, _permuted_heads(name, family, config)))
    known = {weight.source for weight in plan} | {"rope_freqs.weight", "output.weight"}
    if unknown := sorted(source.tensors.keys() - known):
        raise SourceError(
            f"{source.path}: {family.architecture} has no place for tensor {unknown[0]!r}",
            saw=f"{len(unknown)} such tensors",
        )
    return plan


def _permuted_heads(name: str, family: Family, config: Mapping[str, Any]) -> int | None:
    if family.gguf_architecture != "llama":
        return None
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else None


def permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a q or k matrix (or bias) in llama.cpp's order.

    transformers rotates element i of a head with i + d/2, llama.cpp 2i with 2i + 1; this interleaves
    each head's two halves. `unpermute` is its inverse. weight (rows, ...) -> the same shape.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _values(source: _Source, name: str) -> Array:
    tensor = source.tensors[name]
    try:
        values: Array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise SourceError(
            f"{source.path}: tensor {name!r} has type {tensor.tensor_type.name}, which cannot be de-quantized"
        ) from error
    if not np.isfinite(values).all():
        raise NumericsError(
            f"{source.path}: tensor {name!r} holds NaN or infinity",
            saw=f"{int(np.count_nonzero(~np.isfinite(values)))} of {values.size} values",
            try_="download the file again; a model with such weights cannot be compressed",
        )
    return values


def _write_weights(
    source: _Source, plan: list[_Weight], config: Mapping[str, Any], out: Path, dtype: np.dtype[Any]
) -> None:
    def load(weight: _Weight) -> NDArray[Any]:
        values = _values(source, weight.source)
        if dtype == np.float16 and float(np.abs(values).max()) > FLOAT16_MAX:
            raise OverflowError(weight.source)
        return (unpermute(values, weight.heads) if weight.heads else values).astype(dtype)

    shards: list[list[_Weight]] = [[]]
    size = 0
    for weight in plan:
        weight_bytes = math.prod(weight.shape) * dtype.itemsize
        if shards[-1] and size + weight_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight_bytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    progress = iter(track(plan, f"de-quantizing {source.path.name}"))
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(
            out / name, {w.name: w.shape for w in shard}, dtype, map(load, _take(progress, shard))
        )
    if len(shards) > 1:
        total = sum(math.prod(weight.shape) for weight in plan) * dtype.itemsize
        index = {
            "metadata": {"total_size": total},
            "weight_map": {w.name: name for name, shard in zip(names, shards, strict=True) for w in shard},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _take(progress: Iterator[_Weight], shard: list[_Weight]) -> Iterator[_Weight]:
    return (next(progress) for _ in shard)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], tensors: Iterator[NDArray[Any]]
) -> None:
    """Write tensors one after the other; `shapes` gives their names and shapes in the same order.

    The safetensors library wants a whole file's tensors in memory at once. dtype float16 or float32.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": f"F{8 * dtype.itemsize}",
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.shape != shape:
                raise FormatError(f"tensor {name}", saw=f"shape {tensor.shape}", expected=f"{shape}")
            file.write(np.ascontiguousarray(tensor).data)
