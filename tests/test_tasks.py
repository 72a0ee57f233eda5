"""The questions and the text that the package ships."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import pipelines.tasks.zoo_choice as zoo_choice
from pipelines.evaluate import lm_eval_tasks
from pipelines.text import read_text
from tests.tiny import tiny_llama

TASKS = Path(zoo_choice.__file__).parent
QUESTIONS: list[dict[str, Any]] = [
    json.loads(line) for line in (TASKS / "zoo_choice.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_every_question_is_well_formed() -> None:
    assert len(QUESTIONS) >= 240
    for question in QUESTIONS:
        assert list(question) == ["id", "category", "question", "choices", "answer"]
        assert len(question["choices"]) == 4 == len({choice.casefold() for choice in question["choices"]})
        assert all(choice == choice.strip() != "" for choice in question["choices"])
        assert question["answer"] in range(4)
        assert question["question"].isascii() and question["question"].endswith(("?", '"'))


def test_no_question_is_asked_twice() -> None:
    assert len({question["id"] for question in QUESTIONS}) == len(QUESTIONS)
    words = Counter(
        "".join(c for c in q["question"].casefold() if c.isalnum() or c == " ") for q in QUESTIONS
    )
    assert words.most_common(1)[0][1] == 1


def test_answers_cannot_be_guessed_from_place_or_length() -> None:
    places = Counter(question["answer"] for question in QUESTIONS)
    assert max(places.values()) - min(places.values()) <= 1
    longest = shortest = 0.0
    for question in QUESTIONS:
        lengths = [len(choice) for choice in question["choices"]]
        right = lengths[question["answer"]]
        longest += (right == max(lengths)) / lengths.count(max(lengths))
        shortest += (right == min(lengths)) / lengths.count(min(lengths))
    assert longest / len(QUESTIONS) < 0.4
    assert shortest / len(QUESTIONS) < 0.4


def test_the_description_counts_right() -> None:
    text = (TASKS / "README.md").read_text()
    assert f"{len(QUESTIONS)} multiple-choice questions" in text
    for category, count in Counter(question["category"] for question in QUESTIONS).items():
        assert f"| {category} | {count} |" in text


def test_a_random_model_is_near_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = {
        f.metric: f for f in lm_eval_tasks(tiny_llama(tmp_path / "model"), ["zoo_choice"], subject="base")
    }
    assert set(found) == {"accuracy", "accuracy_norm"}
    for figure in found.values():
        assert figure.samples == len(QUESTIONS) and figure.few_shot == 0 and figure.limit is None
        assert figure.stderr is not None and abs(figure.value - 0.25) < 4 * 0.026


def test_the_prose_is_plain_text() -> None:
    text = read_text("builtin:prose").whole
    assert len(text.split()) > 6000
    paragraphs = [p for p in text.split("\n\n") if len(p) > 100]
    assert len(set(paragraphs)) == len(paragraphs) > 60
