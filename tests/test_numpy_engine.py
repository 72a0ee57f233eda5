"""The NumPy engine against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from tests.packs import pack_folder, rewritten
from tests.tiny import VOCABULARY, tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import NumericsError, UsageError
from zoo.runner.engine import open_engine
from zoo.runner.numpy_engine import NumpyEngine, alibi_slopes
from zoo.runner.packed import Packed

LENGTH = 40
IDS = np.random.default_rng(5).integers(3, VOCABULARY, LENGTH).astype(np.int32)


def randomize_biases(model: Any) -> None:
    """transformers begins with biases of zero, which would not be missed."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama, shared key-value heads": lambda f: tiny_llama(f),
    "llama, biases, tied": lambda f: tiny_llama(
        f, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=1
    ),
    "llama, llama3 rope": lambda f: tiny_llama(
        f,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, yarn rope": lambda f: tiny_llama(
        f,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, dynamic rope": lambda f: tiny_llama(
        f,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral, window of 8": lambda f: tiny_mistral(f, sliding_window=8),
    "mistral, no window": lambda f: tiny_mistral(f, sliding_window=None, head_dim=16),
    "mpt": lambda f: tiny_mpt(f),
    "mpt, 6 heads, clipped": lambda f: tiny_mpt(f, d_model=96, n_heads=6, attn_config={"clip_qkv": 0.5}),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Any]:
    from transformers import AutoModelForCausalLM

    folder = MODELS[request.param](tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    randomize_biases(model)
    model.save_pretrained(folder)
    return pack_folder(folder, tmp_path_factory.mktemp("packed"))


@torch.no_grad()
def reference(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    return logits


def forward(
    engine: NumpyEngine, ids: NDArray[np.int32], start: int = 0, slot: int = 0
) -> NDArray[np.float32]:
    """Logits after every token."""
    count = len(ids)
    where = np.arange(start, start + count, dtype=np.int32)
    return engine.forward(ids, np.full(count, slot, np.int32), where, np.arange(count, dtype=np.int32))


def close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.ptp(expected)))


def test_logits_are_those_of_transformers(pair: tuple[Packed, Any]) -> None:
    packed, model = pair
    close(forward(NumpyEngine(packed, context=LENGTH), IDS), reference(model, IDS))


def test_logits_one_by_one_and_of_several_sequences(pair: tuple[Packed, Any]) -> None:
    """A prompt in two parts with single tokens of another sequence between, as continuous batching has it."""
    packed, model = pair
    if (packed.architecture.rope or {}).get("rope_type") == "dynamic":
        pytest.skip("its logits depend on how a text is cut")
    engine = NumpyEngine(packed, slots=3, context=LENGTH)
    other = IDS[::-1].copy()
    first = forward(engine, IDS[:20], slot=2)
    forward(engine, other[:5], slot=0)
    tokens = np.concatenate([IDS[20:39], other[5:6]])
    slots = np.array([2] * 19 + [0], np.int32)
    positions = np.array([*range(20, 39), 5], np.int32)
    both = engine.forward(tokens, slots, positions, np.array([18, 19], np.int32))
    expected = reference(model, IDS)
    close(first, expected[:20])
    close(both[0], expected[38])
    close(both[1], reference(model, other)[5])
    forward(engine, other[:3], start=30, slot=2)  # wrong, so go back and do it again
    close(forward(engine, IDS[30:], start=30, slot=2)[-1], expected[-1])


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
@pytest.mark.parametrize("bias_max", [4, 8])
def test_slopes_are_those_of_mpt(heads: int, bias_max: int) -> None:
    """Of this function of transformers: its model leaves out the configuration's alibi_bias_max."""
    bias = build_mpt_alibi_tensor(heads, 2, bias_max)  # (heads, 1, 2): -1 and 0 times the slope
    np.testing.assert_allclose(alibi_slopes(heads, bias_max), -bias[:, 0, 0].numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack_folder(tiny_llama(tmp_path_factory.mktemp("m")), tmp_path_factory.mktemp("p"))[0]


@pytest.mark.parametrize(
    "tokens, slots, positions, wanted, word",
    [
        ([VOCABULARY], [0], [0], [0], f"token {VOCABULARY}"),
        ([-1], [0], [0], [0], "token -1"),
        ([5], [2], [0], [0], "slot 2"),
        ([5], [-1], [0], [0], "slot -1"),
        ([5], [0], [1], [0], "skipped"),
        ([5], [0], [-1], [0], "position -1"),
        ([5, 6], [0, 0], [0, 2], [0], "skipped"),
        ([5, 6], [0, 0], [1, 0], [0], "skipped"),
        ([5] * 17, [0] * 17, list(range(17)), [0], "position 16"),
        ([5], [0], [0], [1], "wanted 1"),
        ([5, 6], [0], [0], [0], "as many"),
    ],
)
def test_a_wrong_call_is_refused_and_harms_nothing(
    packed: Packed, tokens: list[int], slots: list[int], positions: list[int], wanted: list[int], word: str
) -> None:
    engine = NumpyEngine(packed, slots=2, context=16)
    with pytest.raises(UsageError, match=word):
        engine.forward(*(np.array(x, np.int32) for x in (tokens, slots, positions, wanted)))
    expected = forward(NumpyEngine(packed, slots=2, context=16), IDS[:4])
    np.testing.assert_array_equal(forward(engine, IDS[:4]), expected)


@pytest.mark.parametrize("tensor", ["layers.1.up.scales", "layers.0.mlp_norm.weight"])
def test_weights_that_are_not_finite_are_refused(packed: Packed, tmp_path: Path, tensor: str) -> None:
    data = bytearray(packed.path.read_bytes())
    info = packed.tensors[tensor]
    data[info.offset : info.offset + 4] = b"\xff\x7f\xff\x7f"  # NaN in float16 and in float32
    path = tmp_path / "nan.safetensors"
    path.write_bytes(data)
    with pytest.raises(NumericsError, match="not finite"):
        NumpyEngine(Packed(path), context=16)


def test_logits_that_overflow_are_refused(packed: Packed, tmp_path: Path) -> None:
    engine = NumpyEngine(rewritten(packed, tmp_path / "x.safetensors", logit_scale=3e38), context=16)
    with pytest.raises(NumericsError, match="logits"):
        forward(engine, IDS[:4])


def test_a_mask_without_its_values_is_refused(packed: Packed) -> None:
    """Of masks, the reader cannot tell the number of values before the bits are counted."""
    from zoo.errors import FormatError
    from zoo.runner.format import Layout
    from zoo.runner.format import pack as pack_matrix

    class Short:
        """A reader's view of one file, with one matrix replaced."""

        def __init__(self) -> None:
            self.__dict__.update(packed.__dict__)
            rows, columns = packed.architecture.matrices["layers.0.q"]
            layout = Layout("mask", rows, columns, bits=8, group=32)
            q = np.ones((rows, columns), np.int16)
            self.short = pack_matrix(layout, q, np.ones((rows, layout.groups)))
            self.short["values"] = self.short["values"][:-5]
            self.layouts = packed.layouts | {"layers.0.q": layout}

        def parts(self, name: str) -> dict[str, Any]:
            return self.short if name == "layers.0.q" else packed.parts(name)

    with pytest.raises(FormatError, match=r"layers\.0\.q"):
        NumpyEngine(Short(), context=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"slots": 0}, "slots"),
        ({"threads": 0}, "threads"),
        ({"context": 513}, "1 to 512"),
        ({"context": 0}, "context"),
        ({"kv": "f8"}, "f8"),
    ],
)
def test_options_out_of_range_are_refused(packed: Packed, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        open_engine(packed, **options)


def test_the_context_is_the_models_unless_asked_for(packed: Packed) -> None:
    assert open_engine(packed).context == 512
    assert open_engine(packed, context=33).context == 33
