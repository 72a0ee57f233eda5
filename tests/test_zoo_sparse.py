"""The sparse runner in lm-eval, against lm-eval's own model of transformers on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from pipelines.zoo_sparse import ZooSparse
from tests.packs import pack_folder
from tests.tiny import SENTENCES, tiny_llama, tiny_mpt
from zoo.errors import UsageError
from zoo.runner.generate import Model
from zoo.runner.numpy_engine import NumpyEngine
from zoo.runner.packed import Packed

CONTEXT = 48
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module", params=["llama", "mpt", "longrope"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, HFLM]:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "mpt":
        tiny_mpt(folder)
    elif request.param == "llama":
        tiny_llama(folder)
    else:
        tiny_llama(
            folder,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 16,
                "long_factor": [1.0 + i for i in range(16)],
            },
        )
    packed, model = pack_folder(folder, tmp_path_factory.mktemp("packed"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # One by one: a rotation that depends on the length would depend on the padding too.
    return packed, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)


def ours(packed: Packed, slots: int = 3) -> ZooSparse:
    return ZooSparse(Model(packed, NumpyEngine(packed, slots=slots, context=CONTEXT)))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


CHOICES = [" the dog", " moon", " x", " sold sea shells by the shore", "\n"]
LONG = " ".join(SENTENCES)
PAIRS = [(context, choice) for context in [*SENTENCES, "", LONG, "word "] for choice in CHOICES]


@pytest.mark.parametrize("slots", [1, 3])
def test_log_likelihoods_are_those_of_transformers(pair: tuple[Packed, HFLM], slots: int) -> None:
    packed, reference = pair
    asked = requests("loglikelihood", PAIRS)
    expected = reference.loglikelihood(asked, disable_tqdm=True)
    found = ours(packed, slots).loglikelihood(asked, disable_tqdm=True)
    assert len(found) == len(PAIRS)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-3)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_a_greedy_continuation_is_told(pair: tuple[Packed, HFLM]) -> None:
    packed, reference = pair
    lm = ours(packed)
    ids = lm.tok_encode(SENTENCES[0])[:12]
    continuation = lm.model.generate_ids([ids], lm_options(3))[0].ids
    for changed in (0, 1):
        tokens = [*continuation[:2], (continuation[2] + changed) % packed.architecture.vocabulary]
        asked = [(None, ids, tokens)]
        (found,), (expected,) = (m._loglikelihood_tokens(asked, disable_tqdm=True) for m in (lm, reference))
        assert found[1] == expected[1] == (not changed)
        assert abs(found[0] - expected[0]) < 1e-3


def lm_options(tokens: int) -> list[Any]:
    from zoo.runner.sample import Options

    return [Options(max_tokens=tokens)]


def test_rolling_log_likelihoods_are_those_of_transformers(pair: tuple[Packed, HFLM]) -> None:
    packed, reference = pair
    asked = requests("loglikelihood_rolling", [(text,) for text in [*SENTENCES, LONG]])
    expected = reference.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours(packed).loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_answers_are_those_of_transformers(pair: tuple[Packed, HFLM]) -> None:
    packed, reference = pair
    arguments = [
        (text, {"until": until, "max_gen_toks": 10, "do_sample": False})
        for text in [*SENTENCES[:3], LONG]
        for until in (["\n"], ["e", " s"])
    ]
    asked = requests("generate_until", arguments)
    expected = reference.generate_until(asked, disable_tqdm=True)
    found = ours(packed).generate_until(asked, disable_tqdm=True)
    # Bytes that are no character yet: transformers shows that they are missing, we leave them out.
    whole = [[text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts] for texts in (found, expected)]
    assert whole[0] == whole[1]


def test_a_task_by_the_registered_name(tmp_path: Path) -> None:
    """As a person calls it: through `simple_evaluate`, with the engine of this machine."""
    import json

    packed, model = pack_folder(tiny_llama(tmp_path / "m"), tmp_path)
    lines = [
        {"question": text[:30], "choices": [" the dog", " moon", " seven"], "answer": n % 3}
        for n, text in enumerate(SENTENCES)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    common: dict[str, Any] = {
        "tasks": ["tiny_choice"],
        "task_manager": TaskManager(include_path=tmp_path / "tasks", include_defaults=False),
        "bootstrap_iters": 0,
    }
    arguments = f"path={packed.path},slots=4,max_length=64,threads=1"
    found = lm_eval.simple_evaluate(model="zoo-sparse", model_args=arguments, batch_size=1, **common)
    reference = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "m"), batch_size=1)
    expected = lm_eval.simple_evaluate(model=reference, **common)
    assert len(found["samples"]["tiny_choice"]) == len(SENTENCES)
    for ours_, theirs in zip(
        found["samples"]["tiny_choice"], expected["samples"]["tiny_choice"], strict=True
    ):
        values = ([float(r[0][0]) for r in sample["resps"]] for sample in (ours_, theirs))
        np.testing.assert_allclose(*values, atol=0.3)  # with activations in 8 bits
    assert found["results"]["tiny_choice"]["acc,none"] == expected["results"]["tiny_choice"]["acc,none"]


def test_chat_templates_and_names(pair: tuple[Packed, HFLM]) -> None:
    packed, reference = pair
    lm = ours(packed)
    history = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(history) == reference.apply_chat_template(history)
    assert lm.chat_template(True) == reference.chat_template(True)
    assert lm.eot_token_id == reference.eot_token_id
    assert lm.prefix_token_id == reference.prefix_token_id
    assert lm.tok_encode("<|start|>Hi") == reference.tok_encode("<|start|>Hi")


def test_what_does_not_fit_is_refused(pair: tuple[Packed, HFLM]) -> None:
    lm = ours(pair[0])
    with pytest.raises(UsageError, match="at most 48"):
        lm._loglikelihood_tokens([(None, [3], [4] * 49)], disable_tqdm=True)
    with pytest.raises(UsageError, match="less than 48"):
        lm.generate_until(requests("generate_until", [("Hi", {"max_gen_toks": 48})]), disable_tqdm=True)
