"""How near models are to their teacher on text that none of them was trained on, to choose a recipe by:
`python -m benchmarks.held_out --teacher DIR MODEL...`.

The texts are for choosing, so none is a test split: by default WikiText's validation text, and questions of
GSM8K and beginnings of HellaSwag from their training splits. Others: --text SOURCE#COLUMN, repeatable; a .npy
file of token ids needs no tokenizer. The first windows are left out, since recipes report their fidelity on
those. Prints, as a Markdown table, the mean over --windows windows of --length tokens of KL(teacher || model)
in nats, with its standard error, and of top-1 agreement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pipelines import text
from pipelines.checkpoint import Checkpoint
from pipelines.evaluate import divergences, fidelity_of
from pipelines.recover.data import open_tokens
from pipelines.text import Ids, Text
from zoo.errors import ZooError
from zoo.files import sha256_file
from zoo.progress import counting

TEXTS = (
    "${ZOO_SHARED}/data/text/wikitext2_valid.tokens.txt",
    "${ZOO_SHARED}/data/hub/openai/gsm8k/main:train#question",
    "${ZOO_SHARED}/data/hub/Rowan/hellaswag:train#ctx",
)
REPORTED = 16  # windows at the beginning of a text


def read(source: str, teacher: Path, count: int, length: int) -> tuple[Ids, Text]:
    """`count` windows (windows, length) of a text, fewer if it is short, and what it is."""
    name, _, column = source.partition("#")
    if name.endswith(".npy"):
        path = text.expand(name)
        found = Checkpoint(teacher)
        vocabulary = found.shapes()[f"{found.family.embeddings}.weight"][0]
        ids, said = open_tokens(path, vocabulary), Text((), path.name, sha256_file(path))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True, trust_remote_code=False)
        enough = (count + REPORTED) * length * 16  # bytes; more than any tokenizer needs
        said = text.read_text(name, column=column or "text", limit_bytes=enough)
        ids = text.token_ids(tokenizer, said)
    whole = text.windows(ids, max(min(count + REPORTED, len(ids) // length), REPORTED + 1), length)
    return whole[REPORTED:], said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], help="repeatable")
    parser.add_argument("--windows", type=int, default=64, help="of each text at most")
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    sources = arguments.text or list(TEXTS)
    try:
        texts = [read(source, arguments.teacher, arguments.windows, arguments.length) for source in sources]
        whole = np.concatenate([ids for ids, _ in texts])
        ends = np.cumsum([len(ids) for ids, _ in texts]).tolist()
        names = [source.removeprefix("${ZOO_SHARED}/data/") for source in sources]
        titles = [f"{name}, {len(ids)} windows" for name, (ids, _) in zip(names, texts, strict=True)]
        print(f"| model | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
        for model in arguments.models:
            with counting(model.name, len(whole)) as tell:
                pairs, dtype = divergences(arguments.teacher, model, whole, tell)
            cells = []
            for (ids, said), end in zip(texts, ends, strict=True):
                near, same = fidelity_of(pairs[end - len(ids) : end], ids, text=said, dtype=dtype)
                error = "" if near.stderr is None else f" ± {near.stderr:.4f}"
                cells.append(f"{near.value:.4f}{error}, {same.value:.1%}")
            print(f"| {model} ({dtype}) | {' | '.join(cells)} |", flush=True)
    except (ZooError, OSError) as error:
        sys.exit(f"held_out: {error}")


if __name__ == "__main__":
    main()
