"""The process in which lm-eval runs: `python -m pipelines.harness REQUEST ANSWER`.

Reads a JSON request (see `evaluate.lm_eval_tasks`), writes {"measurements": [...]} or {"error": {...}}, and
tells its progress on standard output; everything libraries have to say goes to standard error.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import datasets
import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from pipelines import shards
from pipelines.shards import Kind, Work
from zoo.entry import Direction, Measurement
from zoo.errors import ZooError, last_line
from zoo.files import sha256_file, sha256_json, sha256_tree

TASKS = Path(__file__).parent / "tasks"
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
BOOTSTRAP = 1000  # resamples for the standard error of metrics that are not means
METRICS = {"acc": "accuracy", "acc_norm": "accuracy_norm"}  # others keep lm-eval's name
UNITS = {"bits_per_byte": "bits/byte"}
LOWER_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score"}


class Answered(LM):  # type: ignore[misc]
    """A model of lm-eval whose answers come from `pipelines.shards`, from whatever process or machine."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self.title = ""
        self.progress: TextIO = sys.stderr
        self.context_length = 0
        self.dtype = ""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._ask("generate_until", requests)

    def _ask(self, kind: Kind, requests: list[Instance]) -> list[Any]:
        documents = [(request.task_name, request.doc_id) for request in requests]
        cut = shards.shards(kind, [request.args for request in requests], documents)
        left = len(requests)

        def tell(count: int) -> None:
            nonlocal left  # a shard that is done twice is counted once
            self.progress.write("\n" * min(count, left))
            self.progress.flush()
            left -= min(count, left)

        print(json.dumps([self.title, left]), file=self.progress, flush=True)
        found = shards.answered(self._work.model_copy(update={"shards": cut}), tell)
        tell(left)
        self.context_length, self.dtype = found.context_length, found.dtype
        return found.answers


def evaluate(request: Mapping[str, Any], progress: TextIO) -> list[Measurement]:
    """Measurements of every requested task. Tasks and their data are loaded before any model."""
    manager = _manager(request["tasks"])
    tasks = {name: _load(manager, name) for name in request["tasks"]}
    lm = Answered(Work.model_validate(request["work"]))
    lm.progress = progress
    measurements = []
    for lm.title, loaded in tasks.items():
        results = _run(lm, manager, lm.title, loaded, request["few_shot"], request["limit"])
        common = {
            "subject": request["subject"],
            "limit": request["limit"],
            "context_length": lm.context_length,
            "harness": f"lm-eval {lm_eval.__version__}",
            "dtype": lm.dtype,
        }
        measurements += list(_measurements(results, lm.title, loaded, common))
    return measurements


def _manager(names: list[str]) -> TaskManager:
    """An index of the tasks: of ours alone, when that will do, because lm-eval's takes seconds to make."""
    ours = TaskManager(include_path=TASKS, include_defaults=False)
    if set(names) <= set(ours.all_tasks):
        return ours
    every = TaskManager(include_path=TASKS)
    for name in names:
        if name not in every.all_tasks:
            near = difflib.get_close_matches(name, every.all_tasks, n=3)
            raise ZooError(
                f"lm-eval {lm_eval.__version__} has no task {name!r}",
                try_=f"one of {', '.join(near)}" if near else "lm-eval ls tasks, for their names",
            )
    return every


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    """{"tasks": name -> task, "groups": name -> group} with the data sets read."""
    try:
        return dict(manager.load([name]))
    except Exception as error:  # data sets fail to load in every type of exception
        traceback.print_exc()
        offline = datasets.config.HF_HUB_OFFLINE
        raise ZooError(
            f"the data of task {name} cannot be loaded",
            saw=last_line(error),
            expected=f"a folder named like the data set in {Path.cwd()}" if offline else None,
            try_=None if offline else "check the network, or name a folder laid out like the Hub",
        ) from error


def _run(
    lm: LM,
    manager: TaskManager,
    name: str,
    loaded: Mapping[str, Any],
    few_shot: int | None,
    limit: int | None,
) -> dict[str, Any]:
    group = loaded["groups"].get(name)
    try:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[group] if group is not None else list(loaded["tasks"].values()),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            **SEEDS,
        )
    except ZooError:
        raise
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            raise ZooError(
                f"memory ran out on task {name}", try_="evaluation.workers=1, or fewer few-shot examples"
            ) from error
        raise ZooError(f"task {name} failed in lm-eval", saw=last_line(error)) from error
    return dict(results)


def _measurements(
    results: Mapping[str, Any], name: str, loaded: Mapping[str, Any], common: Mapping[str, Any]
) -> Iterator[Measurement]:
    """One per metric of the task, of the group as a whole, or of every task where nothing sums them up."""
    aggregated = name in results.get("groups", {})
    for subject in [name] if aggregated else list(loaded["tasks"]):
        leaves = list(loaded["tasks"]) if aggregated else [subject]
        shots = {results["n-shot"][leaf] for leaf in leaves}
        version = results["versions"].get(subject)
        figures = results["results"][subject]
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            label = METRICS.get(metric, metric)
            yield Measurement(
                metric=label if kind == "none" else f"{label},{kind}",
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                unit=UNITS.get(metric, "1"),
                direction=_direction(results, subject, metric),
                task=subject,
                task_version=None if version is None else str(version),
                data_revision=_revision(loaded["tasks"][leaf] for leaf in leaves),
                samples=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                sample_unit="documents" if metric in LOWER_IS_BETTER else "questions",
                few_shot=min(shots) if len(shots) == 1 else None,
                **common,
            )


def _direction(results: Mapping[str, Any], task: str, metric: str) -> Direction:
    higher = results["higher_is_better"].get(task, {}).get(metric)
    if higher is None:
        higher = metric not in LOWER_IS_BETTER
    return "higher_is_better" if higher else "lower_is_better"


def _revision(tasks: Iterable[Any]) -> str | None:
    revisions = {_data_revision(task) for task in tasks}
    known = sorted(revision for revision in revisions if revision)
    if len(known) < len(revisions):
        return None
    return known[0] if len(known) == 1 else sha256_json(known)


def _data_revision(task: Any) -> str | None:
    """sha256 of our own file, of the local data set's folder, or the commit it was taken from on the Hub."""
    own = TASKS / f"{task.config.task}.jsonl"
    if own.is_file():
        return sha256_file(own)
    if task.config.dataset_path and Path(task.config.dataset_path).is_dir():
        return _folder_revision(task.config.dataset_path)
    for split in task.dataset.values():
        for url in split.info.download_checksums or {}:
            if commit := re.search(r"@([0-9a-f]{40})/", url):
                return commit[1]
    return None


@cache
def _folder_revision(folder: str) -> str:
    return sha256_tree(Path(folder))


def main(asked: Path, answered: Path) -> None:
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        found = evaluate(json.loads(asked.read_text()), progress)
        answer: dict[str, Any] = {"measurements": [measurement.model_dump() for measurement in found]}
    except ZooError as error:
        answer = {
            "error": {"what": error.what, "saw": error.saw, "expected": error.expected, "try_": error.try_}
        }
    answered.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
