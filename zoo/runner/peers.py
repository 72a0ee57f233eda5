"""llama.cpp's side of a benchmark: GGUF files of a given architecture with random weights.

As in `zoo.runner.shapes`, only shape and type decide the speed, so a file needs no model to be made of. Every
matrix, embeddings and head included, has the peer's own type; that is the smallest file llama.cpp itself
would accept of this type, so the comparison does not favour us.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from zoo.errors import UsageError
from zoo.files import atomic_file
from zoo.runner.packed import Architecture
from zoo.runner.shapes import draw

BLOCK = 32  # weights of a block, which our pools of floats use too
POOL = 1 << 16  # different blocks of a matrix
_INT4 = 21.5**0.5  # root mean square of -8 .. 7
_INT8 = ((256**2 - 1) / 12 + 0.25) ** 0.5  # and of -128 .. 127
_MANTISSA = 1.5275  # of a float with random mantissa and exponent 0


@dataclass(frozen=True)
class PeerType:
    """A GGUF type that llama.cpp runs."""

    ggml: GGMLQuantizationType
    file: LlamaFileType

    @property
    def block_bytes(self) -> int:
        """Of BLOCK weights."""
        weights, size = GGML_QUANT_SIZES[self.ggml]
        return int(size) * (BLOCK // int(weights))


TYPES = {
    "Q4_0": PeerType(GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "Q8_0": PeerType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "F16": PeerType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "F32": PeerType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}


def parse_against(text: str) -> list[str]:
    """`llama.cpp` (then Q4_0) or `llama.cpp:TYPE,TYPE...` -> the types. Raises UsageError."""
    engine, _, kinds = text.partition(":")
    found = list(dict.fromkeys(kind.strip().upper() for kind in (kinds or "q4_0").split(",")))
    if engine != "llama.cpp" or any(kind not in TYPES for kind in found):
        raise UsageError(
            f"cannot measure against {text!r}",
            expected=f"llama.cpp, or llama.cpp:TYPE,... with the types {', '.join(TYPES).lower()}",
        )
    return found


def _tensors(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """GGUF name -> (rows, columns) of every matrix, in the order of the file."""
    names = {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    joined = architecture.family == "mpt"  # its GGUF has q, k and v in one matrix
    found: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in architecture.matrices.items():
        if name in ("embed", "head"):
            found["token_embd.weight" if name == "embed" else "output.weight"] = (rows, columns)
            continue
        _, layer, matrix = name.split(".")
        target = "attn_qkv" if joined and matrix in "qkv" else names[matrix]
        before, _ = found.get(f"blk.{layer}.{target}.weight", (0, 0))
        found[f"blk.{layer}.{target}.weight"] = (before + rows, columns)
    return found


def _norms(architecture: Architecture) -> list[str]:
    inner = ("attn_norm", "ffn_norm")
    return [
        *(f"blk.{i}.{name}.weight" for i in range(architecture.layers) for name in inner),
        "output_norm.weight",
    ]


def gguf_size(architecture: Architecture, kind: str) -> int:
    """About how many bytes `write_gguf` writes."""
    weights = sum(map(prod, _tensors(architecture).values()))
    return weights // BLOCK * TYPES[kind].block_bytes + 64 * architecture.vocabulary


def write_gguf(path: Path, architecture: Architecture, kind: str, seed: int = 0) -> None:
    """Write a GGUF of type `kind` with random weights of about N(0, 1 / columns), one matrix in memory.

    Its tokenizer has a token for every row of the embeddings and is good for loading only. RoPE scaling
    is left out, as it costs nothing. Raises UsageError for columns that are no multiple of 32.
    """
    tensors, norms = _tensors(architecture), _norms(architecture)
    if odd := next((columns for _, columns in tensors.values() if columns % BLOCK), None):
        raise UsageError(
            "llama.cpp cannot hold a model of this shape",
            saw=f"{odd} columns",
            expected=f"a multiple of {BLOCK}",
        )
    own = TYPES[kind]
    random = np.random.default_rng(seed)
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "mpt" if architecture.family == "mpt" else "llama")
        try:
            _metadata(writer, architecture, own.file)
            for name, shape in tensors.items():
                size = prod(shape) // BLOCK * own.block_bytes
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, own.ggml)
            for name in norms:
                width = (architecture.hidden,)
                float32 = GGMLQuantizationType.F32
                writer.add_tensor_info(name, width, np.dtype(np.float32), 4 * architecture.hidden, float32)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            pools = {
                columns: _blocks(kind, columns**-0.5, random) for columns in {c for _, c in tensors.values()}
            }
            for shape in tensors.values():
                writer.write_tensor_data(draw(pools[shape[1]], prod(shape) // BLOCK, random))
            for _ in norms:
                writer.write_tensor_data(np.ones(architecture.hidden, np.float32))
        finally:
            writer.close()


def _blocks(kind: str, deviation: float, random: np.random.Generator) -> NDArray[Any]:
    """A pool of POOL blocks of BLOCK random weights of this deviation, as they lie in the file."""
    if kind in ("F32", "F16"):
        unsigned, exponent_at, bias = (np.uint32, 23, 127) if kind == "F32" else (np.uint16, 10, 15)
        power = round(np.log2(deviation / _MANTISSA)) + bias
        bits = random.integers(0, 1 << np.dtype(unsigned).itemsize * 8, (POOL, BLOCK), unsigned)
        exponents = unsigned((1 << np.dtype(unsigned).itemsize * 8 - 1 - exponent_at) - 1 << exponent_at)
        return bits & ~exponents | unsigned(power << exponent_at)
    size = TYPES[kind].block_bytes
    blocks = random.integers(0, 256, (POOL, size), np.uint8)
    scales = random.uniform(0.75, 1.25, (POOL, 1)) * deviation / (_INT4 if kind == "Q4_0" else _INT8)
    blocks[:, :2] = scales.astype("<f2").view(np.uint8)  # both types: a float16, then the integers
    return blocks


def _metadata(writer: gguf.GGUFWriter, architecture: Architecture, file_type: LlamaFileType) -> None:
    writer.add_type("model")
    writer.add_name("random weights")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(architecture.context)
    writer.add_embedding_length(architecture.hidden)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.intermediate)
    writer.add_head_count(architecture.heads)
    writer.add_vocab_size(architecture.vocabulary)
    if architecture.family == "mpt":
        writer.add_layer_norm_eps(architecture.norm_eps)
        writer.add_max_alibi_bias(architecture.alibi_bias_max or 8.0)
    else:
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_layer_norm_rms_eps(architecture.norm_eps)
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
        writer.add_rope_dimension_count(architecture.head_dim)
        writer.add_rope_freq_base(float((architecture.rope or {}).get("rope_theta", 10000.0)))
    # A byte-level BPE that merges nothing: the first tokens are the bytes, as GPT-2 writes them.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = [_letter(byte) for byte in range(256)]
    words = [f"<{i}>" for i in range(256, architecture.vocabulary)]
    writer.add_token_list([*letters, *words][: architecture.vocabulary])
    writer.add_token_types([gguf.TokenType.NORMAL] * architecture.vocabulary)
    writer.add_token_merges([f"{letters[97]} {letters[98]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _letter(byte: int) -> str:
    """The printable character that stands for a byte in GPT-2's vocabulary (its `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
