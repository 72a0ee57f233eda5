"""Tiny models packed at 8 bits, beside the very same (de-quantized) weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from zoo.runner.format import Layout, dequantize, pack
from zoo.runner.packed import FILE, Architecture, Packed, Text, packed_writer

LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
MPT = {
    "o": "attn.out_proj",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
    "attention_norm": "norm_1",
    "mlp_norm": "norm_2",
}
GROUP = 32


def architecture_of(config: Any) -> Architecture:
    if config.model_type == "mpt":
        attention = config.attn_config
        return Architecture(
            family="mpt",
            vocabulary=config.vocab_size,
            hidden=config.d_model,
            intermediate=4 * config.d_model,
            layers=config.n_layers,
            heads=config.n_heads,
            kv_heads=config.n_heads,
            head_dim=config.d_model // config.n_heads,
            context=config.max_seq_len,
            norm="layer",
            norm_eps=config.layer_norm_epsilon,
            activation="gelu",
            gated=False,
            tied=True,
            alibi_bias_max=attention.alibi_bias_max,
            clip_qkv=attention.clip_qkv,
            softmax_scale=attention.softmax_scale or (config.d_model / config.n_heads) ** -0.5,
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=config.max_position_embeddings,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        activation="silu",
        gated=True,
        tied=config.tie_word_embeddings,
        rope=dict(config.rope_parameters),
        sliding_window=getattr(config, "sliding_window", None),
        softmax_scale=head_dim**-0.5,
    )


def pack_folder(folder: Path, out: Path) -> tuple[Packed, Any]:
    """The model of a Hugging Face folder, packed into `out`, and in transformers, both with 8-bit weights."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state = model.state_dict()
    architecture = architecture_of(config)
    quantized: dict[str, tuple[Layout, dict[str, Any]]] = {}
    vectors: dict[str, NDArray[np.float32]] = {}

    def take(name: str, source: str, rows: slice = slice(None)) -> None:
        """Pack some rows of a matrix, and put what they became back into the model."""
        weight = state[f"{source}.weight"][rows]
        layout = Layout("dense", *weight.shape, bits=8, group=GROUP)
        values = weight.numpy().reshape(layout.rows, layout.groups, GROUP)
        scales = (np.abs(values).max(axis=2) / 127).astype(np.float16)
        q = np.clip(np.rint(values / scales[:, :, None].astype(np.float32)), -127, 127).astype(np.int16)
        parts = pack(layout, q.reshape(weight.shape), scales)
        weight.copy_(torch.from_numpy(dequantize(layout, parts)))
        quantized[name] = layout, parts
        if f"{source}.bias" in state:
            vectors[f"{name}.bias"] = state[f"{source}.bias"][rows].numpy()

    mpt = architecture.family == "mpt"
    take("embed", "transformer.wte" if mpt else "model.embed_tokens")
    if not architecture.tied:
        take("head", "lm_head")
    for i in range(architecture.layers):
        prefix = f"transformer.blocks.{i}" if mpt else f"model.layers.{i}"
        if mpt:
            for part, name in enumerate("qkv"):
                rows = slice(part * architecture.hidden, (part + 1) * architecture.hidden)
                take(f"layers.{i}.{name}", f"{prefix}.attn.Wqkv", rows)
        for name, source in (MPT if mpt else LLAMA).items():
            if "norm" in name:
                vectors[f"layers.{i}.{name}.weight"] = state[f"{prefix}.{source}.weight"].numpy()
            else:
                take(f"layers.{i}.{name}", f"{prefix}.{source}")
    vectors["norm.weight"] = state[("transformer.norm_f" if mpt else "model.norm") + ".weight"].numpy()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Text(
        eos=[tokenizer.eos_token_id],
        bos=tokenizer.bos_token_id,
        chat_template=tokenizer.chat_template,
        special={"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token},
    )
    path = out / FILE
    layouts = {name: layout for name, (layout, _) in quantized.items()}
    with packed_writer(path, architecture, layouts, text) as writer:
        for name, (_, parts) in quantized.items():
            writer.matrix(name, parts)
        writer.vectors(vectors.items())
        writer.tokenizer((folder / "tokenizer.json").read_bytes())
    return Packed(path), model


def rewritten(packed: Packed, path: Path, **architecture: Any) -> Packed:
    """A copy of a packed file whose header says something else of the architecture."""
    data = packed.path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"]["architecture"]) | architecture
    header["__metadata__"]["architecture"] = json.dumps(told)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 64)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return Packed(path)
