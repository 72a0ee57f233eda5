"""The supported architectures: one table of names.

Per family: which linear layers of a decoder layer share an input (so they share one Hessian), in the
order in which they are computed, and what every tensor is called in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zoo.errors import SourceError

FamilyName = Literal["llama", "mistral", "mpt"]


@dataclass(frozen=True)
class Family:
    name: FamilyName
    architecture: str  # config.json "architectures"
    gguf_architecture: str
    layers: str  # module prefix of decoder layer {i}
    embeddings: str
    norm: str  # before the head
    head: str  # absent from the file when tied to the embeddings
    shared_inputs: tuple[tuple[str, ...], ...]  # linear layers, by group of one input, in order
    gguf_layer: Mapping[str, str]  # module inside a decoder layer -> module inside blk.{i}
    gguf_model: Mapping[str, str]  # the other modules

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.shared_inputs for name in group)

    def layer_prefix(self, index: int) -> str:
        return self.layers.format(i=index)

    def gguf_name(self, tensor: str) -> str | None:
        """GGUF name of a transformers tensor (`...weight` or `...bias`); None if it has none."""
        module, _, suffix = tensor.rpartition(".")
        if module in self.gguf_model:
            return f"{self.gguf_model[module]}.{suffix}"
        before, after = self.layers.split("{i}")
        if not module.startswith(before):
            return None
        index, _, inner = module[len(before) :].partition(after)
        if not index.isdigit() or inner not in self.gguf_layer:
            return None
        return f"blk.{index}.{self.gguf_layer[inner]}.{suffix}"


_LLAMA_SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LLAMA_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_GGUF_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def _llama_like(name: FamilyName, architecture: str) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        gguf_architecture="llama",  # llama.cpp runs Mistral under the name of Llama, with full attention
        layers="model.layers.{i}.",
        embeddings="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        shared_inputs=_LLAMA_SHARED,
        gguf_layer=_LLAMA_GGUF_LAYER,
        gguf_model=_LLAMA_GGUF_MODEL,
    )


FAMILIES: Mapping[FamilyName, Family] = {
    "llama": _llama_like("llama", "LlamaForCausalLM"),
    "mistral": _llama_like("mistral", "MistralForCausalLM"),
    "mpt": Family(
        name="mpt",
        architecture="MptForCausalLM",
        gguf_architecture="mpt",
        layers="transformer.blocks.{i}.",
        embeddings="transformer.wte",
        norm="transformer.norm_f",
        head="lm_head",
        shared_inputs=(("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)),
        gguf_layer={
            "norm_1": "attn_norm",
            "attn.Wqkv": "attn_qkv",
            "attn.out_proj": "attn_output",
            "norm_2": "ffn_norm",
            "ffn.up_proj": "ffn_up",
            "ffn.down_proj": "ffn_down",
        },
        gguf_model={
            "transformer.wte": "token_embd",
            "transformer.norm_f": "output_norm",
            "lm_head": "output",
        },
    ),
}
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES.values()}
_BY_ARCHITECTURE["MPTForCausalLM"] = FAMILIES["mpt"]  # what MosaicML's own checkpoints say


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`. Raises SourceError for an architecture not in the table."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        names = [f"of model_type {config.get('model_type')!r}"]
    for name in map(str, names):
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    raise SourceError(
        f"architecture {', '.join(map(str, names))} is not supported",
        expected=", ".join(family.architecture for family in FAMILIES.values()),
    )
