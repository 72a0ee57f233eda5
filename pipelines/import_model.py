"""`zoo import`: a model that others published becomes an entry, once it was analysed and does run.

Nothing is compressed or measured. A folder of safetensors is loaded with transformers and packed for the
sparse runner, a GGUF file is run with llama.cpp and held against its own weights in transformers; both are
what a made entry has to pass too. What fails is recorded as failed, with the reason.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf

from pipelines import sources, verify
from pipelines.export_gguf import TYPES
from pipelines.families import Family, family_of
from pipelines.keys import EXPORT_CODE, library_versions, stage_key
from pipelines.run import Run, artifacts_of, failure_of, first_line, link_or_copy, place
from zoo import __version__, importing
from zoo.analyze import Analysis, analyze
from zoo.entry import Artifact, Entry, Verification
from zoo.errors import FormatError, NumericsError, PatternError, SourceError, UsageError
from zoo.files import Store, sha256_bytes, sha256_file
from zoo.formats import check_safetensors, weight_files
from zoo.importing import UNKNOWN, Published
from zoo.machine import this_machine
from zoo.registry import Registry
from zoo.registry.registry import RunStatus
from zoo.runner import packed
from zoo.runner.checkpoint import read_json
from zoo.runner.pack import pack_folder


def import_model(
    source: str,
    store: Store,
    registry: Registry,
    *,
    files: Sequence[str] = (),
    entry_id: str | None = None,
    base: str | None = None,
    threads: int | None = None,
) -> Entry:
    """Record the model that `source` names; the entry is in the registry when this returns.

    `base`: the base model's repository, where the publisher's card does not name it. What keeps a model
    from being read at all is raised (ZooError); then only the run is recorded.
    """
    published = importing.locate(source, files)
    name = entry_id or importing.entry_id(published)
    _check_free(registry, name, published)
    origin = published.origin
    host = socket.gethostname()
    run_id = registry.start_run(f"import {name}", sha256_bytes(origin.encode()), os.getpid(), host)
    try:
        entry = _import(published, name, base, threads, Run(store, registry, run_id))
        registry.put(entry)
    except BaseException as error:
        status: RunStatus = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        registry.finish_run(run_id, status, failure=first_line(error))
        raise
    registry.finish_run(run_id, "done" if entry.status == "verified" else "failed", entry.id, entry.failure)
    return entry


def _check_free(registry: Registry, name: str, published: Published) -> None:
    """An import replaces nothing but an earlier import of the same model."""
    there = registry.find(name)
    if there is not None and (there.origin or "").partition("@")[0] != published.origin.partition("@")[0]:
        raise UsageError(
            f"the registry has another entry {name}",
            saw=f"imported from {there.origin}" if there.origin else "made by its recipe",
            try_="name this one with --id",
        )


def _import(published: Published, name: str, base: str | None, threads: int | None, run_: Run) -> Entry:
    if published.gguf is not None:
        weights = sources.resolve(str(published.gguf), run_.store).folder  # what its values are, de-quantized
    else:
        weights = published.folder
        for shard in weight_files(weights):
            sources.check_finite(shard)
    family = family_of(read_json(weights / "config.json"))
    analysis = analyze(published.gguf or weights)
    layers = importing.layers_of(weights, analysis, _gguf_names(weights, family) if published.gguf else None)
    exports, failed = _collected(published, run_)
    verified, benchmarks = verify.verify_all(weights, exports, threads=threads or this_machine().cores)
    if published.gguf is not None:  # the folder of the reference has no name that means anything
        names = {weights.name: published.gguf.name}
        verified = [v.model_copy(update={"artifact": names.get(v.artifact, v.artifact)}) for v in verified]
    verifications = [*verified, *failed]
    failure = failure_of(verifications)
    base = base or published.base
    entry = Entry(
        id=name,
        status="failed" if failure else "verified",
        failure=failure,
        family=family.name,
        base_model=f"hub:{base}" if base else UNKNOWN,
        base_repository=base,
        base_revision=UNKNOWN,
        base_sha256=None,
        origin=published.origin,
        license=published.license,
        recipe="",
        recipe_sha256=sha256_bytes(b""),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=analysis.weights,
        sparsity=sum(x.sparsity * x.rows * x.columns for x in layers)
        / sum(x.rows * x.columns for x in layers),
        bits_per_weight=analysis.smallest_bits_per_weight,
        compression_ratio=analysis.compression_ratio,
        versions=library_versions(),
        layers=layers,
        artifacts=_artifacts(exports, published, analysis),
        benchmarks=benchmarks,
        verifications=verifications,
        stages=run_.stages,
    )
    place(entry, exports, run_.store)
    return entry


def _gguf_names(weights: Path, family: Family) -> dict[str, str]:
    """Of each tensor in the de-quantized folder, its name in the GGUF file."""
    names = [tensor.name for shard in weight_files(weights) for tensor in check_safetensors(shard)]
    return {name: there for name in names if (there := family.gguf_name(name)) is not None}


def _collected(published: Published, run_: Run) -> tuple[Path, list[Verification]]:
    """The folder of all that the entry ships, and what is known already not to work.

    Safetensors get a packed file besides, which the sparse runner reads.
    """
    files = {name: published.folder / name for name in published.names}
    failed = []
    if published.gguf is None:
        hashes = [[name, sha256_file(path)] for name, path in files.items()]
        key = stage_key("import: pack", hashes, code=EXPORT_CODE)
        try:
            made = run_.stage("pack", key, lambda out: _pack(published.folder, out))
            files[packed.FILE] = made / packed.FILE
        except (FormatError, NumericsError, PatternError, SourceError) as error:
            failed.append(
                Verification(
                    runner=verify.ZOO,
                    runner_version=__version__,
                    artifact=packed.FILE,
                    passed=False,
                    reason=str(error).splitlines()[0],
                )
            )
    hashes = [[name, sha256_file(path)] for name, path in files.items()]

    def collect(out: Path) -> None:
        for name, path in files.items():
            ours = published.immutable or name == packed.FILE
            (link_or_copy if ours else shutil.copyfile)(path, out / name)

    return run_.stage("collect", stage_key("import: collect", hashes, code=()), collect), failed


def _pack(folder: Path, out: Path) -> None:
    pack_folder(folder, out / packed.FILE)


def _artifacts(exports: Path, published: Published, analysis: Analysis) -> list[Artifact]:
    changes: dict[str, Any] = {}
    if published.gguf is not None:
        changes = {"gguf": {"format": _gguf_type(published.gguf)}}
    elif analysis.format == "compressed-tensors":
        changes = {"safetensors": {"kind": "compressed-tensors"}}
    return [a.model_copy(update=changes.get(a.kind)) for a in artifacts_of(exports)]


def _gguf_type(path: Path) -> str | None:
    """The type of most of its weights, as the file itself says it."""
    field = gguf.GGUFReader(path).get_field("general.file_type")
    number = field.contents() if field is not None else None
    return next((name for name, known in TYPES.items() if known == number), None)
