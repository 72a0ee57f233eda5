"""The hand-written decoder layers against transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipelines.checkpoint import Checkpoint
from pipelines.layers import check_shapes, layer_forward
from tests.tiny import VOCABULARY, tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError, SourceError

CPU = torch.device("cpu")
LENGTH = 90
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | more}


VARIANTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama, as many key-value heads as heads": (tiny_llama, {"num_key_value_heads": 4}),
    "llama, one key-value head": (tiny_llama, {"num_key_value_heads": 1}),
    "llama, heads wider than their share": (tiny_llama, {"head_dim": 48}),
    "llama, biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama, another activation and epsilon": (tiny_llama, {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "llama, another rope base": (tiny_llama, {"rope_theta": 500000.0}),
    "llama, rope scaled as llama3": (tiny_llama, {"rope_parameters": LLAMA3}),
    "llama, rope_scaling as older configs say it": (tiny_llama, {"rope_scaling": LLAMA3}),
    "llama, rope linear": (tiny_llama, rope("linear")),
    "llama, rope yarn": (tiny_llama, rope("yarn", original_max_position_embeddings=64)),
    "llama, rope dynamic, short": (tiny_llama, rope("dynamic")),
    "llama, rope dynamic, long": (tiny_llama, rope("dynamic") | {"max_position_embeddings": 64}),
    "mistral, window shorter than the text": (tiny_mistral, {"sliding_window": 16}),
    "mistral, window of the text": (tiny_mistral, {"sliding_window": LENGTH}),
    "mistral, window one short of it": (tiny_mistral, {"sliding_window": LENGTH - 1}),
    "mistral, no window": (tiny_mistral, {"sliding_window": None}),
    "mpt": (tiny_mpt, {}),
    "mpt, clipped": (tiny_mpt, {"attn_config": {"clip_qkv": 0.5}}),
    "mpt, another softmax scale": (tiny_mpt, {"attn_config": {"softmax_scale": 0.3}}),
    "mpt, 3 heads": (tiny_mpt, {"n_heads": 3, "d_model": 96}),
    "mpt, 5 heads": (tiny_mpt, {"n_heads": 5, "d_model": 160}),
    "mpt, 6 heads": (tiny_mpt, {"n_heads": 6, "d_model": 192, "expansion_ratio": 2}),
    "mpt, another epsilon": (tiny_mpt, {"layer_norm_epsilon": 1e-2}),
}


def run_layer(checkpoint: Checkpoint, index: int, x: Tensor) -> Tensor:
    """One decoder layer with its own weights, through every pause."""
    weights = {name: tensor.float() for name, tensor in checkpoint.layer(index).items()}
    run = layer_forward(checkpoint.family, checkpoint.config, x.shape[1], CPU)(x, weights)
    pause = next(run)
    for names in checkpoint.family.shared_inputs:
        outputs = [F.linear(pause.inputs, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in names]
        try:
            pause = run.send(outputs)
        except StopIteration as end:
            result: Tensor = end.value
    return result


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layers_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make, changes = VARIANTS[variant]
    folder = make(tmp_path, dtype=torch.float32, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint(folder)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states
        x = wanted[0]
        assert len(wanted) == checkpoint.layer_count + 1
        for index in range(checkpoint.layer_count):
            x = run_layer(checkpoint, index, x)
            last = index + 1 == checkpoint.layer_count  # transformers gives the last one normed
            norm = model.get_submodule("transformer.norm_f" if make is tiny_mpt else "model.norm")
            torch.testing.assert_close(norm(x) if last else x, wanted[index + 1], atol=1e-5, rtol=1e-5)
            if not last:
                assert (x - wanted[index]).norm() > 0.1 * x.norm()  # the layer does something


@pytest.mark.parametrize(
    "change", [{"alibi": False}, {"alibi_bias_max": 4}, {"qk_ln": True}, {"prefix_lm": True}]
)
def test_mpt_variants_that_are_not_computed_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_mpt(tmp_path))
    attention = dict(checkpoint.config["attn_config"]) | change
    with pytest.raises(SourceError, match="MPT variant"):
        layer_forward(checkpoint.family, checkpoint.config | {"attn_config": attention}, 8, CPU)


def test_pauses_tell_the_residual_that_an_output_is_added_to(tmp_path: Path) -> None:
    """Sending zeros leaves the residual stream untouched."""
    for make in (tiny_llama, tiny_mistral, tiny_mpt):
        checkpoint = Checkpoint(make(tmp_path / make.__name__))
        weights = {name: tensor.float() for name, tensor in checkpoint.layer(0).items()}
        x = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(0))
        run = layer_forward(checkpoint.family, checkpoint.config, 12, CPU)(x, weights)
        pause = next(run)
        for names in checkpoint.family.shared_inputs:
            rows = [weights[f"{name}.weight"].shape[0] for name in names]
            if pause.residual is not None:
                assert rows == [128]
                assert torch.equal(pause.residual, x)
            try:
                pause = run.send([torch.zeros(2, 12, count) for count in rows])
            except StopIteration as end:
                assert torch.equal(end.value, x)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": None},
        {"model_type": "no-such-model"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"rope_parameters": 3},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_refuses_is_told_plainly(
    change: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    config = checkpoint.config | change
    if config["model_type"] is None:
        del config["model_type"]
    with pytest.raises(FormatError, match=r"config\.json"):
        check_shapes(config, checkpoint.shapes())


def test_shapes_are_those_of_the_configuration(tmp_path: Path) -> None:
    for number, (make, changes) in enumerate(VARIANTS.values()):
        checkpoint = Checkpoint(make(tmp_path / str(number), **changes))
        shapes = checkpoint.shapes()
        check_shapes(checkpoint.config, shapes)
        assert shapes.keys() == set(checkpoint.names)
        name = next(n for n in shapes if n.endswith("norm_1.weight") or n.endswith("k_proj.weight"))
        with pytest.raises(FormatError, match=name.replace(".", r"\.")) as caught:
            check_shapes(checkpoint.config, shapes | {name: (3, 5)})
        assert caught.value.saw == "a tensor of shape (3, 5)"
        assert caught.value.expected == str(shapes[name])
