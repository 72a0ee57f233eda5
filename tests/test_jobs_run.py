"""The scheduler: isolation, retries, deadlines, budgets, several at once. Its workers are real processes that
record entries without computing any (`tests.job_worker`); what is real throughout is at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from tests.job_worker import behave, write_jobs
from tests.scheduler import ROOT, Done, Place, end, running
from zoo.registry import open_registry
from zoo.registry.job_runs import history
from zoo.registry.leases import Heartbeat, Lease, held, take, this_process


def test_what_is_stale_is_run_and_what_is_fresh_is_not(place: Place) -> None:
    write_jobs(place.folder, ["one", "two", "three"])
    first = place.run("--json", "--max-parallel", "3")
    assert (first.returncode, first.outcomes) == (0, dict.fromkeys(("one", "two", "three"), "done"))
    assert {e.id for e in place.registry.entries()} == {"one", "two", "three"}
    recipe = place.folder / "two.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 8", "bits: 4"))
    second = place.run("--json")
    assert (second.returncode, second.outcomes) == (0, {"two": "done"})
    assert second.of("two")["reasons"][0] == "the recipe changed"
    assert {d["change"] for d in second.of("two")["deltas"]} == {0}
    assert json.loads(second.stdout)["fresh"] == 2
    assert held(place.registry) == {}
    assert [r.status for r in place.runs("two")] == ["done", "done"]


def test_one_bad_job_does_not_stop_the_rest(in_file: Place) -> None:
    write_jobs(in_file.folder, ["bad", "crash", "one"])
    (in_file.folder / "bad.yaml").write_text("name: bad\nbase: nowhere\n")
    behave(in_file.store, "crash", "crash")
    report = in_file.folder / "report"
    done = in_file.run("--json", "--keep-going", "--summary", report / "s.md", "--junit", report / "j.xml",
                       environment={"GITHUB_STEP_SUMMARY": str(in_file.folder / "step.md")})  # fmt: skip
    assert (done.returncode, done.outcomes) == (1, {"bad": "failed", "crash": "failed", "one": "done"})
    assert done.of("crash")["failure"] == "its worker was ended by SIGSEGV"
    assert done.of("crash")["attempts"] == 1
    text = (report / "s.md").read_text()
    assert text == (in_file.folder / "step.md").read_text() and "| crash | ✗ failed |" in text
    assert 'failures="2"' in (report / "j.xml").read_text()


def test_without_keep_going_no_other_is_started(in_file: Place) -> None:
    write_jobs(in_file.folder, ["fail", "one"])
    behave(in_file.store, "fail", "fail")
    done = in_file.run("--json")
    assert (done.returncode, done.outcomes) == (1, {"fail": "failed", "one": "unstarted"})
    assert in_file.run("--json").outcomes == {"fail": "done", "one": "done"}


def test_transient_failures_are_tried_again(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one", "kill", "never"], retries=1)
    behave(in_file.store, "one", "transient")
    behave(in_file.store, "kill", "kill")
    behave(in_file.store, "never", "transient", "transient", "transient")
    done = in_file.run("--json", "--keep-going", "--max-parallel", "3")
    assert (done.returncode, done.outcomes) == (1, {"one": "done", "kill": "done", "never": "failed"})
    assert [done.of(job)["attempts"] for job in ("one", "kill", "never")] == [2, 2, 2]
    assert "one: the network was away; again in 1 s" in done.stderr
    assert "kill: its worker was ended by SIGKILL; again in 1 s" in done.stderr


def test_a_regression_fails_the_run(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one"])
    assert in_file.run().returncode == 0
    with in_file.registry.engine.begin() as connection:  # the last run was far better
        connection.exec_driver_sql(
            "UPDATE job_runs SET figures = (SELECT json_group_array(json_set(value, '$.value', "
            "json_extract(value, '$.value') * CASE json_extract(value, '$.kind') "
            "WHEN 'perplexity' THEN 0.5 ELSE 1 END)) FROM json_each(figures))"
        )
    (in_file.store / "entries" / "one" / "model.safetensors").unlink()
    done = in_file.run("--json")
    worse = [d["name"] for d in done.of("one")["deltas"] if d["regression"]]
    assert (done.returncode, done.outcomes) == (1, {"one": "done"})
    assert worse and all("perplexity" in name or "kl" in name for name in worse)


def test_budget_and_deadline(in_file: Place) -> None:
    write_jobs(in_file.folder, ["slow"], budget="1s")
    behave(in_file.store, "slow", "sleep")
    done = in_file.run("--json")
    assert (done.returncode, done.outcomes) == (1, {"slow": "failed"})
    assert "over its budget of 1 s" in done.of("slow")["failure"]
    write_jobs(in_file.folder, ["slow", "one"])
    behave(in_file.store, "slow", "sleep")
    done = in_file.run("--json", "--deadline", "1.5s")
    assert (done.returncode, done.outcomes) == (1, {"slow": "interrupted", "one": "unstarted"})
    behave(in_file.store, "slow")  # the worker may have ended before it knew that it was to sleep
    assert in_file.run("--json").outcomes == {"slow": "done", "one": "done"}
    assert held(in_file.registry) == {}


def test_every_is_kept_and_now_overrides_it(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one"], every="7d")
    behave(in_file.store, "one", "fail")
    assert in_file.run().returncode == 1
    again = in_file.run("--json")
    assert (again.returncode, again.outcomes, json.loads(again.stdout)["waiting"]) == (0, {}, 1)
    assert in_file.run("--json", "--now").outcomes == {"one": "done"}


def test_two_schedulers_share_the_jobs(place: Place) -> None:
    names = [f"job{n}" for n in range(4)]
    write_jobs(place.folder, names)
    for name in names:
        behave(place.store, name, "slow")
    both = [place.start("--json", "--max-parallel", "2", "--patience", "5s") for _ in range(2)]
    first, second = (end(process) for process in both)
    assert (first.returncode, second.returncode) == (0, 0)
    for name in names:  # each was run once
        assert [r.status for r in place.runs(name)] == ["done"]
        outcomes = sorted(done.outcomes.get(name, "elsewhere") for done in (first, second))
        assert outcomes == ["done", "elsewhere"]
    assert "done" in first.outcomes.values() and "done" in second.outcomes.values()


def test_a_job_of_a_living_scheduler_is_waited_for(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one"])
    registry = in_file.registry
    with Heartbeat(registry, 1.0) as heart:
        lease = take(registry, "one", "elsewhere:1:x:1", patience_s=1.0)
        assert isinstance(lease, Lease)
        heart.keep(lease)
        with running(in_file.start("--patience", "1s")) as process:
            time.sleep(4)
            assert process.poll() is None and history(registry) == []
            heart.drop(lease)
            assert end(process).returncode == 0
    assert [r.status for r in in_file.runs("one")] == ["done"]


def test_json_log(in_file: Place) -> None:
    write_jobs(in_file.folder, ["one"])
    in_file.before = ("--log-json",)
    done = in_file.run()
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0 and len(events) >= 3
    assert all({"time", "level", "event", "message"} <= event.keys() for event in events)
    last = events[-1]
    assert (last["event"], last["job"], last["status"]) == ("job", "one", "done") and last["seconds"] > 0
    assert any(e["event"] == "said" and e["job"] == "one" for e in events)  # from the worker


def test_a_planted_token_is_nowhere(in_file: Place) -> None:
    planted = "hf_" + "Planted0" * 4
    password = "correct horse battery"
    write_jobs(in_file.folder, ["tell-secret", "one"])
    behave(in_file.store, "tell-secret", "tell-secret")
    report = in_file.folder / "s.md"
    secrets = {"HF_TOKEN": planted, "PGPASSWORD": password}
    for before in ((), ("--log-json",)):
        in_file.before = before
        behave(in_file.store, "tell-secret", "tell-secret")
        done = in_file.run("--json", "--keep-going", "--summary", report, "--now", environment=secrets)
        assert done.outcomes["tell-secret"] == "failed"
        assert "refused [secret]" in done.stdout and "the token is [secret]" in done.stderr
        written = b"".join(p.read_bytes() for p in in_file.folder.rglob("*") if p.is_file())
        for where in (done.stdout, done.stderr, written.decode(errors="replace")):
            assert planted not in where and password not in where


# --- the real worker ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny model's entry, made by `zoo jobs run` with nothing replaced."""
    from tests.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("made")
    recipe = {
        "name": "tiny",
        "base": str(tiny_llama(folder / "llama")),
        "calibration": {"windows": 8, "length": 32},
        "steps": [{"kind": "quantize", "method": "gptq", "grid": {"bits": 8, "group": 32}}],
        "evaluation": {
            "perplexity": [{"windows": 2, "length": 64}],
            "fidelity": {"windows": 1, "length": 64},
            "tasks": [],
        },
        "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
        "verification": {"threads": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [{"recipes": ["tiny.yaml"]}]}))
    place = Place(folder, str(folder / "registry.db"))
    open_registry(place.registry_url)
    done = really(place, "run", "--json")
    assert done.returncode == 0, done.stderr
    assert done.outcomes == {"tiny": "done"}
    return place


def really(place: Place, command: str, *options: str) -> Done:
    given = ["--jobs", place.folder / "jobs.yaml", "--store", place.store, "--registry", place.registry_url]
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "jobs", command, *given, *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return end(process)


@pytest.mark.real
def test_the_plan_knows_every_key_that_the_run_used(made: Place) -> None:
    from pipelines import keys, sources
    from pipelines.recipe import load

    entry = made.registry.get("tiny")
    recipe = load(made.folder / "tiny.yaml")
    base = sources.peek(recipe.base, made.store)
    assert (base.revision, base.sha256) == (entry.base_revision, entry.base_sha256)
    assert base.sha256
    planned = keys.expected(recipe, base.sha256, lambda _: None)
    assert planned == [(s.name, s.key) for s in entry.stages if s.name != "verify"]
    assert json.loads(really(made, "plan", "--json").stdout)[0]["state"] == "fresh"


@pytest.mark.real
def test_the_worker_is_the_holder_of_nothing_at_the_end(made: Place) -> None:
    assert held(made.registry) == {}
    assert not any(holder.startswith(this_process()) for holder in held(made.registry))
    (run,) = made.runs("tiny")
    assert (run.status, run.attempts, run.reasons) == ("done", 1, ["never made"])
    assert {f.kind for f in run.figures} >= {"perplexity", "speed", "size"}


@pytest.mark.real
def test_a_corrupted_blob_is_made_again(made: Place) -> None:
    """A bit of a stage's output flips, which the entry's hard link shares: detected, and made again alike."""
    before = made.registry.get("tiny")
    export = next(stage for stage in before.stages if stage.name == "export")
    victim = made.store / "objects" / export.key[:2] / export.key / "model.safetensors"
    victim.chmod(0o644)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    fsck = [sys.executable, "-m", "zoo.cli", "fsck", "--json", "--store", made.store]
    found = subprocess.run(
        [*fsck, "--registry", made.registry_url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert {f["subject"] for f in json.loads(found.stdout)} >= {export.key, "tiny/model.safetensors"}
    (made.store / "entries" / "tiny" / "packed.safetensors").unlink()  # so that the plan sees it
    done = really(made, "run", "--json")
    assert done.outcomes == {"tiny": "done"}
    after = made.registry.get("tiny")
    assert after.artifacts == before.artifacts
    redone = {s.name for s in after.stages if s.status == "done"}
    assert redone - {"verify"} == {"1. quantize (gptq)", "export"}  # which share the file, by hard links
    clean = subprocess.run(
        [*fsck, "--registry", made.registry_url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (clean.returncode, json.loads(clean.stdout)) == (0, [])
