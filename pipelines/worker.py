"""One job in a process of its own, started by an executor: `python -m pipelines.worker`.

The first line of standard input is the `Task`; the rest of it is a lifeline: when it closes, whoever started
this is gone, and so is this soon. The last line of standard output is the `Ended`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal

from zoo import logs
from zoo.entry import Record
from zoo.errors import ZooError
from zoo.jobs.joblist import Needs, StageKind
from zoo.jobs.transient import transient
from zoo.registry import open_registry
from zoo.registry.leases import Lease
from zoo.shared_store import open_store

GRACE_S = 6.0  # between asking a worker to end and ending it


class Task(Record):
    """What a worker does. It comes by standard input, as a registry's URL may hold a password."""

    job: str
    recipe: str
    overrides: list[str]
    store: str
    shared: str | None = None  # URL of the store that machines share
    registry: str
    lease_token: int
    lease_holder: str
    needs: Needs = Needs()  # to be reserved on a cluster
    until: str | None = None  # the part of the recipe after which it ends


class Ended(Record):
    """How a worker ended."""

    status: Literal["done", "failed", "interrupted"]
    transient: bool = False  # the same may succeed a little later
    failure: str | None = None


def main(work: Callable[[Task], Ended] | None = None) -> None:
    """Read the task, do it (`work` stands in for `make` in tests of schedulers), and answer."""
    task = Task.model_validate_json(sys.stdin.readline())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is log
    os.environ[logs.JOB] = task.job
    threading.Thread(target=_end_with_lifeline, name="lifeline", daemon=True).start()
    ended = _ended(task, work or make)
    print(ended.model_dump_json(), file=answer, flush=True)
    os._exit(0)  # threads of native libraries may not end by themselves


def make(task: Task) -> Ended:
    """Make the entry, under the task's lease."""
    from pipelines.recipe import load
    from pipelines.run import PartDone, run

    recipe = load(Path(task.recipe), task.overrides)
    registry = open_registry(task.registry)
    registry.fence = Lease(task.job, task.lease_holder, task.lease_token)
    try:
        entry = run(recipe, open_store(Path(task.store), task.shared), registry, task.until)
    except PartDone:
        return Ended(status="done")
    if entry.status == "failed":
        return Ended(status="failed", failure=logs.redact(entry.failure or "not verified"))
    return Ended(status="done")


def parts(task: Task) -> list[Task]:
    """The task as a chain of tasks that a cluster may place apart: one where all of it needs the same."""
    from pipelines.keys import step_name
    from pipelines.recipe import Recover, load, numbered

    recipe = load(Path(task.recipe), task.overrides)
    kinds: list[tuple[str | None, StageKind]] = [
        (step_name(number, step), "recover" if isinstance(step, Recover) else "compress")
        for number, step in numbered(recipe.steps)
    ]
    kinds.append(("evaluate", "evaluate"))
    if recipe.evaluation.gguf:  # whose files have to be there
        kinds += [("export", "export"), ("gguf", "evaluate")]
    kinds.append((None, "export"))  # the verification, too
    chain: list[Task] = []
    for until, kind in kinds:
        needs = task.needs.of(kind)
        if chain and chain[-1].needs == needs:
            chain.pop()  # it goes on to the end of this one
        chain.append(task.model_copy(update={"needs": needs, "until": until}))
    return chain


def _ended(task: Task, work: Callable[[Task], Ended]) -> Ended:
    try:
        _on_signals(signal.default_int_handler)
        try:
            return work(task)
        finally:  # whoever asks now has its answer in a moment
            _on_signals(signal.SIG_IGN)
    except KeyboardInterrupt:
        return Ended(status="interrupted", failure="stopped")
    except Exception as error:  # a job's failure, whatever it is, is its scheduler's news
        expected = isinstance(error, ZooError | OSError)
        logs.tell("failed", str(error) if expected else traceback.format_exc(), level="error")
        return Ended(status="failed", transient=transient(error), failure=_in_words(error))


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _in_words(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    saw = getattr(error, "saw", None)
    said = first if isinstance(error, ZooError) else f"{type(error).__name__}: {first}"
    return logs.redact(f"{said} ({saw})" if saw else said)[:500]


def _end_with_lifeline() -> None:
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
