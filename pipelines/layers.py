"""The forward pass of one decoder layer, written as a generator that stops before every linear layer.

A layer yields the input that a group of linear layers shares and is sent their outputs. Running the
generators of all calibration batches in lockstep lets the caller see all inputs of a group, compress
its weights, and go on with the compressed outputs: one forward pass, and every linear layer is
calibrated on what it will really receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pipelines.families import Family
from zoo.errors import FormatError, SourceError


class Pause(NamedTuple):
    """Where a forward pass waits for the outputs of linear layers."""

    inputs: Tensor  # (batch, length, in), shared by the group
    residual: Tensor | None = None  # (batch, length, out) that the output is added to, if it is


# Is sent one output (batch, length, out) per linear layer of the group, returns (batch, length, width).
LayerRun = Generator[Pause, Sequence[Tensor], Tensor]
LayerForward = Callable[[Tensor, Mapping[str, Tensor]], LayerRun]


def layer_forward(
    family: Family, config: Mapping[str, Any], length: int, device: torch.device
) -> LayerForward:
    """The decoder layer of a model with this `config.json`, for windows of `length` tokens."""
    model_config = parsed(config)
    if family.name == "mpt":
        return _mpt(model_config, length, device)
    return _llama(model_config, length, device)


def final_norm(
    family: Family, config: Mapping[str, Any], weight: Tensor, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """From what the last decoder layer returns (..., width) to what the output head receives.

    weight and bias (width,) are the final norm's. Raises FormatError as `parsed` does.
    """
    model_config = parsed(config)
    if family.name == "mpt":
        return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, model_config.layer_norm_epsilon)
    return lambda x: F.rms_norm(x, x.shape[-1:], weight, model_config.rms_norm_eps)


def parsed(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object. Raises FormatError for a `config.json` that it refuses."""
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises whatever its checks happen to meet
        raise FormatError(
            "transformers does not accept the model's config.json", saw=str(error).splitlines()[0]
        ) from error


def check_shapes(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise FormatError for a tensor whose shape is not what `config.json` gives it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed(config))
    for name, tensor in model.state_dict().items():
        if name in shapes and tuple(shapes[name]) != tuple(tensor.shape):
            raise FormatError(
                f"{name} does not fit config.json",
                saw=f"a tensor of shape {tuple(shapes[name])}",
                expected=str(tuple(tensor.shape)),
            )


def _llama(config: Any, length: int, device: torch.device) -> LayerForward:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    positions = torch.arange(length, device=device)[None]
    cos, sin = LlamaRotaryEmbedding(config).to(device)(torch.zeros(1, device=device), positions)
    activation = ACT2FN[config.hidden_act]
    mask = _sliding_mask(length, getattr(config, "sliding_window", None), device)

    def forward(x: Tensor, w: Mapping[str, Tensor]) -> LayerRun:
        shape = (*x.shape[:2], -1, head)
        normed = F.rms_norm(x, x.shape[-1:], w["input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = [y.view(shape).transpose(1, 2) for y in (yield Pause(normed))]
        q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
        )
        del q, k, v, normed
        x = x + (yield Pause(mixed.transpose(1, 2).flatten(2), x))[0]
        del mixed
        normed = F.rms_norm(x, x.shape[-1:], w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = yield Pause(normed)
        del normed
        gated = activation(gate) * up
        del gate, up
        return x + (yield Pause(gated, x))[0]

    return forward


def _sliding_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, length) bool, True where attention is allowed; None when plain causal attention does."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _mpt(config: Any, length: int, device: torch.device) -> LayerForward:
    attention = config.attn_config
    # transformers computes every MPT with a bias of at most 8, whatever its configuration says.
    plain = attention.alibi and attention.alibi_bias_max == 8 and not attention.qk_ln
    if not plain or attention.prefix_lm:
        raise SourceError(
            "this MPT variant is not supported",
            saw=f"alibi={attention.alibi}, alibi_bias_max={attention.alibi_bias_max}, "
            f"qk_ln={attention.qk_ln}, prefix_lm={attention.prefix_lm}",
            expected="causal attention with ALiBi up to 8 and no query/key norm",
        )
    heads, width = config.n_heads, config.d_model
    scale = attention.softmax_scale or 1 / math.sqrt(width // heads)
    bias = _alibi(heads, length, device)
    epsilon = config.layer_norm_epsilon

    def forward(x: Tensor, w: Mapping[str, Tensor]) -> LayerRun:
        shape = (*x.shape[:2], heads, width // heads)
        normed = F.layer_norm(x, (width,), w["norm_1.weight"], w.get("norm_1.bias"), epsilon)
        (qkv,) = yield Pause(normed)
        if attention.clip_qkv:
            qkv = qkv.clamp(-attention.clip_qkv, attention.clip_qkv)
        q, k, v = [y.reshape(shape).transpose(1, 2) for y in qkv.chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
        del q, k, v, qkv, normed
        x = x + (yield Pause(mixed.transpose(1, 2).flatten(2), x))[0]
        del mixed
        normed = F.layer_norm(x, (width,), w["norm_2.weight"], w.get("norm_2.bias"), epsilon)
        (up,) = yield Pause(normed)
        del normed
        return x + (yield Pause(F.gelu(up), x))[0]

    return forward


def _alibi(heads: int, length: int, device: torch.device) -> Tensor:
    """(heads, length, length) additive causal bias, slope * (key - query).

    Source: ALiBi, arXiv:2108.12409; for a number of heads that is no power of two, as MPT does: the
    slopes of the next power of two, every second one first.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1, device=device) * 8 / power)
    if power != heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:heads]
    position = torch.arange(length, device=device)
    distance = (position[None, :] - position[:, None]).float()
    bias: Tensor = slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf"))
