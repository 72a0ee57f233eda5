"""What recovery trains on: texts tokenized once into a cached file, then cut into blocks in a fixed order.

The order depends on the seed and the position alone, not on the number of processes, so a run resumes, and
several GPUs see together what one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines import text
from zoo.errors import CalibrationError, SourceError
from zoo.files import Store, sha256_file, sha256_json
from zoo.progress import say, track

FILE = "tokens.npy"
CODE_VERSION = 1
DOCUMENTS = 64  # tokenized at a time
PIECES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass
class Blocks:
    """Token ids cut into blocks of `length`, shuffled anew for every pass.

    With `alternatives`, one array (tokens, samples) for each source, a `fraction` of the tokens of a block is
    replaced by one of its samples each, chosen anew, from the second pass on.
    """

    sources: list[npt.NDArray[Any]]  # of 1 dimension each
    length: int
    seed: int
    alternatives: list[npt.NDArray[Any]] = field(default_factory=list)
    fraction: float = 0.0
    _order: tuple[int, npt.NDArray[np.int64]] = field(default=(-1, np.empty(0, np.int64)), repr=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(len(ids) // self.length for ids in self.sources)])
        if not self.count:
            raise CalibrationError(
                "the training text is too short",
                saw=f"{sum(map(len, self.sources))} tokens",
                expected=f"at least one block of {self.length}",
                try_="a longer text, or a smaller `length`",
            )

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def at(self, positions: Iterable[int]) -> Tensor:
        """The blocks at some positions of the endless shuffled stream, (positions, length) int64."""
        return torch.from_numpy(np.stack([self._block(position) for position in positions]))

    def _block(self, position: int) -> npt.NDArray[np.int64]:
        number, place = divmod(position, self.count)
        if self._order[0] != number:
            self._order = (number, np.random.default_rng([self.seed, number]).permutation(self.count))
        chosen = int(self._order[1][place])
        source = int(np.searchsorted(self._starts, chosen, side="right")) - 1
        start = (chosen - int(self._starts[source])) * self.length
        at = slice(start, start + self.length)
        ids = self.sources[source][at].astype(np.int64)
        if not self.alternatives or number == 0:
            return ids
        samples = self.alternatives[source][at]
        draw = np.random.default_rng([self.seed, position, 1])
        replaced = np.flatnonzero(draw.random(self.length) < self.fraction)
        ids[replaced] = samples[replaced, draw.integers(samples.shape[1], size=len(replaced))]
        return ids


def open_tokens(path: Path, vocabulary: int, dimensions: int = 1) -> npt.NDArray[Any]:
    """A file of token ids, mapped. Raises CalibrationError unless it holds integers below `vocabulary`."""
    ids = _mapped(path, dimensions)
    if ids.size and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise CalibrationError(
            f"{path} holds token ids of another vocabulary",
            saw=f"ids from {ids.min()} to {ids.max()}",
            expected=f"0 to {vocabulary - 1}",
        )
    return ids


def _mapped(path: Path, dimensions: int) -> npt.NDArray[Any]:
    try:
        ids: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} holds no token ids", saw=str(error).splitlines()[0]) from error
    if ids.ndim != dimensions or ids.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path} holds no token ids",
            saw=f"{ids.dtype} {ids.shape}",
            expected=f"{dimensions}-D integers",
        )
    return ids


def tokenized(source: str, column: str, limit: int | None, model: Path, store: Store) -> Path:
    """The file of token ids of a text, made if it is not in the store yet.

    Documents follow each other, the end-of-text token between them. `limit` is in tokens. A source that ends
    in .npy is such a file already.
    """
    if source.endswith(".npy"):
        return _first(text.expand(source), limit, store)
    stream = text.stream(source, column=column)
    return store_tokens(stream.documents, [stream.revision, stream.name, column], limit, model, store)


def _first(path: Path, limit: int | None, store: Store) -> Path:
    """A file of the first `limit` token ids of another, or that file if it has no more."""
    if not path.is_file():
        raise SourceError(f"no file {path}", expected="token ids in a .npy file")
    ids = _mapped(path, 1)
    if limit is None or len(ids) <= limit:
        return path
    key = sha256_json({"tokens": CODE_VERSION, "of": sha256_file(path), "limit": limit})
    with store.locked(key):
        if store.get(key) is None:
            with store.writing(key) as out:
                np.save(out / FILE, ids[:limit])
    return store.path(key) / FILE


def store_tokens(
    documents: Iterable[str], identity: list[str], limit: int | None, model: Path, store: Store
) -> Path:
    """Tokenize documents that `identity` names, with the tokenizer of the folder `model`, once."""
    pieces = [[name, sha256_file(model / name)] for name in PIECES if (model / name).is_file()]
    if not pieces:
        raise SourceError(f"{model} has no tokenizer", expected=f"a folder with {PIECES[0]}")
    key = sha256_json({"tokens": CODE_VERSION, "of": identity, "limit": limit, "tokenizer": pieces})
    with store.locked(key):
        if (done := store.get(key)) is None:
            tokenizer = text.load_tokenizer(model)
            with store.writing(key) as out:
                count = write_tokens(out / FILE, _ids(tokenizer, documents), len(tokenizer), limit)
            say(f"  {count:,} tokens of {identity[1]}")
            done = store.path(key)
    return done / FILE


def _ids(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    coming = iter(documents)
    batches = iter(lambda: list(islice(coming, DOCUMENTS)), [])
    for some in track(batches, f"tokenizing, {DOCUMENTS} documents at a time"):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            yield ids + end


def write_tokens(path: Path, ids: Iterable[list[int]], vocabulary: int, limit: int | None) -> int:
    """Write an .npy file of unknown length as the ids come, in 16 bits if they fit. Returns the count."""
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")

    def header(count: int) -> dict[str, Any]:
        return {"descr": dtype.str, "fortran_order": False, "shape": (count,)}

    count = 0
    with path.open("wb+") as file:
        # NumPy leaves room in the header for a first dimension that grows
        np.lib.format.write_array_header_1_0(file, header(0))
        start = file.tell()
        for some in ids:
            piece = some if limit is None else list(islice(some, limit - count))
            file.write(np.asarray(piece, dtype).tobytes())
            count += len(piece)
            if count == limit:
                break
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header(count))
        if file.tell() != start:
            raise CalibrationError(f"{path} cannot be written", saw="NumPy's header changed its length")
    return count
