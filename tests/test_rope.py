"""Rotary embeddings against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zoo.errors import FormatError
from zoo.runner.packed import Architecture
from zoo.runner.rope import depends_on_length, tables

HEAD_DIM, CONTEXT = 64, 4096
LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.01 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1 + 0.5 * i for i in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": 1024,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, another base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn, ratio": YARN | {"factor": None},
    "yarn, factor below one": YARN | {"factor": 0.5},
    "yarn, mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2},
    "yarn, all set": YARN | {"attention_factor": 1.3, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    "yarn, no original": {"rope_type": "yarn", "factor": 2.0},
    "longrope": LONG,
    "longrope, set": LONG | {"attention_factor": 1.2, "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, factor": {"rope_type": "proportional", "factor": 2.0},
}


def config_of(rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": 10000.0} | rope,
    )


def architecture_of(rope: dict[str, Any] | None) -> Architecture:
    return Architecture(
        family="llama",
        vocabulary=10,
        hidden=4 * HEAD_DIM,
        intermediate=8,
        layers=1,
        heads=4,
        kv_heads=4,
        head_dim=HEAD_DIM,
        context=CONTEXT,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        tied=True,
        rope=rope,
        softmax_scale=1.0,
    )


@pytest.mark.parametrize("length", [100, 1024, 1025, 4096, 6000])
@pytest.mark.parametrize("rope", CASES.values(), ids=CASES)
def test_tables_are_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    config = config_of(rope)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    for found, of_transformers in zip(
        tables(architecture_of(dict(config.rope_parameters)), length, length), expected, strict=True
    ):
        assert found.dtype == np.float32 and found.shape == (length, HEAD_DIM // 2)
        whole = of_transformers[0].numpy()
        # Both halves of a head turn alike; a rounding of the frequency grows with the position.
        tolerance = 3e-7 * np.arange(length)[:, None] + 1e-6
        assert (np.abs(np.tile(found, 2) - whole) <= tolerance).all()


def test_every_type_of_transformers_is_known() -> None:
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == {rope["rope_type"] for rope in CASES.values()}


@pytest.mark.parametrize("rope", CASES.values(), ids=CASES)
def test_depends_on_length_tells_where_it_matters(rope: dict[str, Any]) -> None:
    architecture = architecture_of(dict(config_of(rope).rope_parameters))
    short, long = (tables(architecture, length, 50)[0] for length in (50, 8000))
    assert depends_on_length(architecture) == (not np.array_equal(short, long))


def test_no_rotation_does_not_depend_on_length() -> None:
    assert not depends_on_length(architecture_of(None))
    with pytest.raises(FormatError, match="no rotary"):
        tables(architecture_of(None), 4, 4)


THETA: dict[str, Any] = {"rope_theta": 1e4}


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": None},
        {"rope_theta": "10000"},
        {"rope_theta": True},
        {"rope_theta": 0},
        {"rope_theta": -5.0},
        {"rope_theta": [1]},
        {"rope_theta": 10**400},
        {"rope_theta": float("nan")},
        THETA | {"rope_type": "axial"},
        THETA | {"rope_type": ["default"]},
        THETA | {"rope_type": "linear"},
        THETA | {"rope_type": "linear", "factor": 0},
        THETA | {"rope_type": "linear", "factor": 5e-324},
        THETA | {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5},
        THETA | {"rope_type": "dynamic"},
        THETA | YARN | {"rope_theta": 1.0},
        THETA | YARN | {"original_max_position_embeddings": -1},
        THETA | LONG | {"original_max_position_embeddings": 1},
        THETA | LONG | {"short_factor": None},
        THETA | LONG | {"short_factor": [1.0] * 31},
        THETA | LONG | {"short_factor": ["1"] * 32},
        THETA | LONG | {"short_factor": [0.0] * 32},
        THETA | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    ],
)
def test_parameters_that_make_no_sense_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        tables(architecture_of(rope), 8, 8)
