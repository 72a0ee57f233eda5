"""Leases: one holder at a time, taken over from the dead only, and no record without one. Every database."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.example import entry
from zoo.registry import Registry
from zoo.registry.job_runs import finish, history, start
from zoo.registry.leases import (
    Heartbeat,
    Lease,
    LeaseLost,
    Seen,
    Watch,
    held,
    is_gone,
    release,
    renew,
    take,
    this_process,
)

ROOT = Path(__file__).parents[1]


def taken(registry: Registry, name: str = "job", holder: str = "one", **options: float) -> Lease:
    found = take(registry, name, holder, **options)  # type: ignore[arg-type]
    assert isinstance(found, Lease)
    return found


def test_one_holder_at_a_time(opened: Registry) -> None:
    lease = taken(opened)
    assert take(opened, "job", "two") == Seen("one", 1, 0, 30.0)
    assert set(held(opened)) == {"job"}
    assert isinstance(take(opened, "other", "two"), Lease)
    release(opened, lease)
    assert taken(opened, holder="two").token == 2
    assert not renew(opened, lease)
    release(opened, lease)  # of someone else by now
    assert held(opened)["job"].holder == "two"


def test_a_lease_is_taken_over_only_as_it_was_seen(opened: Registry) -> None:
    lease = taken(opened)
    seen = take(opened, "job", "two")
    assert isinstance(seen, Seen)
    assert renew(opened, lease)
    again = take(opened, "job", "two", instead_of=seen)  # it beat meanwhile
    assert again == Seen("one", 1, 1, 30.0)
    assert isinstance(again, Seen)
    assert take(opened, "job", "two", instead_of=again) == Lease("job", "two", 2)
    assert not renew(opened, lease)


def test_the_living_keep_it_and_the_dead_lose_it(opened: Registry) -> None:
    patience = 5.0  # a machine that stands still for less loses nothing
    with Heartbeat(opened, patience) as heart:
        lease = taken(opened, patience_s=patience)
        heart.keep(lease)
        watch = Watch(opened, "two", patience)
        until = time.monotonic() + 3 * patience
        while time.monotonic() < until:
            assert isinstance(watch.take("job"), Seen)
            assert not heart.lost(lease)
            time.sleep(0.05)
    stopped = time.monotonic()  # the heart is
    while not isinstance(found := watch.take("job"), Lease):
        assert time.monotonic() - stopped < 10
        time.sleep(0.02)
    assert found == Lease("job", "two", 2)
    assert heart.lost(lease)


def test_the_holder_stops_before_others_begin(opened: Registry) -> None:
    """Without a database, so that no heartbeat arrives: lost after less than its patience."""
    heart = Heartbeat(opened, 1.0)  # its thread does not run
    lease = taken(opened, patience_s=1.0)
    heart.keep(lease)
    began = asked = time.monotonic()
    while not heart.lost(lease):
        assert asked - began < 1.0
        time.sleep(0.01)
        asked = time.monotonic()
    assert time.monotonic() - began > 0.5


def test_nothing_is_recorded_without_the_lease(opened: Registry) -> None:
    first = taken(opened)
    run = start(opened, first, "job", ["never made"])
    opened.fence = first
    opened.put(entry("kept"))
    seen = take(opened, "job", "two")
    assert isinstance(seen, Seen)
    second = take(opened, "job", "two", instead_of=seen)
    assert isinstance(second, Lease)
    for record in (
        lambda: opened.put(entry("late")),
        lambda: opened.start_run("r", "0" * 64, 1, "h"),
        lambda: finish(opened, first, run, "done", attempts=1, seconds=1.0),
        lambda: start(opened, first, "job", []),
    ):
        with pytest.raises(LeaseLost, match="lease is lost"):
            record()
    opened.fence = second
    again = start(opened, second, "job", ["never made"])
    opened.put(entry("taken-over"))
    finish(opened, second, again, "done", attempts=1, seconds=1.0)
    assert {e.id for e in opened.entries()} == {"kept", "taken-over"}
    assert [(r.status, r.failure) for r in history(opened, "job")] == [
        ("done", None),
        ("interrupted", "its scheduler ended without a word"),
    ]


def test_of_many_at_once_one_gets_it(opened: Registry) -> None:
    got: Counter[str] = Counter()
    ready = threading.Barrier(8)

    def grab(holder: str) -> None:
        ready.wait()
        got[type(take(opened, "job", holder)).__name__] += 1

    threads = [threading.Thread(target=grab, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {"Lease": 1, "Seen": 7}


def test_a_dead_process_of_this_machine_is_known_at_once(opened: Registry) -> None:
    assert not is_gone(this_process())
    program = "from zoo.registry.leases import this_process; print(this_process())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    dead = done.stdout.strip()
    assert is_gone(dead)
    host, pid, kernel, _ = dead.split(":")
    assert not is_gone(f"elsewhere:{pid}:00000000:1")  # of another machine nothing is known
    assert is_gone(f"{host}:{os.getpid()}:{kernel}:1")  # an id that is used again
    taken(opened, holder=dead)
    watch = Watch(opened, "two")
    assert isinstance(watch.take("job"), Seen)
    assert isinstance(watch.take("job"), Lease)  # though its patience is 30 s


CLOCK = """
import select, sys, time
from zoo.registry import open_registry
from zoo.registry.leases import Lease, Watch
registry = open_registry(sys.argv[1])
watch = Watch(registry, "jumper", 1.0)
print(time.time(), flush=True)
until = time.monotonic() + 2.2
while time.monotonic() < until:
    found = watch.take("job")
    if isinstance(found, Lease):
        print("taken", flush=True)
        break
    select.select([], [], [], 0.05)  # libfaketime breaks time.sleep
else:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("shift", ["+400d", "-400d"])
def test_a_clock_that_jumps_changes_nothing(opened: Registry, shift: str) -> None:
    """A contender whose clock is a year off, by libfaketime, does not take a living holder's lease."""
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("needs faketime: apt-get install faketime")
    with Heartbeat(opened, 1.0) as heart:
        lease = taken(opened, patience_s=1.0)
        heart.keep(lease)
        done = subprocess.run(
            [faketime, "-f", shift, sys.executable, "-c", CLOCK, opened.url],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"DONT_FAKE_MONOTONIC": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen, answer = done.stdout.split()
        assert abs(float(seen) - time.time()) > 300 * 86_400  # the clock was off
        assert answer == "refused"
        assert not heart.lost(lease)
