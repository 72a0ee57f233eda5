"""Jobs on a real Ray cluster of two nodes, of which one is killed under a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.job_worker import behave, write_jobs
from tests.test_jobs_run import ROOT, Place, end, running, until, working
from zoo.registry import open_registry
from zoo.registry.leases import held

pytest.importorskip("ray", reason="needs Ray: pip install 'sparse-zoo[ray]'")
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.real  # starting a cluster takes half a minute
ON_RAY = (
    "import sys, pipelines.ray_executor as e\n"
    "e.OnRay.__init__.__defaults__ = ('tests.job_worker',)\n"
    "from zoo.cli import main; main()"
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, so that jobs run on the nodes that tests add."""
    os.environ["PYTHONPATH"] = str(ROOT)  # of the nodes' processes
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    open_registry(str(tmp_path / "registry.db"))
    return Place(tmp_path, str(tmp_path / "registry.db"))


def start(place: Place, cluster: Cluster, *options: str) -> subprocess.Popen[str]:
    given = ["--jobs", place.folder / "jobs.yaml", "--store", place.store, "--registry", place.registry_url]
    return subprocess.Popen(
        [sys.executable, "-c", ON_RAY, "jobs", "run", *given, "--json", "--executor", "ray",
         "--address", cluster.address, *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_node_is_killed_under_a_job(cluster: Cluster, place: Place) -> None:
    """The job runs again on the other node; a bad job stops nobody; what is said arrives."""
    write_jobs(place.folder, ["one", "two", "bad"])
    behave(place.store, "one", "sleep")
    behave(place.store, "bad", "fail")
    first = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with running(start(place, cluster, "--only", "one")) as process:
        until(lambda: working(place, "one"), "the worker to begin")
        cluster.add_node(num_cpus=1)
        cluster.remove_node(first, allow_graceful=False)
        done = end(process)
    assert (done.returncode, done.outcomes) == (0, {"one": "done"}), done.stderr
    assert done.of("one")["attempts"] >= 2
    rest = end(start(place, cluster, "--keep-going", "--max-parallel", "2"))
    assert (rest.returncode, rest.outcomes) == (1, {"two": "done", "bad": "failed"})
    assert "two: working as told: done" in rest.stderr
    assert held(place.registry) == {}


def test_a_signal_ends_jobs_on_the_cluster(cluster: Cluster, place: Place) -> None:
    write_jobs(place.folder, ["one"])
    behave(place.store, "one", "sleep")
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with running(start(place, cluster)) as process:
        until(lambda: working(place, "one"), "the worker to begin")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        done = end(process)
        assert time.monotonic() - asked < 10
    assert (done.returncode, done.outcomes) == (130, {"one": "interrupted"})
