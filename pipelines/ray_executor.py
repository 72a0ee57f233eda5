"""Workers on a Ray cluster: an actor runs the very worker of `pipelines.executors.Local`.

The machines share a store and the registry, and have the project installed. A job whose stages all need the
same is one actor; else it is a chain of them (`pipelines.worker.parts`), each placed where what it needs is
free, and each going on from what the store has. One that asks for several workers gets a placement group, all
of it at once, is in the first bundle itself, and fills the others as it likes (`pipelines.cluster`).

A job whose actor or machine is lost fails transiently, so the scheduler starts it again with the part that
was lost, elsewhere if that machine is gone. If the scheduler dies, Ray ends its actors, and they take their
workers along.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util import placement_group, remove_placement_group

from pipelines import cluster
from pipelines.cluster import Reserved
from pipelines.executors import Handle, Local, append
from pipelines.worker import GRACE_S, Ended, Task, parts
from zoo.errors import UsageError

LINES_EVERY_S = 1.0
POLL_S = 0.1


class OnRay:
    """An executor; `address`: of the cluster's head, or None for RAY_ADDRESS or one on this machine alone."""

    def __init__(self, address: str | None, module: str = "pipelines.worker") -> None:
        try:
            ray.init(
                address=address,
                namespace=cluster.NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False,
                ignore_reinit_error=True,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"cannot reach the Ray cluster at {address or 'RAY_ADDRESS'}",
                saw=str(error).splitlines()[0][:200],
                try_="ray start --head, on the machine that is to be the head",
            ) from error
        self._module = module
        self._done: Counter[tuple[str, int]] = Counter()  # parts of each job that are, by its lease

    def start(self, task: Task, log: Path, tell: Callable[[str], None]) -> Handle:
        lease = (task.job, task.lease_token)

        def say(line: str) -> None:
            tell(line)
            append(log, line)

        def part_done() -> None:
            self._done[lease] += 1

        return RayHandle(self._module, parts(task)[self._done[lease] :], say, part_done)

    def close(self) -> None:
        ray.shutdown()


class Host:
    """The actor: a worker, on the machine that Ray chose."""

    def __init__(self, module: str, task: str, group: str | None) -> None:
        cluster.hide_gpus_of_others()
        own = _here(Task.model_validate_json(task))
        if group is not None:
            os.environ[cluster.RESERVED] = _reserved(own, group).model_dump_json()
        self._lines: list[str] = []
        self._handle = Local(module).start(own, None, self._lines.append)

    def wait(self) -> str:
        while (ended := self._handle.poll()) is None:
            time.sleep(POLL_S)
        return ended.model_dump_json()

    def lines(self) -> list[str]:
        """What the worker said since this was asked last."""
        said = self._lines[:]
        del self._lines[: len(said)]
        return said

    def stop(self) -> None:
        self._handle.stop()


def _here(task: Task) -> Task:
    """The task with this machine's own folder; where the folder itself is what machines share, it stays."""
    own = os.environ.get("ZOO_STORE")
    return task if task.shared is None or not own else task.model_copy(update={"store": own})


def _reserved(task: Task, group: str) -> Reserved:
    address = ray.get_runtime_context().gcs_address
    store = Path(task.store).absolute()
    return Reserved(address=address, group=group, needs=task.needs, store=store, shared=task.shared)


class RayHandle:
    """A job: its parts one after the other, each in an actor of its own."""

    def __init__(
        self, module: str, chain: list[Task], tell: Callable[[str], None], part_done: Callable[[], None]
    ) -> None:
        self._module = module
        self._chain = chain
        self._tell = tell
        self._part_done = part_done
        self._asked = 0.0
        self._stopped: float | None = None  # when it was asked to
        self._group: Any = None  # of the part that runs, if it has several workers
        self._begin(chain.pop(0))

    def poll(self) -> Ended | None:
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            if self._stopped is not None and time.monotonic() - self._stopped > GRACE_S:
                self._end()  # also one that waits for a machine, and so hears nothing
            elif time.monotonic() - self._asked > LINES_EVERY_S:
                self._pass_on(0.2)
            return None
        try:
            ended = Ended.model_validate_json(ray.get(self._answer))
            self._pass_on(5.0)
        except RayError as error:
            self._end()
            if self._stopped is not None:
                return Ended(status="interrupted", failure="stopped")
            reason = "its worker's machine or process on the cluster was lost"
            return Ended(status="failed", transient=isinstance(error, RayActorError), failure=reason)
        self._end()
        if ended.status != "done" or not self._chain:
            return ended
        self._part_done()
        if self._stopped is not None:
            return Ended(status="interrupted", failure="stopped")
        self._begin(self._chain.pop(0))
        return None

    def stop(self) -> None:
        if self._stopped is None:
            self._stopped = time.monotonic()
            self._actor.stop.remote()

    def kill(self) -> None:
        self._stopped = self._stopped or time.monotonic()
        self._end()

    def _begin(self, task: Task) -> None:
        needs = task.needs
        asked = cluster.resources(needs)
        if _room(asked) < needs.workers:
            wants = ", ".join(f"{count:g} {name}" for name, count in asked.items())
            whole = f"no machine of the cluster has {wants}"
            if needs.workers > 1:
                whole = f"the cluster has no room for {needs.workers} workers with {wants} each"
            self._tell(f"waits: {whole}")
        name = None
        if needs.workers > 1:
            name = f"{task.job}-{uuid.uuid4().hex}"
            self._group = placement_group([asked] * needs.workers, name=name)
        actor: Any = ray.remote(Host).options(
            **cluster.options(needs, self._group, 0),
            max_concurrency=3,  # waiting, asking for lines, stopping
        )
        self._actor = actor.remote(self._module, task.model_dump_json(), name)
        self._answer = self._actor.wait.remote()

    def _end(self) -> None:
        """End the actor, and give back what its workers had."""
        ray.kill(self._actor)
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _pass_on(self, patience_s: float) -> None:
        """Tell what the worker said; an actor that does not run yet is asked again the next time."""
        self._asked = time.monotonic()
        try:
            for line in ray.get(self._actor.lines.remote(), timeout=patience_s):
                self._tell(line)
        except (GetTimeoutError, RayError):
            pass


def _room(asked: dict[str, float]) -> int:
    """How many workers that ask for this there could be at once, if the cluster did nothing else."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(name, 0) // count) for name, count in asked.items()) for has in machines)
