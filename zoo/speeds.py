"""Speeds of an entry's files: each belongs to the machine that it was measured on, and they gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.entry import Artifact, Benchmark, Entry
from zoo.errors import UsageError, ZooError
from zoo.files import sha256_file
from zoo.registry import Registry
from zoo.runner import bench
from zoo.runner.bench import Bench, BenchRow, Settings
from zoo.runner.contenders import Contender

GENERATE = 64  # tokens of decode, as `zoo run` measures them: other speeds do not compare
Files = Mapping[int, tuple[str, Artifact]]  # position of a contender -> its entry's id, and its file


def check_settings(settings: Settings) -> None:
    """Raise UsageError for what has no place in a record."""
    if settings.filled != settings.prompt or settings.kv != "f16":
        raise UsageError(
            "--record is of decode right after the prompt, with keys and values in f16",
            saw=f"--context-at {settings.filled}, --prompt {settings.prompt}, --kv {settings.kv}",
            try_="the same without --context-at and --kv",
        )


def recordable(opened: Sequence[Contender], store: Path, registry: Registry) -> Files:
    """Those of the contenders that are files of entries, as they are recorded.

    Raises RegistryError if an entry is not in the registry, ZooError if a file is not the entry's, UsageError
    if there is none.
    """
    entries = (store / "entries").absolute()
    found = {}
    for position, contender in enumerate(opened):
        path = contender.path.absolute()
        if path.is_relative_to(entries):
            entry_id, *below = path.relative_to(entries).parts
            found[position] = (entry_id, _artifact(registry.get(entry_id), path, "/".join(below)))
    if not found:
        raise UsageError(
            "--record needs an entry whose speed it may record",
            saw=", ".join(contender.model for contender in opened) or "random models only",
            expected=f"an id as `zoo list` shows it, or a file in {entries}/ID",
        )
    return found


def _artifact(entry: Entry, path: Path, named: str) -> Artifact:
    known = next((a for a in entry.artifacts if a.path == named), None)
    if known is None or sha256_file(path) != known.sha256:
        raise ZooError(
            f"{path} is not the {named} that {entry.id} is recorded with",
            try_="zoo fsck --registry REGISTRY --store STORE says what is wrong, and how to mend it",
        )
    return known


def record(measured: Bench, files: Files, registry: Registry) -> None:
    """Put the speeds of `files`, which are the first rows of what was measured, into their entries.

    Raises ZooError if other programs disturbed the measurement, or an entry was made anew meanwhile.
    """
    if measured.cores_taken > bench.BUSY_CORES:
        raise ZooError(
            "nothing was recorded: other programs disturbed the measurement",
            saw=f"{measured.cores_taken:.2g} cores taken by them",
            expected=f"at most {bench.BUSY_CORES}",
            try_="the same when the machine is idle",
        )
    for entry_id in dict.fromkeys(entry_id for entry_id, _ in files.values()):
        ours = {position: file for position, (owner, file) in files.items() if owner == entry_id}
        entry = registry.get(entry_id)
        if not all(file in entry.artifacts for file in ours.values()):
            raise ZooError(
                f"{entry_id} was made anew meanwhile: its speed was not recorded",
                try_="the same command again",
            )
        fresh = [_benchmark(measured, measured.rows[at], file.path) for at, file in ours.items()]
        registry.put(entry.model_copy(update={"benchmarks": together(entry.benchmarks, fresh)}))


def _benchmark(measured: Bench, row: BenchRow, path: str) -> Benchmark:
    return Benchmark(
        runner=row.engine,
        runner_version=measured.versions["sparse-zoo"]
        if row.engine == "zoo"
        else f"llama-cpp-python {measured.versions['llama-cpp-python']}",
        artifact=path,
        threads=measured.threads,
        prompt_tokens=measured.prompt_tokens,
        generated_tokens=measured.generated_tokens,
        repeats=measured.repeats,
        prefill_tokens_per_s=row.prefill_tok_s,
        decode_tokens_per_s=row.decode_tok_s,
        load_s=row.load_s,
        peak_memory_bytes=row.peak_memory_bytes,
        machine=measured.machine,
    )


def together(known: Sequence[Benchmark], fresh: Sequence[Benchmark]) -> list[Benchmark]:
    """All speeds; a fresh one stands where one was measured in the same way on the same machine."""
    found = {_way(benchmark): benchmark for benchmark in known}
    return list((found | {_way(benchmark): benchmark for benchmark in fresh}).values())


def _way(b: Benchmark) -> tuple[object, ...]:
    return (b.machine.fingerprint, b.runner, b.artifact, b.threads, b.prompt_tokens, b.generated_tokens)
