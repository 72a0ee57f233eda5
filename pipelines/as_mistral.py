"""`python -m pipelines.as_mistral`: a Llama's weights in a Mistral, which has the same modules.

A Mistral of any size that a Llama exists in, to try the family on without 7 billion weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from pipelines import sources
from zoo.errors import FormatError, UsageError, ZooError
from zoo.files import Store, told_plainly, write_json

# what a Mistral's configuration has no word for
LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_interleaved")


def as_mistral(base: sources.Base, out: Path) -> None:
    """Write a model with full attention to the folder `out`. Raises FormatError if no Mistral equals it."""
    if base.family.name != "llama":
        raise FormatError(f"{base.source} is no Llama", saw=base.family.name)
    config = base.config
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise FormatError(f"{base.source} has biases in its layers, which a Mistral has not")
    mistral = {key: value for key, value in config.items() if key not in LLAMA_ONLY}
    mistral |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    for path in base.folder.iterdir():
        if path.is_file() and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", mistral)


def main() -> None:
    """Put the weights of a Llama into a Mistral."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.as_mistral", description=main.__doc__)
    parser.add_argument("base", help="a Llama, as `base` in a recipe")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    options = parser.parse_args()
    out: Path = options.out
    try:
        if out.exists():
            raise UsageError(f"{out} is there already", try_="another folder")
        with told_plainly(out.parent), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            base = sources.resolve(options.base, Store(Path(scratch) / "store"))
            made = Path(scratch) / "model"
            made.mkdir()
            as_mistral(base, made)
            made.rename(out)
    except ZooError as error:
        sys.exit(f"zoo: {error}")


if __name__ == "__main__":
    main()
