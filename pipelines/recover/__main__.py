"""`python -m pipelines.recover`: prune and recover on a machine that has torch and transformers only.

Everything stands in one folder and is resumable: finished steps under `steps/`, the state of a training
under `state/`, its tokenized text under `store/`, and the last model, finished or not, under `model/`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe, Recover, TrainingText, load
from zoo.errors import UsageError, ZooError
from zoo.files import Store, sha256_file, sha256_json, write_json
from zoo.formats import weight_files
from zoo.progress import say

WINDOWS, WINDOW = 40, 512  # of the reported perplexity
RUN = "run.json"


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
    parser.add_argument("--recipe", type=Path, help="its steps are done; its base is --model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="text or token ids instead of the recipe's `data` and `written`; repeatable",
    )
    parser.add_argument("--out", type=Path, help="folder for everything that is made")
    parser.add_argument("--seconds", type=float, help="time of this call, after which it saves and ends")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument(
        "--evaluate", type=Path, metavar="TEXT.txt",
        help=f"print the perplexity on the first {WINDOWS} windows of {WINDOW} tokens; never tune on it",
    )  # fmt: skip
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> bool:
    """Do the recipe's steps. False if the time of the call was over before."""
    if options.model is None or options.out is None:
        raise UsageError("--recipe needs --model and --out")
    if not (options.model / "config.json").is_file():
        raise UsageError(f"{options.model} is not a model folder", saw="no config.json in it")
    changes = list(options.changes)
    recipe = load(options.recipe, changes)
    if options.data:
        recipe = _with_data(recipe, options.data)
    trainings = [step for step in recipe.steps if isinstance(step, Recover)]
    if any(step.teacher for step in trainings) and options.teacher is None:
        raise UsageError("the recipe names another teacher", try_="--teacher DIR")
    others = {name for step in trainings for name in step.models if name != step.teacher}
    if others:
        raise UsageError(
            f"the recipe trains on what {', '.join(sorted(map(str, others)))} writes",
            try_="`python -m pipelines.recover.written`, then --data with that file and all other texts",
        )
    teacher = options.teacher or options.model
    out: Path = options.out.absolute()
    identity = sha256_json(
        [recipe.model_dump(mode="json", exclude={"evaluation", "exports", "verification"}),
         *(_fingerprint(folder) for folder in (options.model, teacher))]
    )  # fmt: skip
    _claim(out, identity, options.resume)
    folder: Path = options.model.absolute()
    windows = None
    if any(step.calibrated for step in recipe.steps):
        windows = _windows(recipe, folder, out)
    for number, step in enumerate(recipe.steps, 1):
        target = out / "steps" / f"{number}-{step.kind}"
        if not target.is_dir():
            fresh = target.with_name(f".{target.name}.partial")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            if isinstance(step, Recover):
                state = out / "state" / str(number)
                finished = _recover(step, folder, teacher.absolute(), fresh, state, options.seconds, out)
                if not finished:
                    _publish(fresh, out)
                    return False
                shutil.rmtree(state, ignore_errors=True)
            else:
                from pipelines.compress import run_step

                run_step(step, folder, fresh, windows)
            fresh.rename(target)
        folder = target
    if folder.parent == out / "steps":
        _publish(folder, out)
    say(f"the model is in {out / 'model'}")
    return True


def _recover(
    step: Recover, folder: Path, teacher: Path, fresh: Path, state: Path, seconds: float | None, out: Path
) -> bool:
    from pipelines.recover.resample import alternatives
    from pipelines.recover.tokens import training_tokens
    from pipelines.recover.train import Job, recover

    store, teacher_id = Store(out / "store"), _fingerprint(teacher)
    tokens = training_tokens(step, folder, {step.teacher: (teacher, teacher_id)}, store)
    others = alternatives(step, tokens, teacher, teacher_id, store)
    job = Job(step=step, student=folder, teacher=teacher, tokens=tokens, alternatives=others, out=fresh,
              state=state, stop_after=seconds)  # fmt: skip
    return recover(job).used(step.budget) >= 1.0


def _with_data(recipe: Recipe, sources: Sequence[str]) -> Recipe:
    change = {"data": [TrainingText(source=source) for source in sources], "written": []}
    steps = [s.model_copy(update=change) if isinstance(s, Recover) else s for s in recipe.steps]
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
