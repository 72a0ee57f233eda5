"""A Hugging Face folder as GGUF files: the weights as they are, then llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pipelines import gguf_tokenizer
from pipelines.dequantize import FLOAT16_MAX, llama3_factors, permute
from pipelines.families import Family, family_of
from zoo.errors import FormatError, NumericsError, SourceError, UsageError, ZooError
from zoo.files import atomic_file
from zoo.formats import TensorInfo, check_safetensors, weight_files
from zoo.progress import track

# What llama.cpp can write without an importance matrix, and its number for it (llama_ftype).
TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9, "Q5_0": 8,
    "Q4_K_M": 15, "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30,
    "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$")  # in old Llama checkpoints; it follows from the config


def export_gguf(
    folder: Path, out: Path, types: Sequence[str], *, name: str, license: str | None
) -> dict[str, Path]:
    """Write `<name>-<TYPE>.gguf` into folder `out` for every one of `types`; returns type -> path.

    `folder` is a model folder of the families Llama, Mistral or MPT with dense weights. Float types
    are written from the weights; all others are quantized by llama.cpp from an exact float file,
    which is removed again unless it was asked for. Files appear only when complete and are the same,
    bit for bit, whenever they are made from the same folder.

    Raises UsageError for an unknown type, SourceError for a model or tokenizer that llama.cpp cannot
    reproduce, NumericsError where F16 cannot hold a weight.
    """
    if unknown := [kind for kind in types if kind not in TYPES]:
        raise UsageError(f"unknown GGUF type {unknown[0]!r}", expected=", ".join(TYPES))
    model = _open(folder)
    paths = {kind: out / f"{name}-{kind}.gguf" for kind in types}
    for kind in FLOATS:
        if kind in paths:
            with atomic_file(paths[kind]) as temporary:
                _write(model, temporary, kind, name, license)
    quantized = [kind for kind in paths if kind not in FLOATS]
    exact = _exact_type(model)
    if quantized and exact in paths:
        _quantize_all(paths[exact], {kind: paths[kind] for kind in quantized})
    elif quantized:
        out.mkdir(parents=True, exist_ok=True)
        with _scratch(out / f".{name}-{exact}.{os.getpid()}.gguf") as whole:
            _write(model, whole, exact, name, license)
            _quantize_all(whole, {kind: paths[kind] for kind in quantized})
    return paths


def check(folder: Path) -> None:
    """Raise what `export_gguf` would of architecture, tensors and tokenizer, whatever the weights' values."""
    model = _open(folder)
    _described(model, None, "F16", folder.name, None)
    _rope_factors(model)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Model:
    folder: Path
    family: Family
    config: Any  # transformers' configuration: one spelling for old and new config.json
    tensors: dict[str, tuple[Path, TensorInfo]]  # by name in transformers, in the order of the file written


def _open(folder: Path) -> _Model:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    family = family_of(config.to_dict())
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in weight_files(folder):
        found |= {tensor.name: (path, tensor) for tensor in check_safetensors(path)}
    for name in list(found):
        tied = config.tie_word_embeddings and name.startswith(f"{family.head}.")
        if tied or _SKIPPED.search(name):
            del found[name]
        elif family.gguf_name(name) is None or (family.name == "mpt" and name.endswith(".bias")):
            raise SourceError(
                f"{folder}: tensor {name!r} has no place in a GGUF of {family.architecture}",
                saw="packed weights" if name.endswith("_packed") else None,
                try_="export from the folder with dense weights",
            )
        elif found[name][1].dtype not in FLOATS:
            raise SourceError(
                f"{folder}: tensor {name!r}", saw=found[name][1].dtype, expected=", ".join(FLOATS)
            )
    count = config.num_hidden_layers
    wanted = [f"{family.embeddings}.weight"]
    wanted += [f"{family.layer_prefix(i)}{inner}.weight" for i in range(count) for inner in family.gguf_layer]
    if not config.tie_word_embeddings:
        wanted.append(f"{family.head}.weight")
    if missing := [name for name in wanted if name not in found]:
        raise FormatError(f"{folder} lacks tensor {missing[0]!r}", saw=f"{len(missing)} missing")
    return _Model(folder, family, config, found)


def _exact_type(model: _Model) -> str:
    """The float type that holds the model's matrices without rounding."""
    kinds = {tensor.dtype for _, tensor in model.tensors.values() if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 else "F32"


def _read(path: Path, tensor: TensorInfo) -> NDArray[np.float32]:
    raw = np.memmap(path, dtype=np.uint8, mode="r")[tensor.offset : tensor.offset + tensor.size]
    if tensor.dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view({"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype(np.float32)
    return values.reshape(tensor.shape)


def _convert(values: NDArray[np.float32], kind: str, name: str) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise NumericsError(f"tensor {name!r} holds NaN or infinity")
    if kind == "F16" and float(np.abs(values).max(initial=0)) > FLOAT16_MAX:
        raise NumericsError(
            f"tensor {name!r} does not fit F16",
            saw=f"{float(np.abs(values).max())}",
            try_="export BF16 or F32",
        )
    converted: NDArray[Any] = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    return converted


def _write(model: _Model, path: Path, kind: str, name: str, license: str | None) -> None:
    """Write one GGUF with matrices of float type `kind` and vectors of F32, one tensor in memory."""
    writer = _described(model, path, kind, name, license)
    targets = {target: source for source in model.tensors if (target := model.family.gguf_name(source))}
    shapes = {target: model.tensors[source][1].shape for target, source in targets.items()}
    if (factors := _rope_factors(model)) is not None:
        shapes["rope_freqs.weight"] = factors.shape
    order = sorted(shapes, key=_position)
    own = {target: "F32" if len(shapes[target]) == 1 else kind for target in order}
    for target in order:
        size = math.prod(shapes[target]) * (4 if own[target] == "F32" else 2)
        ggml = gguf.GGMLQuantizationType[own[target]]
        writer.add_tensor_info(target, shapes[target], np.dtype(np.float32), size, ggml)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target in track(order, f"writing {name}-{kind}.gguf"):
            values = _load(model, targets[target]) if target in targets else factors
            assert values is not None  # the one tensor without a source is rope_freqs
            writer.write_tensor_data(_convert(values, own[target], target))
    finally:
        writer.close()


def _described(
    model: _Model, path: Path | None, kind: str, name: str, license: str | None
) -> gguf.GGUFWriter:
    """With all that a GGUF says of a model and its tokenizer; the file is not begun yet."""
    writer = gguf.GGUFWriter(path, model.family.gguf_architecture)
    writer.add_type("model")
    writer.add_name(name)
    if license:
        writer.add_license(license)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (_llama if model.family.gguf_architecture == "llama" else _mpt)(model, writer)
    rows = model.tensors[f"{model.family.embeddings}.weight"][1].shape[0]
    gguf_tokenizer.write_tokenizer(model.folder, rows, writer)
    return writer


def _position(name: str) -> tuple[int, str]:
    """Sort key: embeddings, the decoder layers in order, then the rest."""
    if found := re.match(r"blk\.(\d+)\.", name):
        return int(found[1]), name
    return (-1 if name.startswith("token_embd") else 2**31), name


def _load(model: _Model, name: str) -> NDArray[np.float32]:
    values = _read(*model.tensors[name])
    if model.family.gguf_architecture == "llama":
        if ".q_proj." in name:
            return permute(values, model.config.num_attention_heads)
        if ".k_proj." in name:
            return permute(values, model.config.num_key_value_heads)
    return values


# Metadata


def _llama(model: _Model, writer: gguf.GGUFWriter) -> None:
    config = model.config
    _require(model, "hidden_act", config.hidden_act, "silu")
    writer.add_vocab_size(model.tensors[f"{model.family.embeddings}.weight"][1].shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    if getattr(config, "sliding_window", None):
        # llama.cpp attends to everything for this architecture; the window is there for other readers.
        writer.add_sliding_window(config.sliding_window)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            _require(model, key, rope.get(key), None)
        _require(model, "truncate", rope.get("truncate", True), True)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    elif kind not in ("default", "llama3"):  # llama3 goes into a tensor
        raise SourceError(
            f"{model.folder}: rope scaling {kind!r} has no form in GGUF",
            expected="default, linear, yarn or llama3",
        )


def _mpt(model: _Model, writer: gguf.GGUFWriter) -> None:
    config, attention = model.config, model.config.attn_config
    _require(model, "attn_config.alibi", attention.alibi, True)
    _require(model, "attn_config.attn_type", attention.attn_type, "multihead_attention")
    _require(model, "attn_config.softmax_scale", attention.softmax_scale, None)
    # transformers computes every MPT with 8, whatever its configuration says.
    _require(model, "attn_config.alibi_bias_max", attention.alibi_bias_max, 8)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.d_model)  # as transformers has it, whatever expansion_ratio
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(float(attention.alibi_bias_max))
    if attention.clip_qkv:
        writer.add_clamp_kqv(float(attention.clip_qkv))


def _require(model: _Model, key: str, saw: Any, expected: Any) -> None:
    if saw != expected:
        raise SourceError(
            f"{model.folder}: llama.cpp cannot run this {model.family.architecture}",
            saw=f"{key} = {saw!r}",
            expected=f"{expected!r}",
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_factors(model: _Model) -> NDArray[np.float32] | None:
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_factors(rope, _head_dim(model.config))


# Quantization


def _quantize_all(source: Path, targets: dict[str, Path]) -> None:
    for kind, path in track(list(targets.items()), "quantizing"):
        with atomic_file(path) as temporary:
            quantize(source, temporary, kind)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a float GGUF to `kind` with llama.cpp. Raises ZooError with llama.cpp's last words."""
    import llama_cpp

    lines: list[str] = []

    def listen(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        lines.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(listen)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = TYPES[kind]
        parameters.nthread = os.cpu_count() or 1
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    finally:
        # `callback` dies with this frame, so llama.cpp must not keep it.
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    if status != 0:
        raise ZooError(
            f"llama.cpp could not quantize {source.name} to {kind}",
            saw=next((line for line in reversed(lines) if line), f"status {status}"),
            try_="check the free space of the disk",
        )
