"""Text that a model writes for training: pieces that begin as another text does and go on by themselves.

The student sees what its teacher would say, on more text and on other subjects than there is text at hand.
Source: the data-free distillation of LLM-QAT, arXiv:2305.17888, section 3.1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from pipelines.continuation import continued
from pipelines.evaluate import load_model
from pipelines.recipe import Written
from pipelines.recover.data import open_tokens, tokenized, write_tokens
from zoo.errors import CalibrationError, SourceError, ZooError
from zoo.files import Store, atomic_file, sha256_file, sha256_json, told_plainly
from zoo.progress import say, track

FILE = "tokens.npy"
CODE_VERSION = 2


def written_tokens(setting: Written, writer: Path, writer_id: str, model: Path, store: Store) -> Path:
    """The file of token ids that `writer` writes, made once; `writer_id` names its weights by their content.

    Token ids are those of the tokenizer of `model`, which the writer must share. Every batch is on disk once
    it is written, so an interrupted run writes none twice.
    """
    # more tokens than are to be written are never needed to begin from, and a data set may be endless
    prompts = tokenized(setting.source, setting.column, setting.tokens, model, store)
    said = setting.model_dump(exclude={"source", "column", "model"})
    key = sha256_json({"written": CODE_VERSION, "prompts": sha256_file(prompts), "writer": writer_id, **said})
    with store.locked(key):
        if (done := store.get(key)) is None:
            pieces = store.root / "training" / f"{key}.pieces"
            with told_plainly(pieces):
                ids = _pieces(setting, writer, prompts, pieces)
            with store.writing(key) as out:
                count = write_tokens(
                    out / FILE, (row.tolist() for row in ids), int(ids.max()) + 1, setting.tokens
                )
            pieces.unlink()
            say(f"  {count:,} tokens that {writer.name} wrote")
            done = store.path(key)
    return done / FILE


def _pieces(setting: Written, writer: Path, prompts: Path, path: Path) -> npt.NDArray[np.uint32]:
    """The pieces (count, length), those that `path` has already and then new ones, which it gets."""
    model, tokenizer = load_model(writer, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    text = open_tokens(prompts, model.get_output_embeddings().weight.shape[0])
    places = _places(text, tokenizer, setting)
    batches = -(-setting.tokens // (setting.length * setting.batch))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    size = setting.length * setting.batch * np.dtype(np.uint32).itemsize
    whole = path.stat().st_size // size
    with path.open("rb+") as file:
        file.truncate(whole * size)  # of a batch that was being written
        file.seek(0, 2)
        for number in track(range(whole, batches), f"{writer.name} writes {batches} batches to train on"):
            draw = np.random.default_rng([setting.seed, number])
            starts = draw.choice(places, size=setting.batch)
            begun = text[starts[:, None] + np.arange(setting.prompt)].astype(np.int64)
            torch.manual_seed(setting.seed + number)
            what = f"batch {number + 1} of {batches}"
            ids = continued(model, torch.from_numpy(begun), setting.length, what, setting.temperature)
            if tokenizer.eos_token_id is not None:
                ids[:, -1] = tokenizer.eos_token_id
            file.write(ids.numpy().astype(np.uint32).tobytes())
            file.flush()
    return np.fromfile(path, np.uint32).reshape(-1, setting.length)


def _places(text: npt.NDArray[Any], tokenizer: Any, setting: Written) -> npt.NDArray[np.int64] | int:
    """Where pieces may begin: the first places of the text, so many, or those of lines as long as the prompt.

    Raises CalibrationError if the prompt fits nowhere.
    """
    if setting.begin == "anywhere":
        longest, places = len(text), len(text) - setting.prompt + 1
    else:
        ids = np.unique(text)
        ends = [one for one in ids if one == tokenizer.eos_token_id or tokenizer.decode([one]).endswith("\n")]
        stops = np.flatnonzero(np.append(np.isin(text, ends), True))  # at what ends a line
        starts = np.append(0, stops[:-1] + 1)
        longest, places = int((stops - starts).max()), starts[stops - starts >= setting.prompt]
    if longest < setting.prompt:
        whole = setting.begin == "anywhere"
        raise CalibrationError(
            f"{setting.source} is too short to begin from",
            saw=f"{longest} tokens" + ("" if whole else " in its longest line"),
            expected=f"the {setting.prompt} of `prompt` at least",
            try_="a smaller `prompt`" + ("" if whole else ", or `begin: anywhere`"),
        )
    return places


def _told(error: ValidationError) -> str:
    found = [(one, one["msg"].removeprefix("Value error, ")) for one in error.errors()]
    return "; ".join(f"{one['loc'][0]} {one['input']}: {said}" if one["loc"] else said for one, said in found)


def main() -> None:
    """Let a model write a text into a file of token ids that another machine can train on."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.recover.written", description=main.__doc__)
    parser.add_argument(
        "source", help="what the pieces begin as: a .txt, .parquet or .npy file, or hub:org/name"
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that writes")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file")
    for name, field in Written.model_fields.items():
        if name not in ("source", "model"):
            kind: Any = field.annotation if field.annotation in (int, float) else str
            needed = field.is_required()
            parser.add_argument(f"--{name}", type=kind, default=None if needed else field.default,
                                required=needed, help=field.description)  # fmt: skip
    options = vars(parser.parse_args())
    model, out = options.pop("model"), options.pop("out")
    try:
        setting = Written(**options)
    except ValidationError as error:
        sys.exit(f"zoo: {_told(error)}")
    try:
        if not (model / "config.json").is_file():
            raise SourceError(f"{model} is not a model folder", saw="no config.json in it")
        with tempfile.TemporaryDirectory() as scratch, atomic_file(out) as target:
            made = written_tokens(setting, model, "", model, Store(Path(scratch)))
            shutil.copyfile(made, target)
    except ZooError as error:
        sys.exit(f"zoo: {error}")


if __name__ == "__main__":
    main()
