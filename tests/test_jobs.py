"""Job lists, what is stale and why, and how the outcome is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from prometheus_client.parser import text_string_to_metric_families

from pipelines.jobs import plan
from pipelines.worker import Task, parts
from tests.example import entry
from tests.job_worker import made_entry, write_jobs
from zoo.entry import Publication, Stage
from zoo.files import Store, sha256_bytes
from zoo.jobs.joblist import Job, JobsError, Tolerance, load, parse_duration
from zoo.jobs.metrics import metrics
from zoo.jobs.plan import Facts, Planned, planned, stale
from zoo.jobs.summary import JobResult, JobsSummary, deltas, figures, junit, last_line, markdown
from zoo.registry import Registry, open_registry
from zoo.registry.job_runs import Figure, finish, start
from zoo.registry.leases import Lease, take

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 5, 1, tzinfo=UTC)


# --- the list ---


def parts_of(tmp_path: Path, needs: str) -> list[tuple[str | None, float, float, float | None]]:
    """(until, cpus, gpus, memory) of the workers of a job with four steps."""
    steps = [
        {"kind": "prune", "method": "wanda", "pattern": {"keep": 8, "group": 16}},
        {"kind": "recover", "data": [{"source": "prose"}], "budget": {"tokens": 1000}},
        {"kind": "quantize", "method": "rtn", "grid": {"bits": 8, "group": 32}},
    ]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"name": "a", "base": "./base", "steps": steps}))
    (job,) = jobs_of(tmp_path, f"jobs: [{{recipes: [a.yaml], needs: {needs}}}]")
    task = Task(job=job.name, recipe=job.recipe, overrides=[], store="s", registry="r", lease_token=1,
                lease_holder="h", needs=job.needs)  # fmt: skip
    chain = [Task.model_validate_json(part.model_dump_json()) for part in parts(task)]
    assert all(part.model_copy(update={"needs": task.needs, "until": None}) == task for part in chain)
    return [(part.until, part.needs.cpus, part.needs.gpus, part.needs.memory_gb) for part in chain]


def test_stages_that_need_something_else_are_workers_of_their_own(tmp_path: Path) -> None:
    assert parts_of(tmp_path, "{cpus: 2}") == [(None, 2, 0, None)]
    assert parts_of(tmp_path, "{stages: {recover: {cpus: 1, gpus: 0}}}") == [(None, 1, 0, None)]
    assert parts_of(tmp_path, "{cpus: 2, stages: {recover: {gpus: 4}}}") == [
        ("1. prune (wanda)", 2, 0, None),
        ("2. recover", 2, 4, None),
        (None, 2, 0, None),
    ]
    assert parts_of(
        tmp_path, "{stages: {recover: {gpus: 1}, evaluate: {gpus: 1}, export: {memory_gb: 9}}}"
    ) == [
        ("1. prune (wanda)", 1, 0, None),
        ("2. recover", 1, 1, None),
        ("3. quantize (rtn)", 1, 0, None),
        ("evaluate", 1, 1, None),
        (None, 1, 0, 9),
    ]
    with pytest.raises(JobsError, match="stages"):
        parts_of(tmp_path, "{stages: {verify: {gpus: 1}}}")
    with pytest.raises(JobsError, match="gpus"):
        parts_of(tmp_path, "{stages: {recover: {gpus: -1}}}")


def test_only_trainings_and_evaluations_have_several_workers(tmp_path: Path) -> None:
    def workers(needs: str) -> list[int]:
        (job,) = jobs_of(tmp_path, f"jobs: [{{recipes: [a.yaml], needs: {needs}}}]")
        return [job.needs.of(kind).workers for kind in ("compress", "recover", "evaluate", "export")]

    assert workers("{cpus: 2}") == [1, 1, 1, 1]
    assert workers("{workers: 3}") == [1, 3, 3, 1]
    assert workers("{stages: {evaluate: {workers: 4}}}") == [1, 1, 4, 1]
    with pytest.raises(JobsError, match="compress is done by one worker"):
        workers("{stages: {compress: {workers: 2}}}")


def jobs_of(tmp_path: Path, text: str) -> list[Job]:
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    return load(path)[0]


def test_recipes_times_bases(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: my-a\n")
    jobs = jobs_of(
        tmp_path,
        "jobs:\n"
        "- recipes: [a.yaml, r/b.yaml]\n"
        "- recipes: [a.yaml]\n"
        "  bases: {one: 'hub:x/one', two: ./two}\n"
        "  set: [calibration.seed=1]\n"
        "  every: 7d\n"
        "  budget: 90m\n"
        "  publish: {to: me}\n",
    )
    assert [job.name for job in jobs] == ["my-a", "b", "one-a", "two-a"]
    assert jobs[0].recipe == str(tmp_path / "a.yaml") and jobs[0].overrides == []
    one = jobs[2]
    assert (one.every_s, one.budget_s, one.retries) == (7 * 86_400, 5400, 3)
    assert one.overrides[:3] == ["calibration.seed=1", 'base="hub:x/one"', "name=one-a"]
    assert yaml.safe_load(one.overrides[3].removeprefix("publish=")) == {
        "to": "me", "endpoint": None, "private": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs: []", ["jobs", "at least 1"]),
        ("jobs:\n- recipe: [a.yaml]", ["jobs.0.recipes", "required", "jobs.0.recipe"]),
        ("jobs:\n- recipes: [a.yaml]\n  every: weekly", ["jobs.0.every", "7d"]),
        ("jobs:\n- recipes: [a.yaml]\n  budget: 0s", ["jobs.0.budget", "greater than 0"]),
        ("jobs: [", ["is not YAML"]),
        ("jobs: !!python/object/apply:os.system ['true']", ["is not YAML"]),
        ("- 1", ["is not a job list"]),
        ("jobs:\n- recipes: [a.yaml, a.yaml]", ["several jobs for one entry", "a"]),
        ("tolerance: {accuracy: .nan}\njobs:\n- recipes: [a.yaml]", ["tolerance.accuracy"]),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(JobsError) as told:
        jobs_of(tmp_path, text)
    for word in words:
        assert word in str(told.value)


def test_the_projects_own_list_is_right() -> None:
    jobs, _ = load(ROOT / "pipelines" / "jobs.yaml")
    assert len(jobs) >= 2
    for job in jobs:
        assert Path(job.recipe).is_file() and yaml.safe_load(Path(job.recipe).read_text())["name"] == job.name


def test_durations() -> None:
    assert [parse_duration("--x", t) for t in ("90s", "1.5h", "2 d")] == [90, 5400, 172_800]
    with pytest.raises(JobsError.__mro__[1], match="--x is no duration"):
        parse_duration("--x", "soon")


# --- what is stale ---


class Kept:
    """A job whose entry is in the registry and the store, as a run would leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = write_jobs(folder, ["one"])
        self.store = Store(folder / "store")
        self.registry = open_registry(str(folder / "registry.db"))
        self.registry.put(made_entry(self.job, self.store.root))

    @property
    def job(self) -> Job:
        return load(self.path)[0][0]

    def plan(self) -> Planned:
        return plan([self.job], self.registry, self.store)[0]

    def change(self, **changes: Any) -> None:
        self.registry.put(self.registry.get("one").model_copy(update=changes))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    found = Kept(tmp_path)
    assert (found.plan().state, found.plan().reasons) == ("fresh", [])
    return found


def test_never_made(tmp_path: Path) -> None:
    jobs, _ = load(write_jobs(tmp_path, ["one"]))
    (found,) = plan(jobs, open_registry(str(tmp_path / "r.db")), Store(tmp_path / "store"))
    assert (found.state, found.reasons) == ("stale", ["never made"])


def test_a_changed_recipe(kept: Kept) -> None:
    recipe = kept.folder / "one.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 8", "bits: 4"))
    assert kept.plan().reasons[0] == "the recipe changed"
    recipe.write_text("# a comment\n" + recipe.read_text().replace("bits: 4", "bits: 8"))
    assert kept.plan().state == "fresh"


def test_a_recipe_of_before_a_key_was_known(kept: Kept) -> None:
    said = yaml.safe_load(kept.registry.get("one").recipe)
    del said["calibration"]["seed"], said["verification"]
    older = yaml.safe_dump(said)
    kept.change(recipe=older, recipe_sha256=sha256_bytes(older.encode()))
    assert kept.plan().state == "fresh"
    said["calibration"]["seed"] = 1
    for changed in (yaml.safe_dump(said), "a key that is known no more: 1", ""):
        kept.change(recipe=changed, recipe_sha256=sha256_bytes(changed.encode()))
        assert kept.plan().reasons == ["the recipe changed"]


def test_a_changed_base_model(kept: Kept) -> None:
    (kept.folder / "base" / "config.json").write_text('{"changed": true}')
    assert kept.plan().state == "stale"
    assert kept.plan().reasons[0].startswith("the base model's files changed")


def test_a_new_revision_of_the_base(kept: Kept) -> None:
    kept.change(base_revision="0" * 40)
    assert kept.plan().reasons[0] == "new base revision: local, was 000000000000"


def test_another_library(kept: Kept) -> None:
    versions = kept.registry.get("one").versions
    kept.change(versions={**versions, "torch": "1.0"})
    assert kept.plan().reasons[0] == f"changed libraries: torch {versions['torch']}, was 1.0"


def test_a_missing_artifact(kept: Kept) -> None:
    one = kept.registry.get("one").artifacts[0]
    kept.change(artifacts=[one, one.model_copy(update={"path": "other"})])
    assert kept.plan().reasons == ["missing artifact: other"]
    (kept.store.root / "entries" / "one" / "model.safetensors").unlink()
    said = "missing artifacts: it was not published, and its files are not in this store"
    assert kept.plan().reasons == [said]
    place = Publication(
        endpoint="https://h", repository="me/one", commit="0" * 40, tag="t", published="2026-01-01T00:00:00Z"
    )
    kept.change(publications=[place])
    assert kept.plan().state == "fresh"  # it can be pulled


def test_a_failed_entry(kept: Kept) -> None:
    kept.change(status="failed", failure="no agreement")
    assert kept.plan().reasons == ["failed: no agreement"]


def test_unpublished(kept: Kept) -> None:
    text = yaml.safe_load(kept.path.read_text())
    text["jobs"][0]["publish"] = {"to": "me", "endpoint": "https://hub.example"}
    kept.path.write_text(yaml.safe_dump(text))
    assert kept.plan().reasons == ["not published: https://hub.example/me has no one"]
    place = {"commit": "0" * 40, "tag": "t", "published": "2026-01-01T00:00:00Z"}
    other = Publication(endpoint="https://hub.example", repository="you/one", **place)
    kept.change(publications=[other])
    assert kept.plan().state == "stale"
    kept.change(publications=[other, other.model_copy(update={"repository": "me/one"})])
    assert kept.plan().state == "fresh"


def test_broken(kept: Kept) -> None:
    (kept.folder / "one.yaml").write_text("name: one\nbase: /nowhere\nsteps: [{kind: prunee}]")
    found = kept.plan()
    assert found.state == "broken" and "prunee" in found.reasons[0]
    shutil.rmtree(kept.folder / "base")
    kept.path = write_jobs(kept.folder, ["one"])
    shutil.rmtree(kept.folder / "base")
    assert "there is no model at" in kept.plan().reasons[0]


# An editable install finds the project by a finder of its own, before the path is looked at.
ELSEWHERE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
from zoo.cli import main
main()
"""


def test_a_changed_line_of_code(kept: Kept, tmp_path: Path) -> None:
    """In a copy of the code: what depends on it is stale, and what does not is fresh."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "pipelines", copy / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("zoo", "cards"):
        (copy / name).symlink_to(ROOT / name)

    def reasons() -> list[str]:
        command = [sys.executable, "-c", ELSEWHERE, "jobs", "plan", "--jobs", kept.path, "--json"]
        done = subprocess.run(
            [*command, "--store", kept.store.root, "--registry", kept.folder / "registry.db"],
            cwd=copy, env={"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin"}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)[0]["reasons"]
        return found

    assert reasons() == []
    for module, stages in {
        "jobs": [],
        "evaluate": ["perplexity of the base", "perplexity of the entry", "fidelity to the base"],
        "solve": ["1. quantize (rtn)", "perplexity of the entry", "fidelity to the base", "export"],
    }.items():
        source = copy / "pipelines" / f"{module}.py"
        before = source.read_text()
        source.write_text(before + "# changed\n")
        assert reasons() == ([f"changed code or text: {', '.join(stages)}"] if stages else [])
        source.write_text(before)


def test_what_came_before_an_adopted_step_need_not_have_been_done_here() -> None:
    """Its key is made of theirs; of what comes after it, another key is a change."""
    done = {"2. average": "m", "3. prune (wanda)": "p", "export": "e", "verify": "v"}
    made = entry(stages=[Stage(name=name, key=key, status="done", seconds=1) for name, key in done.items()])
    now = {"calibrate": "c", "1. recover": "r", "2a1. recover": "a", "2b1. recover": "b", **done}
    del now["verify"]

    def told(**changes: str) -> list[str]:
        facts = Facts(now=NOW, entry=made, base_revision=made.base_revision, versions=made.versions)
        return stale(facts.model_copy(update={"stages": list((now | changes).items())}))

    assert told() == told(**{"2a1. recover": "x"}) == []
    assert told(export="x") == ["changed code or text: export"]
    changed = told(**{"3. prune (wanda)": "x", "export": "x"})
    assert changed == ["changed code or text: 3. prune (wanda), export"]
    every = told(**{"2. average": "x", "3. prune (wanda)": "x", "export": "x"})
    assert every[0].startswith("changed code or text: calibrate, 1. recover, 2a1. recover")


def test_every_holds_a_stale_job_back() -> None:
    job = Job(name="one", recipe="", overrides=[], every_s=86_400.0, budget_s=None, retries=0, publish=None)
    facts = Facts(now=NOW, last_started=NOW - timedelta(hours=1))
    found = planned(job, facts)
    assert (found.state, found.due) == ("waiting", NOW + timedelta(hours=23))
    later = facts.model_copy(update={"last_started": NOW - timedelta(hours=25)})
    assert planned(job, later).state == "stale"
    assert planned(job, Facts(now=NOW)).state == "stale"


# --- what became of it ---


def figure(name: str, kind: str, value: float) -> Figure:
    direction = "higher_is_better" if kind in ("accuracy", "speed") else "lower_is_better"
    return Figure.model_validate({"name": name, "kind": kind, "direction": direction, "value": value})


@pytest.mark.parametrize(
    ("kind", "before", "after", "change", "regression"),
    [
        ("accuracy", 0.50, 0.52, 0.02, False),
        ("accuracy", 0.50, 0.495, -0.005, False),
        ("accuracy", 0.50, 0.48, -0.02, True),
        ("perplexity", 20.0, 20.2, -0.01, False),
        ("perplexity", 20.0, 21.0, -0.05, True),
        ("perplexity", 20.0, 10.0, 0.5, False),
        ("speed", 100.0, 50.0, -0.5, True),
        ("speed", 100.0, 90.0, -0.1, False),
        ("size", 100.0, 110.0, -0.1, True),
    ],
)
def test_deltas(kind: str, before: float, after: float, change: float, regression: bool) -> None:
    tolerance = Tolerance(accuracy=0.01, perplexity=0.02, speed=0.2, size=0.02)
    old = [figure("it", kind, before), figure("gone", kind, 1.0)]
    (found,) = deltas(old, [figure("it", kind, after), figure("new", kind, 1.0)], tolerance)
    assert found.change == pytest.approx(change) and found.regression is regression
    assert deltas(old, [figure("it", kind, after)], Tolerance(
        accuracy=None, perplexity=None, speed=None, size=None))[0].regression is False  # fmt: skip


def test_figures_measured_otherwise_are_not_compared() -> None:
    one = entry()
    again = [m.model_copy(update={"data_revision": "0" * 64}) for m in one.measurements]
    other = one.model_copy(update={"measurements": again})
    measured = {f.name for f in figures(one) if f.kind in ("accuracy", "perplexity")}
    assert measured and not measured & {f.name for f in figures(other)}
    assert {f.kind for f in figures(one)} == {"accuracy", "perplexity", "speed", "size"}


HOSTILE = "a|b <script>alert(1)</script>\x00\x1b[31m\nsecond & line"


@pytest.fixture
def summary() -> JobsSummary:
    worse = deltas([figure("ppl | x", "perplexity", 10)], [figure("ppl | x", "perplexity", 12)], Tolerance())
    results = [
        JobResult(job="good", outcome="done", reasons=["never made"], attempts=1, seconds=2.0,
                  links=["https://h/me/good/tree/t"]),
        JobResult(job="worse", outcome="done", reasons=["the recipe changed"], attempts=1, deltas=worse),
        JobResult(job="bad", outcome="failed", reasons=["never made"], attempts=3, failure=HOSTILE),
        JobResult(job="late", outcome="unstarted", reasons=["never made"], failure="the deadline came"),
    ]  # fmt: skip
    return JobsSummary(started=NOW, seconds=3.0, fresh=1, waiting=0, results=results)


def test_markdown(summary: JobsSummary) -> None:
    text = markdown(summary)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<script>" not in html
    table = html[html.index("<table>") : html.index("</table>")]
    assert [row.count("<td>") for row in table.split("<tr>")[2:]] == [4, 4, 4, 4]
    assert "<https://h/me/good/tree/t>" in text
    assert "**regression**" in text and "-20.00%" in text
    assert last_line(summary) == "2 done, 1 failed, 1 unstarted, 1 fresh, 1 regressions; 3.0 s"
    assert not summary.ok


def test_junit(summary: JobsSummary) -> None:
    suite = ElementTree.fromstring(junit(summary)).find("testsuite")
    assert suite is not None
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped")} == {
        "tests": "4", "failures": "2", "skipped": "1",
    }  # fmt: skip
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {
        "good": ["system-out"],
        "worse": ["failure", "system-out"],
        "bad": ["failure", "system-out"],
        "late": ["skipped", "system-out"],
    }


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    registry: Registry = open_registry(str(tmp_path / "r.db"))
    registry.put(entry("one"))
    registry.put(entry("gone", status="failed", failure="gone wrong"))
    name = 'odd "job"\\\n'
    lease = take(registry, name, "me")
    assert isinstance(lease, Lease)
    run = start(registry, lease, name, ["never made"])
    found = [figure('ppl "x"', "perplexity", 12.5)]
    finish(registry, lease, run, "done", attempts=2, seconds=3.5, figures=found)
    finish(registry, lease, start(registry, lease, name, []), "failed", attempts=1, seconds=1.0)
    start(registry, lease, name, [])
    families = {f.name: f for f in text_string_to_metric_families(metrics(registry))}
    samples = {(s.name, *sorted(s.labels.values())): s.value for f in families.values() for s in f.samples}
    assert samples["zoo_entries", "verified"] == samples["zoo_entries", "failed"] == 1
    for status in ("done", "failed", "running"):
        assert samples["zoo_job_runs_total", *sorted((name, status))] == 1
    assert samples["zoo_job_last_duration_seconds", name] == 1.0
    assert samples["zoo_job_figure", *sorted((name, "perplexity", 'ppl "x"'))] == 12.5
    assert samples["zoo_job_leased", *sorted((name, "me"))] == 1
    ends = [samples[f"zoo_job_last_{what}_timestamp_seconds", name] for what in ("success", "run")]
    assert ends[0] < ends[1] <= datetime.now(UTC).timestamp()
    assert {f.type for f in families.values()} == {"gauge", "counter"}
