"""How models tell right endings from wrong ones, by the benchmark's command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import endings
from tests.tiny import tiny_llama
from zoo.errors import CalibrationError

Values = npt.NDArray[np.float64]
QUESTIONS = [
    ("The harbor was quiet", ["and the boats lay still.", "so it was."], "0"),
    ("A man walks", ["on.", "into the old house by the sea and sits."], "1"),
    ("They sing a song", ["of rain.", "of the river.", "that nobody knows here."], "2"),
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    starts, found, labels = zip(*QUESTIONS, strict=True)
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.table({"ctx": starts, "endings": found, "label": labels}), path)
    return path


def test_it_is_the_likelihood_of_every_ending_by_itself(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ending alone, not padded, all logits in float64; the error by a jackknife over questions."""
    folders = [tiny_llama(tmp_path / str(seed), num_hidden_layers=1, seed=seed) for seed in (0, 1)]
    monkeypatch.setattr("sys.argv", ["endings", *map(str, folders), "--questions", str(questions)])
    endings.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    one, two = ([cell.strip() for cell in row.split("|")[2:-1]] for row in rows)
    tables = []
    for folder, cells in zip(folders, (one, two), strict=True):
        table, answered = sums_of(folder)
        right, right_tokens, wrong, wrong_tokens = table.sum(0)
        expected = [right / right_tokens, wrong / wrong_tokens]
        assert [float(cell) for cell in cells[:2]] == pytest.approx(expected, abs=6e-4)
        assert figures(cells[2]) == pytest.approx(jackknifed(table), abs=6e-4)
        assert cells[4] == f"{answered:.1%}"
        tables.append(table)
    assert figures(one[3]) == [0, 0] != figures(two[3])
    assert figures(two[3]) == pytest.approx(jackknifed(*tables), abs=6e-4)


def figures(cell: str) -> list[float]:
    return [float(figure) for figure in cell.split(" ± ")]


def jackknifed(first: Values, *others: Values) -> list[float]:
    """How far right and wrong are apart, less what they are in `others`, and its standard error."""

    def figure(keep: Any) -> float:
        found = []
        for table in (first, *others):
            a, b, c, d = table[keep].sum(0)
            found.append(a / b - c / d)
        return float(found[0] - sum(found[1:]))

    every = np.arange(len(first))
    left = [figure(np.delete(every, i)) for i in every]
    return [figure(every), float(np.sqrt((len(left) - 1) * np.var(left)))]


def sums_of(folder: Path) -> tuple[Values, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs, answered = [], []
    for start, options, label in QUESTIONS:
        sums, counts = [], []
        for option in options:
            ids = torch.tensor([tokenizer(f"{start} {option}")["input_ids"]])
            with torch.no_grad():
                found = model(ids).logits[0, :-1].double().log_softmax(-1)
            each = found.gather(-1, ids[0, 1:, None])[len(tokenizer(start)["input_ids"]) - 1 :, 0]
            sums.append(float(each.sum()))
            counts.append(len(each))
        right = int(label)
        answered.append(np.argmax([s / len(o) for s, o in zip(sums, options, strict=True)]) == right)
        pairs.append((sums[right], counts[right], sum(sums) - sums[right], sum(counts) - counts[right]))
    return np.array(pairs), float(np.mean(answered))


def test_questions_are_spread_over_the_file(questions: Path) -> None:
    assert [question.start for question in endings.read(questions, 2)] == [QUESTIONS[0][0], QUESTIONS[1][0]]
    assert len(endings.read(questions, 100)) == 3


def test_what_cannot_be_read_is_told(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(CalibrationError, match="1 questions of"):
        endings.read(questions, 1)
    for model, path, words in (
        (tmp_path, questions, "is no model folder"),
        (tmp_path / "model", questions, "there is no model at"),
        (tmp_path, tmp_path / "absent.parquet", "absent.parquet"),
        (tmp_path, tmp_path / "other.parquet", "holds no questions"),
    ):
        arguments = [str(model), "--questions", str(path)]
        monkeypatch.setattr("sys.argv", ["endings", *arguments])
        with pytest.raises(SystemExit, match=f"endings: .*{words}"):
            endings.main()
