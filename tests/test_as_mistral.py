"""A Llama's weights in a Mistral."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import sources
from pipelines.as_mistral import main
from tests.tiny import VOCABULARY, tiny_llama, tiny_mpt
from zoo.files import Store


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["as_mistral", *map(str, arguments)])
    main()


def test_the_mistral_says_what_the_llama_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, out = tiny_llama(tmp_path / "llama", num_hidden_layers=2), tmp_path / "mistral"
    call(monkeypatch, llama, out)
    base = sources.resolve(str(out), Store(tmp_path / "store"))
    assert base.family.name == "mistral"
    ids = torch.arange(3, 80)[None] % VOCABULARY
    said = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids) for folder in (llama, out)]
    assert torch.equal(said[0].logits, said[1].logits)
    assert AutoTokenizer.from_pretrained(out)("a fox") == AutoTokenizer.from_pretrained(llama)("a fox")
    assert {path.name for path in tmp_path.iterdir()} >= {"llama", "mistral"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")], "scratch is gone"


def test_what_no_mistral_equals_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="is no Llama"):
        call(monkeypatch, tiny_mpt(tmp_path / "mpt"), out)
    with pytest.raises(SystemExit, match="has biases"):
        call(monkeypatch, tiny_llama(tmp_path / "biases", attention_bias=True), out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(SystemExit, match="is there already"):
        call(monkeypatch, tiny_llama(tmp_path / "llama"), out)
    assert not list(out.iterdir())


def test_a_base_may_lie_in_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "models" / "tiny", num_hidden_layers=2)
    monkeypatch.setenv("ZOO_SHARED", str(tmp_path))
    store = Store(tmp_path / "store")
    found = sources.resolve("${ZOO_SHARED}/models/tiny", store)
    assert found.folder == folder and found.source == "${ZOO_SHARED}/models/tiny"
    assert sources.peek("${ZOO_SHARED}/models/tiny", store).sha256 == found.sha256
    assert json.loads((found.folder / "config.json").read_text())["model_type"] == "llama"
