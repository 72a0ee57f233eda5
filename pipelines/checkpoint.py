"""Reading and writing a Hugging Face model folder a few tensors at a time.

A model is never whole in memory: the reader maps a shard only while it copies the tensors asked for,
the writer keeps at most one shard.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.families import Family, family_of
from zoo.entry import Layer
from zoo.errors import FormatError, NumericsError, SourceError
from zoo.files import told_plainly
from zoo.formats import COMPANIONS, TERMS, weight_files

SHARD_BYTES = 2 << 30
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPRESSION = "compression.json"
GRID = "grid.safetensors"
TRAINING = "training.json"
FULL_DISK = re.compile(r"No space left|os error 28|PytorchStreamWriter failed writing|unexpected pos")


class Checkpoint:
    """A model folder: config, family, and its tensors by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "config.json"
        if not config.is_file():
            raise SourceError(
                f"{folder} is not a model folder", expected="config.json and *.safetensors in it"
            )
        try:
            self.config: dict[str, Any] = json.loads(config.read_text())
        except ValueError as error:
            raise FormatError(f"{config} is not JSON", saw=str(error)) from error
        if not isinstance(self.config, dict):
            raise FormatError(f"{config} is not a configuration", expected="a JSON object")
        self.family: Family = family_of(self.config)
        self._shard_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                table: dict[str, str] = json.loads(index.read_text())["weight_map"]
                shards = sorted({str(shard) for shard in table.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{index} has no usable weight_map", saw=repr(error)) from error
        else:
            table, shards = {}, [WEIGHTS]
        for shard in shards:
            path = self.folder / shard
            if Path(shard).name != shard or not path.is_file():
                raise SourceError(f"{self.folder} lacks its weights", expected=f"a file {shard}")
            with _opened(path) as file:
                held = set(file.keys())
            if not index.is_file():
                table = dict.fromkeys(held, shard)
            missing = [name for name, where in table.items() if where == shard and name not in held]
            if missing:
                raise FormatError(f"{path} lacks tensors that the index places in it", saw=missing[0])
        return table

    @property
    def names(self) -> list[str]:
        return sorted(self._shard_of)

    @property
    def layer_count(self) -> int:
        count = self.config.get("num_hidden_layers", self.config.get("n_layers"))
        if not isinstance(count, int) or count < 1:
            raise FormatError(
                f"{self.folder / 'config.json'} does not say how many layers the model has",
                saw=repr(count),
                expected="a number under num_hidden_layers (n_layers for MPT)",
            )
        return count

    @property
    def tied(self) -> bool:
        return f"{self.family.head}.weight" not in self._shard_of

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in sorted(set(self._shard_of.values())):
            with _opened(self.folder / shard) as file:
                for name in file.keys():  # noqa: SIM118
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors, in the file's own type. Raises on NaN, infinity or absence."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self._shard_of:
                raise FormatError(f"{self.folder} lacks the tensor {name}")
            wanted.setdefault(self._shard_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for shard, members in wanted.items():
            with _opened(self.folder / shard) as file:
                for name in members:
                    found[name] = file.get_tensor(name).clone()
        for name, tensor in found.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise NumericsError(
                    f"{name} in {self.folder} holds NaN or infinity", saw=f"{bad} of {tensor.numel()} values"
                )
        return found

    def layer(self, index: int) -> dict[str, Tensor]:
        """Tensors of decoder layer `index`, named relative to the layer, in sorted order."""
        prefix = self.family.layer_prefix(index)
        needed = {f"{prefix}{module}.weight" for module in self.family.gguf_layer}
        names = sorted(needed.union(name for name in self._shard_of if name.startswith(prefix)))
        found = self.tensors(names)
        return {name.removeprefix(prefix): found[name] for name in names}

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the decoder layers: embeddings, final norm, head."""
        stem = self.family.layers.split("{i}")[0]
        return [name for name in self.names if not name.startswith(stem)]

    def compression(self) -> list[Layer]:
        """What earlier steps did to the layers; empty for a base model."""
        path = self.folder / COMPRESSION
        if not path.is_file():
            return []
        try:
            return [Layer.model_validate(layer) for layer in json.loads(path.read_text())["layers"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} is not a record of what was done to the layers", saw=str(error).splitlines()[0]
            ) from error

    def grids(self) -> dict[str, Tensor]:
        """`<module>.scale` and `<module>.zero_point` of the quantized layers."""
        path = self.folder / GRID
        if not path.is_file():
            return {}
        with _opened(path) as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


class _opened:
    """safe_open with this project's errors; the map is dropped on exit, so memory does not pile up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self._file: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{self.path} is not a readable safetensors file",
                saw=str(error),
                try_="fetch or export the file again",
            ) from error
        return self._file

    def __exit__(self, *_: object) -> None:
        del self._file


@contextmanager
def full_disk_as_oserror() -> Iterator[None]:
    """Turn what safetensors and torch.save raise on a full disk, which is text alone, into an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not FULL_DISK.search(str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


class CheckpointWriter:
    """Writes a model folder shard by shard. Use `add` for every tensor, then `finish` once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        with told_plainly(self.folder), full_disk_as_oserror():
            save_file(self._shard, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(sorted(self._shard))
        self._shard, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"

    def finish(self) -> None:
        if self._shard:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / WEIGHTS)
            return
        table: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            shard = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / shard)
            table |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(table.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def side_files(folder: Path) -> list[Path]:
    """Config, tokenizer, terms and history: what a step copies unchanged beside new weights."""
    patterns = (*COMPANIONS, *TERMS, TRAINING)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def model_files(folder: Path) -> list[Path]:
    """What a model folder has for transformers, and the record of what was done to it."""
    others = (folder / name for name in (INDEX, COMPRESSION))
    return [*weight_files(folder), *side_files(folder), *(path for path in others if path.is_file())]


def copy_side_files(source: Path, target: Path) -> None:
    with told_plainly(target):
        for path in side_files(source):
            shutil.copyfile(path, target / path.name)
