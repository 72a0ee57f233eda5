"""Workers on a Ray cluster: each job is an actor that runs the very worker of `pipelines.executors.Local`.

The machines share the store and the registry, and have the project installed. Ray places a job where what it
needs is free. A job whose actor or machine is lost fails transiently, so the scheduler starts it again,
elsewhere if that machine is gone, and it goes on from its last finished stage. If the scheduler dies, Ray
ends its actors, and they take their workers along.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from pipelines.executors import Handle, Local
from pipelines.worker import Ended, Task
from zoo.errors import UsageError

LINES_EVERY_S = 1.0
POLL_S = 0.1


class OnRay:
    """An executor; `address`: of the cluster's head, or None for RAY_ADDRESS or one on this machine alone."""

    def __init__(self, address: str | None, module: str = "pipelines.worker") -> None:
        try:
            ray.init(
                address=address,
                namespace="sparse-zoo",
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

    def start(self, task: Task, log: Path, tell: Callable[[str], None]) -> Handle:
        return RayHandle(self._module, task, log, tell)

    def close(self) -> None:
        ray.shutdown()


class Host:
    """The actor: a worker, on the machine that Ray chose."""

    def __init__(self, module: str, task: str, log: str) -> None:
        self._lines: list[str] = []
        self._handle = Local(module).start(Task.model_validate_json(task), Path(log), self._lines.append)

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


class RayHandle:
    def __init__(self, module: str, task: Task, log: Path, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._asked = 0.0
        self._stopped = False
        actor: Any = ray.remote(Host).options(
            num_cpus=task.cpus,
            num_gpus=task.gpus,
            memory=None if task.memory_gb is None else int(task.memory_gb * 1e9),
            max_concurrency=3,  # waiting, asking for lines, stopping
            max_restarts=0,
        )
        self._actor = actor.remote(module, task.model_dump_json(), str(log))
        self._answer = self._actor.wait.remote()

    def poll(self) -> Ended | None:
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            if time.monotonic() - self._asked > LINES_EVERY_S:
                self._pass_on(0.2)
            return None
        try:
            ended = Ended.model_validate_json(ray.get(self._answer))
            self._pass_on(5.0)
        except RayError as error:
            if self._stopped:
                return Ended(status="interrupted", failure="stopped")
            reason = "its worker's machine or process on the cluster was lost"
            return Ended(status="failed", transient=isinstance(error, RayActorError), failure=reason)
        ray.kill(self._actor)
        return ended

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._actor.stop.remote()

    def kill(self) -> None:
        self._stopped = True
        ray.kill(self._actor)

    def _pass_on(self, patience_s: float) -> None:
        """Tell what the worker said; an actor that does not run yet is asked again the next time."""
        self._asked = time.monotonic()
        try:
            for line in ray.get(self._actor.lines.remote(), timeout=patience_s):
                self._tell(line)
        except (GetTimeoutError, RayError):
            pass
