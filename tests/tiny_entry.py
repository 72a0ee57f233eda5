"""A verified entry of a tiny model: real files that transformers, llama.cpp and the sparse runner load."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import tests.example
from pipelines.export_gguf import export_gguf
from pipelines.run import artifacts_of
from tests.tiny import tiny_llama
from zoo.entry import Entry, Verification
from zoo.files import file_table
from zoo.registry import Registry, open_registry
from zoo.runner.pack import pack_folder

ID = "tiny-llama-w8"


@dataclass(frozen=True)
class Shelf:
    """A store and a registry."""

    store: Path
    registry_path: Path

    @property
    def registry(self) -> Registry:
        return open_registry(str(self.registry_path))

    @property
    def options(self) -> list[str | Path]:
        return ["--store", self.store, "--registry", self.registry_path]

    def folder(self, entry_id: str = ID) -> Path:
        return self.store / "entries" / entry_id

    def entry(self, entry_id: str = ID) -> Entry:
        return self.registry.get(entry_id)


def empty(folder: Path) -> Shelf:
    return Shelf(folder / "store", folder / "registry.db")


def model_files(folder: Path) -> Path:
    """The files of a tiny Llama in every form that an entry ships, made once a module (two seconds)."""
    tiny_llama(folder)
    export_gguf(folder, folder, ["F16"], name=ID, license="apache-2.0")
    pack_folder(folder)
    (folder / "recipe.yaml").write_text(tests.example.RECIPE)
    return folder


def shelve(folder: Path, files: Path, *, entry_id: str = ID, padding: int = 0, seed: int = 0) -> Shelf:
    """A store and registry with the entry of `files`, and `padding` random bytes in a file of it."""
    shelf = empty(folder)
    place = shelf.folder(entry_id)
    shutil.copytree(files, place)
    if padding:
        (place / "padding.bin").write_bytes(padding_bytes(padding, seed))
    artifacts = artifacts_of(place)
    checks = [
        Verification(runner="test", runner_version="1", artifact=a.path, passed=True, reason="made so")
        for a in artifacts
        if a.kind in ("gguf", "packed", "safetensors")
    ]
    entry = tests.example.entry(entry_id, artifacts=artifacts, verifications=checks, benchmarks=[])
    shelf.registry.put(entry)
    return shelf


def padding_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def same_files(entry: Entry, folder: Path) -> bool:
    """Whether `folder` holds the artifacts of the entry, by size and sha256."""
    table = file_table(folder)
    return all(table.get(a.path) == (a.size, a.sha256) for a in entry.artifacts)
