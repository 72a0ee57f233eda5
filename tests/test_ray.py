"""Jobs and their stages on a real Ray cluster, of which a node is killed under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.job_worker import behave, write_jobs
from tests.scheduler import ROOT, Done, Place, end, running, until, working
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
    """One runs; the other waits for what no machine has."""
    listed = [
        yaml.safe_load(write_jobs(place.folder, [name], needs={"gpus": gpus}).read_text())["jobs"][0]
        for name, gpus in (("one", 0), ("two", 8))
    ]
    (place.folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": listed}))
    behave(place.store, "one", "sleep")
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with running(start(place, cluster, "--max-parallel", "2")) as process:
        until(lambda: working(place, "one"), "the worker to begin")
        (log,) = (place.store / "jobs").glob("two-*.log")
        assert "no machine of the cluster has 1 CPU, 8 GPU" in log.read_text()
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        done = end(process)
        assert time.monotonic() - asked < 10
    assert (done.returncode, done.outcomes) == (130, dict.fromkeys(("one", "two"), "interrupted"))


# --- stages apart, with nothing replaced ---


PROSE = ROOT / "pipelines" / "tasks" / "prose.txt"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "calibration": {"windows": 4, "length": 32},
    "steps": [
        {"kind": "prune", "method": "wanda", "pattern": {"keep": 8, "group": 16}},
        {
            "kind": "recover",
            "data": [{"source": str(PROSE)}],
            "budget": {"tokens": 128 * 300},
            "optimizer": {"learning_rate": 1e-3},
            "length": 32,
            "batch": 4,
            "micro_batch": 4,
        },
    ],
    "evaluation": {"perplexity": [{"windows": 2, "length": 64}], "tasks": []},
    "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
    "verification": {"threads": 1},
}


def really(folder: Path, name: str, *options: str | Path) -> subprocess.Popen[str]:
    """`zoo jobs run` with a store and a registry called so."""
    given = ["--jobs", folder / "jobs.yaml", "--store", folder / name, "--registry", folder / f"{name}.db"]
    return subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "jobs", "run", *given, "--json", *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in err, err
    return Done(process.returncode, out, err)


def said(store: Path) -> str:
    """By all runs on the machine with this store."""
    return "".join(log.read_text() for log in sorted((store / "runs").glob("*.log")))


def artifacts(folder: Path, name: str) -> dict[str, str]:
    entry = open_registry(str(folder / f"{name}.db")).get("tiny")
    return {a.path: a.sha256 for a in entry.artifacts if a.path != "training.json"}  # which has times


def test_a_machine_is_killed_while_it_trains(cluster: Cluster, tmp_path: Path) -> None:
    """Stages run where what they need is; training runs again on another machine, to the same bits.

    Every machine has a store of its own, and what they share is behind it. Their GPU is one in name only.
    """
    from tests.tiny import tiny_llama

    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(RECIPE | {"base": str(tiny_llama(tmp_path / "llama"))})
    )
    needs = {"cpus": 2, "stages": {"recover": {"cpus": 1, "gpus": 1}}}
    (tmp_path / "jobs.yaml").write_text(
        yaml.safe_dump({"jobs": [{"recipes": ["tiny.yaml"], "needs": needs}]})
    )
    finished(really(tmp_path, "undisturbed"))

    def add(name: str, **resources: int) -> Any:
        return cluster.add_node(**resources, env_vars={"ZOO_STORE": str(tmp_path / name)})

    add("large", num_cpus=2)
    killed = add("killed", num_cpus=1, num_gpus=1)
    cluster.wait_for_nodes()
    shared = ["--shared-store", f"file://{tmp_path / 'shared'}"]
    with running(
        really(tmp_path, "own", *shared, "--executor", "ray", "--address", cluster.address)
    ) as process:
        until(lambda: "2. recover ..." in said(tmp_path / "killed"), "the training to begin")
        cluster.remove_node(killed, allow_graceful=False)
        assert "2. recover: " not in said(tmp_path / "killed")
        add("other", num_cpus=1, num_gpus=1)
        done = finished(process)
    assert done.outcomes == {"tiny": "done"} and done.of("tiny")["attempts"] == 2
    large, other = said(tmp_path / "large"), said(tmp_path / "other")
    assert "1. prune (wanda): done before" in other and "2. recover: done before" not in other
    assert "2. recover: done before" in large and "2. recover ..." not in large
    assert large.count("calibrate ...") == 1 and "export: " in large and "export" not in other
    assert artifacts(tmp_path, "own") == artifacts(tmp_path, "undisturbed")
    assert not (tmp_path / "own" / "objects").exists()  # the scheduler's
    assert "2. recover: done before" in Path(done.of("tiny")["log"]).read_text()
    again = finished(really(tmp_path, "own", *shared))
    assert json.loads(again.stdout)["fresh"] == 1
