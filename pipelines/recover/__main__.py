"""`python -m pipelines.recover`: prune and recover on a machine that has torch and transformers only.

Everything stands in one folder and is resumable: texts, finished steps and the states of trainings under
`store/`, which several runs may share, so that what their recipes have in common is made once; and the last
model, finished or not, under `model/`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.recipe import Average, Recipe, Recover, TrainingText, load, made_by, numbered
from pipelines.recover.steps import Models, fingerprint, run_steps
from zoo.errors import UsageError, ZooError
from zoo.files import Store
from zoo.progress import say

WINDOWS, WINDOW = 40, 512  # of the reported perplexity


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        if options.job is not None:
            from pipelines.recover.launch import work

            sys.exit(work(options.job))
        finished = _run(options) if options.recipe is not None else True
        if options.evaluate is not None:
            model = None if options.out is None else options.out / "model"
            _evaluate(model if model is not None and model.is_dir() else options.model, options.evaluate)
        if not finished:
            say("the budget is not used up: run the same command with --resume to go on")
    except ZooError as error:
        sys.exit(f"zoo: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.recover", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder: the base, or one that is pruned already")
    parser.add_argument(
        "--teacher",
        type=Path,
        help="of every step but those that learn from another step; default: as the recipe says",
    )
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
    if made_by(name) is not None:
        raise argparse.ArgumentTypeError(f"{name} is made by the recipe itself, or found in --store")
    return name, Path(folder)


def _run(options: argparse.Namespace) -> bool:
    """Do the recipe's steps. False if the time of the call was over before."""
    if options.model is None or options.out is None:
        raise UsageError("--recipe needs --model and --out")
    recipe = _with_texts(load(options.recipe, list(options.changes)), options.data, options.written)
    models = _models(recipe, options)
    out: Path = options.out.absolute()
    store = Store(options.store or out / "store")
    done = run_steps(recipe, options.model.absolute(), models, out, store, options.seconds, options.resume)
    if done:
        say(f"the model is in {out / 'model'}")
    return done


def _models(recipe: Recipe, options: argparse.Namespace) -> Models:
    """The folders of all models that the recipe names, and what names their content; None: of its base."""
    given: dict[str | None, Path] = {None: options.teacher or options.model}
    if options.teacher is not None:
        trainings = [step for _, step in numbered(recipe.steps) if isinstance(step, Recover)]
        given |= {step.teacher: options.teacher for step in trainings if made_by(step.teacher) is None}
    given |= dict(options.named)
    for folder in (options.model, *given.values()):
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is not a model folder", saw="no config.json in it")
    if missing := recipe.models - given.keys():
        raise UsageError(
            f"the recipe learns from {', '.join(sorted(map(str, missing)))}",
            try_=f"--named {min(map(str, missing))}=DIR, or --written FILE for what a model was to write",
        )
    return {name: (folder.absolute(), fingerprint(folder)) for name, folder in given.items()}


def _with_texts(recipe: Recipe, data: Sequence[str], written: Sequence[str]) -> Recipe:
    """The recipe with texts at hand in place of its `data` or `written`, where some are given."""
    ours = [TrainingText(source=source) for source in data]
    theirs = [TrainingText(source=source) for source in written]

    def here(step: Any) -> Any:
        change: dict[str, Any] = {}
        if isinstance(step, Average):
            change = {"branches": [[here(one) for one in branch] for branch in step.branches]}
        elif isinstance(step, Recover):
            change = {"data": [*(ours or step.data), *theirs], "written": [] if theirs else step.written}
        return step.model_copy(update=change)

    return recipe.model_copy(update={"steps": [here(step) for step in recipe.steps]})


def _evaluate(folder: Path | None, words: Path) -> None:
    if folder is None:
        raise UsageError("--evaluate needs --out of a run, or --model")
    from pipelines import evaluate, text

    model, tokenizer = evaluate.load_model(folder, torch.float32)  # on whatever machine
    found = text.read_text(str(words))
    ids = text.windows(text.token_ids(tokenizer, found), WINDOWS, WINDOW)
    (measured,) = evaluate.perplexity(model, ids, text=found, subject="entry")
    assert math.isfinite(measured.value)
    print(json.dumps({"folder": str(folder), **measured.model_dump()}))


if __name__ == "__main__":
    main()
