"""The same questions for any models: `python -m benchmarks.accuracy MODEL... --tasks TASK,... --json OUT`.

MODEL is a model folder (transformers), a .gguf file (llama.cpp) or a packed .safetensors file (the sparse
runner); TASK is `name`, `name:limit`, `name@few_shot` or `name:limit@few_shot`. Data sets come from --data, a
folder laid out like the Hub, else from the Hub. Every task's figures are in OUT as soon as it is done; those
that are there, of the same bytes and settings, are not measured again. Prints them as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.evaluate import lm_eval_tasks
from pipelines.shards import Work, runner, work_on
from zoo.entry import Measurement
from zoo.errors import UsageError, ZooError
from zoo.files import Store, sha256_file, sha256_tree, write_json
from zoo.machine import this_machine
from zoo.progress import say

HARNESS = f"lm-eval {version('lm-eval')}"
TASK = re.compile(r"(?P<name>[^:@]+)(?::(?P<limit>\d+))?(?:@(?P<shots>\d+))?")


def parse(text: str) -> dict[str, Any]:
    """`name:limit@few_shot` -> what `lm_eval_tasks` takes."""
    found = TASK.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"cannot read the task {text!r}", expected="name, name:limit or name:limit@few_shot")
    limit, shots = found["limit"], found["shots"]
    return {
        "task": found["name"],
        "limit": None if limit is None else int(limit),
        "few_shot": None if shots is None else int(shots),
    }


def measure(work: Work, task: dict[str, Any], data: Path | None) -> list[Measurement]:
    return lm_eval_tasks(
        work.model,
        [task["task"]],
        subject="entry",
        few_shot=task["few_shot"],
        limit=task["limit"],
        data=data,
        work=work,
    )


def show(models: list[str], results: list[dict[str, Any]]) -> None:
    """One row per model, one column per task and metric."""
    cells: dict[tuple[str, str], str] = {}
    for one in results:
        for raw in one["measurements"]:
            m = Measurement.model_validate(raw)
            name = f"{m.task} {m.metric}" + (f" {m.few_shot}-shot" if m.few_shot else "") + f" ({m.samples})"
            error = "" if m.stderr is None else f" ± {m.stderr:.4f}"
            cells[one["model"], name] = f"{m.value:.4f}{error}"
    columns = list(dict.fromkeys(name for _, name in cells))
    print(f"| model | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for model in models:
        print(f"| {model} | {' | '.join(cells.get((model, name), '') for name in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tasks", required=True, help="e.g. arc_easy:500,hellaswag:1000@10")
    parser.add_argument("--json", type=Path, required=True, help="what is measured goes here")
    parser.add_argument("--workers", type=int, help="processes; default: what is worth it")
    shared = Path(os.environ.get("ZOO_SHARED") or "../shared") / "data" / "hub"
    parser.add_argument("--data", type=Path, default=shared if shared.is_dir() else None)
    arguments = parser.parse_args()
    try:
        tasks = [parse(text) for text in arguments.tasks.split(",")]
        results = json.loads(arguments.json.read_bytes()) if arguments.json.exists() else []
        store = Store(arguments.json.with_suffix(".answers"))
        for model in arguments.models:
            sha256 = sha256_tree(model) if model.is_dir() else sha256_file(model)
            work = work_on(model, sha256, store, arguments.workers)
            for task in tasks:
                settings = {"sha256": sha256, "runner": runner(model), **task, "harness": HARNESS}
                if any(settings.items() <= one.items() for one in results):
                    say(f"{model.name}, {task['task']}: measured before")
                    continue
                began = time.monotonic()
                found = measure(work, task, None if arguments.data is None else arguments.data.absolute())
                took = {"seconds": round(time.monotonic() - began, 1), "machine": this_machine().cpu}
                what = {"model": str(model), **settings, **took}
                results.append({**what, "measurements": [m.model_dump() for m in found]})
                write_json(arguments.json, results)
        show([str(model) for model in arguments.models], results)
    except (ZooError, OSError) as error:
        sys.exit(f"accuracy: {error}")


if __name__ == "__main__":
    main()
