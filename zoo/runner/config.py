"""From a Hugging Face configuration to what the engine has to know.

What transformers computes is the rule, its defaults for absent keys included; a setting with which it would
compute something else than the setting says is refused. Sources: its configuration_ and modeling_
files of llama, mistral and mpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.errors import FormatError, SourceError
from zoo.runner.checkpoint import read_json
from zoo.runner.packed import Architecture, Text

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu"]] = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Llama(_Settings):
    family: ClassVar[Literal["llama", "mistral"]] = "llama"
    vocab_size: int = 32000
    hidden_size: int = Field(4096, gt=0)
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = Field(32, gt=0)
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


class _Mistral(_Llama):
    family = "mistral"
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096


class _MptAttention(_Settings):
    attn_type: Literal["multihead_attention"] = "multihead_attention"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    # With any other value transformers would compute the same, which is not what the value says.
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False
    alibi: Literal[True] = True
    alibi_bias_max: Literal[8] = 8


class _Mpt(_Settings):
    d_model: int = Field(2048, gt=0)
    n_heads: int = Field(16, gt=0)
    n_layers: int = 24
    max_seq_len: int = 2048
    vocab_size: int = 50368
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    attn_config: _MptAttention | None = None
    # As above.
    expansion_ratio: Literal[4] = 4
    no_bias: Literal[True] = True
    logit_scale: None = None
    norm_type: Literal["low_precision_layernorm", "layernorm"] = "low_precision_layernorm"


_FAMILIES: Mapping[str, type[_Llama] | type[_Mpt]] = {
    "LlamaForCausalLM": _Llama,
    "MistralForCausalLM": _Mistral,
    "MptForCausalLM": _Mpt,
    "MPTForCausalLM": _Mpt,  # what MosaicML's own checkpoints say
}


def architecture_of(config: Mapping[str, Any]) -> tuple[Architecture, frozenset[str]]:
    """The architecture, and which of q, k, v, o, gate, up, down have a bias.

    Raises SourceError for an architecture that is not supported, FormatError for settings that are not.
    """
    names = config.get("architectures")
    name = (
        str(names[0]) if isinstance(names, list) and names else f"of model_type {config.get('model_type')!r}"
    )
    if name not in _FAMILIES:
        raise SourceError(
            f"architecture {name} is not supported",
            expected="LlamaForCausalLM, MistralForCausalLM, MptForCausalLM",
        )
    # A key without a value has no meaning of its own, but for the few whose default is a number.
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    try:
        settings = _FAMILIES[name].model_validate(given)
        if isinstance(settings, _Mpt):
            return _mpt(settings), frozenset()
        return _llama(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"config.json: {where or name} is not supported",
            saw=repr(first["input"])[:100],
            expected=first["msg"][:200],
        ) from error


def _llama(settings: _Llama) -> tuple[Architecture, frozenset[str]]:
    if (activation := _ACTIVATIONS.get(settings.hidden_act)) is None:
        raise FormatError(
            "config.json: hidden_act is not supported", saw=settings.hidden_act, expected="silu or gelu"
        )
    head_dim = settings.head_dim or settings.hidden_size // settings.num_attention_heads
    biased = ("q", "k", "v", "o") * settings.attention_bias + ("gate", "up", "down") * settings.mlp_bias
    is_mistral = settings.family == "mistral"
    return Architecture(
        family=settings.family,
        vocabulary=settings.vocab_size,
        hidden=settings.hidden_size,
        intermediate=settings.intermediate_size,
        layers=settings.num_hidden_layers,
        heads=settings.num_attention_heads,
        kv_heads=settings.num_key_value_heads or settings.num_attention_heads,
        head_dim=head_dim,
        context=settings.max_position_embeddings,
        norm="rms",
        norm_eps=settings.rms_norm_eps,
        activation=activation,
        gated=True,
        tied=settings.tie_word_embeddings,
        rope=_rope(settings),
        sliding_window=settings.sliding_window if is_mistral else None,
        softmax_scale=head_dim**-0.5,
    ), frozenset(() if is_mistral else biased)


def _rope(settings: _Llama) -> dict[str, Any]:
    """transformers' rope_parameters, from the present form or from rope_theta and rope_scaling."""
    rope = dict(settings.rope_scaling or settings.rope_parameters or {})
    rope.setdefault("rope_theta", 10000.0 if settings.rope_theta is None else settings.rope_theta)
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in _ROPE_TYPES:
        raise FormatError(
            "config.json: this kind of RoPE is not supported",
            saw=str(kind)[:60],
            expected=", ".join(_ROPE_TYPES),
        )
    if kind in _WITH_ORIGINAL_LENGTH:
        rope.setdefault("original_max_position_embeddings", settings.max_position_embeddings)
    partial = rope.get("partial_rotary_factor", settings.partial_rotary_factor)
    if partial not in (None, 1, 1.0):
        raise FormatError("config.json: partial_rotary_factor is not supported", saw=str(partial)[:60])
    return rope


def _mpt(settings: _Mpt) -> Architecture:
    attention = settings.attn_config or _MptAttention()
    head_dim = settings.d_model // settings.n_heads
    if head_dim * settings.n_heads != settings.d_model:
        raise FormatError(
            "config.json: the heads do not divide the width",
            saw=f"d_model {settings.d_model}, n_heads {settings.n_heads}",
        )
    return Architecture(
        family="mpt",
        vocabulary=settings.vocab_size,
        hidden=settings.d_model,
        intermediate=4 * settings.d_model,
        layers=settings.n_layers,
        heads=settings.n_heads,
        kv_heads=settings.n_heads,
        head_dim=head_dim,
        context=settings.max_seq_len,
        norm="layer",
        norm_eps=settings.layer_norm_epsilon,
        activation="gelu",
        gated=False,
        tied=settings.tie_word_embeddings,
        alibi_bias_max=8.0,
        clip_qkv=attention.clip_qkv or None,
        softmax_scale=head_dim**-0.5 if attention.softmax_scale is None else attention.softmax_scale,
    )


def modules_of(architecture: Architecture) -> dict[str, tuple[str, int]]:
    """Name in the packed file -> (module in transformers, its first row there) of matrices and norms.

    MPT has q, k and v in one matrix, one after the other.
    """
    if architecture.family == "mpt":
        layer, outer = "transformer.blocks.{i}.", ("transformer.wte", "transformer.norm_f", "lm_head")
        width = architecture.hidden
        inner = {
            "attention_norm": ("norm_1", 0),
            "q": ("attn.Wqkv", 0),
            "k": ("attn.Wqkv", width),
            "v": ("attn.Wqkv", 2 * width),
            "o": ("attn.out_proj", 0),
            "mlp_norm": ("norm_2", 0),
            "up": ("ffn.up_proj", 0),
            "down": ("ffn.down_proj", 0),
        }
    else:
        layer, outer = "model.layers.{i}.", ("model.embed_tokens", "model.norm", "lm_head")
        inner = {"attention_norm": ("input_layernorm", 0), "mlp_norm": ("post_attention_layernorm", 0)}
        inner |= {name: (f"self_attn.{name}_proj", 0) for name in "qkvo"}
        inner |= {name: (f"mlp.{name}_proj", 0) for name in ("gate", "up", "down")}
    found = {name: (module, 0) for name, module in zip(("embed", "norm", "head"), outer, strict=True)}
    for i in range(architecture.layers):
        prefix = layer.format(i=i)
        found |= {f"layers.{i}.{name}": (prefix + module, row) for name, (module, row) in inner.items()}
    return found


def text_of(folder: Path, config: Mapping[str, Any]) -> Text:
    """End and begin tokens, chat template and special tokens, from wherever the folder has them."""
    generation = read_json(folder / "generation_config.json")
    tokenizer = read_json(folder / "tokenizer_config.json")
    special = {}
    for source in (read_json(folder / "special_tokens_map.json"), tokenizer):
        for name in _SPECIAL:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[name] = token
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    return Text(
        eos=[token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int],
        bos=bos if type(bos) is int else None,
        chat_template=_chat_template(folder, tokenizer),
        special=special,
    )


def _chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not UTF-8", saw=str(error)) from error
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several, of which one is the default
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
