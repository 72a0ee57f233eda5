"""The other workers that the Ray executor reserved for a stage, as the stage sees them.

A stage whose job asks for several workers runs in the first of them. Each of the others has the same CPUs,
memory and GPUs, and waits: the stage puts an actor there while it needs it. If the stage's process ends, by
whatever, Ray ends its actors.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from zoo.entry import Record
from zoo.errors import StoreError, ZooError
from zoo.jobs.joblist import Needs
from zoo.shared_store import open_store

RESERVED = "ZOO_RESERVED"  # in the environment of a stage that has more than one worker
NAMESPACE = "sparse-zoo"
ROOT = Path(__file__).parents[1]


class Reserved(Record):
    """What the executor tells a stage."""

    address: str  # of the cluster's head
    group: str  # name of the placement group: a bundle for each worker, the first of them this stage's own
    needs: Needs  # of each worker; needs.workers of them
    store: Path  # of this machine
    shared: str | None  # URL of the store that the machines share


def reserved() -> Reserved | None:
    """None in a stage that has no other workers."""
    said = os.environ.get(RESERVED)
    return None if said is None else Reserved.model_validate_json(said)


def resources(needs: Needs) -> dict[str, float]:
    """What one worker asks Ray for, by Ray's names of it; memory in bytes."""
    memory = 0 if needs.memory_gb is None else int(needs.memory_gb * 1e9)
    asked = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": memory}
    return {name: count for name, count in asked.items() if count}


def options(needs: Needs, group: Any, bundle: int) -> dict[str, Any]:
    """How an actor is placed; `group`: a placement group, or None for wherever there is room."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked = resources(needs)
    placed = {
        "num_cpus": needs.cpus,
        "num_gpus": needs.gpus,
        "memory": asked.get("memory"),
        "max_restarts": 0,
    }
    if group is not None:
        placed["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundle)
    return placed


def hide_gpus_of_others() -> None:
    """To be called first in an actor: only the GPUs that it asked for are its own."""
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def others(actor: type, most: int | None = None) -> Iterator[list[Any]]:
    """An actor in each other worker, or in so many at most, made with this stage's `Reserved` as JSON.

    None where none is reserved. They end with the block. Raises ZooError if the cluster does not answer.
    """
    found = reserved()
    if found is None or most == 0:
        yield []
        return
    import ray
    from ray.exceptions import RayError

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(ROOT):  # Ray has workers import from the working directory, which may hold others' files
            ray.init(
                address=found.address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                ignore_reinit_error=True,
            )
        group = ray.util.get_placement_group(found.group)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        ray.shutdown()
        raise ZooError("the Ray cluster does not answer", saw=last_line(error)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
    try:
        made = ray.remote(actor)
        yield [
            made.options(**options(found.needs, group, bundle)).remote(found.model_dump_json())
            for bundle in range(1, found.needs.workers)[:most]
        ]
    finally:
        ray.shutdown()


def end(actors: Sequence[Any]) -> None:
    """End actors now; what they were asked fails."""
    if not actors:
        return  # and no Ray need be installed
    import ray

    for actor in actors:
        ray.kill(actor)


def answers(asked: Sequence[Any], patience_s: float | None) -> list[Any]:
    """Of what actors were asked, the answers that are there within so many seconds (None: all), in no order.

    Raises ZooError, which is transient, if a worker was lost; or what an actor raised.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience_s)
    try:
        return list(ray.get(ready))
    except RayActorError as error:
        raise ZooError(
            "a worker of the cluster was lost",
            saw=last_line(error),
            try_="run it again: it goes on after the last finished stage",
        ) from error
    except RayTaskError as error:
        cause = error.cause
        raise (
            cause
            if isinstance(cause, ZooError)
            else ZooError("a worker of the cluster failed", saw=last_line(error))
        ) from error


def here(path: Path, theirs: Reserved) -> Path:
    """Where this machine has what another worker has at `path`.

    Outputs in that worker's store are those of this machine's, fetched if need be, and files from the Hub
    are fetched from there; everything else has the same path on all machines. Raises StoreError for what is
    not here.
    """
    own = os.environ.get("ZOO_STORE")
    found = path
    if theirs.shared is not None and own and path.is_relative_to(theirs.store / "objects"):
        _, key, *rest = path.relative_to(theirs.store / "objects").parts
        store = open_store(Path(own), theirs.shared)
        with store.locked(key):
            found = (store.get(key) or store.path(key)).joinpath(*rest)
    elif not path.exists() and (named := re.search(r"/models--([^/]+)--([^/]+)/snapshots/(\w+)$", str(path))):
        from huggingface_hub import snapshot_download

        from pipelines.sources import PATTERNS

        organisation, name, revision = named.groups()
        repository = f"{organisation}/{name}"
        found = Path(snapshot_download(repository, revision=revision, allow_patterns=[*PATTERNS]))
    if not found.exists():
        raise StoreError(
            f"this machine has no {path}",
            expected="the same path on all machines, or a store that they share",
            try_="--shared-store URL, or copy the folder there",
        )
    return found


def last_line(error: BaseException) -> str:
    """What is told of an error that came over the cluster, whose first lines are a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]
