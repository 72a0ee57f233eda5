"""What becomes of jobs when things break, each of them really broken: killed processes and connections, a
full disk, a store that cannot be written, signals. Nothing is lost and the next scheduler goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.job_worker import behave, write_jobs
from tests.postgres import database
from tests.process import small_disk
from tests.scheduler import (
    ROOT,
    Done,
    Place,
    alive,
    end,
    freeze,
    running,
    until,
    worker_of,
    working,
)
from zoo.registry import open_registry
from zoo.registry.leases import Lease, held, take

pytestmark = pytest.mark.real  # a minute or two
QUICK_PATIENCE = ("--patience", "2s")


def test_kill_9_of_the_scheduler(place: Place) -> None:
    """Its worker ends, and the next scheduler has the job at once, as it knows that the process is gone."""
    write_jobs(place.folder, ["one", "two"])
    behave(place.store, "one", "sleep")
    with running(place.start()) as process:
        until(lambda: working(place, "one"), "the worker to begin")
        worker = worker_of(place, "one")
        process.kill()
        process.wait()
    assert set(held(place.registry)) == {"one"}
    began = time.monotonic()
    done = place.run("--json")
    assert (done.returncode, done.outcomes) == (0, {"one": "done", "two": "done"})
    assert time.monotonic() - began < 25  # and not the 30 s of the lease's patience, and more
    until(lambda: not alive(worker), "the orphaned worker to end")
    assert [(r.status, r.failure) for r in place.runs("one")] == [
        ("done", None),
        ("interrupted", "its scheduler ended without a word"),
    ]


def test_a_scheduler_that_is_only_frozen(place: Place) -> None:
    """SIGSTOP: another takes over; thawed, the first one and its worker can record nothing."""
    write_jobs(place.folder, ["one"])
    behave(place.store, "one", "sleep")
    with running(place.start("--json", *QUICK_PATIENCE)) as frozen:
        until(lambda: working(place, "one"), "the worker to begin")
        freeze(frozen, place)
        second = place.run("--json", *QUICK_PATIENCE)
        assert (second.returncode, second.outcomes) == (0, {"one": "done"})
        frozen.send_signal(signal.SIGCONT)
        first = end(frozen)
    assert first.outcomes == {"one": "interrupted"}
    assert "lease was lost" in first.of("one")["failure"]
    assert [r.status for r in place.runs("one")] == ["done", "interrupted"]


def test_kill_9_of_a_worker(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one"])
    behave(in_file.store, "one", "sleep")
    with running(in_file.start("--json")) as process:
        until(lambda: working(in_file, "one"), "the worker to begin")
        os.kill(worker_of(in_file, "one"), signal.SIGKILL)
        done = end(process)
    assert (done.returncode, done.outcomes) == (0, {"one": "done"})
    assert done.of("one")["attempts"] == 2


def test_every_database_connection_is_cut(fresh_postgres: str, tmp_path: Path) -> None:
    """pg_terminate_backend, again and again while two jobs run."""
    url = database(template=fresh_postgres)
    place = Place(tmp_path, url)
    write_jobs(place.folder, ["one", "two"])
    for name in ("one", "two"):
        behave(place.store, name, "slow", "slow", "slow")
    engine = create_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    cut = text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name")
    terminated = 0
    with running(place.start("--json", "--max-parallel", "2")) as process, engine.connect() as connection:
        until(lambda: working(place, "one"), "the worker to begin")
        for _ in range(4):
            name = make_url(url).database
            terminated += connection.execute(cut, {"name": name}).scalar_one()
            time.sleep(0.4)
        done = end(process)
    engine.dispose()
    assert terminated >= 1
    assert (done.returncode, done.outcomes) == (0, {"one": "done", "two": "done"}), done.stderr
    assert held(place.registry) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("manners", ["sleep", "deaf"])
def test_a_signal_hands_over_within_10_seconds(in_file: Place, number: signal.Signals, manners: str) -> None:
    """Also if a worker does not listen."""
    write_jobs(in_file.folder, ["one", "two"])
    behave(in_file.store, "one", manners)
    with running(in_file.start("--json")) as process:
        until(lambda: working(in_file, "one"), "the worker to begin")
        worker = worker_of(in_file, "one")
        asked = time.monotonic()
        process.send_signal(number)
        done = end(process)
        assert time.monotonic() - asked < 10
    assert (done.returncode, done.outcomes) == (130, {"one": "interrupted", "two": "unstarted"})
    assert not alive(worker)
    assert held(in_file.registry) == {}
    assert in_file.run("--json").outcomes == {"one": "done", "two": "done"}


def test_a_full_disk(in_file: Place) -> None:
    """The store is on a disk of 1 MB: the job fails and says so, others' stay; with room it is done."""
    write_jobs(in_file.folder, ["one", "fits"])
    in_file.run("--only", "fits")
    with small_disk(1_000_000) as disk:
        (disk / "ballast").write_bytes(bytes(999_424 - 4096))
        done = in_file.run("--json", "--only", "one", store=disk)
        assert (done.returncode, done.outcomes) == (1, {"one": "failed"})
        assert "No space left" in done.of("one")["failure"] or "no space left" in done.of("one")["failure"]
        assert done.of("one")["attempts"] == 1
        (disk / "ballast").unlink()
        assert in_file.run("--json", "--only", "one", store=disk).outcomes == {"one": "done"}
    assert {e.id for e in in_file.registry.entries()} == {"one", "fits"}


def test_the_registry_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(1_000_000) as disk:
        open_registry(str(disk / "registry.db")).engine.dispose()
        place = Place(tmp_path, str(disk / "registry.db"))
        write_jobs(place.folder, ["one"])
        ballast = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY)
        with suppress(OSError):
            while os.write(ballast, bytes(4096)):
                pass
        os.close(ballast)
        done = place.run()
        assert done.returncode == 1 and "no space left" in done.stderr
        (disk / "ballast").unlink()
        assert place.run("--json").outcomes == {"one": "done"}


def test_a_read_only_store(in_file: Place) -> None:
    """On a file system that is mounted so, as the superuser could write everywhere else."""
    write_jobs(in_file.folder, ["one"])
    with small_disk(1_000_000) as disk:
        remount = ["mount", "-o", "remount,ro", str(disk)]
        assert subprocess.run(remount, capture_output=True, check=False).returncode == 0
        done = in_file.run("--json", store=disk)
        assert (done.returncode, done.outcomes) == (1, {"one": "failed"})
        assert "Read-only" in done.of("one")["failure"]
    assert in_file.run("--json").outcomes == {"one": "done"}


def test_a_read_only_registry_can_be_planned_from(tmp_path: Path) -> None:
    with small_disk(2_000_000) as disk:
        open_registry(str(disk / "registry.db")).engine.dispose()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        write_jobs(tmp_path, ["one"])
        command = ["jobs", "plan", "--json", "--jobs", tmp_path / "jobs.yaml", "--store", tmp_path / "store"]
        planned = subprocess.run(
            [sys.executable, "-m", "zoo.cli", *command, "--registry", disk / "registry.db"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)[0]["state"] == "stale"


def test_a_lease_of_a_machine_that_is_gone(in_file: Place) -> None:
    """Nothing is known of its process: its patience passes, then the job is run."""
    write_jobs(in_file.folder, ["one"])
    assert isinstance(take(in_file.registry, "one", "elsewhere:1:x:1", patience_s=3.0), Lease)
    began = time.monotonic()
    done: Done = in_file.run("--json")
    assert (done.returncode, done.outcomes) == (0, {"one": "done"})
    assert time.monotonic() - began >= 3
    assert "runs elsewhere (elsewhere:1:x:1)" in done.stderr
