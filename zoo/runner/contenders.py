"""What a benchmark measures: model files, given or made up, and what decoding a token reads of each."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal

import psutil

from zoo.errors import StoreError, UsageError
from zoo.formats import check_gguf
from zoo.progress import track
from zoo.runner import peers, shapes
from zoo.runner.format import Layout
from zoo.runner.generate import find as find_packed
from zoo.runner.packed import FILE, TOKENIZER, Architecture, Packed
from zoo.runner.shapes import Pattern, parse_pattern, random_size, write_random

DEFAULT_PATTERNS = (parse_pattern("dense"), parse_pattern("8:16"))
BANDWIDTH_BYTES = 1 << 30  # read to tell the memory's speed: more than a last-level cache holds
PROCESS_BYTES = 300_000_000  # of an engine, besides weights, keys and values
FREE_DISK_BYTES = 500_000_000  # that we leave


@dataclass(frozen=True)
class Contender:
    """A model file, the engine that runs it, and what decoding a token reads."""

    engine: Literal["zoo", "llama.cpp"]
    model: str
    format: str
    path: Path
    bits_per_weight: float
    weight_bytes: int  # per token
    kv_width: int  # keys and values of one position, over all layers
    kv_int8_bits: float  # of one of them with its share of the scales, if kept as int8
    window: int | None = None  # positions that a token sees

    def kv_bytes(self, positions: int, kv: str) -> int:
        return round(positions * self.kv_width * (16 if kv == "f16" else self.kv_int8_bits) / 8)


def open_packed(path: Path, model: str | None = None) -> Contender:
    """A packed file, for our engine. Raises FormatError."""
    packed = Packed(path)
    one, sizes = packed.architecture, dict.fromkeys(packed.layouts, 0)
    for name, tensor in packed.tensors.items():
        matrix = name.rpartition(".")[0]
        if matrix in sizes:
            sizes[matrix] += tensor.size
    inner = {name: layout for name, layout in packed.layouts.items() if name.startswith("layers.")}
    weights = sum(layout.rows * layout.columns for layout in inner.values())
    read = sum(tensor.size for name, tensor in packed.tensors.items() if name != TOKENIZER)
    if not one.tied:  # of embeddings, a row
        read -= sizes["embed"] - sizes["embed"] // one.vocabulary
    return Contender(
        engine="zoo",
        model=model or _name(path),
        format=_most(
            (str(_pattern(layout, packed.tensors[f"{name}.values"].size)), layout.rows * layout.columns)
            for name, layout in inner.items()
        ),
        path=path,
        bits_per_weight=8 * sum(sizes[name] for name in inner) / weights,
        weight_bytes=read,
        kv_width=_kv_width(one),
        kv_int8_bits=8 + 32 / one.head_dim,  # a float32 for every head and position
        window=one.sliding_window,
    )


def _kv_width(one: Architecture) -> int:
    return 2 * one.layers * one.kv_heads * one.head_dim


def _pattern(layout: Layout, values: int) -> Pattern:
    """A layout in the notation of `zoo bench`. values: their bytes, which tell the sparsity of a mask."""
    kept = 8 * values / layout.bits / (layout.rows * layout.columns)
    sparsity = round(max(1 - kept, 0), 2) if layout.kind == "mask" else 0.0
    return Pattern(layout.kind, layout.bits, layout.group, layout.keep, sparsity)


def _most(formats: Iterable[tuple[str, int]]) -> str:
    """The format of most weights, and how many others there are, of (format, weights) pairs."""
    weights: dict[str, int] = {}
    for name, count in formats:
        weights[name] = weights.get(name, 0) + count
    most = max(weights, key=lambda name: weights[name])
    return most + (f" and {len(weights) - 1} more" if len(weights) > 1 else "")


def open_gguf(path: Path, model: str | None = None) -> Contender:
    """A GGUF file, for llama.cpp. Raises FormatError, or UsageError if llama-cpp-python is not installed."""
    _need_llama_cpp()
    tensors = {tensor.name: tensor for tensor in check_gguf(path)}
    matrices = [t for t in tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
    embeddings = tensors.get("token_embd.weight")
    if not matrices or embeddings is None:
        raise UsageError(
            f"{path} is not a language model", expected="a GGUF file with token_embd and blk.0 ..."
        )
    read = sum(tensor.size for tensor in tensors.values())
    if "output.weight" in tensors:
        read -= embeddings.size - embeddings.size // embeddings.shape[0]
    width = 0
    for t in matrices:
        if t.name.endswith(("attn_k.weight", "attn_v.weight")):
            width += t.shape[0]
        elif t.name.endswith("attn_qkv.weight"):
            width += t.shape[0] - t.shape[1]
    return Contender(
        engine="llama.cpp",
        model=model or _name(path),
        format=_most((t.dtype, prod(t.shape)) for t in matrices),
        path=path,
        bits_per_weight=8 * sum(t.size for t in matrices) / sum(prod(t.shape) for t in matrices),
        weight_bytes=read,
        kv_width=width,
        kv_int8_bits=8.5,  # Q8_0
    )


def _name(path: Path) -> str:
    return path.parent.absolute().name if path.name == FILE else path.stem


def parse_patterns(texts: Sequence[str], bits: int | None) -> list[Pattern]:
    """The patterns of `--pattern` (each a list with commas) and `--bits`. Raises UsageError."""
    found = [parse_pattern(text, bits) for line in texts for text in line.split(",")]
    if bits is not None and not found:
        raise UsageError("--bits is of a pattern", try_="add --pattern, such as 8:16")
    return list(dict.fromkeys(found))


def _need_llama_cpp() -> None:
    if find_spec("llama_cpp") is None:
        raise UsageError(
            "this needs llama.cpp, and llama-cpp-python is not installed", try_="pip install llama-cpp-python"
        )


def find(target: str, store: Path) -> Contender:
    """The GGUF file, or the packed file or entry in `store`, that `target` names. Raises ZooError if none."""
    path = Path(target).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path)
    return open_packed(find_packed(target, store))


@contextmanager
def scratch(store: Path, keep: Path | None) -> Iterator[Path]:
    """A folder for random models, removed afterwards (and what killed runs left) unless it is `keep`."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    root = store / "bench"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.iterdir():
        owner = left.name.partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=root) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class RandomModel:
    """A model to be written: `how` is a Pattern for our engine, or a GGUF type for llama.cpp."""

    model: str
    architecture: Architecture
    how: Pattern | str

    @property
    def size(self) -> int:
        if isinstance(self.how, Pattern):
            return random_size(self.architecture, self.how)
        return peers.gguf_size(self.architecture, self.how)

    def write(self, folder: Path) -> Contender:
        name = re.sub(r"[^\w.:]+", "-", f"{self.model}-{self.how}")
        if isinstance(self.how, Pattern):
            write_random(folder / f"{name}.safetensors", self.architecture, self.how)
            return open_packed(folder / f"{name}.safetensors", self.model)
        peers.write_gguf(folder / f"{name}.gguf", self.architecture, self.how)
        return open_gguf(folder / f"{name}.gguf", self.model)


def plan(
    opened: Sequence[Contender],
    *,
    shape: str | None,
    layers: int | None,
    patterns: Sequence[Pattern],
    against: Sequence[str],
) -> list[RandomModel]:
    """The random models to write: the shape in every pattern, and peers of it and of `opened` packed files.

    Raises UsageError where nothing would be measured.
    """
    if shape is None and (layers is not None or patterns):
        raise UsageError("--layers, --pattern and --bits are of random models", try_="add --shape NAME")
    found: list[RandomModel] = []
    models: list[tuple[str, Architecture]] = []
    if shape is not None:
        one = shapes.shape(shape, layers)
        name = shape + (
            f" ({one.layers} of {shapes.SHAPES[shape].layers} layers)"
            if one.layers < shapes.SHAPES[shape].layers
            else ""
        )
        found += [RandomModel(name, one, pattern) for pattern in patterns or DEFAULT_PATTERNS]
        models.append((name, one))
    for contender in opened:
        if contender.engine == "zoo":
            one = Packed(contender.path).architecture
            if all(one != other for _, other in models):  # peers of one architecture are measured once
                models.append((contender.model, one))
    if against:
        _need_llama_cpp()
    if against and not models:
        raise UsageError(
            "--against needs a model of ours to be held against",
            try_="name a packed file, or --shape NAME; GGUF files are measured as they are",
        )
    if not opened and not found:
        raise UsageError("there is nothing to measure", try_="name a model, or --shape llama-2-7b --layers 8")
    return found + [RandomModel(name, one, kind) for name, one in models for kind in against]


def check_room(
    folder: Path, opened: Sequence[Contender], planned: Sequence[RandomModel], *, context: int, kv: str
) -> None:
    """Before anything is written: do all fit into memory together, and the planned ones onto the disk?

    Raises UsageError if not into memory, as an engine that swaps measures nothing; StoreError if not
    onto the disk of `folder`. context: positions of each engine. kv: f16 or int8.
    """
    count = len(opened) + len(planned)
    need = BANDWIDTH_BYTES + PROCESS_BYTES * count
    need += sum(one.path.stat().st_size + one.kv_bytes(context, kv) for one in opened)
    need += sum(one.size + 2 * _kv_width(one.architecture) * context for one in planned)
    if need > (available := psutil.virtual_memory().available):
        raise UsageError(
            f"{count} models do not fit into memory together",
            saw=f"{available / 1e9:.1f} GB available",
            expected=f"{need / 1e9:.1f} GB",
            try_="fewer --layers, or fewer patterns and peers in one run",
        )
    need, free = FREE_DISK_BYTES + sum(one.size for one in planned), shutil.disk_usage(folder).free
    if planned and need > free:
        raise StoreError(
            f"no space in {folder} for {len(planned)} random models",
            saw=f"{free / 1e9:.1f} GB free",
            expected=f"{need / 1e9:.1f} GB",
            try_="fewer --layers, patterns or peers, or --keep FOLDER on another disk",
        )


def write(folder: Path, planned: Sequence[RandomModel]) -> list[Contender]:
    """Write the planned models into `folder`; check its room first."""
    return [model.write(folder) for model in track(planned, "writing random models")]
