"""`zoo pull` from a real zoo server: what other libraries find afterwards, and whatever goes wrong."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

import tests.example
import zoo
from cards import render
from tests.hub import Server, new_token, serving
from tests.hub import start as run_server
from tests.process import refused, small_disk
from tests.proxy import Proxy, slow_line
from tests.tiny_entry import ID, Shelf, empty, model_files, padding_bytes, same_files, shelve
from zoo.entry import Entry
from zoo.errors import FormatError, HubError, StoreError, UsageError, ZooError
from zoo.files import sha256_bytes
from zoo.hub import client, download, manifest, pull
from zoo.hub.push import push
from zoo.machine import this_machine
from zoo.registry import open_registry

BIG = "big-entry"  # the tiny model and a file of random bytes
PADDING = 6_000_000
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Server]:
    """With two entries, by the user zoo."""
    folder = tmp_path_factory.mktemp("hub")
    with serving(folder / "hub") as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", running.token)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, padding in ((ID, 0), (BIG, PADDING)):
            shelf = shelve(folder / name, files, entry_id=name, padding=padding)
            hub = client.connect(running.endpoint)
            push(name, hub, store=shelf.store, registry=shelf.registry, card=render, to="zoo")
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's clients, in this process."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def hub(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> client.Hub:
    monkeypatch.setenv("HF_TOKEN", server.token)
    return client.connect(server.endpoint)


@pytest.fixture
def here(tmp_path: Path) -> Shelf:
    return empty(tmp_path / "here")


def fetch(target: str, hub: client.Hub, shelf: Shelf, **options: Any) -> pull.Pulled:
    return pull.pull(target, hub, store=shelf.store, registry=shelf.registry, **options)


@functools.cache
def padding_sha256() -> str:
    return sha256_bytes(padding_bytes(PADDING))


def blobs(cache: Path, name: str = f"zoo--{ID}") -> Path:
    return cache / f"models--{name}" / "blobs"


def unfinished(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.incomplete"))


# --- what is there afterwards ---


def test_other_libraries_find_what_was_pulled(
    hub: client.Hub, here: Shelf, cache: Path, files: Path, tmp_path: Path
) -> None:
    pulled = fetch(ID, hub, here)
    folder = Path(snapshot_download(f"zoo/{ID}", cache_dir=cache, local_files_only=True))
    assert folder == Path(pulled.folder) and pulled.repository == f"zoo/{ID}"
    entry = here.entry()
    assert same_files(entry, folder) and set(pulled.files) >= {a.path for a in entry.artifacts}
    assert unfinished(cache) == []
    scanned = scan_cache_dir(cache)
    assert not scanned.warnings and [r.refs for r in next(iter(scanned.repos)).revisions] == [{"main"}]
    assert try_to_load_from_cache(f"zoo/{ID}", "config.json", cache_dir=cache) == str(folder / "config.json")

    (publication,) = entry.publications
    assert entry.status == "published" and publication.commit == pulled.commit
    assert publication.tag == f"recipe-{entry.recipe_sha256[:16]}"
    assert Entry.model_validate_json((here.folder() / "entry.json").read_bytes()) == entry

    import torch
    from llama_cpp import Llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"zoo/{ID}", cache_dir=cache, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(f"zoo/{ID}", cache_dir=cache, local_files_only=True)
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.float()(ids).logits[0, -1]
    gguf = Llama(str(folder / f"{ID}-F16.gguf"), verbose=False, n_ctx=64, logits_all=True)
    gguf.eval(ids[0].tolist())
    assert int(gguf.scores[len(ids[0]) - 1].argmax()) == int(expected.argmax())
    ours = zoo.load(ID, store=here.store, threads=1)
    assert int(ours.logits(ids[0].tolist())[-1].argmax()) == int(expected.argmax())


def test_only_some_files(hub: client.Hub, here: Shelf, cache: Path) -> None:
    sparse = fetch(f"zoo/{ID}", hub, here, only="sparse")
    assert "packed.safetensors" in sparse.files and "zoo.json" in sparse.files
    assert not any(f.endswith(".gguf") or f in ("model.safetensors", "config.json") for f in sparse.files)
    assert zoo.load(ID, store=here.store, threads=1)
    with pytest.raises(LocalEntryNotFoundError):  # a part is not taken for the whole
        snapshot_download(f"zoo/{ID}", cache_dir=cache, local_files_only=True)
    gguf = fetch(f"zoo/{ID}", hub, here, only="gguf")
    assert set(gguf.files) - set(sparse.files) == {f"{ID}-F16.gguf"}
    plain = fetch(f"zoo/{ID}", hub, here, only="safetensors")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(plain.files)
    links = {p.name for p in here.folder().rglob("*")}
    assert {"packed.safetensors", f"{ID}-F16.gguf", "model.safetensors"} <= links
    fetch(f"zoo/{ID}", hub, here)
    snapshot_download(f"zoo/{ID}", cache_dir=cache, local_files_only=True)


def test_plain_files(hub: client.Hub, here: Shelf, cache: Path, tmp_path: Path) -> None:
    pulled = fetch(ID, hub, here, dest=tmp_path / "dest")
    found = {p.relative_to(pulled.folder).as_posix() for p in Path(pulled.folder).rglob("*")}
    assert found == set(pulled.files) and not cache.exists()
    assert same_files(here.entry(), tmp_path / "dest")
    assert zoo.load(ID, store=here.store, threads=1)


def test_a_plain_folder_with_files_of_another_release(
    hub: client.Hub, here: Shelf, cache: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / f"{ID}-F16.gguf").write_bytes(b"GGUF of another release")
    fetch(ID, hub, here, dest=dest, only="sparse")
    links = {path.name for path in here.folder().iterdir()}
    assert "packed.safetensors" in links and f"{ID}-F16.gguf" not in links


def test_a_revision(hub: client.Hub, here: Shelf, cache: Path, tmp_path: Path, files: Path) -> None:
    """A card that was edited by hand is no longer what was published; the tag still is."""
    shelf = shelve(tmp_path / "made", files, entry_id="edited")
    release = push("edited", hub, store=shelf.store, registry=shelf.registry, card=render, to="zoo")
    card = (render(shelf.entry("edited")) + "And more.").encode()
    hub.api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="zoo/edited")
    with pytest.raises(FormatError, match=r"not as it was published: README\.md") as told:
        fetch("edited", hub, here)
    assert f"--revision {release.tag}" in str(told.value)
    assert fetch("edited", hub, here, revision=release.tag).commit == release.commit
    assert fetch("edited", hub, here, revision=release.commit).commit == release.commit
    assert (cache / "models--zoo--edited" / "refs" / release.tag).read_text() == release.commit
    for wrong in ("nowhere", "../main"):
        with pytest.raises(ZooError, match="revision"):
            fetch("edited", hub, here, revision=wrong)


def test_a_repository_that_no_zoo_published(
    hub: client.Hub, server: Server, here: Shelf, cache: Path
) -> None:
    hub.api.create_repo("foreign/model", exist_ok=True)
    for path, data in (("config.json", b"{}"), ("weights/model.gguf", b"GGUF" + bytes(2000))):
        hub.api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="foreign/model")
    pulled = fetch("foreign/model", hub, here)
    assert pulled.entry_id is None and {"config.json", "weights/model.gguf"} <= set(pulled.files)
    assert here.registry.entries() == [] and not here.store.exists()
    assert (Path(pulled.folder) / "weights/model.gguf").read_bytes() == b"GGUF" + bytes(2000)
    assert "config.json" not in fetch("foreign/model", hub, here, only="gguf").files
    with pytest.raises(ZooError, match="has no sparse files"):
        fetch("foreign/model", hub, here, only="sparse")
    flip(server, b"{}")
    (blobs(cache, "foreign--model") / "9e26dfeeb6e641a33dae4961196235bdb965b21b").unlink()
    with pytest.raises(HubError, match=r"another config\.json") as told:
        fetch("foreign/model", hub, here)
    assert "git sha1 9e26dfeeb6e641a33dae4961196235bdb965b21b" in str(told.value)
    flip(server, b"{}")


# --- damage ---


def flip(server: Server, data: bytes) -> None:
    """Damage what the server keeps of `data`, or mend it."""
    (path,) = server.store.rglob(sha256_bytes(data))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def test_a_damaged_cache_is_found_and_mended(hub: client.Hub, here: Shelf, cache: Path) -> None:
    fetch(ID, hub, here)
    entry = here.entry()
    path = blobs(cache) / next(a.sha256 for a in entry.artifacts if a.path == "model.safetensors")
    right = path.read_bytes()
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:1000]):
        path.write_bytes(wrong)
        fetch(ID, hub, here)
        assert path.read_bytes() == right
    before = path.stat().st_ino
    fetch(ID, hub, here)
    assert path.stat().st_ino == before
    fetch(ID, hub, here, force=True)
    assert path.stat().st_ino != before and path.read_bytes() == right


@pytest.mark.parametrize("kept", ["damaged", "too long"])
def test_what_an_interrupted_call_left_is_not_trusted(
    hub: client.Hub, here: Shelf, cache: Path, files: Path, kept: str
) -> None:
    right = (files / "model.safetensors").read_bytes()
    partial = blobs(cache) / f"{sha256_bytes(right)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5000) if kept == "damaged" else right + b"more")
    fetch(ID, hub, here)
    assert same_files(here.entry(), here.folder())
    assert unfinished(cache) == []


def test_a_byte_flipped_at_the_server_is_refused(
    hub: client.Hub, server: Server, here: Shelf, cache: Path, files: Path
) -> None:
    data = (files / "packed.safetensors").read_bytes()
    flip(server, data)
    try:
        with pytest.raises(HubError, match=r"another packed\.safetensors than was published") as told:
            fetch(ID, hub, here)
        assert sha256_bytes(data) in str(told.value)
        assert not list(blobs(cache).glob(f"{sha256_bytes(data)}*"))
        assert here.registry.entries() == [] and not here.folder().exists()
    finally:
        flip(server, data)
    fetch(ID, hub, here)


# --- whatever happens on the way ---


def start(
    server: Server, endpoint: str, home: Path, shelf: Shelf, *arguments: str | Path, command: str = "pull"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", command, BIG, "--endpoint", endpoint, *shelf.options, *arguments],
        env=server.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job has it ignored
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, finish(process).stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)


def arrived(home: Path) -> int:
    """Bytes of the padding that a pull has written so far."""
    found = [p.stat().st_size for p in home.rglob(f"{padding_sha256()}.incomplete")]
    return max(found, default=0)


def test_killed_at_any_moment_the_same_command_goes_on(server: Server, tmp_path: Path) -> None:
    home, shelf = tmp_path / "home", empty(tmp_path)
    with slow_line(server.endpoint, 20e6) as line:
        for part in (0.2, 0.7):
            process = start(server, line.endpoint, home, shelf)
            until(lambda: arrived(home) > part * PADDING, process)  # noqa: B023
            process.kill()
            assert finish(process).returncode == -9
            assert shelf.registry.entries() == [] and not list(home.rglob("snapshots"))
    there = arrived(home)
    assert there > 0.7 * PADDING
    with slow_line(server.endpoint) as line:
        done = finish(start(server, line.endpoint, home, shelf, "--json"))
        assert done.returncode == 0, done.stderr
        assert PADDING - there < line.down < PADDING - there + 4_000_000  # the model's own files
    pulled = json.loads(done.stdout)
    assert same_files(shelf.entry(BIG), Path(pulled["folder"])) and unfinished(home) == []
    assert server.token not in done.stdout + done.stderr


@pytest.mark.real
def test_a_cut_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    home, shelf = tmp_path / "home", empty(tmp_path)
    with slow_line(server.endpoint, 20e6) as line:
        process = start(server, line.endpoint, home, shelf)
        for part in (0.2, 0.6):
            until(lambda: arrived(home) > part * PADDING, process)  # noqa: B023
            line.cut()
        done = finish(process)
    assert done.returncode == 0, done.stderr
    assert line.down < PADDING + 5_000_000


@pytest.mark.real
def test_the_server_killed_meanwhile_and_started_again(tmp_path: Path, files: Path) -> None:
    """Both a pull and a push wait for it and go on."""
    shelf = shelve(tmp_path / "made", files, entry_id=BIG, padding=PADDING)
    store, there = tmp_path / "hub", empty(tmp_path)
    token = new_token(store, "zoo")

    def through(line: Proxy, process: subprocess.Popen[str], passed: Callable[[], bool]) -> None:
        nonlocal server
        until(passed, process)
        server.kill()
        line.cut()
        server = run_server(store, token)
        line.lead_to(server.endpoint)
        done = finish(process)
        assert done.returncode == 0, done.stderr

    server = run_server(store, token)
    try:
        with slow_line(server.endpoint, 10e6) as line:
            push_it = start(server, line.endpoint, tmp_path / "home", shelf, command="push")
            through(line, push_it, lambda: line.up > PADDING / 2)
        with slow_line(server.endpoint, 10e6) as line:
            pull_it = start(server, line.endpoint, tmp_path / "home", there)
            through(line, pull_it, lambda: arrived(tmp_path / "home") > PADDING / 2)
    finally:
        server.kill()
    assert same_files(there.entry(BIG), there.folder(BIG))


@pytest.mark.real
def test_the_demo_of_publishing(tmp_path: Path, files: Path) -> None:
    shelf = shelve(tmp_path, files)
    before = shelf.entry()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.demo", ID],
        env=os.environ | {"ZOO_STORE": str(shelf.store), "ZOO_REGISTRY": str(shelf.registry_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ zoo ") == 3 and "48 tokens" in done.stderr
    assert shelf.entry() == before and [p.name for p in shelf.store.iterdir()] == ["entries"]


@pytest.mark.real
def test_interrupted_by_the_user(server: Server, tmp_path: Path) -> None:
    home, shelf = tmp_path / "home", empty(tmp_path)
    with slow_line(server.endpoint, 5e6) as line:
        process = start(server, line.endpoint, home, shelf)
        until(lambda: arrived(home) > 0.1 * PADDING, process)
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert arrived(home) > 0.1 * PADDING
    assert shelf.registry.entries() == []


def test_several_at_once_share_the_work(server: Server, tmp_path: Path) -> None:
    home, shelf = tmp_path / "home", empty(tmp_path)
    with slow_line(server.endpoint, 5e6) as line:
        running = [start(server, line.endpoint, home, shelf) for _ in range(2)]
        done = [finish(process) for process in running]
    for one in done:
        assert one.returncode == 0, one.stderr
    assert any("another process is fetching it" in one.stderr for one in done)
    assert line.down < PADDING + 5_000_000  # once
    folder = Path(done[0].stdout.strip())
    assert same_files(shelf.entry(BIG), folder) and unfinished(home) == []
    assert [p.name for p in (shelf.store / "entries").iterdir()] == [BIG]


def test_a_full_disk(hub: client.Hub, here: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(1_000_000) as disk:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk))
        with pytest.raises(StoreError, match="no room") as told:
            fetch(BIG, hub, here)
        assert "1 MB free" in str(told.value) and "--only" in str(told.value)
        commit = client.describe(hub, f"zoo/{BIG}", "main").sha or ""
        blob = client.files_at(hub, f"zoo/{BIG}", commit)["padding.bin"]
        url = hub.file_url(f"zoo/{BIG}", commit, blob.path)
        with pytest.raises(StoreError, match="no space left"):  # as if it had filled up meanwhile
            download.fetch(hub, download.Download(url, blob.path, blob.size, blob.sha256, None), disk / "big")
        assert not (disk / "big").exists()
    assert here.registry.entries() == []


# --- errors ---


def test_names_that_lead_nowhere(hub: client.Hub, here: Shelf) -> None:
    with pytest.raises(HubError, match="no entry tiny-llama-w at") as told:
        fetch("tiny-llama-w", hub, here)
    assert f"near it: zoo/{ID}" in str(told.value) and "zoo search" in str(told.value)
    with pytest.raises(HubError, match="there is no zoo/nothing at"):
        fetch("zoo/nothing", hub, here)
    for wrong in ("../etc", "a/../b", "Not An Id", "a/b/c", ""):
        with pytest.raises(UsageError):
            fetch(wrong, hub, here)


def test_an_id_that_two_have(hub: client.Hub, here: Shelf, tmp_path: Path, files: Path) -> None:
    shelf = shelve(tmp_path / "made", files, entry_id="twice")
    for name in ("ann", "bob"):
        push("twice", hub, store=shelf.store, registry=shelf.registry, card=render, to=name)
    with pytest.raises(UsageError, match="several entries") as told:
        fetch("twice", hub, here)
    assert "ann/twice, bob/twice" in str(told.value)
    assert fetch("bob/twice", hub, here).repository == "bob/twice"
    fetch("ann/twice", hub, here)  # the same files
    assert [p.repository for p in here.entry("twice").publications] == ["bob/twice", "ann/twice"]


def test_another_entry_of_that_id_is_not_replaced_unasked(
    hub: client.Hub, cache: Path, tmp_path: Path, files: Path
) -> None:
    mine = shelve(tmp_path / "mine", files, padding=10)
    before = mine.entry()
    with pytest.raises(ZooError, match=f"another entry {ID} here") as told:
        fetch(ID, hub, mine)
    assert "--force" in str(told.value) and "made here" in str(told.value)
    assert mine.entry() == before and same_files(before, mine.folder())
    fetch(ID, hub, mine, force=True)
    assert mine.entry().artifacts != before.artifacts and same_files(mine.entry(), mine.folder())

    same = shelve(tmp_path / "same", files)
    fetch(ID, hub, same)
    assert same.entry().status == "published" and not (same.folder() / "config.json").is_symlink()


def test_files_made_here_are_replaced_by_force_only(
    hub: client.Hub, cache: Path, tmp_path: Path, files: Path
) -> None:
    mine = shelve(tmp_path / "mine", files)
    damaged = mine.folder() / "config.json"
    damaged.write_text("{}")
    for options in ({}, {"force": True, "only": "sparse"}):  # which would leave a part of them
        fetch(ID, hub, mine, **options)
        assert damaged.read_text() == "{}" and not damaged.is_symlink()
    fetch(ID, hub, mine, force=True)
    assert same_files(mine.entry(), mine.folder())


def test_a_folder_left_aside_is_not_lost(
    hub: client.Hub, cache: Path, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames; and then the disk is full."""
    mine = shelve(tmp_path / "mine", files)
    mine.folder().rename(mine.folder().with_name(f".{ID}.old"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pull, "write_json", full)
        with pytest.raises(StoreError, match="no space left"):
            fetch(ID, hub, mine, force=True)
    assert same_files(mine.entry(), mine.folder())
    fetch(ID, hub, mine, force=True)
    assert same_files(mine.entry(), mine.folder())
    assert [path.name for path in mine.folder().parent.iterdir()] == [ID]


def test_closed_doors(
    hub: client.Hub, server: Server, here: Shelf, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelve(tmp_path / "made", files, entry_id="closed")
    push("closed", hub, store=shelf.store, registry=shelf.registry, card=render, to="zoo", private=True)
    hub.api.update_repo_settings(f"zoo/{ID}", gated="auto")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    stranger = client.connect(server.endpoint)
    try:
        with pytest.raises(HubError, match=r"is gated.*HF_TOKEN|gated") as told:
            fetch(f"zoo/{ID}", stranger, here)
        assert "HF_TOKEN" in str(told.value)
    finally:
        hub.api.update_repo_settings(f"zoo/{ID}", gated=False)
    with pytest.raises(HubError, match=r"no zoo/closed at http.*, or it is private"):
        fetch("zoo/closed", stranger, here)
    assert fetch("zoo/closed", hub, here).entry_id == "closed"


def test_no_connection(hub: client.Hub, here: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"cannot reach http://127\.0\.0\.1:9"):
        fetch(ID, client.connect("http://127.0.0.1:9"), here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot ask") as told:
        fetch(ID, hub, here)
    assert "HF_HUB_OFFLINE" in str(told.value)


def test_a_server_that_is_none(here: Shelf, cache: Path) -> None:
    """An ordinary web server, as behind a hotel's login page."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=here.store.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = re.search(r"port (\d+)", process.stdout.readline())
        assert port is not None
        other = client.connect(f"http://127.0.0.1:{port[1]}")
        for target in (ID, f"zoo/{ID}"):
            with pytest.raises(HubError):
                fetch(target, other, here)
    finally:
        process.kill()
        process.wait()


# --- a hostile manifest ---


def hostile(**changes: Any) -> bytes:
    entry = tests.example.entry(ID, artifacts=[])
    listed = {"path": "a", "size": 1, "sha256": "0" * 64}
    data = {"format": 1, "files": [listed], "entry": entry.model_dump(mode="json")}
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["entry"][key] = value  # type: ignore[call-overload, index]
    return json.dumps(data).encode()


def file(path: str, size: int = 1) -> dict[str, Any]:
    return {"path": path, "size": size, "sha256": "0" * 64}


# On a machine that has the fingerprint of another one.
ODD_RUN = tests.example.entry().benchmarks[0].model_dump(mode="json")
ODD_RUN["machine"]["cpu"] = "another"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b'{"format": "1"}',
        hostile(format=2),
        hostile(files=[file("../a")]),
        hostile(files=[file("/etc/passwd")]),
        hostile(files=[file("a/./b")]),
        hostile(files=[file("a\\b")]),
        hostile(files=[file("a\nb")]),
        hostile(files=[file("")]),
        hostile(files=[file("x" * 300)]),
        hostile(files=[file(".git/config")]),
        hostile(files=[file(".Git/config")]),
        hostile(files=[file("a/.git/config")]),
        hostile(benchmarks=[ODD_RUN]),
        hostile(files=[file("a"), file("a")]),
        hostile(files=[file("a"), file("a/b")]),
        hostile(files=[file("zoo.json")]),
        hostile(files=[file("a", -1)]),
        hostile(files=[{"path": "a", "size": 1, "sha256": "0" * 63}]),
        hostile(id="../x"),
        hostile(parameters=1 << 70),
        hostile(base_model="nul\0"),
        hostile(created=7),
        hostile(artifacts=[{**file("b"), "kind": "gguf"}]),
        hostile(artifacts=[{**file("a", 2), "kind": "gguf"}]),
    ],
    ids=lambda data: str(data[:20]) if isinstance(data, bytes) else None,
)
def test_a_hostile_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="the manifest"):
        manifest.parse(data, "the manifest")


def test_a_manifest_of_a_newer_zoo_with_more_fields() -> None:
    found = manifest.parse(hostile(novelty={"a": 1}), "it")
    assert found.entry.id == ID and found.files[0].path == "a"


def test_a_manifest_does_not_say_where_it_is_published(hub: client.Hub, here: Shelf) -> None:
    place = {"endpoint": "http://127.0.0.1:9", "repository": "evil/own-places", "commit": "0" * 40}
    place |= {"tag": "v1", "published": "2026-01-01T00:00:00Z"}
    data = hostile(files=[], id="own-places", publications=[place])
    assert manifest.parse(data, "it").entry.publications == []
    hub.api.create_repo("evil/own-places")
    hub.api.upload_file(path_or_fileobj=data, path_in_repo="zoo.json", repo_id="evil/own-places")
    fetch("evil/own-places", hub, here)
    assert [p.endpoint for p in here.entry("own-places").publications] == [hub.endpoint]


def test_a_manifest_of_another_entry(hub: client.Hub, here: Shelf) -> None:
    for name, data, word in (
        ("impostor", hostile(files=[]), "is of another entry"),
        ("absent", hostile(id="absent"), "not as it was published"),
        ("broken", b"{", "not JSON"),
    ):
        hub.api.create_repo(f"evil/{name}")
        hub.api.upload_file(path_or_fileobj=data, path_in_repo="zoo.json", repo_id=f"evil/{name}")
        with pytest.raises(FormatError, match=word):
            fetch(f"evil/{name}", hub, here)
    assert here.registry.entries() == []


# --- zoo generate ---


def test_generate_pulls_by_itself(server: Server, tmp_path: Path) -> None:
    environment = server.environment(tmp_path / "home") | {"ZOO_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-m", "zoo.cli", "generate", ID, "The quick", "--max-tokens", "4", "--json"]

    def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    first = run(environment)
    assert first.returncode == 0, first.stderr
    assert f"{ID} is not here: pulling zoo/{ID} from {server.endpoint}" in first.stderr
    assert not list(tmp_path.rglob("*.gguf")) and not (tmp_path / "registry.db").exists()
    second = run(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert second.returncode == 0 and "pulling" not in second.stderr
    assert json.loads(first.stdout)["ids"] == json.loads(second.stdout)["ids"]

    command[4] = "not-anywhere"
    refused(run(environment), 1, "there is no entry not-anywhere", f"at {server.endpoint}")
    refused(run(environment | {"HF_HUB_OFFLINE": "1"}), 1, "there is no entry not-anywhere", "HF_HUB_OFFLINE")


def test_bench_pulls_an_entry_whose_speed_it_is_to_record(server: Server, tmp_path: Path) -> None:
    """On a machine that other tests keep busy, which else would not be recorded."""
    code = "import zoo.runner.bench as bench; bench.BUSY_CORES = 1e9; from zoo.cli import main; main()"
    settings = ["--threads", "1", "--prompt", "8", "--generate", "2", "--repeat", "1"]
    environment = server.environment(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", ID, *settings, "--record", "--store", tmp_path / "store"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recorded = open_registry(str(tmp_path / "registry.db"), create=False).get(ID)
    here = [b for b in recorded.benchmarks if b.machine == this_machine()]
    assert [(b.artifact, b.prompt_tokens, b.generated_tokens) for b in here] == [("packed.safetensors", 8, 2)]
