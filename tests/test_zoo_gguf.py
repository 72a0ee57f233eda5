"""llama.cpp in lm-eval, against lm-eval's own model of transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import zoo_gguf
from pipelines.evaluate import lm_eval_tasks, load_model, perplexity, perplexity_in_shards
from pipelines.export_gguf import export_gguf
from pipelines.shards import work_on
from pipelines.text import Ids
from pipelines.zoo_gguf import ZooGguf
from tests.test_evaluate import SHARED, TEXT, needs_shared
from tests.tiny import SENTENCES, VOCABULARY, tiny_llama, tiny_mpt
from zoo.entry import Measurement
from zoo.errors import FormatError, UsageError
from zoo.files import Store

CONTEXT = 48
CHOICES = [" the dog", " moon", " x", " sold sea shells by the shore", "\n"]
LONG = " ".join(SENTENCES)
PAIRS = [(context, choice) for context in [*SENTENCES, "", LONG, "word "] for choice in CHOICES]


@pytest.fixture(scope="module", params=["llama", "mpt"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ZooGguf, HFLM]:
    folder = tmp_path_factory.mktemp("model")
    (tiny_llama if request.param == "llama" else tiny_mpt)(folder)
    path = export_gguf(folder, folder / "out", ["F32"], name="tiny", license=None)["F32"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)
    return ZooGguf(str(path), max_length=CONTEXT, threads=1), reference


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@pytest.mark.parametrize(("cells", "sequences"), [(1024, 16), (64, 3)])
def test_log_likelihoods_are_those_of_transformers(
    pair: tuple[ZooGguf, HFLM], cells: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo_gguf, "CELLS", cells)
    monkeypatch.setattr(zoo_gguf, "SEQUENCES", sequences)
    ours, reference = pair
    ours._context = None
    asked = requests("loglikelihood", PAIRS)
    expected = reference.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=0.02)
    assert [f[1] for f in found] == [e[1] for e in expected]
    ours._context = None


def test_rolling_log_likelihoods_are_those_of_transformers(pair: tuple[ZooGguf, HFLM]) -> None:
    ours, reference = pair
    asked = requests("loglikelihood_rolling", [(text,) for text in [*SENTENCES, LONG]])
    expected = reference.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked, disable_tqdm=True), expected, rtol=1e-3)


def test_answers_are_those_of_transformers(pair: tuple[ZooGguf, HFLM]) -> None:
    ours, reference = pair
    arguments = [
        (text, {"until": until, "max_gen_toks": 5, "do_sample": False})
        for text in [*SENTENCES, LONG, LONG[5:]]
        for until in (["\n"], ["e", " s"])
    ]
    asked = requests("generate_until", arguments)
    expected = reference.generate_until(asked, disable_tqdm=True)
    # (llama.cpp keeps keys and values in float16, and random weights know near ties: few tokens.)
    # Bytes that are no character: transformers shows that they are broken, we leave them out.
    whole = [text.replace("\N{REPLACEMENT CHARACTER}", "") for text in expected]
    assert ours.generate_until(asked, disable_tqdm=True) == whole


def test_tokens_are_those_of_the_tokenizer(pair: tuple[ZooGguf, HFLM]) -> None:
    ours, reference = pair
    assert (ours.eot_token_id, ours.prefix_token_id) == (reference.eot_token_id, reference.prefix_token_id)
    for text in ("<|start|>Hi", "naïve café — ½ 日本語", " two  spaces"):
        assert ours.tok_encode(text) == reference.tok_encode(text)


WINDOWS: Ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, 600))  # of more tokens than a call takes


@pytest.mark.parametrize("make", [tiny_llama, tiny_mpt])
def test_perplexity_of_a_float_file_is_that_of_the_folder(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    path = export_gguf(folder, tmp_path / "out", ["F32"], name="tiny", license=None)["F32"]
    (expected,) = perplexity(load_model(folder)[0], WINDOWS[:, :300], text=TEXT, subject="entry")
    (found,) = asked_in_shards(path, WINDOWS[:, :300], tmp_path / "store")
    assert found.dtype == "F32, llama.cpp"
    assert found.value == pytest.approx(expected.value, rel=2e-3)  # keys and values are in float16
    assert found.stderr == pytest.approx(expected.stderr, rel=2e-2)
    same = {"value": expected.value, "stderr": expected.stderr, "dtype": expected.dtype}
    assert found.model_copy(update=same) == expected


def test_perplexity_of_a_quantized_file_is_that_of_llama_cpp_itself(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    paths = export_gguf(folder, tmp_path / "out", ["F32", "Q4_0"], name="tiny", license=None)
    (found,) = asked_in_shards(paths["Q4_0"], WINDOWS, tmp_path / "store")
    runner = Llama(str(paths["Q4_0"]), n_ctx=768, n_threads=1, logits_all=True, verbose=False)
    losses = []
    for window in WINDOWS:
        runner.reset()
        runner.eval(window.tolist())
        logits = runner.scores[:600].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-log_probabilities[np.arange(599), window[1:]].mean())
    assert found.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    (whole,) = asked_in_shards(paths["F32"], WINDOWS, tmp_path / "store")
    assert abs(found.value / whole.value - 1) > 5e-3  # it is the file that answers
    assert found.dtype == "Q4_0, llama.cpp"


def asked_in_shards(path: Path, ids: Ids, store: Path) -> list[Measurement]:
    work = work_on(path, path.name, Store(store), workers=1)
    return perplexity_in_shards(work, ids, text=TEXT, subject="entry")


tokens = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(st.tuples(tokens.map(lambda ids: [9, *ids]), tokens.map(lambda ids: [*ids, 1])), max_size=40))
def test_packs_hold_every_text_once_with_its_own_past(pairs: list[tuple[list[int], list[int]]]) -> None:
    seen: dict[int, list[int]] = {}
    for pack in zoo_gguf._packs(pairs):
        assert pack.requests <= zoo_gguf.SEQUENCES
        paths: dict[int, list[int]] = {}
        for token in pack.tokens:
            for sequence in token.sequences:
                path = paths.setdefault(sequence, [])
                assert token.position == len(path)
                path.append(token.id)
            for request, target in token.asked:
                of_request = seen.setdefault(request, [])
                context, _ = pairs[request]
                # What leads here, in the sequences of this token, is the context and the answers so far.
                assert any(path == context + of_request for path in paths.values())
                of_request.append(target)
        distinct = {tuple(path[: n + 1]) for path in paths.values() for n in range(len(path))}
        assert len(pack.tokens) == len(distinct)
    assert seen == {index: continuation for index, (_, continuation) in enumerate(pairs)}


def test_what_does_not_fit_or_is_no_model_is_refused(pair: tuple[ZooGguf, HFLM], tmp_path: Path) -> None:
    ours, _ = pair
    with pytest.raises(UsageError, match="at most 48"):
        ours._loglikelihood_tokens([(None, [3], [4] * 49)], disable_tqdm=True)
    with pytest.raises(UsageError, match="less than 48"):
        ours.generate_until(requests("generate_until", [("Hi", {"max_gen_toks": 48})]), disable_tqdm=True)
    (tmp_path / "no.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(FormatError, match=r"no\.gguf"):
        ZooGguf(str(tmp_path / "no.gguf"))


@pytest.mark.real
@needs_shared
def test_a_task_on_a_file_gives_the_figures_of_the_folder(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    path = export_gguf(folder, tmp_path / "out", ["F32"], name="tiny", license=None)["F32"]
    settings: dict[str, Any] = {"subject": "entry", "limit": 40, "data": SHARED / "data" / "hub"}
    of_file = lm_eval_tasks(path, ["arc_easy"], **settings)
    of_folder = lm_eval_tasks(folder, ["arc_easy"], **settings)
    assert [f.model_copy(update={"dtype": "float32"}) for f in of_file] == of_folder
    assert {f.dtype for f in of_file} == {"F32, llama.cpp"}
