"""All token files that a recover step trains on: its texts, what a teacher writes for its
skills, and what models write."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipelines.recipe import Recover
from pipelines.recover.data import tokenized
from pipelines.recover.skill import skill_tokens
from pipelines.recover.written import written_tokens
from zoo.errors import ZooError
from zoo.files import Store, atomic_file


def training_tokens(
    step: Recover, model: Path, models: Mapping[str | None, tuple[Path, str]], store: Store
) -> list[Path]:
    """Files of token ids by the tokenizer of `model`; each is made once and then found in the store.

    models: by the names in `step.models`, the folder of each and what names its weights by their content.
    """
    return [
        *(tokenized(text.source, text.column, text.tokens, model, store) for text in step.data),
        *(skill_tokens(skill, *models[step.teacher], model, store) for skill in step.skills),
        *(written_tokens(text, *models[text.model or step.teacher], model, store) for text in step.written),
    ]


def main() -> None:
    """Tokenize one text into a file that another machine can train on."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.recover.tokens", description=main.__doc__)
    parser.add_argument("source", help="a .txt or .parquet file, or hub:org/name")
    parser.add_argument("--column", default="text")
    parser.add_argument("--tokens", type=int, help="at most this many")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch, atomic_file(options.out) as target:
            made = tokenized(
                options.source, options.column, options.tokens, options.model, Store(Path(scratch))
            )
            shutil.copyfile(made, target)
    except ZooError as error:
        sys.exit(f"zoo: {error}")


if __name__ == "__main__":
    main()
