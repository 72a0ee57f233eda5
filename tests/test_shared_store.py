"""A store that machines share: in a folder, and on a real S3-compatible server between real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from tests import s3
from tests.process import ROOT, Zoo, refused
from tests.proxy import slow_line
from tests.store_machine import BIG, finish, key_of
from tests.tiny import tiny_llama
from zoo.entry import Entry
from zoo.errors import StoreError, UsageError
from zoo.files import Store, file_table
from zoo.fsck import fsck
from zoo.jobs.transient import transient
from zoo.registry import Registry, open_registry
from zoo.shared_store import Remote, SharedStore, open_store

KEY = "ab" * 32
WEIGHTS = b"weights" * 1000


class Folder:
    """A shared store in a folder, and machines that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.a, self.b, self.c = (self.machine(name) for name in "abc")

    def machine(self, name: str) -> SharedStore:
        return SharedStore(self.folder / name, Remote(f"file://{self.shared}"))

    @property
    def list(self) -> Path:
        return self.shared / "sums" / KEY[:2] / f"{KEY}.json"

    @property
    def weights(self) -> Path:
        sha256 = json.loads(self.list.read_bytes())["weights"][1]
        return self.shared / "blobs" / sha256[:2] / sha256


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- in a folder ---


def test_what_one_machine_finished_another_has(place: Folder) -> None:
    made = finish(place.a, KEY, WEIGHTS)
    assert place.b.get(KEY) == place.b.path(KEY)
    assert file_table(place.b.path(KEY)) == file_table(made)
    assert Store(place.b.root).damage(KEY) == []  # by the sums that it wrote itself
    assert list((place.b.root / "partial").iterdir()) == []
    assert place.b.get("cd" * 32) is None


def test_outputs_that_hold_the_same_file_upload_it_once(place: Folder) -> None:
    finish(place.a, KEY, WEIGHTS)
    finish(place.a, "cd" * 32, WEIGHTS)
    assert len(place.a.remote.outputs()) == 2 and len(place.a.remote.files()) == 3


def test_what_was_finished_without_the_shared_store_is_uploaded(place: Folder) -> None:
    alone = Store(place.a.root)
    finish(alone, KEY, WEIGHTS)
    alone.sums(KEY).unlink()  # as an older zoo left it
    assert place.b.get(KEY) is None
    assert place.a.get(KEY) is not None
    assert place.b.get(KEY) is not None


DAMAGE: dict[str, Callable[[Folder], object]] = {
    "a bit": lambda p: flip(p.weights),
    "short": lambda p: p.weights.write_bytes(p.weights.read_bytes()[:-1]),
    "long": lambda p: p.weights.write_bytes(p.weights.read_bytes() + b"x"),
    "missing": lambda p: p.weights.unlink(),
    "half a list": lambda p: p.list.write_bytes(p.list.read_bytes()[:-20]),
    "an empty list": lambda p: p.list.write_bytes(b""),
    "another list": lambda p: p.list.write_text("[]"),
    "a hostile list": lambda p: p.list.write_text(
        p.list.read_text().replace('"weights"', '"../../../weights"')),
    "no list": lambda p: p.list.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_is_made_again_and_never_used(place: Folder, damage: Callable[[Folder], Any]) -> None:
    made = finish(place.a, KEY, WEIGHTS)
    damage(place)
    assert place.b.get(KEY) is None
    assert not place.b.path(KEY).exists() and not (place.folder / "weights").exists()
    again = finish(place.b, KEY, WEIGHTS)
    assert file_table(again) == file_table(made)
    assert place.c.get(KEY) is not None  # as the upload mended it
    assert file_table(place.c.path(KEY)) == file_table(made)


def test_fsck_finds_and_mends(place: Folder, in_sqlite: Registry) -> None:
    finish(place.a, KEY, WEIGHTS)
    finish(place.a, "cd" * 32, b"others")
    assert fsck(in_sqlite, place.a) == []
    flip(place.weights)
    (place.shared / "sums" / "cd" / f"{'cd' * 32}.json").write_text("{")
    left, fresh = (place.shared / "blobs" / name[:2] / name for name in ("e" * 64, "f" * 64))
    for path in (left, fresh):
        path.parent.mkdir(exist_ok=True)
        path.write_text("of an upload that was killed")
    long_ago = (datetime.now(UTC) - timedelta(days=2)).timestamp()
    os.utime(left, (long_ago, long_ago))
    found = fsck(in_sqlite, place.a)
    assert {(f.where, f.subject) for f in found} == {
        ("shared", KEY),
        ("shared", "cd" * 32),
        ("shared", "e" * 64),
    }
    assert any("weights" in f.problem for f in found)
    assert all(f.repaired for f in fsck(in_sqlite, place.a, repair=True))
    assert fresh.exists() and not left.exists()  # it may be on its way
    assert fsck(in_sqlite, place.a) == []
    assert place.b.get(KEY) is None
    for key in (KEY, "cd" * 32):
        assert place.a.get(key) is not None  # whole here, so uploaded again
        assert place.b.get(key) is not None


def test_a_folder_that_cannot_be_written(place: Folder) -> None:
    place.shared.write_text("a file")
    with pytest.raises(StoreError, match=f"cannot write the shared store file://{place.shared}"):
        place.a.remote.check()


@pytest.mark.parametrize(
    ("url", "words"),
    [("nosuch://bucket", "nosuch"), ("s3://key:planted-secret@bucket/x", "password"), ("s3://[", "none")],
)
def test_a_url_that_cannot_work(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        open_store(tmp_path, url)
    assert words in str(refusal.value) and "planted" not in str(refusal.value)


def test_a_store_is_a_folder(tmp_path: Path) -> None:
    done = Zoo(tmp_path)("fsck", "--store", "s3://bucket/x")
    refused(done, 2, "--store is a folder of this machine", "--shared-store s3://bucket/x")


# --- on a server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def on_s3(server: s3.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty store there; this process may use it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.BUCKET}/{tmp_path.name}"


def machine(folder: Path, url: str, count: int, fill: str, **environment: str) -> subprocess.Popen[str]:
    """Ready to finish so many outputs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.store_machine", folder, url, str(count), fill],
        cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_processes_of_one_machine_fetch_at_once(place: Folder) -> None:
    """None removes what another is fetching."""
    keys = [f"{number:02x}" * 32 for number in range(40)]
    for key in keys:
        with place.a.locked(key), place.a.writing(key) as folder:
            (folder / "weights").write_bytes(WEIGHTS + key.encode())
    code = f"""
import sys
from pathlib import Path
from zoo.shared_store import Remote, SharedStore
store = SharedStore(Path({str(place.folder / "d")!r}), Remote({f"file://{place.shared}"!r}))
for key in {keys!r}:
    assert (store.get(key) / "weights").read_bytes() == {WEIGHTS!r} + key.encode()
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert not list((place.folder / "d" / "partial").iterdir())


def test_two_machines_finish_the_same_stages_at_once(on_s3: str, tmp_path: Path) -> None:
    """Their outputs differ, so that a mixture would show."""
    both = [machine(tmp_path / fill, on_s3, 4, fill) for fill in "xy"]
    go(*both)
    assert [process.wait(60) for process in both] == [0, 0]
    third = open_store(tmp_path / "third", on_s3)
    for number in range(4):
        key = key_of(number)
        path = third.get(key)
        assert path is not None
        assert (path / "weights").read_bytes() in (b"x" * BIG, b"y" * BIG)
        for fill in "xy":  # the loser has its own or the winner's, whole
            assert Store(tmp_path / fill).get(key) is not None


def test_an_upload_that_is_killed_leaves_nothing_to_use(
    server: s3.Server, on_s3: str, tmp_path: Path
) -> None:
    with slow_line(server.endpoint, 2e6) as line:
        killed = machine(tmp_path / "a", on_s3, 1, "x", AWS_ENDPOINT_URL=line.endpoint)
        go(killed)
        while line.up < BIG / 4:
            assert killed.poll() is None
            time.sleep(0.01)
        assert line.up < BIG
        killed.kill()
        killed.wait()
    key = key_of(0)
    assert Store(tmp_path / "a").get(key) is not None  # it was finished there
    other = open_store(tmp_path / "b", on_s3)
    assert isinstance(other, SharedStore)
    assert other.remote.outputs() == [] and other.get(key) is None
    again = machine(tmp_path / "a", on_s3, 1, "x")
    go(again)
    assert again.wait(60) == 0
    assert other.get(key) is not None


def test_a_server_that_does_not_answer(on_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="cannot read the shared store") as failure:
        open_store(tmp_path, on_s3).get(KEY)
    assert "127.0.0.1:9" in str(failure.value) and transient(failure.value)


def test_a_bucket_that_is_not_there(on_s3: str) -> None:
    with pytest.raises(StoreError, match="cannot write") as failure:
        Remote("s3://no-such-bucket/x").check()
    assert "bucket does not exist" in str(failure.value) and not transient(failure.value)


# --- `zoo run` and `zoo jobs` on two machines ---


RECIPE: dict[str, Any] = {
    "name": "tiny",
    "calibration": {"windows": 4, "length": 32},
    "steps": [
        {"kind": "prune", "method": "wanda", "pattern": {"keep": 8, "group": 16}},
        {"kind": "quantize", "method": "gptq", "grid": {"bits": 8, "group": 32}},
    ],
    "evaluation": {"perplexity": [{"windows": 2, "length": 64}], "tasks": []},
    "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
    "verification": {"threads": 1},
}


class Machine:
    """A folder with a store and a registry of its own, and `zoo` in it."""

    def __init__(self, folder: Path, recipe: Path, url: str, server: s3.Server) -> None:
        folder.mkdir()
        self.folder, self.recipe, self.url = folder, recipe, url
        self.zoo = Zoo(folder, server.environment)
        self.own = ("--store", folder / "store", "--registry", folder / "registry.db")

    def run(self) -> Entry:
        done = self.zoo("run", self.recipe, *self.own, "--shared-store", self.url)
        assert done.returncode == 0, done.stderr
        assert s3.SECRET not in done.stderr
        return open_registry(str(self.folder / "registry.db")).get("tiny")

    @property
    def fetched_damage(self) -> str:
        return (self.folder / f"{self.zoo.started}.err").read_text()


def made(entry: Entry) -> set[str]:
    return {stage.name for stage in entry.stages if stage.status == "done"}


def artifacts(entry: Entry) -> dict[str, str]:
    return {a.path: a.sha256 for a in entry.artifacts}


def test_another_machine_makes_nothing_again(server: s3.Server, on_s3: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "llama")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"base": str(base)}))
    a, b, c = (Machine(tmp_path / name, recipe, on_s3, server) for name in "abc")
    first = a.run()
    assert len(made(first)) == len(first.stages) > 0
    second = b.run()
    assert made(second) == set()
    assert artifacts(second) == artifacts(first)
    assert second.measurements == first.measurements

    # A bit flips on the server, in a file that both the last step and the export hold.
    (victim,) = (path for path, sha256 in artifacts(first).items() if path == "model.safetensors")
    sha256 = artifacts(first)[victim]
    remote = fsspec.filesystem("s3", use_listings_cache=False)
    path = f"{on_s3.removeprefix('s3://')}/blobs/{sha256[:2]}/{sha256}"
    data = bytearray(remote.cat_file(path))
    data[len(data) // 2] ^= 1
    remote.pipe_file(path, bytes(data))
    checked = a.zoo("fsck", *a.own, "--shared-store", on_s3, "--json")
    assert checked.returncode == 1
    damaged = {s.key for s in first.stages if s.name in ("2. quantize (gptq)", "export")}
    assert {f["subject"] for f in json.loads(checked.stdout)} == damaged
    third = c.run()
    assert "model.safetensors has another sha256" in c.fetched_damage
    assert made(third) == {"2. quantize (gptq)"}  # whose upload mended the export, too
    assert artifacts(third) == artifacts(first)
    assert a.zoo("fsck", *a.own, "--shared-store", on_s3).returncode == 0

    # The registry is moved to a machine whose own store is empty: nothing is stale, nor wrong.
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [{"recipes": ["tiny.yaml"]}]}))
    elsewhere = ("--store", tmp_path / "empty", "--registry", a.own[3])
    planned = a.zoo(
        "jobs", "plan", "--jobs", tmp_path / "jobs.yaml", *elsewhere, "--shared-store", on_s3, "--json"
    )
    assert json.loads(planned.stdout)[0]["state"] == "fresh", planned.stdout
    alone = a.zoo("jobs", "plan", "--jobs", tmp_path / "jobs.yaml", *elsewhere, "--json")
    assert json.loads(alone.stdout)[0]["state"] == "stale"
    assert a.zoo("fsck", *elsewhere, "--shared-store", on_s3).returncode == 0


def test_planted_credentials_are_nowhere(tmp_path: Path) -> None:
    """An unreachable server, and a command that would say all it knows."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"base": str(tiny_llama(tmp_path / "llama"))}))
    environment = s3.Server("http://127.0.0.1:9").environment | {"AWS_MAX_ATTEMPTS": "1"}
    done = Zoo(tmp_path, environment)(
        "--log-json", "run", recipe, "--store", tmp_path / "store", "--registry", tmp_path / "registry.db",
        "--shared-store", "s3://bucket/x",
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot write the shared store s3://bucket/x" in done.stderr and "Traceback" not in done.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert s3.SECRET.encode() not in written
