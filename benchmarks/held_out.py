"""How near models are to their teacher on text that none of them was trained on, to choose a recipe by:
`python -m benchmarks.held_out --teacher DIR MODEL...`.

The texts are for choosing, so none is a test split: by default WikiText's validation text, and questions of
GSM8K and beginnings of HellaSwag from their training splits, in --data. Others: --text SOURCE#COLUMN,
repeatable; a .npy file of token ids needs no tokenizer. Prints, as a Markdown table, the mean over --windows
windows of --length tokens of KL(teacher || model) in nats, with its standard error, and of top-1 agreement.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from pipelines import text
from pipelines.evaluate import fidelity
from pipelines.text import Ids, Text
from zoo.errors import ZooError
from zoo.files import sha256_file

TEXTS = (
    "text/wikitext2_valid.tokens.txt",
    "hub/openai/gsm8k/main:train#question",
    "hub/Rowan/hellaswag:train#ctx",
)


def read(source: str, teacher: Path, count: int, length: int) -> tuple[Ids, Text]:
    """At most `count` windows (windows, length) of a text, and what it is."""
    name, _, column = source.partition("#")
    if name.endswith(".npy"):
        path = Path(name)
        ids, said = np.load(path, allow_pickle=False), Text((), path.name, sha256_file(path))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True, trust_remote_code=False)
        said = text.read_text(name, column=column or "text", limit_bytes=count * length * 16)
        ids = text.token_ids(tokenizer, said)
    return text.windows(ids, min(count, max(len(ids) // length, 1)), length), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], help="repeatable")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--data", default=os.environ.get("ZOO_SHARED", "../shared") + "/data")
    arguments = parser.parse_args()
    sources = arguments.text or [f"{arguments.data}/{name}" for name in TEXTS]
    try:
        texts = [read(source, arguments.teacher, arguments.windows, arguments.length) for source in sources]
        titles = [
            f"{source.removeprefix(arguments.data + '/')}, {len(ids)} windows"
            for source, (ids, _) in zip(sources, texts, strict=True)
        ]
        print(f"| model | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
        for model in arguments.models:
            cells = []
            for ids, said in texts:
                near, same = fidelity(arguments.teacher, model, ids, text=said)
                cells.append(f"{near.value:.4f} ± {near.stderr or 0:.4f}, {same.value:.1%}")
            print(f"| {model} | {' | '.join(cells)} |", flush=True)
    except (ZooError, OSError, ValueError) as error:
        sys.exit(f"held_out: {error}")


if __name__ == "__main__":
    main()
