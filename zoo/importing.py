"""A model that others published, at hand and described: what it is, and no claim about how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from zoo.analyze import Analysis, TensorAnalysis
from zoo.entry import EntryId, Layer
from zoo.errors import FormatError, SourceError, UsageError
from zoo.files import sha256_file
from zoo.formats import COMPANIONS, SIDE_FILES, TERMS, check_gguf, check_safetensors, weight_files
from zoo.hub.front_matter import card_data
from zoo.progress import say, track
from zoo.runner.checkpoint import Checkpoint

UNKNOWN = "unknown"  # a base model or revision that the publisher does not name
# What a model folder is made of, its licence and notices among it. Pickled weights are never fetched.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS, *TERMS, "recipe.yaml")
CARD = "README.md"
_GROUPS = (4, 8, 16, 32)  # of the patterns keep:group that are looked for, smallest first
_SLACK = 0.02  # by which fewer weights may be left than a pattern keeps
_CHUNK = 1 << 22  # weights looked at together
# Columns that share a scale, and whether without a minimum, of llama.cpp's types.
_GGUF_GRIDS = {
    "Q8_0": (32, True), "Q5_0": (32, True), "Q5_1": (32, False), "Q4_0": (32, True), "Q4_1": (32, False),
    "Q6_K": (16, True), "Q5_K": (32, False), "Q4_K": (32, False), "Q3_K": (16, True), "Q2_K": (16, False),
    "IQ4_NL": (32, True), "IQ4_XS": (32, True),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """The files of a published model, every one checked to be sound."""

    origin: str  # hub:org/name@commit, or the path that was named
    folder: Path
    names: tuple[str, ...]  # of the files in `folder` that make up the model
    gguf: Path | None  # the GGUF file; None: a folder of safetensors
    immutable: bool  # a Hub cache, whose files never change
    license: str | None
    base: str | None  # org/name of the base model, as the publisher's card says


def locate(source: str, files: Sequence[str] = ()) -> Published:
    """Find or fetch the model that `source` names, and check its files.

    `source`: hub:org/name or hub:org/name@revision, a model folder, or a .gguf file. `files`: patterns of
    which to take, where a repository holds several GGUF files. Raises SourceError, UsageError, HubError or
    FormatError.
    """
    if source.startswith("hub:"):
        return _fetch(source, files)
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        return _published(str(path), path, names, files, immutable=False)
    if path.is_file() and path.suffix == ".gguf":
        return _published(str(path), path.parent, [path.name], (), immutable=False)
    raise SourceError(
        f"there is no model at {source}",
        saw="a file that is not .gguf" if path.is_file() else "no such file or folder",
        expected="hub:org/name@revision, a model folder or a .gguf file",
    )


def entry_id(published: Published) -> str:
    """A name for the entry: that of the repository, folder or GGUF file, as far as an id can hold it."""
    name = published.origin.removeprefix("hub:").partition("@")[0].rpartition("/")[2]
    if published.gguf is not None:
        name = published.gguf.stem
    found = re.sub(r"[^a-z0-9._-]+", "-", name.lower())
    found = re.sub(r"[._-]*-[._-]*|\.{2,}|_{2,}|[._]{2,}", "-", found).strip("-._")[:96].strip("-._")
    if not found:
        raise UsageError(f"{name!r} gives no id", try_="name one with --id")
    check_id(found)
    return found


def check_id(name: str) -> None:
    """Raise UsageError if an entry cannot have this id."""
    try:
        TypeAdapter(EntryId).validate_python(name)
    except ValidationError as error:
        raise UsageError(
            f"--id {name!a} is no id",
            expected="lower-case letters, digits, and single - . _ between them",
        ) from error


def _fetch(source: str, files: Sequence[str]) -> Published:
    from huggingface_hub import snapshot_download

    from zoo.hub import client

    repository, _, revision = source.removeprefix("hub:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"{source} names no repository", expected="hub:org/name or hub:org/name@revision")
    hub = client.connect()
    commit = client.describe(hub, repository, revision or "main").sha
    if commit is None:
        raise SourceError(f"{repository} has no commit", saw=f"revision {revision or 'main'}")
    blobs = client.files_at(hub, repository, commit)
    names = _model_names(repository, [path for path in blobs if "/" not in path], files)
    wanted = [name for name in (*names, CARD) if name in blobs]
    say(f"fetching {repository}: {sum(blobs[name].size for name in wanted) / 1e6:.1f} MB")
    with client.told_plainly(hub, repository, revision):
        folder = Path(
            snapshot_download(
                repository,
                revision=commit,
                allow_patterns=wanted,
                endpoint=hub.endpoint,
                token=hub.api.token,
            )
        )
    for name in track(wanted, "checking"):  # the client checks sizes only
        sha256 = blobs[name].sha256
        if sha256 is not None and sha256_file(folder / name) != sha256:
            raise FormatError(
                f"{name} of {repository} did not arrive whole",
                expected=f"sha256 {sha256}",
                try_=f"rm {folder / name}, and run again",
            )
    return _published(f"hub:{repository}@{commit}", folder, wanted, files, immutable=True)


def _published(
    origin: str, folder: Path, there: Sequence[str], files: Sequence[str], *, immutable: bool
) -> Published:
    names = _model_names(origin, there, files)
    gguf = next((folder / name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        check_gguf(gguf)
    else:
        for shard in weight_files(folder):
            check_safetensors(shard)
    card = _card(folder / CARD)
    license_, base = card.get("license"), card.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return Published(
        origin=origin,
        folder=folder,
        names=tuple(name for name in names if name != CARD),
        gguf=gguf,
        immutable=immutable,
        license=license_ if isinstance(license_, str) else None,
        base=base if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
    )


def _model_names(where: str, there: Sequence[str], files: Sequence[str]) -> list[str]:
    """Which of a repository's files make up one model: a GGUF file, or all that a folder of weights has."""
    ggufs = [name for name in there if name.endswith(".gguf")]
    if files:
        ggufs = [name for name in ggufs if any(fnmatchcase(name, pattern) for pattern in files)]
    there = [name for name in there if name not in SIDE_FILES]  # made anew, or not the model itself
    weights = any(name.endswith(".safetensors") for name in there)
    if weights and not files:
        return [name for name in there if any(fnmatchcase(name, pattern) for pattern in PATTERNS)]
    if len(ggufs) == 1:
        notices = [name for name in there if any(fnmatchcase(name, p) for p in PATTERNS[-3:])]
        return [*ggufs, *notices]
    if ggufs:
        raise UsageError(
            f"{where} has several GGUF files, and an entry holds one",
            saw=", ".join(sorted(ggufs)[:20]),
            try_=f"--file {sorted(ggufs)[0]}",
        )
    raise SourceError(
        f"{where} holds no model that can be imported",
        saw=", ".join(sorted(there)[:10]) or "no files",
        expected="*.safetensors with config.json, or a .gguf file" + (" of that name" if files else ""),
    )


def _card(path: Path) -> Mapping[str, Any]:
    """The metadata of a model card; empty if there is none that can be read."""
    if not path.is_file():
        return {}
    try:
        return card_data(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FormatError):
        return {}


def layers_of(folder: Path, analysis: Analysis, gguf_names: Mapping[str, str] | None = None) -> list[Layer]:
    """The linear layers of a model, by their modules in transformers, as far as the weights tell.

    `folder` holds the weights by transformers' names; `analysis` is of the published file. For a GGUF,
    `gguf_names` gives the tensor there of each tensor in `folder`. How the weights came to be, and with
    which error, is not known, so `method` and `error` are None.
    """
    checkpoint = Checkpoint(folder)
    stored = {tensor.name: tensor for tensor in analysis.tensors}
    found = []
    names = sorted(gguf_names) if gguf_names is not None else [t.name for t in analysis.tensors]
    for name in track(names, "looking for patterns"):
        tensor = stored.get(name if gguf_names is None else gguf_names[name])
        if tensor is None or not tensor.linear or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        rows, columns = tensor.shape
        sparsity, pattern = _pattern(checkpoint, module, rows, columns)
        found.append(
            Layer(
                name=module,
                rows=rows,
                columns=columns,
                sparsity=sparsity,
                pattern=pattern,
                **_grid(tensor, checkpoint, name),
            )
        )
    return found


def _pattern(checkpoint: Checkpoint, module: str, rows: int, columns: int) -> tuple[float, str | None]:
    """The fraction of zeros, and what they follow: keep:group if it holds in every group, or nothing."""
    weights = checkpoint.matrix(module, rows, columns).weights
    zeros, most = 0, dict.fromkeys((group for group in _GROUPS if columns % group == 0), 0)
    for start, stop in _row_chunks(rows, columns):
        kept = weights(start, stop) != 0
        zeros += kept.size - int(np.count_nonzero(kept))
        for group, seen in most.items():
            most[group] = max(seen, int(kept.reshape(-1, group).sum(axis=1).max()))
    sparsity = zeros / (rows * columns)
    for group, keep in most.items():
        if 0 < keep < group and keep / group <= 1 - sparsity + _SLACK:
            return sparsity, f"{keep}:{group}"
    return sparsity, "unstructured" if sparsity >= _SLACK else None


def _row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _grid(tensor: TensorAnalysis, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """`bits`, and of quantized weights `group` and `symmetric`."""
    if (found := re.match(r"(?:BF|F)(\d+)$", tensor.dtype)) is not None:
        return {"bits": int(found[1])}
    if (found := re.match(r"int(\d+)", tensor.dtype)) is not None:
        scale = checkpoint.tensors[f"{name}_scale"][1].shape
        groups = scale[1] if len(scale) == 2 else 1
        return {
            "bits": int(found[1]),
            "group": tensor.shape[1] // groups if groups > 1 else None,
            "symmetric": f"{name}_zero_point" not in checkpoint.tensors,
        }
    bits = re.match(r"I?Q(\d)", tensor.dtype)
    group, symmetric = _GGUF_GRIDS.get(tensor.dtype, (None, None))
    return {
        "bits": int(bits[1]) if bits is not None else tensor.bits_per_weight,
        "group": group,
        "symmetric": symmetric,
    }
