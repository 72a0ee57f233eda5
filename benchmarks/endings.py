"""How well models tell right endings of a text from wrong ones, to see what compression cost:
`python -m benchmarks.endings MODEL...`.

Perplexity and KL divergence count every token alike; a question is answered by how much likelier its right
ending is than the wrong ones. The questions are for choosing between recipes, so they are of HellaSwag's
training split: its texts go on as a person wrote (right) or as another model did (wrong). MODEL is whatever a
recipe's `base` may be: a folder, a .gguf file, zoo:ENTRY-ID. Prints, as a Markdown table, mean
log-probabilities per token, in nats, of right and of wrong endings; how far they are apart, and how much less
than with the first model, with standard errors over questions; and the share of questions whose right ending
is the likeliest by its length in bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from pipelines.evaluate import load_model
from pipelines.sources import resolve
from pipelines.text import expand
from zoo.errors import CalibrationError, ZooError, last_line
from zoo.files import Store
from zoo.progress import track

Values = npt.NDArray[np.float64]
QUESTIONS = "${ZOO_SHARED}/data/hub/Rowan/hellaswag/default/train.parquet"


class Question(NamedTuple):
    start: str
    endings: Sequence[str]
    right: int  # index of an ending


def read(path: Path, count: int) -> list[Question]:
    """`count` questions spread over a Parquet file with HellaSwag's columns, fewer if it has fewer."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["ctx", "endings", "label"]).to_pylist()
    except ValueError as error:  # pyarrow's errors are
        raise CalibrationError(f"{path} holds no questions", saw=last_line(error)) from error
    count = min(count, len(rows))
    if count < 2:
        raise CalibrationError(f"{count} questions of {path} tell no error", expected="2 at least")
    places = np.linspace(0, len(rows), count, endpoint=False).astype(int)
    return [Question(rows[i]["ctx"], rows[i]["endings"], int(rows[i]["label"])) for i in places]


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any, question: Question) -> tuple[Tensor, Tensor]:
    """Of each ending after the start: the sum over its tokens, (endings,) float64, and their number."""
    begun = len(tokenizer(question.start)["input_ids"])
    ids = [tokenizer(f"{question.start} {ending}")["input_ids"] for ending in question.endings]
    length = max(map(len, ids))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])  # after all that is looked at
    hidden = model.base_model(input_ids=padded.to(model.device)).last_hidden_state[:, begun - 1 : -1]
    logits = model.get_output_embeddings()(hidden).double()
    found = log_softmax(logits, -1).gather(-1, padded[:, begun:, None].to(model.device))[..., 0].cpu()
    counts = torch.tensor([len(row) - begun for row in ids])
    return (found * (torch.arange(length - begun) < counts[:, None])).sum(1), counts


def told(model: Any, tokenizer: Any, questions: Sequence[Question], title: str) -> tuple[Values, list[bool]]:
    """Of each question: the sums of log-probabilities and of tokens, of its right and of its wrong endings,
    (questions, 4), and whether it is answered right."""
    rows, answered = [], []
    for question in track(questions, title):
        sums, counts = log_probabilities(model, tokenizer, question)
        size = torch.tensor([len(ending.encode()) for ending in question.endings])
        answered.append(int((sums / size).argmax()) == question.right)
        right = torch.arange(len(sums)) == question.right
        rows.append([float(x[at].sum()) for at in (right, ~right) for x in (sums, counts)])
    return np.array(rows), answered


def means(sums: Values) -> tuple[Values, Values]:
    """Nats per token of right and of wrong endings; sums (..., 4) as `told` has them."""
    return sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]


def apart(rows: Values) -> tuple[float, Values]:
    """The difference of the means, and what it is without one question each."""
    whole = rows.sum(0)
    return float(np.subtract(*means(whole))), np.subtract(*means(whole - rows))


def jackknife(without_one: Values) -> float:
    """The standard error of a figure, from its values without one sample each."""
    return float(np.sqrt((len(without_one) - 1) * np.var(without_one)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--questions", default=QUESTIONS, help="a Parquet file with HellaSwag's columns")
    parser.add_argument("--count", type=int, default=500, help="spread over the file")
    arguments = parser.parse_args()
    try:
        questions = read(expand(arguments.questions), arguments.count)
        print("| model | right | wrong | apart | less than the first | answered |\n|---|---|---|---|---|---|")
        store = Store(Path(os.environ.get("ZOO_STORE") or "~/.cache/sparse-zoo").expanduser())
        first = None
        for model in arguments.models:
            rows, answered = told(*load_model(resolve(model, store).folder), questions, Path(model).name)
            right, wrong = means(rows.sum(0))
            found = apart(rows)
            first = first or found
            less = first[0] - found[0]
            print(
                f"| {model} | {right:.3f} | {wrong:.3f} | {found[0]:.3f} ± {jackknife(found[1]):.3f} "
                f"| {less:.3f} ± {jackknife(first[1] - found[1]):.3f} | {np.mean(answered):.1%} |",
                flush=True,
            )
    except (ZooError, OSError) as error:
        sys.exit(f"endings: {error}")


if __name__ == "__main__":
    main()
