"""The steps of a recipe in a store, one after the other, without the rest of the pipeline.

Keys are the hashes of what decides a step's result: its settings, the content of models and texts. The code
is no part of them, so that a training goes on after an update of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import average
from pipelines.recipe import STEP, Average, Calibration, Recipe, Recover, Step, follow, numbered
from pipelines.recover.tokens import training_tokens
from zoo.errors import UsageError
from zoo.files import Store, sha256_file, sha256_json, write_json
from zoo.progress import say

# as a step names them (None: the recipe's base): folder, and what names its content
Models = Mapping[str | None, tuple[Path, str]]
RUN = "run.json"
POLL_S = 1.0
CONTENT = (".safetensors", ".json", ".jinja", ".model")  # of a model: weights, settings, tokenizer
HOW = {"micro_batch", "recompute", "compile"}  # may change in a training: no result depends on it
WHAT = {"data", "written", "teacher"}  # of texts and models the content counts, wherever they are


def run_steps(
    recipe: Recipe, model: Path, models: Models, out: Path, store: Store, seconds: float | None, resume: bool
) -> bool:
    """Do the steps on `model`; the last one's model, finished or not, is then in `out`/model.

    seconds: until a training saves and ends, or waiting for another run that does the same step. False if
    they were over before. Raises UsageError for a folder that holds something else, or is not to be resumed.
    """
    settings = [recipe.calibration.model_dump(mode="json"), *(_said(step, HOW) for step in recipe.steps)]
    names = sorted((name or "", models[name][1]) for name in recipe.models)
    begin = fingerprint(model), model
    claim = _Claim(out, sha256_json([settings, begin[0], names]), resume)
    known = dict(models)
    run = _Run(known, out, store, None if seconds is None else time.monotonic() + seconds)
    windows = None
    if any(step.calibrated for _, step in numbered(recipe.steps)):
        windows = _calibrated(recipe.calibration, model, begin[0], store)

    def make(number: str, step: Step, taken: list[tuple[str, Path]]) -> tuple[str, Path]:
        before, folder = taken[0]
        tokens: list[Path] = []
        parts: list[Any] = [_said(step, HOW | WHAT), before]
        if isinstance(step, Recover):
            tokens = training_tokens(step, folder, known, store)
            parts += [known[step.teacher][1], [sha256_file(path) for path in tokens]]
        elif isinstance(step, Average):
            parts = [step.kind, step.weights, [key for key, _ in taken]]
        elif windows is not None and step.calibrated:
            parts += [sha256_file(windows)]
        key = sha256_json(parts)
        claim.begin(number, key)
        run.wait_for(key)
        with store.locked(key):
            if store.get(key) is None:
                run.make(step, key, [folder for _, folder in taken], tokens, windows)
            shutil.rmtree(run.state(key), ignore_errors=True)
        known[STEP + number] = store.path(key), key
        return key, store.path(key)

    try:
        _, folder = follow(recipe.steps, begin, make)
    except _TimeOver:
        return False
    if recipe.steps:
        _publish(folder, out)
    return True


class _TimeOver(Exception):
    """The time of the call; what a training has so far is saved."""


def _said(step: Step, without: set[str]) -> dict[str, Any]:
    """What a recipe says of a step, and of those of its branches, but for the keys `without`."""
    everywhere: Any = dict.fromkeys(without, True)
    everywhere["branches"] = {"__all__": {"__all__": without}}
    return step.model_dump(mode="json", exclude=everywhere)


def fingerprint(folder: Path) -> str:
    """What names the content of a model folder."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in CONTENT and path.is_file())
    return sha256_json([[path.name, sha256_file(path)] for path in paths])


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    models: Models
    out: Path
    store: Store
    deadline: float | None  # by the monotonic clock

    def left(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def state(self, key: str) -> Path:
        """Of a training that is not finished."""
        return self.store.root / "training" / key

    def wait_for(self, key: str) -> None:
        """Wait until no other run does this step. Raises _TimeOver if the time is over before."""
        if self.store.is_locked(key):
            say("  another run does this step: waiting for it")
        while self.store.is_locked(key):
            if self.left() == 0:
                raise _TimeOver
            time.sleep(POLL_S)

    def make(
        self,
        step: Step,
        key: str,
        taken: Sequence[Path],
        tokens: list[Path],
        windows: Path | None,
    ) -> None:
        """Do a step on the models in the folders `taken` and put what it made into the store. If the time is
        over before, what it has so far goes into the model folder, and _TimeOver is raised."""
        fresh = self.out / ".made"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            if isinstance(step, Recover):
                if not self._recovered(step, key, taken[0], tokens, fresh):
                    _publish(fresh, self.out)
                    raise _TimeOver
            elif isinstance(step, Average):
                average.run_step(step, taken, fresh)
            else:
                from pipelines.calibrate import load_windows
                from pipelines.compress import run_step

                run_step(step, taken[0], fresh, None if windows is None else load_windows(windows.parent))
            with self.store.writing(key) as kept:
                for path in fresh.iterdir():
                    shutil.move(path, kept / path.name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _recovered(self, step: Recover, key: str, folder: Path, tokens: list[Path], out: Path) -> bool:
        from pipelines.recover.resample import alternatives
        from pipelines.recover.train import Job, recover

        teacher, teacher_id = self.models[step.teacher]
        others = alternatives(step, tokens, teacher, teacher_id, self.store)
        job = Job(step=step, identity=key, student=folder, teacher=teacher, tokens=tokens,
                  alternatives=others, out=out, state=self.state(key), stop_after=self.left())  # fmt: skip
        return recover(job).used(step.budget) >= 1.0


def _calibrated(setting: Calibration, model: Path, model_id: str, store: Store) -> Path:
    """The file of calibration windows, made once."""
    from pipelines import calibrate, keys

    text = None if setting.source == "self" else keys.text_revision(setting.source, setting.column)
    key = sha256_json(["calibration", setting.model_dump(mode="json", exclude={"source"}), text, model_id])
    with store.locked(key):
        if store.get(key) is None:
            with store.writing(key) as out:
                calibrate.calibrate(setting, model, out)
    return store.path(key) / calibrate.FILE


class _Claim:
    """What `out` holds: so that two runs are never mixed in it, nor one begun anew unnoticed."""

    def __init__(self, out: Path, identity: str, resume: bool) -> None:
        self.path = out / RUN
        self.identity = identity
        self.keys: list[str] = []
        self.begun = 0  # steps
        if not self.path.is_file():
            out.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        found = json.loads(self.path.read_bytes())
        if found.get("identity") != identity:
            raise UsageError(
                f"{out} holds a run of another recipe, model or text", try_="another --out for this one"
            )
        if not resume:
            raise UsageError(f"{out} holds this run already", try_="--resume, or another --out")
        self.keys = found.get("steps", [])

    def begin(self, number: str, key: str) -> None:
        """Step `number` is next."""
        if self.keys[self.begun : self.begun + 1] not in ([], [key]):
            raise UsageError(
                f"{self.path.parent} was begun with another text or calibration",
                saw=f"step {number} would not go on from what it holds",
                try_="the same text again, or another --out",
            )
        self.keys[self.begun :] = [key]
        self.begun += 1
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"identity": self.identity, "steps": self.keys})


def _publish(folder: Path, out: Path) -> None:
    """`folder`'s files as `out`/model, in one rename."""
    fresh, old = out / ".model.new", out / ".model.old"
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, fresh, copy_function=shutil.copyfile)  # the store's files are read-only
    if (out / "model").is_dir():
        (out / "model").rename(old)
    fresh.rename(out / "model")
    shutil.rmtree(old, ignore_errors=True)
