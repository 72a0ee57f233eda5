"""`python -m pipelines.recover`: prune and recover on a machine that has torch and transformers only.

Everything stands in one folder and is resumable: texts, finished steps and the states of trainings under
`store/`, which several runs may share, so that what their recipes have in common is made once; and the last
model, finished or not, under `model/`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import keys
from pipelines.recipe import Recipe, Recover, Step, TrainingText, load
from pipelines.recover.tokens import training_tokens
from zoo.errors import UsageError, ZooError
from zoo.files import Store, sha256_bytes, sha256_file, sha256_json, write_json
from zoo.formats import weight_files
from zoo.progress import say

WINDOWS, WINDOW = 40, 512  # of the reported perplexity
RUN = "run.json"
Models = Mapping[str | None, tuple[Path, str]]  # as a recipe names them: folder, and what names its weights


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        if options.job is not None:
            from pipelines.recover.train import Job, recover

            recover(Job.model_validate_json(options.job.read_text()))
            return
        model = options.out / "model"
        finished = _run(options) if options.recipe is not None else True
        if options.evaluate is not None:
            _evaluate(model if model.is_dir() else options.model, options.evaluate)
        if not finished:
            say("the budget is not used up: run the same command with --resume to go on")
    except ZooError as error:
        sys.exit(f"zoo: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.recover", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder: the base, or one that is pruned already")
    parser.add_argument("--teacher", type=Path, help="model folder (default: --model)")
    parser.add_argument(
        "--named",
        action="append",
        default=[],
        metavar="NAME=DIR",
        type=_named,
        help="folder of a model that the recipe names as a teacher, or as who writes; repeatable",
    )
    parser.add_argument("--recipe", type=Path, help="its steps are done; its base is --model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="text or token ids instead of the recipe's `data`; repeatable",
    )
    parser.add_argument(
        "--written",
        action="append",
        default=[],
        help="text or token ids instead of the recipe's `written`; repeatable",
    )
    parser.add_argument("--out", type=Path, help="folder for everything that is made")
    parser.add_argument("--store", type=Path, help="shared by several runs (default: in --out)")
    parser.add_argument("--seconds", type=float, help="time of this call, after which it saves and ends")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument(
        "--evaluate", type=Path, metavar="TEXT.txt",
        help=f"print the perplexity on the first {WINDOWS} windows of {WINDOW} tokens; never tune on it",
    )  # fmt: skip
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, found, folder = text.rpartition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=DIR")
    return name, Path(folder)


def _run(options: argparse.Namespace) -> bool:
    """Do the recipe's steps. False if the time of the call was over before."""
    if options.model is None or options.out is None:
        raise UsageError("--recipe needs --model and --out")
    recipe = _with_texts(load(options.recipe, list(options.changes)), options.data, options.written)
    models = _models(recipe, options)
    folder: Path = options.model.absolute()
    key = _fingerprint(folder)
    out: Path = options.out.absolute()
    _claim(out, _identity(recipe, key, models), options.resume)
    store = Store(options.store or out / "store")
    windows = None
    if any(step.calibrated for step in recipe.steps):
        windows = _windows(recipe, folder, out)
    for step in recipe.steps:
        tokens: list[Path] = []
        made_of = [step.model_dump(mode="json"), key]
        if isinstance(step, Recover):
            tokens = training_tokens(step, folder, models, store)
            made_of += [[models[name][1] for name in step.models], [sha256_file(path) for path in tokens]]
        elif windows is not None and step.calibrated:
            made_of += [sha256_bytes(windows.numpy().tobytes())]
        code = keys.RECOVER_CODE if isinstance(step, Recover) else keys.SOLVER_CODE
        key = keys.stage_key(*made_of, code=code)
        with store.locked(key):
            if store.get(key) is None and not _made(
                step, folder, models, tokens, windows, key, store, options
            ):
                return False
        folder = store.path(key)
    if recipe.steps:
        _publish(folder, out)
    say(f"the model is in {out / 'model'}")
    return True


def _made(
    step: Step, folder: Path, models: Models, tokens: list[Path], windows: Any, key: str, store: Store,
    options: argparse.Namespace,
) -> bool:  # fmt: skip
    """Do a step and put what it made into the store; if the time is over before, into the model folder."""
    out: Path = options.out.absolute()
    fresh = out / ".made"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    state = store.root / "training" / key
    try:
        if isinstance(step, Recover):
            if not _recover(step, folder, models, tokens, fresh, state, options.seconds, store):
                _publish(fresh, out)
                return False
        else:
            from pipelines.compress import run_step

            run_step(step, folder, fresh, windows)
        with store.writing(key) as kept:
            for path in fresh.iterdir():
                shutil.move(path, kept / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(state, ignore_errors=True)
    return True


def _models(recipe: Recipe, options: argparse.Namespace) -> Models:
    """The folders of all models that the recipe names, and what names their weights; None: of its base."""
    given = {None: options.teacher or options.model, **dict(options.named)}
    trainings = [step for step in recipe.steps if isinstance(step, Recover)]
    if options.teacher is not None:
        given |= {step.teacher: options.teacher for step in trainings}
    for folder in (options.model, *given.values()):
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is not a model folder", saw="no config.json in it")
    if missing := {name for step in trainings for name in step.models} - given.keys():
        raise UsageError(
            f"the recipe learns from {', '.join(sorted(map(str, missing)))}",
            try_=f"--named {min(map(str, missing))}=DIR, or --written FILE for what a model was to write",
        )
    return {name: (folder.absolute(), _fingerprint(folder)) for name, folder in given.items()}


def _identity(recipe: Recipe, model: str, models: Models) -> str:
    """Of a run: what it makes, and of what."""
    steps = recipe.model_dump(mode="json", exclude={"evaluation", "exports", "verification"})
    return sha256_json([steps, model, sorted((name or "", sha256) for name, (_, sha256) in models.items())])


def _recover(
    step: Recover, folder: Path, models: Models, tokens: list[Path], fresh: Path, state: Path,
    seconds: float | None, store: Store,
) -> bool:  # fmt: skip
    from pipelines.recover.resample import alternatives
    from pipelines.recover.train import Job, recover

    teacher, teacher_id = models[step.teacher]
    others = alternatives(step, tokens, teacher, teacher_id, store)
    job = Job(step=step, student=folder, teacher=teacher, tokens=tokens, alternatives=others, out=fresh,
              state=state, stop_after=seconds)  # fmt: skip
    return recover(job).used(step.budget) >= 1.0


def _with_texts(recipe: Recipe, data: Sequence[str], written: Sequence[str]) -> Recipe:
    """The recipe with texts at hand in place of its `data` or `written`, where some are given."""

    def changed(step: Recover) -> Recover:
        here = [TrainingText(source=source) for source in data] or step.data
        there = [TrainingText(source=source) for source in written]
        change = {"data": [*here, *there], "written": [] if there else step.written}
        return step.model_copy(update=change)

    steps = [changed(step) if isinstance(step, Recover) else step for step in recipe.steps]
    return recipe.model_copy(update={"steps": steps})


def _claim(out: Path, identity: str, resume: bool) -> None:
    """Refuse to mix two runs in one folder, or to go on unasked."""
    path = out / RUN
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"identity": identity})
        return
    if json.loads(path.read_bytes()).get("identity") != identity:
        raise UsageError(
            f"{out} holds a run of another recipe, model or text", try_="another --out for this one"
        )
    if not resume:
        raise UsageError(f"{out} holds this run already", try_="--resume, or another --out")


def _fingerprint(folder: Path) -> str:
    return sha256_json([[path.name, sha256_file(path)] for path in sorted(weight_files(folder))])


def _windows(recipe: Recipe, model: Path, out: Path) -> Any:
    from pipelines import calibrate

    folder = out / "calibration"
    if not (folder / calibrate.FILE).is_file():
        folder.mkdir(exist_ok=True)
        calibrate.calibrate(recipe.calibration, model, folder)
    return calibrate.load_windows(folder)


def _publish(folder: Path, out: Path) -> None:
    """`folder`'s files as `out`/model, in one rename."""
    fresh, old = out / ".model.new", out / ".model.old"
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, fresh)
    if (out / "model").is_dir():
        (out / "model").rename(old)
    fresh.rename(out / "model")
    shutil.rmtree(old, ignore_errors=True)


def _evaluate(folder: Path | None, words: Path) -> None:
    if folder is None:
        raise UsageError("--evaluate needs --out of a run, or --model")
    from pipelines import evaluate, text

    model, tokenizer = evaluate.load_model(folder, _exact())
    found = text.read_text(str(words))
    ids = text.windows(text.token_ids(tokenizer, found), WINDOWS, WINDOW)
    (measured,) = evaluate.perplexity(model, ids, text=found, subject="entry")
    assert math.isfinite(measured.value)
    print(json.dumps({"folder": str(folder), **measured.model_dump()}))


def _exact() -> Any:
    """Perplexities are reported in float32, on whatever machine."""
    import torch

    return torch.float32


if __name__ == "__main__":
    main()
