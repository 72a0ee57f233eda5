"""Text for calibration and perplexity: where it comes from, and cutting its tokens into windows."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.errors import CalibrationError, SourceError, last_line
from zoo.files import sha256_file, sha256_tree

PROSE = Path(__file__).parent / "tasks" / "prose.txt"
SEEDS = Path(__file__).parent / "recover"
# Our own, to be measured on, and for models to write on from
BUILTIN = {
    "builtin:prose": PROSE,
    "builtin:seed": SEEDS / "seed.txt",
    "builtin:openings": SEEDS / "openings.txt",
}
SHARED = "${ZOO_SHARED}"
FORMS = (
    "a .txt or .parquet file, a folder laid out like a Hub data set, "
    "hub:org/name[/config][:split][@revision], or one of " + ", ".join(BUILTIN)
)
PIECE = 1 << 20
Options = dict[str, Any]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """Documents in their order, with all that is needed to find the same ones again."""

    documents: tuple[str, ...]
    name: str  # without the folders of one machine
    revision: str  # sha256 of the file or folder, or commit of the Hub data set

    @property
    def whole(self) -> str:
        return "\n\n".join(self.documents)


@dataclass(frozen=True)
class Stream:
    """As Text, its documents read as they are asked for."""

    documents: Iterator[str]
    name: str
    revision: str


def read_text(
    source: str, *, column: str = "text", split: str = "train", limit_bytes: int | None = None
) -> Text:
    """Read `source`, one of FORMS; `~` and `${ZOO_SHARED}` (default ../shared) in paths are expanded.

    `column` and `split` are for data sets; a split named in `source` goes first. At most `limit_bytes` of
    UTF-8 are kept, cut between characters. Raises CalibrationError for what is missing, empty or not text.
    """
    if source in BUILTIN:
        return Text(_plain(BUILTIN[source], limit_bytes), source, sha256_file(BUILTIN[source]))
    if source.startswith("builtin:"):
        raise CalibrationError(f"there is no text {source}", expected=" or ".join(BUILTIN))
    path = expand(source)
    if not source.startswith("hub:") and path.suffix == ".txt" and path.is_file():
        return Text(_plain(path, limit_bytes), path.name, sha256_file(path))
    found = _data_set(source, column, split)
    return Text(tuple(_within(limit_bytes, found.documents)), found.name, found.revision)


def stream(source: str, *, column: str = "text", split: str = "train") -> Stream:
    """As `read_text`, one document after the other, for texts larger than memory; a .txt file is cut into
    pieces of about PIECE characters at the ends of lines."""
    if source.startswith("builtin:"):
        found = read_text(source)
        return Stream(iter(found.documents), found.name, found.revision)
    if not source.startswith("hub:"):
        path = expand(source)
        if path.suffix == ".txt" and path.is_file():
            return Stream(_pieces(path), path.name, sha256_file(path))
    return _data_set(source, column, split)


def _data_set(source: str, column: str, split: str) -> Stream:
    options, name, revision = (_hub if source.startswith("hub:") else _local_data_set)(source, split)
    return Stream(_documents(options, name, column), name, revision)


def _pieces(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= PIECE:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text", saw=str(error)) from error
    if size:
        yield "".join(lines)


def expand(path: str) -> Path:
    """`path` with `~` and `${ZOO_SHARED}` replaced."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(path.replace(SHARED, os.environ.get("ZOO_SHARED") or str(beside))).expanduser()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises SourceError if there is none that transformers reads."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        saw = "" if len(found) > len(found.all_special_ids) else "no token"  # as of no file at all
    except Exception as error:  # it tells of missing and damaged files in every type of exception
        saw = last_line(error)
    if saw:
        raise SourceError(
            f"{folder} has no tokenizer that transformers reads",
            saw=saw,
            try_="`save_pretrained` of the tokenizer, into that folder",
        )
    return found


def token_ids(tokenizer: Any, text: Text) -> Ids:
    """The text tokenised whole, (tokens,), with whatever special tokens the tokenizer puts around a text."""
    # verbose=False: no warning that the text is longer than the model's context; windows() cuts it.
    return np.asarray(tokenizer(text.whole, verbose=False)["input_ids"], dtype=np.int64)


def windows(ids: npt.NDArray[Any], count: int, length: int) -> Ids:
    """The first `count` non-overlapping windows of `length` tokens, (count, length).

    Raises CalibrationError when there are fewer than count x length tokens.
    """
    if count < 1 or length < 2:
        raise CalibrationError(
            f"{count} windows of {length} tokens cannot be cut", expected="at least 1 window of at least 2"
        )
    if ids.size < count * length:
        raise CalibrationError(
            "the text is too short",
            saw=f"{ids.size} tokens",
            expected=f"{count} windows of {length}, that is {count * length} tokens",
            try_=f"lower the number of windows to {ids.size // length}, or give a longer text"
            if ids.size >= length
            else f"lower the window length to {ids.size}, or give a longer text",
        )
    return np.asarray(ids[: count * length], dtype=np.int64).reshape(count, length)


def _plain(path: Path, limit: int | None) -> tuple[str, ...]:
    with path.open("rb") as file:
        data = file.read(-1 if limit is None else limit)
        whole = limit is None or not file.read(1)
    try:
        # An incremental decoder, so that a character cut in two by the limit is dropped, not an error.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text",
            saw=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            try_="convert it, for example with iconv -t UTF-8",
        ) from error
    if not text.strip():
        raise CalibrationError(f"{path} holds no text", saw=f"{len(data)} bytes")
    return (text,)


def _local_data_set(source: str, split: str) -> tuple[Options, str, str]:
    """Options for `datasets`, name and revision."""
    path = expand(source)
    if not path.exists() and ":" in path.name:
        name, _, split = path.name.rpartition(":")
        path = path.with_name(name)
    if path.suffix == ".parquet" and path.is_file():
        # A lone file is one split, which `datasets` calls train.
        options: Options = {"path": "parquet", "data_files": str(path), "split": "train"}
        return options, path.name, sha256_file(path)
    if path.is_dir():
        folder, config = path, None
    elif path.name in _configurations(path.parent):
        folder, config = path.parent, path.name
    else:
        raise CalibrationError(f"there is no text at {path}", saw=_what_is(path), expected=FORMS)
    options = {"path": str(folder), "name": config, "split": split}
    return options, f"{path.name}:{split}", sha256_tree(folder)


def _configurations(folder: Path) -> list[str]:
    """The names in a data set's README.md; none of a folder that is no data set."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        named = (metadata_load(folder / "README.md") or {}).get("configs")
    except (OSError, ValueError, YAMLError):
        return []
    listed = named if isinstance(named, list) else []
    return [str(one["config_name"]) for one in listed if isinstance(one, dict) and "config_name" in one]


def _what_is(path: Path) -> str:
    if path.is_file():
        return f"a file ending in {path.suffix or 'nothing'}"
    if configurations := _configurations(path.parent):
        return f"{path.parent} has {', '.join(configurations[:20])}, not {path.name}"
    return f"{path.parent} exists, {path.name} does not" if path.parent.is_dir() else "no such folder either"


def _hub(source: str, split: str) -> tuple[Options, str, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    rest, _, revision = source.removeprefix("hub:").partition("@")
    rest, _, named_split = rest.partition(":")
    split = named_split or split
    owner, _, rest = rest.partition("/")
    name, _, config = rest.partition("/")
    if not owner or not name:
        raise CalibrationError(f"{source} names no data set", expected="hub:org/name")
    repository = f"{owner}/{name}"
    if Path(repository).exists():
        # `datasets` would quietly read that folder, and the recorded revision would be untrue.
        raise CalibrationError(
            f"a local folder {repository} hides the data set {source}",
            try_=f"run from another folder, or name it as ./{repository}",
        )
    try:
        commit = HfApi().dataset_info(repository, revision=revision or None).sha
    except (OSError, HFValidationError) as error:  # the Hub's and the network's errors are OSErrors
        raise CalibrationError(
            f"the data set {source} cannot be reached",
            saw=_reason(error),
            try_="check the name and the network, or use a local file",
        ) from error
    options = {"path": repository, "name": config or None, "split": split, "revision": commit}
    title = f"hub:{repository}{'/' if config else ''}{config}:{split}"
    return options, title, str(commit)


def _documents(options: Options, name: str, column: str) -> Iterator[str]:
    """The non-empty texts of one split, streamed, so that who stops asking stops the reading."""
    import datasets

    datasets.disable_progress_bars()
    none = True
    try:
        for document in _column(datasets.load_dataset(**options, streaming=True), name, column):
            none = False
            yield document
    except CalibrationError:
        raise
    except Exception as error:  # whatever a reader of foreign files raises means: this is not readable
        raise CalibrationError(f"{name} cannot be read", saw=_reason(error)) from error
    if none:
        raise CalibrationError(f"{name} holds no text in column {column!r}")


def _column(rows: Any, name: str, column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise CalibrationError(
                f"{name} has no column {column!r}", saw=f"columns {', '.join(row)}", try_="name one of these"
            )
        if not isinstance(row[column], str):
            raise CalibrationError(
                f"column {column!r} of {name} holds no text", saw=f"{type(row[column]).__name__} values"
            )
        if row[column].strip():
            yield row[column]


def _within(limit: int | None, documents: Iterator[str]) -> Iterator[str]:
    left = limit
    for document in documents:
        if left is None:
            yield document
            continue
        kept = document.encode()[:left].decode(errors="ignore")
        left -= len(kept.encode())
        if kept:
            yield kept
        if kept != document or left <= 0:
            return


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
