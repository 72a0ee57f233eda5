"""`zoo run`: from a recipe to an entry. Every stage's output is content-addressed, so a run resumes.

A stage's key is the hash of its settings, its inputs' keys, the code that computes it and the libraries
under that code: a finished stage is never done twice, and never reused when something changed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cards
from pipelines import (
    calibrate,
    checkpoint,
    compress,
    evaluate,
    export_compressed,
    export_gguf,
    masks,
    sources,
    text,
    verify,
)
from pipelines.families import Family
from pipelines.recipe import (
    CompressedTensors,
    Evaluation,
    Gguf,
    Packed,
    Passage,
    Prune,
    Quantize,
    Recipe,
    Rounding,
    Safetensors,
    SparsityPattern,
)
from zoo import __version__
from zoo.analyze import analyze, layout_name
from zoo.entry import Artifact, Benchmark, Entry, Measurement, Stage, Status, Verification
from zoo.errors import PatternError, RecipeError
from zoo.files import (
    Store,
    file_table,
    sha256_bytes,
    sha256_file,
    sha256_json,
    sha256_tree,
    told_plainly,
    write_json,
)
from zoo.formats import check_safetensors, weight_files
from zoo.machine import this_machine
from zoo.progress import say
from zoo.registry.registry import Registry
from zoo.runner import native, packed
from zoo.runner.pack import pack_folder

LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "lm-eval", "datasets", "gguf",
    "llama-cpp-python", "compressed-tensors",
)  # fmt: skip
# The modules that decide a stage's result. They are hashed, which needs no import (of lm-eval: seconds).
SOLVER_CODE = ("compress", "solve", "masks", "grids", "layers", "allocate", "checkpoint", "families")
EVALUATION_CODE = ("evaluate", "harness", "text")
CARD = "README.md"  # the entry gets its own; that of the base, if it has one, says other things
TASKS = Path(__file__).parent / "tasks"
PACK_CODE = tuple(
    f"../zoo/{name}"
    for name in ("runner/pack", "runner/grid", "runner/config", "runner/checkpoint", "runner/format",
                 "runner/packed", "compressed_tensors")
)  # fmt: skip
EXPORT_CODE = (
    "export_gguf", "gguf_tokenizer", "export_compressed", "checkpoint", "grids", "families", *PACK_CODE,
)  # fmt: skip
RUNNER_CODE = tuple(f"../zoo/runner/{name}" for name in ("engine", "native", "numpy_engine", "rope"))


@dataclass
class Run:
    """One run on its way: where outputs go, and the stages so far."""

    store: Store
    registry: Registry
    id: int
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str, key: str, work: Callable[[Path], None]) -> Path:
        """The output folder of a stage, made by `work` unless it is there already."""
        began = time.monotonic()
        with self.store.locked(key):  # another run of the same recipe waits here, then finds it done
            done = self.store.get(key)
            if done is not None:
                say(f"{name}: done before")
                self._record(Stage(name=name, key=key, status="cached", seconds=0.0))
                return done
            say(f"{name} ...")
            try:
                with self.store.writing(key) as folder:
                    work(folder)
            except BaseException as error:
                seconds = time.monotonic() - began
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._record(Stage(name=name, key=key, status="failed", seconds=seconds, reason=reason))
                raise
        seconds = time.monotonic() - began
        say(f"{name}: {seconds:.0f} s")
        self._record(Stage(name=name, key=key, status="done", seconds=seconds))
        return self.store.path(key)

    def _record(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.registry.record_stage(self.id, stage)


def run(recipe: Recipe, store: Store, registry: Registry) -> Entry:
    """Do all that the recipe says; the entry is in the registry when this returns.

    An entry that does not verify comes back, and is recorded, with status "failed" and the reason. Whatever
    else goes wrong is raised, with the run recorded as failed.
    """
    settle(recipe)
    recipe_yaml = recipe.to_yaml()
    recipe_sha256 = sha256_bytes(recipe_yaml.encode())
    run_id = registry.start_run(recipe.name, recipe_sha256, os.getpid(), socket.gethostname())
    run_ = Run(store, registry, run_id)
    try:
        entry = _run(recipe, recipe_yaml, recipe_sha256, run_)
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        registry.finish_run(run_id, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
                            failure=reason)  # fmt: skip
        raise
    registry.put(entry)
    registry.finish_run(run_id, "done" if entry.status == "verified" else "failed", entry.id, entry.failure)
    return entry


def settle(recipe: Recipe) -> None:
    """Refuse what would only fail after hours, and fix what makes a result depend on the moment."""
    known = set(export_gguf.TYPES)
    for export in recipe.exports:
        if isinstance(export, Gguf) and (wrong := [t for t in export.types if t not in known]):
            raise RecipeError(f"GGUF type {', '.join(wrong)} is not known", expected=", ".join(sorted(known)))
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def _run(recipe: Recipe, recipe_yaml: str, recipe_sha256: str, run_: Run) -> Entry:
    base = sources.resolve(recipe.base, run_.store)
    say(f"base model {recipe.base}: {base.family.name}, revision {base.revision}")
    _check_groups(recipe, base)
    _check_texts(recipe.evaluation)
    model = _compressed(recipe, base, run_)
    measurements = _measured(recipe.evaluation, base, model, run_)
    exports = _exported(recipe, base, model, run_)
    verifications, benchmarks = _verified(recipe, model[0], exports, run_)
    return _entry(
        recipe,
        recipe_yaml,
        recipe_sha256,
        base,
        model[0],
        exports,
        measurements,
        verifications,
        benchmarks,
        run_,
    )


def _check_groups(recipe: Recipe, base: sources.Base) -> None:
    """Raise PatternError for a group that does not divide its layer: the solver would, after hours."""
    tensors = [tensor for shard in weight_files(base.folder) for tensor in check_safetensors(shard)]
    widths = {tensor.name.removesuffix(".weight"): tensor.shape[-1] for tensor in tensors if tensor.shape}
    for number, step in enumerate(recipe.steps, 1):
        for layer, width in sorted(widths.items()):
            for what, cut in _cuts(step, layer, base.family):
                if cut is None or cut.group is None:
                    continue
                try:
                    masks.check_divides(width, cut.group, what)
                except PatternError as error:
                    error.what = f"step {number}, {layer}: {error.what}"
                    raise


def _cuts(
    step: Prune | Quantize, layer: str, family: Family
) -> Iterator[tuple[str, SparsityPattern | Rounding | None]]:
    """What cuts the columns of a layer into groups."""
    if isinstance(step, Quantize):
        grid = {family.embeddings: step.embeddings, family.head: step.head}.get(layer)
        if layer.endswith(family.linears):
            grid = step.grid
            for q in step.overrides:
                grid = q.grid if fnmatchcase(layer, q.layers) else grid
        yield "quantization", grid
    elif layer.endswith(family.linears):
        pattern: SparsityPattern | None = step.pattern
        for p in step.overrides:
            pattern = p.pattern if fnmatchcase(layer, p.layers) else pattern
        yield "sparsity pattern", pattern
        yield "quantization", step.quantize if pattern else None


def _check_texts(setting: Evaluation) -> None:
    """Raise CalibrationError for a text that is not there: the evaluation would, after hours."""
    for passage in filter(None, [*setting.perplexity, setting.fidelity]):
        _revision(passage.text, passage.column)


def _compressed(recipe: Recipe, base: sources.Base, run_: Run) -> tuple[Path, str]:
    """The compressed model folder and its key."""
    windows = None
    windows_key = ""
    if any(step.calibrated for step in recipe.steps):
        setting = recipe.calibration
        text_revision = None if setting.source == "self" else _revision(setting.source, setting.column)
        windows_key = _key(
            "calibrate",
            setting.model_dump(),
            base.sha256,
            text_revision,
            code=("calibrate", *EVALUATION_CODE),
        )
        folder = run_.stage(
            "calibrate", windows_key, lambda out: calibrate.calibrate(setting, base.folder, out)
        )
        windows = calibrate.load_windows(folder)
    model, key = base.folder, base.sha256
    for number, step in enumerate(recipe.steps, 1):
        key = _key("step", step.model_dump(), key, windows_key if step.calibrated else "", code=SOLVER_CODE)
        source = model

        def work(out: Path, step: Any = step, source: Path = source) -> None:
            compress.run_step(step, source, out, windows)

        model = run_.stage(f"{number}. {step.kind} ({step.method})", key, work)
    return model, key


def _revision(source: str, column: str) -> str:
    """What a text is, before it is read as a whole: its content's hash, or its name on the Hub."""
    if source.startswith("hub:"):
        return source
    path = text.expand(source)
    return sha256_file(path) if path.is_file() else text.read_text(source, column=column).revision


def _measured(
    setting: Evaluation, base: sources.Base, model: tuple[Path, str], run_: Run
) -> list[Measurement]:
    """The figures of the base, cached for all entries of it, and of the entry."""
    found: list[Measurement] = []
    folder, key = model
    subjects: Sequence[tuple[evaluate.Subject, Path, str]] = (
        ("base", base.folder, base.sha256),
        ("entry", folder, key),
    )
    data = None if setting.data is None else text.expand(setting.data)
    our_tasks = sha256_tree(TASKS)
    for subject, where, subject_key in subjects:
        for passage in setting.perplexity:
            found += _stage_of_measurements(
                run_,
                f"perplexity of the {subject}",
                ["perplexity", subject, subject_key, _passage(passage)],
                partial(_perplexity, where, passage, subject),
            )
        for (few_shot, limit), names in _by_protocol(setting).items():
            found += _stage_of_measurements(
                run_,
                f"{', '.join(names)} of the {subject}",
                ["tasks", subject, subject_key, names, few_shot, limit, str(data or ""), our_tasks],
                partial(
                    evaluate.lm_eval_tasks,
                    where,
                    names,
                    subject=subject,
                    few_shot=few_shot,
                    limit=limit,
                    data=data,
                ),
            )
    if setting.fidelity is not None:
        found += _stage_of_measurements(
            run_,
            "fidelity to the base",
            ["fidelity", base.sha256, key, _passage(setting.fidelity)],
            partial(_fidelity, base.folder, folder, setting.fidelity),
        )
    return found


def _by_protocol(setting: Evaluation) -> Mapping[tuple[int, int | None], list[str]]:
    """Tasks that one call of the harness can take together."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for task in setting.tasks:
        groups.setdefault((task.few_shot, task.limit), []).append(task.name)
    return groups


def _passage(passage: Passage) -> list[Any]:
    return [passage.model_dump(), _revision(passage.text, passage.column)]


def _read_passage(folder: Path, passage: Passage) -> tuple[text.Ids, text.Text]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    words = text.read_text(passage.text, column=passage.column)
    return text.windows(text.token_ids(tokenizer, words), passage.windows, passage.length), words


def _perplexity(folder: Path, passage: Passage, subject: evaluate.Subject) -> list[Measurement]:
    ids, words = _read_passage(folder, passage)
    model, _ = evaluate.load_model(folder)
    return evaluate.perplexity(model, ids, text=words, subject=subject)


def _fidelity(base: Path, folder: Path, passage: Passage) -> list[Measurement]:
    ids, words = _read_passage(folder, passage)
    return evaluate.fidelity(base, folder, ids, text=words)


def _stage_of_measurements(
    run_: Run, name: str, parts: Sequence[Any], work: Callable[[], list[Measurement]]
) -> list[Measurement]:
    def write(out: Path) -> None:
        write_json(out / "measurements.json", [m.model_dump() for m in work()])

    folder = run_.stage(name, _key(*parts, code=EVALUATION_CODE), write)
    return [Measurement.model_validate(m) for m in json.loads((folder / "measurements.json").read_text())]


def _exported(recipe: Recipe, base: sources.Base, model: tuple[Path, str], run_: Run) -> Path:
    """The folder of all that the entry ships, as its repository will have it."""
    folder, key = model

    def export(out: Path) -> None:
        for setting in recipe.exports:
            if isinstance(setting, Safetensors):
                for path in sorted(folder.iterdir()):
                    if path.name not in (checkpoint.GRID, CARD):
                        _link_or_copy(path, out / path.name)
            elif isinstance(setting, CompressedTensors):
                target = out / "compressed-tensors"
                target.mkdir()
                export_compressed.export_compressed_tensors(folder, target)
                (target / CARD).unlink(missing_ok=True)
            elif isinstance(setting, Packed):
                pack_folder(folder, out / packed.FILE)
            else:
                export_gguf.export_gguf(folder, out, setting.types, name=recipe.name, license=base.license)
        (out / "recipe.yaml").write_text(recipe.to_yaml())

    settings = [setting.model_dump() for setting in recipe.exports]
    return run_.stage("export", _key("export", settings, key, recipe.to_yaml(), code=EXPORT_CODE), export)


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it: finished outputs never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class _NotVerified(Exception):
    """Takes what was found past the store: a failed check is done again, as the machine may have failed."""

    def __init__(self, verifications: list[Verification], benchmarks: list[Benchmark]) -> None:
        super().__init__(_failure(verifications))
        self.verifications = verifications
        self.benchmarks = benchmarks


def _failure(verifications: list[Verification]) -> str | None:
    if not verifications:
        return "nothing was verified: the recipe exports no file that a runner reads"
    return "; ".join(f"{v.artifact}: {v.reason}" for v in verifications if not v.passed) or None


def _verified(
    recipe: Recipe, model: Path, exports: Path, run_: Run
) -> tuple[list[Verification], list[Benchmark]]:
    threads = recipe.verification.threads or this_machine().cores

    def check(out: Path) -> None:
        verifications, benchmarks = verify.verify_all(model, exports, threads=threads)
        if not all(v.passed for v in verifications):
            raise _NotVerified(verifications, benchmarks)
        write_json(
            out / "verified.json",
            {
                "verifications": [v.model_dump() for v in verifications],
                "benchmarks": [b.model_dump() for b in benchmarks],
            },
        )

    engine = sha256_file(native.EXTENSION) if native.EXTENSION else "numpy"
    key = _key(
        "verify", exports.name, threads, this_machine().fingerprint, engine, code=("verify", *RUNNER_CODE)
    )
    try:
        found = json.loads((run_.stage("verify", key, check) / "verified.json").read_text())
    except _NotVerified as failed:
        return failed.verifications, failed.benchmarks
    return (
        [Verification.model_validate(v) for v in found["verifications"]],
        [Benchmark.model_validate(b) for b in found["benchmarks"]],
    )


def _entry(
    recipe: Recipe,
    recipe_yaml: str,
    recipe_sha256: str,
    base: sources.Base,
    model: Path,
    exports: Path,
    measurements: list[Measurement],
    verifications: list[Verification],
    benchmarks: list[Benchmark],
    run_: Run,
) -> Entry:
    failure = _failure(verifications)
    status: Status = "failed" if failure else "verified"
    analysis = analyze(model)
    entry = Entry(
        id=recipe.name,
        status=status,
        failure=failure,
        family=base.family.name,
        base_model=recipe.base,
        base_repository=base.repository,
        base_revision=base.revision,
        base_sha256=base.sha256,
        license=base.license,
        recipe=recipe_yaml,
        recipe_sha256=recipe_sha256,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=analysis.weights,
        sparsity=analysis.sparsity or 0.0,
        bits_per_weight=analysis.smallest_bits_per_weight,
        compression_ratio=analysis.compression_ratio,
        versions=_versions(),
        layers=checkpoint.Checkpoint(model).compression(),
        artifacts=_artifacts(exports),
        measurements=measurements,
        benchmarks=benchmarks,
        verifications=verifications,
        stages=run_.stages,
    )
    _place(entry, exports, run_.store)
    return entry


def _artifacts(exports: Path) -> list[Artifact]:
    found = []
    for path, (size, sha256) in file_table(exports).items():
        name = Path(path).name
        form = None
        if name.endswith(".gguf"):
            kind, form = "gguf", name.removesuffix(".gguf").rpartition("-")[2]
        elif name == packed.FILE:
            kind, form = "packed", _packed_format(exports / path)
        elif path.startswith("compressed-tensors/"):
            kind = "compressed-tensors"
        elif name.endswith((".safetensors", ".safetensors.index.json")):
            kind = "safetensors"
        elif name == "recipe.yaml":
            kind = "recipe"
        elif name in ("config.json", "generation_config.json", checkpoint.COMPRESSION):
            kind = "config"
        else:
            kind = (
                "tokenizer"
                if name.startswith(("tokenizer", "vocab", "merges", "chat_", "special"))
                else "other"
            )
        found.append(
            Artifact.model_validate(
                {"path": path, "kind": kind, "format": form, "size": size, "sha256": sha256}
            )
        )
    return found


def _packed_format(path: Path) -> str:
    """The layout that holds most of the decoder's weights."""
    weights: Counter[str] = Counter()
    for name, layout in packed.Packed(path).layouts.items():
        if name.startswith("layers."):
            weights[layout_name(layout)] += layout.rows * layout.columns
    return weights.most_common(1)[0][0]


def _place(entry: Entry, exports: Path, store: Store) -> None:
    """Put the entry's files, card and record under `entries/<id>` of the store, in one rename."""
    target = store.root / "entries" / entry.id
    with store.locked(f"entry-{entry.id}"), told_plainly(target):
        fresh, old = (target.with_name(f".{entry.id}.{word}") for word in ("new", "old"))
        for left in (fresh, old):  # by a run that was killed here
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        for path in sorted(p for p in exports.rglob("*") if p.is_file()):
            destination = fresh / path.relative_to(exports)
            destination.parent.mkdir(exist_ok=True)
            _link_or_copy(path, destination)
        (fresh / CARD).write_text(cards.render(entry))
        write_json(fresh / "entry.json", entry.model_dump(mode="json"))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _key(*parts: Any, code: Sequence[str]) -> str:
    """Hash of a stage's settings and inputs, its code, and the libraries."""
    sources_ = [sha256_file(Path(__file__).parent / f"{module}.py") for module in code]
    return sha256_json([list(parts), sources_, _versions()])


def _versions() -> dict[str, str]:
    found = {"sparse-zoo": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
