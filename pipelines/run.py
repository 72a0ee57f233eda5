"""`zoo run`: from a recipe to an entry. Every stage's output is content-addressed, so a run resumes.

A stage's key (`pipelines.keys`) is the hash of all that decides its result: a finished stage is never done
twice, and never reused when something changed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

import cards
from pipelines import (
    average,
    calibrate,
    checkpoint,
    compress,
    evaluate,
    export_compressed,
    export_gguf,
    keys,
    masks,
    publish,
    shards,
    sources,
    text,
    verify,
)
from pipelines.families import Family
from pipelines.recipe import (
    STEP,
    Average,
    CompressedTensors,
    Evaluation,
    Gguf,
    Packed,
    Passage,
    Quantize,
    Recipe,
    Recover,
    Rounding,
    Safetensors,
    SparsityPattern,
    Step,
    numbered,
    override_of,
)
from pipelines.recover.resample import alternatives
from pipelines.recover.tokens import training_tokens
from pipelines.recover.train import Job, recover, thinned
from pipelines.recover.write import history
from zoo.analyze import analyze, layout_name
from zoo.entry import Artifact, Benchmark, Entry, Measurement, Stage, Status, Verification, curves
from zoo.errors import CalibrationError, PatternError, RecipeError, RegistryError
from zoo.files import (
    Store,
    file_table,
    sha256_bytes,
    sha256_file,
    told_plainly,
    write_json,
)
from zoo.formats import check_safetensors, weight_files
from zoo.logs import redact
from zoo.machine import this_machine
from zoo.progress import log_path, logged, say
from zoo.registry.registry import Registry, RunStatus
from zoo.runner import native, packed
from zoo.runner.pack import pack_folder
from zoo.shared_store import SharedStore

RECIPE = "recipe.yaml"
CARD = "README.md"  # the entry gets its own; that of the base, if it has one, says other things


@dataclass
class Run:
    """One run on its way: where outputs go, and the stages so far."""

    store: Store
    registry: Registry
    id: int
    until: str | None = None  # the part of the recipe after which it ends
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str, key: str, work: Callable[[Path], None]) -> Path:
        """The output folder of a stage, made by `work` unless it is there already."""
        began = time.monotonic()
        with self.store.locked(key):  # another run of the same recipe waits here, then finds it done
            done = self.store.get(key)
            if done is not None:
                say(f"{name}: done before", event="stage", stage=name, status="cached", seconds=0.0)
                self._record(Stage(name=name, key=key, status="cached", seconds=0.0))
                return done
            say(f"{name} ...", event="stage-started", stage=name)
            try:
                with self.store.writing(key) as folder:
                    work(folder)
            except BaseException as error:
                seconds = time.monotonic() - began
                reason = first_line(error)
                with suppress(RegistryError):  # if it does not answer, that is not what went wrong first
                    self._record(Stage(name=name, key=key, status="failed", seconds=seconds, reason=reason))
                raise
        seconds = time.monotonic() - began
        say(f"{name}: {seconds:.0f} s", event="stage", stage=name, status="done", seconds=seconds)
        self._record(Stage(name=name, key=key, status="done", seconds=seconds))
        return self.store.path(key)

    def reached(self, part: str) -> None:
        """Say that this part of the recipe is done; raises PartDone if no more is to be."""
        if part == self.until:
            raise PartDone(part)

    def _record(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.registry.record_stage(self.id, stage)


class PartDone(Exception):
    """The part of a recipe that was asked for is in the store."""


def run(recipe: Recipe, store: Store, registry: Registry, until: str | None = None) -> Entry:
    """Do all that the recipe says; the entry is in the registry when this returns.

    An entry that does not verify comes back, and is recorded, with status "failed" and the reason. Whatever
    else goes wrong is raised, with the run recorded as failed; if only the publishing did, the entry is kept.
    `until` names the stage of a step (`keys.step_name`), or "evaluate" (base and entry), "export" or "gguf"
    (the figures of its GGUF files): PartDone is raised after it.
    """
    settle(recipe)
    if isinstance(store, SharedStore):
        store.remote.check()
    recipe_yaml = recipe.to_yaml()
    recipe_sha256 = sha256_bytes(recipe_yaml.encode())
    run_id = registry.start_run(recipe.name, recipe_sha256, os.getpid(), socket.gethostname())
    run_ = Run(store, registry, run_id, until)
    try:
        with logged(log_path(store.root, run_id, recipe_sha256)):
            entry = _run(recipe, recipe_yaml, recipe_sha256, run_)
            entry = publish.still_known(entry, registry)
            registry.put(entry)
            if recipe.publish is not None and entry.status != "failed":
                entry = publish.publish(entry, recipe.publish, store, registry)
    except PartDone:
        registry.finish_run(run_id, "done")
        raise
    except BaseException as error:
        ended: RunStatus = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(RegistryError):  # if it does not answer, that is not what went wrong here first
            registry.finish_run(run_id, ended, failure=first_line(error))
        raise
    registry.finish_run(run_id, "failed" if entry.status == "failed" else "done", entry.id, entry.failure)
    return entry


def first_line(error: BaseException) -> str:
    """What may be recorded of a failure, and shown to everyone."""
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__


def settle(recipe: Recipe) -> None:
    """Refuse what would only fail after hours, and fix what makes a result depend on the moment."""
    known = set(export_gguf.TYPES)
    for export in recipe.exports:
        if isinstance(export, Gguf) and (wrong := [t for t in export.types if t not in known]):
            raise RecipeError(f"GGUF type {', '.join(wrong)} is not known", expected=", ".join(sorted(known)))
    if redact(recipe.to_yaml()) != recipe.to_yaml():
        raise RecipeError(
            "the recipe holds a secret, which would be recorded and published",
            expected="no token, and no password in a URL",
            try_="give it by the environment, e.g. HF_TOKEN",
        )
    if recipe.publish is not None:
        publish.check(recipe.publish)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def _run(recipe: Recipe, recipe_yaml: str, recipe_sha256: str, run_: Run) -> Entry:
    base = sources.resolve(recipe.base, run_.store)
    say(f"base model {recipe.base}: {base.family.name}, revision {base.revision}")
    _check_groups(recipe, base)
    _check_texts(recipe, base)
    if any(isinstance(export, Gguf) for export in recipe.exports):
        export_gguf.check(base.folder)  # else it is told after hours
    model = _compressed(recipe, base, run_)
    file = _packed(recipe, model, run_)
    measurements = _measured(recipe.evaluation, base, model, file, run_)
    run_.reached("evaluate")
    exports = _exported(recipe, base, model, file, run_)
    run_.reached("export")
    measurements += _measured_gguf(recipe, model, exports, run_)
    run_.reached("gguf")
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
    for number, step in numbered(recipe.steps):
        for layer, width in sorted(widths.items()):
            for what, cut in _cuts(step, layer, base.family):
                if cut is None or cut.group is None:
                    continue
                try:
                    masks.check_divides(width, cut.group, what)
                except PatternError as error:
                    error.what = f"step {number}, {layer}: {error.what}"
                    raise


def _cuts(step: Step, layer: str, family: Family) -> Iterator[tuple[str, SparsityPattern | Rounding | None]]:
    """What cuts the columns of a layer into groups."""
    if isinstance(step, Average):
        return
    if isinstance(step, Recover):
        yield from _cuts_in_training(step, layer, family)
    elif isinstance(step, Quantize):
        grid = {family.embeddings: step.embeddings, family.head: step.head}.get(layer)
        if layer.endswith(family.linears):
            other = override_of(layer, step.overrides)
            grid = step.grid if other is None else other.grid
        yield "quantization", grid
    elif layer.endswith(family.linears):
        own = override_of(layer, step.overrides)
        pattern = step.pattern if own is None else own.pattern
        yield "sparsity pattern", pattern
        yield "quantization", step.quantize if pattern else None


def _cuts_in_training(
    step: Recover, layer: str, family: Family
) -> Iterator[tuple[str, SparsityPattern | Rounding | None]]:
    linear = layer.endswith(family.linears)
    if step.prune is not None and linear:
        own = override_of(layer, step.prune.overrides)
        yield "sparsity pattern", step.prune.pattern if own is None else own.pattern
    if step.quantize is not None:
        grid = {family.embeddings: step.quantize.embeddings, family.head: step.quantize.head}.get(layer)
        if linear:
            other = override_of(layer, step.quantize.overrides)
            grid = step.quantize.grid if other is None else other.grid
        yield "quantization", grid


def _check_texts(recipe: Recipe, base: sources.Base) -> None:
    """Raise what training or evaluation would raise after hours: SourceError without a tokenizer, and
    CalibrationError for a text that is not there, or windows that are too long for the model.
    """
    text.load_tokenizer(base.folder)
    context = base.config.get("max_position_embeddings") or base.config.get("max_seq_len") or math.inf
    for passage in filter(None, [*recipe.evaluation.perplexity, recipe.evaluation.fidelity]):
        keys.text_revision(passage.text, passage.column)
        if passage.length > context:
            raise CalibrationError(
                f"the model cannot be asked about windows of {passage.length} tokens of {passage.text}",
                saw=f"a context of {context} tokens",
                try_="a smaller `length` in the recipe's `evaluation`",
            )
    for _, step in numbered(recipe.steps):
        if isinstance(step, Recover):
            keys.training_revisions(step)


def _compressed(recipe: Recipe, base: sources.Base, run_: Run) -> tuple[Path, str]:
    """The compressed model folder and its key. What comes before a step that is in the store is not made."""
    windows = None
    windows_key = keys.calibration(recipe, base.sha256)
    bases = {name: base if name is None else sources.resolve(name, run_.store) for name in recipe.models}
    made = keys.steps(recipe, base.sha256, windows_key, lambda source: bases[source].sha256)
    models = {name: (one.folder, one.sha256) for name, one in bases.items()}
    needed = _needed(made, run_.store)
    if any(one.step.calibrated for one in made if one.key in needed):
        folder = run_.stage(
            "calibrate",
            windows_key,
            lambda out: calibrate.calibrate(recipe.calibration, base.folder, out),
        )
        windows = calibrate.load_windows(folder)

    def folder_of(model: str) -> Path:
        return base.folder if model == base.sha256 else run_.store.path(model)

    for one in made:
        step, taken = one.step, [folder_of(model) for model in one.of]
        if one.key not in needed:
            pass
        elif isinstance(step, Recover):
            _recovered(step, one.name, one.key, taken[0], models, run_)
        elif isinstance(step, Average):
            run_.stage(one.name, one.key, partial(average.run_step, step, taken))
        else:
            run_.stage(one.name, one.key, partial(compress.run_step, step, taken[0], windows=windows))
        models[STEP + one.number] = folder_of(one.key), one.key
        run_.reached(one.name)
    key = made[-1].key if made else base.sha256
    return folder_of(key), key


def _needed(made: Sequence[keys.Made], store: Store) -> set[str]:
    """The keys of what is in the store, and of what has to be made for the last."""
    found = {one.key for one in made if store.get(one.key) is not None}
    wanted = {made[-1].key} if made else set()
    for one in reversed(made):
        if one.key in wanted and one.key not in found:
            found.add(one.key)
            wanted |= set(one.of)
    return found


def _recovered(
    step: Recover, name: str, key: str, folder: Path, models: Mapping[str | None, tuple[Path, str]], run_: Run
) -> None:
    """Train the model in `folder`; models: of each name in `step.models` the folder, and what names its
    content. A training that was interrupted goes on from its last state."""
    state = run_.store.root / "training" / key

    def work(out: Path) -> None:
        tokens = training_tokens(step, folder, models, run_.store)
        teacher, teacher_id = models[step.teacher]
        others = alternatives(step, tokens, teacher, teacher_id, run_.store)
        recover(Job(step=step, identity=key, student=folder, teacher=teacher, tokens=tokens,
                    alternatives=others, out=out, state=state))  # fmt: skip

    run_.stage(name, key, work)
    shutil.rmtree(state, ignore_errors=True)


def _packed(recipe: Recipe, model: tuple[Path, str], run_: Run) -> tuple[Path, str] | None:
    """The packed file and its key, if the entry is to have one."""
    if not keys.packs(recipe):
        return None
    folder, key = model

    def work(out: Path) -> None:
        pack_folder(folder, out / packed.FILE)

    return run_.stage("pack", keys.pack(key), work) / packed.FILE, keys.pack(key)


def _measured(
    setting: Evaluation,
    base: sources.Base,
    model: tuple[Path, str],
    file: tuple[Path, str] | None,
    run_: Run,
) -> list[Measurement]:
    """The figures of the base, cached for all entries of it, and of the entry.

    The packed file, if there is one, answers the tasks: they are asked of the very bytes that are shipped.
    """
    found: list[Measurement] = []
    folder, key = model
    subjects: Sequence[tuple[evaluate.Subject, tuple[Path, str], tuple[Path, str]]] = (
        ("base", (base.folder, base.sha256), (base.folder, base.sha256)),
        ("entry", model, file or model),
    )
    for subject, weights, answering in subjects:
        of = f"the {subject}"
        found += _perplexities(setting, setting.perplexity, subject, of, weights, weights[0], run_)
        asked = _tasks(setting, subject, of, answering, run_)
        found += _of_file(packed.FILE, asked) if answering == file else asked
    if setting.fidelity is not None:
        found += _stage_of_measurements(
            run_,
            "fidelity to the base",
            keys.fidelity(setting.fidelity, base.sha256, key),
            partial(
                _fidelity,
                shards.work_on(folder, key, run_.store, setting.workers),
                base,
                setting.fidelity,
            ),
        )
    return found


def _measured_gguf(recipe: Recipe, model: tuple[Path, str], exports: Path, run_: Run) -> list[Measurement]:
    """The figures of the GGUF files, if the recipe asks them: what llama.cpp makes of the entry."""
    setting = recipe.evaluation
    found: list[Measurement] = []
    for name, kind in recipe.asked_gguf.items():
        file = exports / name, keys.gguf(kind, model[1])
        asked = _perplexities(setting, setting.perplexity[:1], "entry", name, file, model[0], run_)
        found += _of_file(name, asked + _tasks(setting, "entry", name, file, run_))
    return found


def _of_file(name: str, found: Sequence[Measurement]) -> list[Measurement]:
    return [measurement.model_copy(update={"artifact": name}) for measurement in found]


def _perplexities(
    setting: Evaluation,
    passages: Sequence[Passage],
    subject: evaluate.Subject,
    of: str,
    model: tuple[Path, str],
    tokenizer: Path,
    run_: Run,
) -> list[Measurement]:
    """Of a model and its key, called `of`, each a stage; the folder `tokenizer` has its tokenizer."""
    work = shards.work_on(*model, run_.store, setting.workers)
    return [
        measurement
        for passage in passages
        for measurement in _stage_of_measurements(
            run_,
            f"perplexity of {of}",
            keys.perplexity(passage, subject, model[1]),
            partial(_perplexity, work, tokenizer, passage, subject),
        )
    ]


def _tasks(
    setting: Evaluation, subject: evaluate.Subject, of: str, model: tuple[Path, str], run_: Run
) -> list[Measurement]:
    """Of a model and its key, called `of`; what one call of the harness takes together is a stage."""
    data = None if setting.data is None else text.expand(setting.data)
    found: list[Measurement] = []
    for (few_shot, limit), names in keys.by_protocol(setting, subject).items():
        found += _stage_of_measurements(
            run_,
            f"{', '.join(names)} of {of}",
            keys.tasks(
                names, few_shot, limit, data, subject, model[1], packed=model[0].suffix == ".safetensors"
            ),
            partial(
                evaluate.lm_eval_tasks,
                model[0],
                names,
                subject=subject,
                few_shot=few_shot,
                limit=limit,
                data=data,
                work=shards.work_on(*model, run_.store, setting.workers),
            ),
        )
    return found


def _read_passage(folder: Path, passage: Passage) -> tuple[text.Ids, text.Text]:
    tokenizer = text.load_tokenizer(folder)
    enough = passage.windows * passage.length * 16  # bytes; more than any tokenizer needs
    words = text.read_text(passage.text, column=passage.column, limit_bytes=enough)
    return text.windows(text.token_ids(tokenizer, words), passage.windows, passage.length), words


def _perplexity(
    work: shards.Work, tokenizer: Path, passage: Passage, subject: evaluate.Subject
) -> list[Measurement]:
    ids, words = _read_passage(tokenizer, passage)
    return evaluate.perplexity_in_shards(work, ids, text=words, subject=subject)


def _fidelity(work: shards.Work, base: sources.Base, passage: Passage) -> list[Measurement]:
    ids, words = _read_passage(work.model, passage)
    return evaluate.fidelity_in_shards(work, base.folder, base.sha256, ids, text=words)


def _stage_of_measurements(
    run_: Run, name: str, key: str, work: Callable[[], list[Measurement]]
) -> list[Measurement]:
    def write(out: Path) -> None:
        write_json(out / "measurements.json", [m.model_dump() for m in work()])

    folder = run_.stage(name, key, write)
    return [Measurement.model_validate(m) for m in json.loads((folder / "measurements.json").read_text())]


def _exported(
    recipe: Recipe, base: sources.Base, model: tuple[Path, str], file: tuple[Path, str] | None, run_: Run
) -> Path:
    """The folder of all files that the entry ships, but for its recipe, card and record."""
    folder, key = model

    def export(out: Path) -> None:
        for setting in recipe.exports:
            if isinstance(setting, Safetensors):
                for path in checkpoint.model_files(folder):
                    # a folder of the user's may change: no link to that
                    ours = path.resolve().is_relative_to(run_.store.root.resolve() / "objects")
                    (link_or_copy if ours else shutil.copyfile)(path, out / path.name)
            elif isinstance(setting, CompressedTensors):
                target = out / "compressed-tensors"
                target.mkdir()
                export_compressed.export_compressed_tensors(folder, target)
                (target / CARD).unlink(missing_ok=True)
            elif isinstance(setting, Packed):
                assert file is not None
                link_or_copy(file[0], out / packed.FILE)
            else:
                export_gguf.export_gguf(folder, out, setting.types, name=recipe.name, license=base.license)

    return run_.stage("export", keys.export(recipe, key), export)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it: finished outputs never change."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class _NotVerified(Exception):
    """Takes what was found past the store: a failed check is done again, as the machine may have failed."""

    def __init__(self, verifications: list[Verification], benchmarks: list[Benchmark]) -> None:
        super().__init__(failure_of(verifications))
        self.verifications = verifications
        self.benchmarks = benchmarks


def failure_of(verifications: list[Verification]) -> str | None:
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
    key = keys.stage_key(
        "verify",
        exports.name,
        threads,
        this_machine().fingerprint,
        engine,
        code=("verify", *keys.RUNNER_CODE),
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
    failure = failure_of(verifications)
    status: Status = "failed" if failure else "verified"
    analysis = analyze(model)
    made = history(model)
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
        versions=keys.library_versions(),
        layers=checkpoint.Checkpoint(model).compression(),
        artifacts=sorted([*artifacts_of(exports), _recipe_file(recipe_yaml)], key=lambda one: one.path),
        measurements=measurements,
        benchmarks=benchmarks,
        verifications=verifications,
        training=[point for curve in curves(made.training) for point in thinned(curve)],
        training_runs=made.runs,
        stages=run_.stages,
    )
    place(entry, exports, run_.store)
    return entry


def _recipe_file(recipe_yaml: str) -> Artifact:
    said = recipe_yaml.encode()
    return Artifact(path=RECIPE, kind="recipe", format=None, size=len(said), sha256=sha256_bytes(said))


def artifacts_of(exports: Path) -> list[Artifact]:
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
        elif name == RECIPE:
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


def place(entry: Entry, exports: Path, store: Store) -> None:
    """Put the entry's files, recipe, card and record under `entries/<id>` of the store."""
    target = store.root / "entries" / entry.id
    with store.locked(f"entry-{entry.id}"), told_plainly(target):
        fresh, old = (target.with_name(f".{entry.id}.{word}") for word in ("new", "old"))
        if old.exists() and not target.exists():  # by a run that was killed between the two renames
            old.rename(target)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        for path in sorted(p for p in exports.rglob("*") if p.is_file()):
            destination = fresh / path.relative_to(exports)
            destination.parent.mkdir(exist_ok=True)
            link_or_copy(path, destination)
        if entry.recipe and not (fresh / RECIPE).exists():
            (fresh / RECIPE).write_text(entry.recipe)
        (fresh / CARD).write_text(cards.render(entry))
        write_json(fresh / "entry.json", entry.model_dump(mode="json"))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
