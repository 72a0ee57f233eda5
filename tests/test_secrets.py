"""Planted tokens, keys and passwords: refused in recipes and job lists, and nowhere in what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from sqlalchemy import make_url

from pipelines import recipe
from tests.example import entry
from tests.job_worker import behave, write_jobs
from tests.postgres import database
from tests.process import program, refused
from tests.scheduler import ROOT, Done, Place, running, until, working
from zoo.entry import Publication
from zoo.errors import ZooError
from zoo.jobs import joblist
from zoo.logs import HIDDEN, redact
from zoo.registry import open_registry

TOKEN = "hf_" + "Planted0" * 4
PASSWORD = "Correct-Horse-9"
# How a secret may stand in a text -> the secret. Made up, all of them.
PLANTED = {
    f"base: hub:org/name # {TOKEN}": TOKEN,
    "key: AKIA" + "Z3PLANTED" + "0123456": "AKIA" + "Z3PLANTED" + "0123456",
    "aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxPlantedKEY0": "wJalrXUtnFEMI/K7MDENG/bPxPlantedKEY0",
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxPlantedKEY0": "wJalrXUtnFEMI/K7MDENG/bPxPlantedKEY0",
    "Authorization: Bearer planted-0123456789abcdef": "planted-0123456789abcdef",
    "{'authorization': 'Basic cGxhbnRlZDpwbGFudGVk'}": "cGxhbnRlZDpwbGFudGVk",
    '{"api_key": "planted0123456789"}': "planted0123456789",
    "endpoint: sk-proj-Planted0123456789abcdef": "sk-proj-Planted0123456789abcdef",
    "ghp_Planted0123456789abcdefghijklmnop": "ghp_Planted0123456789abcdefghijklmnop",
    f"data: https://someone:{PASSWORD}@example.org/x.txt": PASSWORD,
    "data: https://someone:pw@example.org/x.txt": "someone:pw",
    f"postgresql://zoo@db/zoo?password={PASSWORD}&sslmode=require": PASSWORD,
    f"host=db dbname=zoo password={PASSWORD} user=zoo": PASSWORD,
    "s3.example.org/b/k?X-Amz-Expires=9&X-Amz-Signature=0123456789abcdef0123": "0123456789abcdef0123",
    "https://example.org/x?token=planted0123456789": "planted0123456789",
}
HARMLESS = (
    "hub:org/name@main, revision 1fa3b2c4d5e6f708192a3b4c5d6e7f8091a2b3c4",
    "http://127.0.0.1:37401/demo/name/tree/v1 to http://localhost:8000",
    "postgresql+psycopg://zoo@/zoo?host=/run/postgresql",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "max_tokens=48, eos_token: <|im_end|>, tokens: 1234567890123456789, pad_token: </s>",
    "the token is not one; set HF_TOKEN to a token that may write there",
    "pipelines/recipes/smollm2-135m-8of16-w5-recovered.yaml, task-specific, hf_config",
    "no password was given: try --registry or PGPASSWORD",
    "/secret: a folder; secrets are kept in secret/place",
)
RECIPE = """\
name: one
base: ./base
steps:
  - kind: quantize
    method: rtn
    grid: {bits: 8, group: 32}
"""


@pytest.mark.parametrize(("said", "secret"), PLANTED.items(), ids=range(len(PLANTED)))
def test_what_is_secret_is_hidden(said: str, secret: str) -> None:
    hidden = redact(f"it says {said} here")
    assert secret not in hidden and HIDDEN in hidden
    assert hidden.startswith("it says ") and hidden.endswith(" here")
    assert redact(hidden) == hidden


@pytest.mark.parametrize("said", HARMLESS)
def test_what_is_not_secret_is_left(said: str) -> None:
    assert redact(said) == said


def test_passwords_in_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ssw0rd-9@proxy:3128")
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain words, as it were")
    assert redact("p@ssw0rd-9 p%40ssw0rd-9 plain words, as it were") == f"{HIDDEN} {HIDDEN} {HIDDEN}"


# --- recipes and job lists ---


@pytest.mark.parametrize(("said", "secret"), PLANTED.items(), ids=range(len(PLANTED)))
def test_a_recipe_or_job_list_with_a_secret_is_refused(tmp_path: Path, said: str, secret: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(f"{RECIPE}\n\n# {said}\n")
    for load in (recipe.load, joblist.load):
        with pytest.raises(ZooError, match="line 9 holds a secret") as caught:
            load(path)  # type: ignore[operator]
        assert secret not in str(caught.value)
    path.write_text(RECIPE)
    recipe.load(path)
    with pytest.raises(ZooError, match=r"--set calibration\.source holds a secret") as caught:
        recipe.load(path, [f"calibration.source={said}"])
    assert secret not in str(caught.value)


def test_of_a_refused_recipe_nothing_is_kept_or_said(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE.replace("./base", f"hub:org/{TOKEN}"))
    (tmp_path / "jobs.yaml").write_text(f"jobs: [{{recipes: [one.yaml], set: [base={TOKEN}]}}]")
    for command in (
        ["run", "one.yaml"],
        ["recipe", "check", "one.yaml"],
        ["jobs", "plan"],
        ["--log-json", "jobs", "run"],
    ):
        done = program(*command, folder=tmp_path, environment={"ZOO_JOBS": "jobs.yaml", "ZOO_STORE": "store"})
        assert done.returncode == 2
        assert "holds a secret" in done.stderr and "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.yaml", "one.yaml"]


def test_a_job_whose_recipe_holds_a_secret(in_file: Place) -> None:
    """It fails, the others are made, and the secret is in no report, log, registry or export."""
    write_jobs(in_file.folder, ["good", "bad"])
    bad = in_file.folder / "bad.yaml"
    bad.write_text(f"{bad.read_text()}# {TOKEN}\n")
    report = in_file.folder / "report"
    done = in_file.run("--json", "--keep-going", "--summary", report / "s.md", "--junit", report / "j.xml",
                       environment={"GITHUB_STEP_SUMMARY": str(report / "step.md")})  # fmt: skip
    assert (done.returncode, done.outcomes) == (1, {"good": "done", "bad": "failed"})
    assert "holds a secret" in done.of("bad")["failure"]
    given = ["--registry", in_file.registry_url]
    told = [done.stdout, done.stderr]
    for command in (
        ["registry", "export"],
        ["show", "good", "--json"],
        ["card", "good"],
        ["jobs", "metrics"],
    ):
        said = program(*command, *given, folder=in_file.folder)
        assert said.returncode == 0, said.stderr
        told += [said.stdout, said.stderr]
    bad.unlink()
    assert found_in(in_file.folder, TOKEN) == []
    assert not any(TOKEN in text for text in told)


def found_in(folder: Path, secret: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


# --- what others say, and see ---


@contextmanager
def tell_tale() -> Iterator[str]:
    """A server that answers with the Authorization header that it was sent, in every way it can."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = f"you sent {self.headers['Authorization']} to {self.path}"
            body = json.dumps({"error": said}).encode()
            self.send_response(403, said)
            self.send_header("X-Error-Message", said)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("before", [(), ("--log-json",)], ids=["plain", "json"])
def test_a_server_that_repeats_the_token(tmp_path: Path, before: tuple[str, ...]) -> None:
    with tell_tale() as endpoint:
        there = {"endpoint": endpoint, "repository": "a/one", "commit": 40 * "0", "tag": "t"}
        published = Publication.model_validate({**there, "published": "2026-01-01T00:00:00Z"})
        registry = open_registry(str(tmp_path / "registry.db"))
        registry.put(entry("one", status="published", publications=[published]))
        environment = {
            "HF_TOKEN": TOKEN,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "ZOO_STORE": "store",
        }
        for command in (
            ["pull", "a/b"],
            ["search", "x", "--remote"],
            ["push", "one"],
            ["fsck", "--published", "--no-store"],
        ):
            done = program(*before, *command, folder=tmp_path, environment=environment)
            assert "Traceback" not in done.stderr
            assert TOKEN not in done.stdout + done.stderr
            if command[0] != "push":
                assert f"you sent Bearer {HIDDEN}" in done.stdout + done.stderr, command
    assert found_in(tmp_path, TOKEN) == []


def test_a_password_is_not_in_what_a_failed_connection_says(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="needs psycopg: pip install '.[postgres]' in a checkout")
    at_port_1 = f"postgresql+psycopg://zoo:{PASSWORD}@127.0.0.1:1/zoo"
    for url, code in {
        at_port_1: 1,
        f"postgresql+psycopg://zoo@127.0.0.1:1/zoo?password={PASSWORD}": 1,
        at_port_1.replace("@", "@2@"): 1,
        at_port_1.replace(":1/", ":port/"): 2,
        at_port_1.replace("postgresql", "nosuchdb"): 1,
    }.items():
        done = program("list", folder=tmp_path, environment={"ZOO_REGISTRY": url})
        assert PASSWORD not in refused(done, code)
    done = program("doctor", "--registry", at_port_1.replace(":1/", ":port/"), folder=tmp_path)
    assert PASSWORD not in done.stdout + done.stderr and "is not a registry" in done.stdout


def test_a_bug_s_traceback_holds_no_secret() -> None:
    bug = (
        "from zoo import cli\n"
        "@cli.app.command()\n"
        f"def bug(): raise RuntimeError('sent ' + {TOKEN[:5]!r} + {TOKEN[5:]!r})\n"
        "cli.main()"
    )
    for before in ([], ["--log-json"]):
        done = subprocess.run(
            [sys.executable, "-c", bug, *before, "bug"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"RuntimeError: sent {HIDDEN}" in done.stderr and TOKEN not in done.stderr


def test_a_planted_password_is_nowhere(fresh_postgres: str, tmp_path: Path) -> None:
    """Of a registry whose URL has one: in no command line, and not in what a worker says that says all."""
    url = make_url(database(template=fresh_postgres)).set(password=PASSWORD).render_as_string(False)
    place = Place(tmp_path, url)
    write_jobs(place.folder, ["one", "two"])
    behave(place.store, "one", "tell-task")
    behave(place.store, "two", "sleep")
    seen: set[str] = set()
    with running(place.start("--json", "--keep-going", "--max-parallel", "2")) as process:
        until(lambda: working(place, "one") and working(place, "two"), "the workers to begin")
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 1
        for each in (psutil.Process(process.pid), *workers):
            with suppress(psutil.NoSuchProcess):  # one's may have ended; two's is started alike, and sleeps
                seen.add(" ".join(each.cmdline()))
        assert any("pipelines.worker" in command or "job_worker" in command for command in seen), seen
        until(lambda: any(run.status == "failed" for run in place.runs("one")), "one to have failed")
        process.terminate()
        done = Done(0, *process.communicate(timeout=60))  # a traceback is among it, as it should
    assert done.of("one")["outcome"] == "failed"
    assert f"zoo:{PASSWORD}" not in done.stdout + done.stderr and "I know" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert not any(PASSWORD in command for command in seen)
    assert found_in(tmp_path, PASSWORD) == []
    told = [run.model_dump_json() for job in ("one", "two") for run in place.runs(job)]
    assert not any(PASSWORD in text for text in told)
