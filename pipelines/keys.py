"""The keys of a recipe's stages: what decides each one's result.

A key is the hash of a stage's settings, its inputs' keys, the code that computes it and the libraries under
that code. None of it needs the stage to be done, nor torch: `expected` says what a run would do.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pipelines import text
from pipelines.recipe import (
    Average,
    Evaluation,
    Packed,
    Passage,
    Prune,
    Quantize,
    Recipe,
    Recover,
    Step,
    follow,
    made_by,
    numbered,
)
from zoo import __version__
from zoo.files import sha256_file, sha256_json, sha256_tree

LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "lm-eval", "datasets", "gguf",
    "llama-cpp-python", "compressed-tensors",
)  # fmt: skip
# The modules that decide a stage's result. They are hashed, which needs no import (of lm-eval: seconds).
BASE_CODE = ("dequantize", "gguf_tokenizer")  # a base in a GGUF file is named by that file alone
SOLVER_CODE = (
    "compress", "solve", "masks", "grids", "layers", "allocate", "checkpoint", "families",
    "../zoo/runner/format", *BASE_CODE,
)  # fmt: skip
RECOVER_CODE = (
    "recover/train", "recover/losses", "recover/masks", "recover/prune", "recover/rounding", "recover/shards",
    "recover/student", "recover/write", "recover/data", "recover/tokens", "recover/skill",
    "recover/written", "recover/resample", "continuation", *SOLVER_CODE,
)  # fmt: skip
AVERAGE_CODE = ("average", "recover/write", "checkpoint", "families", *BASE_CODE)
ANSWERS_CODE = ("shards", "lm", "zoo_gguf", "zoo_sparse", "evaluate", *BASE_CODE)
EVALUATION_CODE = ("harness", "text", *ANSWERS_CODE)
TASKS = Path(__file__).parent / "tasks"
PACK_CODE = tuple(
    f"../zoo/{name}"
    for name in ("runner/pack", "runner/grid", "runner/config", "runner/checkpoint", "runner/format",
                 "runner/packed", "compressed_tensors")
) + BASE_CODE  # fmt: skip
EXPORT_CODE = ("export_gguf", "export_compressed", "checkpoint", "grids", "families", *PACK_CODE)
RUNNER_CODE = tuple(
    f"../zoo/runner/{name}" for name in ("engine", "generate", "native", "numpy_engine", "rope", "sample")
)
KERNELS = Path(__file__).parents[1] / "zoo" / "runner" / "csrc"

Subject = Literal["entry", "base"]


def stage_key(*parts: Any, code: Sequence[str]) -> str:
    """Hash of a stage's settings and inputs, its code, and the libraries."""
    sources = [sha256_file(Path(__file__).parent / f"{module}.py") for module in code]
    return sha256_json([list(parts), sources, library_versions()])


def library_versions() -> dict[str, str]:
    found = {"sparse-zoo": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def text_revision(source: str, column: str) -> str:
    """What a text is, before it is read as a whole: its content's hash, or its name on the Hub."""
    if source.startswith("hub:"):
        return source
    path = text.expand(source)
    return sha256_file(path) if path.is_file() else text.stream(source, column=column).revision


def training_revisions(step: Recover) -> list[str]:
    """What the texts and prompts of a training are."""
    named = [(data.source, data.column) for data in step.data]
    named += [(skill.prompts, skill.column) for skill in step.skills]
    named += [(written.source, written.column) for written in step.written]
    return [text_revision(source, column) for source, column in named]


def calibrates(recipe: Recipe) -> bool:
    return any(step.calibrated for _, step in numbered(recipe.steps))


def calibration(recipe: Recipe, base_sha256: str) -> str:
    """Of the calibration windows; "" if no step looks at any."""
    if not calibrates(recipe):
        return ""
    setting = recipe.calibration
    revision = None if setting.source == "self" else text_revision(setting.source, setting.column)
    return stage_key(
        "calibrate",
        setting.model_dump(),
        base_sha256,
        revision,
        code=("calibrate", "continuation", "evaluate", "text", *BASE_CODE),
    )


def compression(step: Prune | Quantize, before: str, windows: str) -> str:
    """Of a step on the model of key `before`."""
    return stage_key("step", step.model_dump(), before, windows if step.calibrated else "", code=SOLVER_CODE)


def recovery(step: Recover, before: str, models: Sequence[str]) -> str:
    """Of a training of the model of key `before`; models: the hashes of `step.models`."""
    return stage_key(
        "recover", step.model_dump(), before, models, training_revisions(step), code=RECOVER_CODE
    )


def average(step: Average, models: Sequence[str]) -> str:
    """Of a mean of models of these keys, the first of which is the one that the others branched off."""
    return stage_key("average", step.weights, models, code=AVERAGE_CODE)


def perplexity(passage: Passage, subject: Subject, model: str) -> str:
    return stage_key("perplexity", subject, model, _passage(passage), code=EVALUATION_CODE)


def by_protocol(setting: Evaluation, subject: Subject) -> Mapping[tuple[int, int | None], list[str]]:
    """Tasks of a subject that one call of the harness can take together, by (few_shot, limit)."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for task in setting.tasks:
        if subject == "base" and not task.base:
            continue
        groups.setdefault((task.few_shot, task.limit), []).append(task.name)
    return groups


def tasks(
    names: Sequence[str],
    few_shot: int,
    limit: int | None,
    data: Path | None,
    subject: Subject,
    model: str,
    packed: bool,
) -> str:
    """packed: whether our runner answers, whose kernels have no version of their own."""
    return stage_key(
        "tasks", subject, model, names, few_shot, limit, data and _tree(data), _tree(TASKS),
        packed and _tree(KERNELS), code=EVALUATION_CODE + (RUNNER_CODE if packed else ()),
    )  # fmt: skip


@cache
def _tree(folder: Path) -> str:
    return sha256_tree(folder)


def pack(model: str) -> str:
    return stage_key("pack", model, code=PACK_CODE)


def packs(recipe: Recipe) -> bool:
    return any(isinstance(export, Packed) for export in recipe.exports)


def gguf(kind: str, model: str) -> str:
    """Of a GGUF file's tensors."""
    return stage_key("gguf", kind, model, code=EXPORT_CODE)


def fidelity(passage: Passage, base_sha256: str, model: str) -> str:
    return stage_key("fidelity", base_sha256, model, _passage(passage), code=EVALUATION_CODE)


def _passage(passage: Passage) -> list[Any]:
    return [passage.model_dump(), text_revision(passage.text, passage.column)]


def export(recipe: Recipe, model: str) -> str:
    settings = [setting.model_dump() for setting in recipe.exports]
    return stage_key("export", settings, model, recipe.name, code=EXPORT_CODE)


def step_name(number: str, step: Step) -> str:
    method = f" ({step.method})" if isinstance(step, Prune | Quantize) else ""
    return f"{number}. {step.kind}{method}"


@dataclass(frozen=True)
class Made:
    """A step and what names the model that it makes."""

    number: str
    step: Step
    key: str
    of: tuple[str, ...]  # keys of the models it takes, then of those of earlier steps that it learns from

    @property
    def name(self) -> str:
        """Of the stage."""
        return step_name(self.number, self.step)


class _Unknown(Exception):
    pass


def steps(
    recipe: Recipe, base_sha256: str, windows: str, sha256_of: Callable[[str], str | None]
) -> list[Made]:
    """Every step, those of branches too, up to one of which `sha256_of` does not know a model."""
    found: list[Made] = []

    def named(name: str | None) -> str:
        number = made_by(name)
        if name is None:
            return base_sha256
        if number is not None:
            return next(made.key for made in found if made.number == number)
        if (sha256 := sha256_of(name)) is None:
            raise _Unknown
        return sha256

    def make(number: str, step: Step, taken: list[str]) -> str:
        teachers: list[str] = []
        if isinstance(step, Recover):
            key = recovery(step, taken[0], [named(name) for name in step.models])
            teachers = [named(name) for name in step.models if made_by(name) is not None]
        elif isinstance(step, Average):
            key = average(step, taken)
        else:
            key = compression(step, taken[0], windows)
        found.append(Made(number, step, key, (*taken, *teachers)))
        return key

    with suppress(_Unknown):
        follow(recipe.steps, base_sha256, make)
    return found


def expected(
    recipe: Recipe, base_sha256: str, sha256_of: Callable[[str], str | None]
) -> list[tuple[str, str]]:
    """(name, key) of every stage that a run would do now, but the verification, which is the machine's.

    `sha256_of` gives the hash of a teacher's files by its source; where it is not known, the list ends with
    the stage before.
    """
    found: list[tuple[str, str]] = []
    windows = calibration(recipe, base_sha256)
    if windows:
        found.append(("calibrate", windows))
    outputs = steps(recipe, base_sha256, windows, sha256_of)
    found += [(made.name, made.key) for made in outputs]
    if len(outputs) < len(numbered(recipe.steps)):
        return found
    model = outputs[-1].key if outputs else base_sha256
    setting = recipe.evaluation
    if packs(recipe):
        found.append(("pack", pack(model)))
    asked = pack(model) if packs(recipe) else model
    subjects: tuple[tuple[Subject, str, str], ...] = (
        ("base", base_sha256, base_sha256),
        ("entry", model, asked),
    )
    for subject, key, of_tasks in subjects:
        for passage in setting.perplexity:
            found += [(f"perplexity of the {subject}", perplexity(passage, subject, key))]
        packed = subject == "entry" and packs(recipe)
        found += _tasks(setting, subject, f"the {subject}", of_tasks, packed)
    if setting.fidelity is not None:
        found.append(("fidelity to the base", fidelity(setting.fidelity, base_sha256, model)))
    found.append(("export", export(recipe, model)))
    for name, kind in recipe.asked_gguf.items():
        for passage in setting.perplexity[:1]:
            found.append((f"perplexity of {name}", perplexity(passage, "entry", gguf(kind, model))))
        found += _tasks(setting, "entry", name, gguf(kind, model), packed=False)
    return found


def _tasks(setting: Evaluation, subject: Subject, of: str, model: str, packed: bool) -> list[tuple[str, str]]:
    data = None if setting.data is None else text.expand(setting.data)
    return [
        (f"{', '.join(names)} of {of}", tasks(names, few_shot, limit, data, subject, model, packed))
        for (few_shot, limit), names in by_protocol(setting, subject).items()
    ]
