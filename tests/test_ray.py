"""Jobs and their stages on a real Ray cluster, of which nodes and workers are killed under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from transformers import AutoTokenizer

from pipelines import shards
from pipelines.cluster import NAMESPACE, RESERVED, Reserved
from pipelines.evaluate import fidelity, lm_eval_tasks, load_model, perplexity
from pipelines.text import read_text, token_ids, windows
from tests.job_worker import behave, write_jobs
from tests.scheduler import PATIENCE_S, ROOT, Done, Place, end, running, until, working
from tests.tiny import VOCABULARY, tiny_llama
from zoo.entry import Measurement
from zoo.files import Store
from zoo.jobs.joblist import Needs
from zoo.registry import open_registry
from zoo.registry.leases import held
from zoo.shared_store import Remote, SharedStore

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]' in a checkout")
import ray
from ray.cluster_utils import Cluster

LONG_S = 600.0  # for what has many processes to start
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
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # else other tests take their processors away
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
    assert done.outcomes == {"tiny": "done"} and done.of("tiny")["attempts"] >= 2
    large, other = said(tmp_path / "large"), said(tmp_path / "other")
    assert "1. prune (wanda): done before" in other and "2. recover: done before" not in other
    assert "2. recover: done before" in large and "2. recover ..." not in large
    assert large.count("calibrate ...") == 1 and "export: " in large and "export" not in other
    assert artifacts(tmp_path, "own") == artifacts(tmp_path, "undisturbed")
    assert not (tmp_path / "own" / "objects").exists()  # the scheduler's
    assert "2. recover: done before" in Path(done.of("tiny")["log"]).read_text()
    again = finished(really(tmp_path, "own", *shared))
    assert json.loads(again.stdout)["fresh"] == 1


# --- several workers for one stage ---


def started(words: str) -> list[psutil.Process]:
    """Processes that this one started, and those that they did, with these words in what they are called."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


EVALUATED = """
import sys
from pathlib import Path
from pipelines.shards import Work, answered
told = []
found = answered(Work.model_validate_json(Path(sys.argv[1]).read_bytes()), told.append)
Path(sys.argv[2]).write_text(found.model_dump_json())
print(sum(told))
"""


def test_workers_of_the_cluster_answer_shards_and_one_is_killed_in_the_middle(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One process finds the very same as those of a machine and two workers elsewhere, one of them killed."""
    base, entry = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "entry", seed=1)
    asked = np.random.default_rng(0).integers(0, VOCABULARY, (300, 256)).tolist()
    cut = shards.shards("fidelity", [[window] for window in asked], [n // 8 for n in range(300)])
    assert len(cut) > 5
    work = shards.work_on(entry, "entry", Store(tmp_path / "alone"), workers=1)
    work = work.model_copy(update={"shards": cut, "base": (base, "base")})
    expected = shards.answered(work, lambda _: None)
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        group = ray.util.placement_group([{"CPU": 1}] * 3, name="tested")
        ray.get(group.ready(), timeout=PATIENCE_S)
        reserved = Reserved(
            address=cluster.address, group="tested", needs=Needs(workers=3), store=tmp_path, shared=None
        )
        mine = work.model_copy(update={"store": tmp_path / "many", "workers": 2})
        (tmp_path / "work.json").write_text(mine.model_dump_json())
        evaluating = subprocess.Popen(
            [sys.executable, "-c", EVALUATED, tmp_path / "work.json", tmp_path / "answers.json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {RESERVED: reserved.model_dump_json(), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        with running(evaluating) as process:
            until(lambda: len(started("-m pipelines.shards ")) == 2, "its own workers")
            own = started("-m pipelines.shards ")
            for worker in own:
                worker.suspend()  # else they are done before the cluster has begun
            until(lambda: started("ray::Answerer.answer"), "a worker of it to be at a shard", LONG_S)
            started("ray::Answerer.answer")[0].kill()
            until(lambda: len(Store(mine.store).keys()) > 1, "the other to answer", LONG_S)
            for worker in own:
                worker.resume()
            out, err = process.communicate(timeout=LONG_S)
    finally:
        ray.shutdown()
    assert process.returncode == 0, err
    assert shards.Answers.model_validate_json((tmp_path / "answers.json").read_bytes()) == expected
    assert int(out.splitlines()[-1]) == len(asked)  # Ray speaks there too
    assert "the evaluation goes on with a worker less" in err and not started("ray::Answerer")


def test_a_training_and_an_evaluation_on_several_machines(cluster: Cluster, tmp_path: Path) -> None:
    """A training's curve is that of one process, though a worker was killed in its middle; figures are exact.

    Every machine has a store of its own, and what they share is behind it.
    """
    base = tiny_llama(tmp_path / "llama")
    training = RECIPE["steps"][1] | {"budget": {"tokens": 128 * 400}}
    task = {"name": "zoo_choice", "base": False}
    evaluation = {"perplexity": [{"windows": 4, "length": 64}], "fidelity": {"windows": 4, "length": 64}}
    recipe = RECIPE | {"base": str(base), "steps": [RECIPE["steps"][0], training]}
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(recipe | {"evaluation": evaluation | {"tasks": [task], "workers": 2}})
    )
    needs = {"stages": {"recover": {"workers": 2}, "evaluate": {"workers": 2}}}
    (tmp_path / "jobs.yaml").write_text(
        yaml.safe_dump({"jobs": [{"recipes": ["tiny.yaml"], "needs": needs}]})
    )
    finished(really(tmp_path, "undisturbed"))
    for name in ("first", "second"):
        cluster.add_node(num_cpus=1, env_vars={"ZOO_STORE": str(tmp_path / name)})
    cluster.wait_for_nodes()
    remote = Remote(f"file://{tmp_path / 'shared'}")
    options = ["--shared-store", remote.url, "--executor", "ray", "--address", cluster.address]
    with running(really(tmp_path, "own", *options)) as process:
        until(lambda: started("ray::Machine.train"), "the training to begin", LONG_S)
        # a child that it forks has its title until it begins another program
        machine = min(started("ray::Machine.train"), key=lambda process: process.create_time())
        until(
            lambda: any(connected(p) for p in machine.children(recursive=True)),
            "its machines to meet",
            LONG_S,
        )
        time.sleep(2)  # some hundred of its steps
        there = machine.children(recursive=True)
        assert there and process.poll() is None
        machine.kill()
        _, alive = psutil.wait_procs(there, PATIENCE_S)
        assert not alive, "what a killed worker had started must end with it"
        until(lambda: len(task_workers()) == 2, "the task's own workers", LONG_S)
        own = task_workers()
        for worker in own:
            worker.suspend()  # else they may be done before the cluster has begun
        until(lambda: started("ray::Answerer.answer"), "a worker of the cluster to answer", LONG_S)
        for worker in own:
            worker.resume()
        done = finished(process)
    assert done.outcomes == {"tiny": "done"} and done.of("tiny")["attempts"] >= 2
    log = Path(done.of("tiny")["log"]).read_text()
    assert "worker less" not in log and log.count("1. prune (wanda) ...") == 1
    one, several = (
        open_registry(str(tmp_path / f"{name}.db")).get("tiny") for name in ("undisturbed", "own")
    )
    assert len(one.training) == 40
    assert [p.loss for p in several.training] == pytest.approx([p.loss for p in one.training], rel=1e-3)
    here = SharedStore(tmp_path / "here", remote)
    outputs = {stage.name: here.get(stage.key) for stage in several.stages}
    model, packed = outputs["2. recover"], outputs["pack"]
    assert model is not None and packed is not None
    found = lm_eval_tasks(next(packed.glob("*.safetensors")), ["zoo_choice"], subject="entry", few_shot=0)
    text = read_text("builtin:prose")
    ids = windows(token_ids(AutoTokenizer.from_pretrained(model), text), 4, 64)
    found += perplexity(load_model(model)[0], ids, text=text, subject="entry")
    found += fidelity(base, model, ids, text=text)
    theirs = [m for m in several.measurements if m.subject == "entry"]
    assert figures(found) == figures(theirs) and len(theirs) == 5


def figures(measured: list[Measurement]) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {(m.metric, m.task): (m.value, m.stderr, m.samples, m.dtype) for m in measured}


def task_workers() -> list[psutil.Process]:
    """The processes of this machine that answer a task's shards."""
    found = []
    for process in started("-m pipelines.shards "):
        with suppress(psutil.Error):
            if any("pipelines.harness" in " ".join(parent.cmdline()) for parent in process.parents()):
                found.append(process)
    return found


def connected(process: psutil.Process) -> bool:
    """Whether it talks to another process of the training, not only to where they meet."""
    with suppress(psutil.Error):
        return len([c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]) > 1
    return False
