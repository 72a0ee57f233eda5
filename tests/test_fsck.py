"""`zoo fsck` finds every inconsistency that is planted, and repairs what can be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import cards
from tests.example import entry
from tests.hub import Server, serving
from tests.job_worker import made_entry, write_jobs
from tests.proxy import slow_line
from zoo.entry import Artifact, Entry, Publication
from zoo.files import Store, sha256_bytes
from zoo.fsck import Finding, clean, fsck
from zoo.hub import client
from zoo.hub import pull as pulling
from zoo.hub.push import push
from zoo.jobs.joblist import load
from zoo.registry import Registry, open_registry
from zoo.registry.leases import take

ROOT = Path(__file__).parents[1]
KEY = "ab" * 32


class Zoo:
    """An entry whose export stage is in the store, another output of a stage, and nothing wrong."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.registry: Registry = open_registry(str(folder / "registry.db"))
        (job,) = load(write_jobs(folder, ["one"]))[0]
        self.entry = made_entry(job, self.store.root)
        self.registry.put(self.entry)
        with self.store.writing(self.export) as out:
            shutil.copy(self.folder / "model.safetensors", out)
        with self.store.writing(KEY) as out:
            (out / "weights").write_bytes(bytes(1000))

    @property
    def export(self) -> str:
        return next(stage.key for stage in self.entry.stages if stage.name == "export")

    @property
    def folder(self) -> Path:
        return self.store.root / "entries" / "one"

    def check(self, repair: bool = False) -> list[Finding]:
        return fsck(self.registry, self.store, repair=repair, render=cards.render)

    def sql(self, statement: str) -> None:
        with self.registry.engine.begin() as connection:
            connection.exec_driver_sql(statement)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    made = Zoo(tmp_path)
    assert made.check() == []
    return made


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def dead_holder() -> str:
    program = "from zoo.registry.leases import this_process; print(this_process())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


REPAIRABLE: dict[str, tuple[Callable[[Zoo], object], str, str]] = {
    "missing file": (
        lambda z: (z.folder / "model.safetensors").unlink(), "one/model.safetensors", "is missing"),
    "damaged file": (lambda z: flip(z.folder / "model.safetensors"), "one/model.safetensors", "is damaged"),
    "short file": (lambda z: truncate(z.folder / "model.safetensors"), "one/model.safetensors", "bytes"),
    "no record": (lambda z: (z.folder / "entry.json").unlink(), "one/entry.json", "the registry says"),
    "other record": (
        lambda z: (z.folder / "entry.json").write_text(entry("one").model_dump_json()),
        "one/entry.json", "not what the registry says"),
    "no card": (lambda z: (z.folder / "README.md").unlink(), "one/README.md", "is missing"),
    "damaged output": (lambda z: flip(z.store.path(KEY) / "weights"), KEY, "is damaged: weights"),
    "output lacks a file": (lambda z: (z.store.path(KEY) / "weights").unlink(), KEY, "is damaged: weights"),
    "output has another file": (
        lambda z: (z.store.path(KEY) / "more").write_text("x"), KEY, "is damaged: more"),
    "damaged sums": (lambda z: z.store.sums(KEY).write_text("{"), KEY, "is damaged"),
    "half-written": (
        lambda z: (z.store.root / "partial" / f"{KEY}.1").mkdir(parents=True), f"{KEY}.1", "half-written"),
    "half-placed": (lambda z: (z.store.root / "entries" / ".one.new").mkdir(), ".one.new", "was left"),
    "entry not recorded": (lambda z: z.sql("DELETE FROM entries WHERE id = 'one'"), "one", "does not have"),
    "not in the index": (lambda z: z.sql("DELETE FROM entry_index"), "one", "search index"),
    "dead run": (
        lambda z: z.registry.start_run("r", "0" * 64, dead_pid(), socket.gethostname()), "r", "is gone"),
    "dead lease": (lambda z: take(z.registry, "job", dead_holder()), "job", "which is gone"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRABLE)
def test_found_and_repaired(zoo: Zoo, name: str) -> None:
    plant, subject, problem = REPAIRABLE[name]
    plant(zoo)
    found = zoo.check()
    assert [f.subject for f in found if problem in f.problem] == [subject], found
    assert not clean(found) and all(f.repair and f.repaired is None for f in found)
    assert zoo.check() == found  # looking changes nothing
    assert clean(zoo.check(repair=True))
    assert zoo.check() == []
    assert (zoo.folder / "model.safetensors").read_bytes() == b"weights of one"
    assert zoo.registry.get("one").artifacts == zoo.entry.artifacts


def test_all_at_once(zoo: Zoo) -> None:
    (zoo.folder / "model.safetensors").unlink()
    flip(zoo.store.path(KEY) / "weights")
    (zoo.store.root / "partial" / f"{KEY}.1").mkdir(parents=True)
    zoo.registry.start_run("r", "0" * 64, dead_pid(), socket.gethostname())
    assert len(zoo.check()) == 4
    assert clean(zoo.check(repair=True)) and zoo.check() == []


def test_what_cannot_be_repaired_is_said(zoo: Zoo) -> None:
    flip(zoo.folder / "model.safetensors")
    flip(zoo.store.path(zoo.export) / "model.safetensors")
    (zoo.folder / "stranger").write_text("x")
    (zoo.store.root / "entries" / "nobody").mkdir()
    found = zoo.check(repair=True)
    assert not clean(found)
    left = {f.subject: (f.repair, f.repaired) for f in zoo.check()}
    assert left == {
        "one/model.safetensors": ("zoo run RECIPE", None),
        "one/stranger": (None, None),
        "nobody": ("zoo registry import, or remove the folder", None),
    }
    assert (zoo.folder / "stranger").exists()  # nothing unknown is removed


def test_an_entry_of_which_nothing_is_here(zoo: Zoo) -> None:
    """One line, however many files it has."""
    (one,) = zoo.entry.artifacts
    files = {"a/b": b"weights of a", "c": b"weights of c"}
    artifacts = [
        Artifact(path=path, kind="other", size=len(data), sha256=sha256_bytes(data))
        for path, data in files.items()
    ]
    zoo.registry.put(zoo.entry.model_copy(update={"artifacts": [one, *artifacts]}))
    shutil.rmtree(zoo.folder)
    problem = "was not published, and its files are not in this store"
    for repair in (True, False):  # of two files the stage's output is gone as well
        (found,) = zoo.check(repair)
        assert (found.subject, found.problem, found.repair) == ("one", problem, "zoo run RECIPE")
        assert not clean([found])
    zoo.registry.put(zoo.entry.model_copy(update={"origin": "hub:org/name@0123"}))
    zoo.store.discard(zoo.export)
    assert [f.repair for f in zoo.check()] == ["zoo import hub:org/name@0123"]


def test_an_entry_is_placed_again_from_the_stage_that_made_it(zoo: Zoo) -> None:
    before = {path.name: path.read_bytes() for path in zoo.folder.iterdir() if path.name != "README.md"}
    shutil.rmtree(zoo.folder)
    (found,) = zoo.check()
    assert (found.subject, found.repair) == ("one", "copy them from the stage that made them")
    assert clean(zoo.check(repair=True)) and zoo.check() == []
    assert {name: (zoo.folder / name).read_bytes() for name in before} == before


def test_what_is_being_written_is_left_alone(zoo: Zoo) -> None:
    other = "cd" * 32
    with zoo.store.locked(other), zoo.store.writing(other) as out:
        (out / "half").write_text("x")
        assert zoo.check(repair=True) == []
        assert (out / "half").exists()


def test_rows_that_refer_to_nothing(zoo: Zoo) -> None:
    connection = sqlite3.connect(zoo.registry.url)  # which does not enforce foreign keys
    with connection:
        connection.execute("INSERT INTO artifacts VALUES ('ghost', 0, 'x', 'other', NULL, 1, ?)", ["0" * 64])
    connection.close()
    (found,) = zoo.check()
    assert "artifacts" in found.problem and "entries" in found.problem and found.repair is None


def test_a_damaged_database_file(zoo: Zoo, tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 8192] = os.urandom(8192)
    path.write_bytes(data)
    command = ["fsck", "--store", zoo.store.root, "--registry", path]
    done = subprocess.run(
        [sys.executable, "-m", "zoo.cli", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout or done.stderr.startswith("zoo: ")


# --- against a real server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def published(zoo: Zoo, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoo:
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    zoo.store.root.joinpath("entries", "one", "model.safetensors").write_bytes(b"weights of one")
    hub, to = client.connect(server.endpoint), f"ns-{os.urandom(4).hex()}"
    push("one", hub, store=zoo.store.root, registry=zoo.registry, card=cards.render, to=to)
    return zoo


def check_published(zoo: Zoo, repair: bool = False) -> list[Finding]:
    def fetch(one: Entry) -> None:
        place = one.publications[-1]
        pulling.pull(place.repository, client.connect(place.endpoint), store=zoo.store.root,
                     registry=zoo.registry, revision=place.commit, mend=one)  # fmt: skip

    return fsck(zoo.registry, zoo.store, client.connect, repair=repair, render=cards.render, fetch=fetch)


def test_what_was_published_is_checked(published: Zoo, server: Server) -> None:
    assert check_published(published) == []
    place = published.registry.get("one").publications[0]
    other = published.entry.artifacts[0].model_copy(update={"sha256": "0" * 64})
    published.registry.put(published.registry.get("one").model_copy(update={"artifacts": [other]}))
    problems = {f.where: f.problem for f in check_published(published)}
    assert problems["published"] == "publishes other files than the registry has"
    published.registry.put(
        published.registry.get("one").model_copy(update={"artifacts": published.entry.artifacts})
    )
    client.connect(server.endpoint).api.delete_repo(place.repository)
    (found,) = check_published(published)
    assert (found.where, found.repair) == ("published", "zoo push one")
    assert place.repository in found.problem


def test_files_are_fetched_from_where_they_were_published(published: Zoo) -> None:
    flip(published.folder / "model.safetensors")
    published.store.discard(published.export)
    (found,) = check_published(published)
    assert found.repair and found.repair.startswith("pull it from ns-")
    assert clean(check_published(published, repair=True))
    assert check_published(published) == []
    assert (published.folder / "model.safetensors").read_bytes() == b"weights of one"


def test_a_fetch_that_fails_loses_nothing(published: Zoo) -> None:
    place = published.registry.get("one").publications[0]
    client.connect(place.endpoint).api.delete_repo(place.repository)
    published.store.discard(published.export)
    (published.folder / "model.safetensors").unlink()
    found = check_published(published, repair=True)
    assert [f.repaired for f in found if f.subject == "one/model.safetensors"] == [False]
    assert (published.folder / "entry.json").is_file() and (published.folder / "README.md").is_file()


def test_killed_in_a_download_it_goes_on_and_loses_nothing(
    zoo: Zoo, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = os.urandom(4_000_000)
    (zoo.folder / "big.bin").write_bytes(big)
    artifact = Artifact(path="big.bin", kind="other", size=len(big), sha256=sha256_bytes(big))
    zoo.registry.put(zoo.entry.model_copy(update={"artifacts": [*zoo.entry.artifacts, artifact]}))
    home = tmp_path / "home"
    with slow_line(server.endpoint, 4e6) as line:
        environment = server.environment(home) | {"HF_ENDPOINT": line.endpoint}
        for name in ("HF_ENDPOINT", "HF_TOKEN"):
            monkeypatch.setenv(name, environment[name])
        hub, to = client.connect(), f"ns-{os.urandom(4).hex()}"
        push("one", hub, store=zoo.store.root, registry=zoo.registry, card=cards.render, to=to)
        assert clean(zoo.check(repair=True)) and zoo.check() == []  # its record names that file now
        (zoo.folder / "big.bin").unlink()
        sound = {path: path.read_bytes() for path in zoo.folder.iterdir()}
        command = [sys.executable, "-m", "zoo.cli", "fsck", "--repair", "--json"]
        command += ["--store", str(zoo.store.root), "--registry", str(tmp_path / "registry.db")]

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

        for _ in range(2):
            process = start()
            deadline = time.monotonic() + 60
            while not any(path.stat().st_size for path in home.rglob(f"{artifact.sha256}.incomplete")):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.002)
            process.kill()
            process.communicate()
            assert {path: path.read_bytes() for path in zoo.folder.iterdir()} == sound
        out, err = start().communicate()
    assert [f["repaired"] for f in json.loads(out)] == [True], err
    assert (zoo.folder / "big.bin").read_bytes() == big and zoo.check() == []


def test_a_folder_moved_aside_is_put_back(zoo: Zoo) -> None:
    """By a process that was killed between the two renames that put a new one in its place."""
    before = {path.name: path.read_bytes() for path in zoo.folder.iterdir()}
    zoo.registry.put(
        zoo.entry.model_copy(update={"publications": [Publication(
            endpoint="http://127.0.0.1:9", repository="a/one", commit="0" * 40, tag="v1", published="2026"
        )]})
    )  # fmt: skip
    zoo.folder.rename(zoo.folder.with_name(".one.old"))
    zoo.folder.with_name(".one.new").mkdir()
    found = {f.subject: f.repair for f in zoo.check()}
    assert found == {".one.new": "remove it", ".one.old": "put it back as one"}
    assert clean(zoo.check(repair=True)) and zoo.check() == []
    assert {path.name: path.read_bytes() for path in zoo.folder.iterdir()} == before
    shutil.copytree(zoo.folder, zoo.folder.with_name(".one.old"))  # killed after them
    assert [f.repair for f in zoo.check()] == ["remove it"]
    assert clean(zoo.check(repair=True)) and zoo.check() == []


def test_other_files_than_the_registrys_repair_nothing(published: Zoo, tmp_path: Path) -> None:
    """Wherever they are published: of a place that others named, anything may come."""
    one = published.registry.get("one")
    published.store.discard(published.export)
    data = b"other weights"
    other = Artifact(path="model.safetensors", kind="safetensors", size=len(data), sha256=sha256_bytes(data))
    (published.folder / "model.safetensors").write_bytes(b"damaged")
    published.registry.put(one.model_copy(update={"artifacts": [other]}))
    found = check_published(published, repair=True)
    assert [f.repaired for f in found if f.subject == "one/model.safetensors"] == [False]
    assert published.registry.get("one").artifacts == [other]
    assert (published.folder / "model.safetensors").read_bytes() == b"damaged"


def test_a_place_that_others_named_gets_no_token(published: Zoo, server: Server, tmp_path: Path) -> None:
    """As an import may bring it: neither in the check of what was published nor in a repair."""
    seen: list[dict[str, str]] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    recorder = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{recorder.server_port}"
    elsewhere = Publication(
        endpoint=endpoint, repository="evil/one", commit="0" * 40, tag="v1", published="2026-01-01T00:00:00Z"
    )
    one = published.registry.get("one")
    published.registry.put(one.model_copy(update={"publications": [*one.publications, elsewhere]}))
    published.store.discard(published.export)
    command = [sys.executable, "-m", "zoo.cli", "fsck", "--store", published.store.root]
    command += ["--registry", tmp_path / "registry.db"]
    try:
        for options in (["--published"], ["--repair"]):
            done = subprocess.run(
                [*command, *options, "--json"], cwd=ROOT, env=server.environment(tmp_path / "home"),
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            subjects = {f["subject"] for f in json.loads(done.stdout)}
            assert done.returncode == 1 and seen, done.stderr
            assert not any("authorization" in headers or server.token in str(headers) for headers in seen)
            if options == ["--published"]:  # while the server of HF_ENDPOINT gets it, and answers
                assert subjects == {f"{endpoint}/evil/one@{12 * '0'}"}
                (published.folder / "model.safetensors").unlink()
            else:
                assert subjects == {"one/model.safetensors"}
            seen.clear()
    finally:
        recorder.shutdown()
        recorder.server_close()


def test_the_command(zoo: Zoo, tmp_path: Path) -> None:
    (zoo.folder / "model.safetensors").unlink()
    base = [
        sys.executable,
        "-m",
        "zoo.cli",
        "fsck",
        "--store",
        zoo.store.root,
        "--registry",
        tmp_path / "registry.db",
    ]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*base, *options], cwd=ROOT, capture_output=True, text=True, check=False)

    found = run("--json")
    assert (found.returncode, json.loads(found.stdout)[0]["subject"]) == (1, "one/model.safetensors")
    mended = run("--repair")
    assert (mended.returncode, "repaired" in mended.stdout) == (0, True), mended.stderr
    assert run().stdout == "nothing wrong with registry, store\n"
