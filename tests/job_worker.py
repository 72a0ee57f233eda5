"""A worker without torch: it records an entry as `zoo run` would, or fails, dies or hangs as it is told.

What it does for a job is the next word in the file BEHAVIOUR/<job>, one for each attempt; `done` at the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from pipelines import keys, sources
from pipelines.recipe import load
from pipelines.worker import Ended, Task, main
from tests.example import entry
from zoo import logs
from zoo.entry import Artifact, Entry, Stage
from zoo.files import sha256_bytes, write_json
from zoo.jobs.joblist import Job
from zoo.registry import open_registry
from zoo.registry.leases import Lease

RECIPE: dict[str, Any] = {
    "steps": [{"kind": "quantize", "method": "rtn", "grid": {"bits": 8, "group": 32}}],
    "evaluation": {"tasks": []},
}


def write_jobs(folder: Path, names: list[str], **group: Any) -> Path:
    """A job list of these jobs, their recipes, and a base model as far as a plan looks at it."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    for name in names:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "base": str(base), **RECIPE}))
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"jobs": [{"recipes": [f"{n}.yaml" for n in names], **group}]}))
    return path


def behave(store: Path, job: str, *words: str) -> None:
    """What the worker will do for this job at its next attempts."""
    folder = store / "behaviour"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / job).write_text(json.dumps(words))


def made_entry(job: Job | Task, store: Path, **changes: Any) -> Entry:
    """The entry that `zoo run` would record, as far as a plan looks at it; its one file is in the store."""
    recipe = load(Path(job.recipe), job.overrides)
    base = sources.peek(recipe.base, store)
    assert base.sha256
    folder = store / "entries" / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    data = b"weights of " + recipe.name.encode()
    (folder / "model.safetensors").write_bytes(data)
    stages = [
        Stage(name=name, key=key, status="done", seconds=0.1)
        for name, key in keys.expected(recipe, base.sha256, lambda _: None)
    ]
    made = entry(
        recipe.name,
        base_model=recipe.base,
        base_revision=base.revision,
        base_sha256=base.sha256,
        recipe=recipe.to_yaml(),
        recipe_sha256=sha256_bytes(recipe.to_yaml().encode()),
        versions=keys.library_versions(),
        stages=stages,
        status="verified",
        publications=[],
        artifacts=[
            Artifact(path="model.safetensors", kind="safetensors", size=len(data), sha256=sha256_bytes(data))
        ],
        **changes,
    )
    write_json(folder / "entry.json", made.model_dump(mode="json"))
    (folder / "README.md").write_text("card")
    return made


def work(task: Task) -> Ended:
    store = Path(task.store)
    plan = store / "behaviour" / task.job
    words = json.loads(plan.read_text()) if plan.exists() else []
    word = words[0] if words else "done"
    if words:
        write_json(plan, words[1:])
    registry = open_registry(task.registry)
    registry.fence = Lease(task.job, task.lease_holder, task.lease_token)
    run_id = registry.start_run(task.job, "0" * 64, os.getpid(), socket.gethostname())
    logs.tell("said", f"working as told: {word}")
    try:
        if word == "sleep":
            time.sleep(600)
        if word == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "transient":
            return Ended(status="failed", transient=True, failure="the network was away")
        if word == "fail":
            return Ended(status="failed", failure="it cannot work")
        if word == "tell-secret":
            print("the token is", os.environ["HF_TOKEN"], file=sys.stderr)
            return Ended(status="failed", failure=logs.redact(f"refused {os.environ['HF_TOKEN']}"))
        if word == "tell-task":
            print("I know", task.model_dump_json(), file=sys.stderr)
            raise RuntimeError(f"refused {task.registry}")
        if word == "slow":
            time.sleep(1.5)
        registry.put(made_entry(task, store))
    except KeyboardInterrupt:
        return Ended(status="interrupted", failure="stopped")
    registry.finish_run(run_id, "done", task.job)
    return Ended(status="done")


if __name__ == "__main__":
    main(work)
