"""The server's store: git's own numbers, all-or-nothing commits, hashed tokens, and what is collected."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.process import small_disk
from zoo.errors import FormatError, StoreError, UsageError
from zoo.hub import front_matter
from zoo.hub.store import (
    EntryNotFound,
    Exists,
    File,
    HubStore,
    Refused,
    Removal,
    Repo,
    RepoNotFound,
    RevisionNotFound,
    Stale,
    check_name,
    check_path,
    check_ref,
    folders,
    lfs_file,
    lfs_pointer,
)
from zoo.hub.tokens import create_token, find_token


@pytest.fixture
def hub(tmp_path: Path) -> HubStore:
    return HubStore(tmp_path / "hub")


@pytest.fixture
def repo(hub: HubStore) -> Repo:
    return hub.create("models", "me/model")


def put_large(hub: HubStore, path: str, content: bytes) -> File:
    sha256 = hashlib.sha256(content).hexdigest()
    hub.receive(sha256, len(content), [content[:3], content[3:]])
    return lfs_file(path, sha256, len(content))


def push(hub: HubStore, repo: Repo, files: dict[str, bytes], **named: Any) -> str:
    changes = [hub.put(path, content) for path, content in files.items()]
    return hub.commit(repo, "main", changes, title="a push", **named).oid


# --- history ---


def test_trees_and_commits_have_gits_own_numbers(hub: HubStore, repo: Repo, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    files = {"README.md": b"hi\n", "a/b/c.txt": b"", "a.txt": b"x", "a/é ü.json": b"{}", "a-b/z": b"1"}
    large = b"weights" * 1000
    changes = [hub.put(path, content) for path, content in files.items()]
    first = hub.commit_of(repo, "main")
    commit = hub.commit(
        repo,
        "main",
        [*changes, put_large(hub, "a/model.gguf", large)],
        title="Title",
        message="More",
        author="me",
    )

    work = tmp_path / "git"
    pointer = lfs_pointer(hashlib.sha256(large).hexdigest(), len(large))
    for path, content in {**files, "a/model.gguf": pointer}.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content)

    def git(*arguments: str, **more: Any) -> str:
        command = ["git", "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(
            command, cwd=work, check=True, capture_output=True, text=True, **more
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    tree = git("write-tree")
    ours = folders(hub.files(commit).values())
    assert ours[""] == tree
    listed = [line.partition("\t") for line in git("ls-tree", "-rtd", "-z", tree).split("\0") if line]
    assert {path: oid for path, oid in ours.items() if path} == {
        path: head.split()[2] for head, _, path in listed
    }
    # git makes the same commit of this tree, if it is told the same author and moment.
    person = "me <me@zoo> %d +0000"
    text = f"tree {tree}\nparent {first.oid}\nauthor {person}\ncommitter {person}\n\nTitle\n\nMore"
    numbers = {
        git("hash-object", "-t", "commit", "--stdin", "--literally", input=text % (second, second))
        for second in range(int(time.time()) - 5, int(time.time()) + 1)
    }
    assert commit.oid in numbers


def test_history_is_linear_and_a_stale_parent_is_refused(hub: HubStore, repo: Repo) -> None:
    start = hub.commit_of(repo, "main").oid
    one = push(hub, repo, {"a": b"1"}, parent=start)
    two = push(hub, repo, {"b": b"2"}, parent=one[:7])
    with pytest.raises(Stale):
        push(hub, repo, {"a": b"lost"}, parent=one)
    three = push(hub, repo, {"a": b"3"})
    assert [c.oid for c in hub.commits(repo, "main")] == [three, two, one, start]
    assert [c.oid for c in hub.commits(repo, two)] == [two, one, start]
    assert [c.oid for c in hub.commits(repo, "main", skip=1, limit=2)] == [two, one]
    content = {
        path: hub.blob(f.sha256).read_bytes() for path, f in hub.files(hub.commit_of(repo, "main")).items()
    }
    assert content == {"a": b"3", "b": b"2"}
    assert hub.blob(hub.file(hub.commit_of(repo, one), "a").sha256).read_bytes() == b"1"


def test_a_commit_is_whole_or_not_at_all(hub: HubStore, repo: Repo) -> None:
    before = push(hub, repo, {"a": b"1", "d/e": b"2"})
    absent = lfs_file("big.bin", "0" * 64, 10)
    wrong_size = File("a", "0" * 40, 99, hub.put("a", b"1").sha256, lfs=True)
    for changes, error in [
        ([hub.put("x", b"x"), absent], Refused),
        ([hub.put("x", b"x"), wrong_size], Refused),
        ([hub.put("x", b"x"), Removal("not there")], EntryNotFound),
        ([hub.put("x", b"x"), Removal("d")], EntryNotFound),  # a folder is not a file
        ([Removal("a"), Removal("a", folder=True)], EntryNotFound),
        ([hub.put("d", b"x")], Refused),  # there is a folder d
        ([hub.put("a/b", b"x")], Refused),  # there is a file a
        ([hub.put("x", b"x"), hub.put("../y", b"y")], Refused),
    ]:
        with pytest.raises(error):
            hub.commit(repo, "main", changes, title="t")
        assert hub.commit_of(repo, "main").oid == before
    with pytest.raises(RevisionNotFound):
        hub.commit(repo, "no-such-branch", [hub.put("x", b"x")], title="t")
    hub.commit(repo, "main", [Removal("d/", folder=True), Removal("a")], title="empty")
    assert hub.files(hub.commit_of(repo, "main")) == {}


def test_branches_and_tags(hub: HubStore, repo: Repo) -> None:
    one = push(hub, repo, {"a": b"1"})
    hub.create_ref(repo, "tag", "v1.0", "main")
    hub.create_ref(repo, "branch", "try/it", one[:40])
    hub.commit(repo, "try/it", [hub.put("b", b"2")], title="on a branch")
    assert hub.commit_of(repo, "v1.0").oid == one == hub.commit_of(repo, "refs/tags/v1.0").oid
    assert set(hub.files(hub.commit_of(repo, "try/it"))) == {"a", "b"}
    assert hub.commit_of(repo, "main").oid == one
    with pytest.raises(Exists):
        hub.create_ref(repo, "tag", "v1.0", "main")
    with pytest.raises(RevisionNotFound):  # a tag stays where it is
        hub.commit(repo, "v1.0", [hub.put("b", b"2")], title="t")
    with pytest.raises(Refused):
        hub.delete_ref(repo, "branch", "main")
    hub.delete_ref(repo, "branch", "try/it")
    for gone in ("try/it", "nothing", "0" * 40, "refs/pr/1"):
        with pytest.raises(RevisionNotFound):
            hub.commit_of(repo, gone)
    assert [(r.kind, r.name, r.oid) for r in hub.refs(repo)] == [
        ("branch", "main", one),
        ("tag", "v1.0", one),
    ]


def test_the_last_commit_of_a_file(hub: HubStore, repo: Repo) -> None:
    one = push(hub, repo, {"a": b"1", "b": b"1"})
    two = push(hub, repo, {"a": b"2", "b": b"1"})
    files = hub.files(hub.commit_of(repo, "main"))
    commits = hub.changed_by(files.values())
    assert {path: commits[f.changed_id].oid for path, f in files.items()} == {"a": two, "b": one}


def test_repositories_are_listed_newest_first(hub: HubStore) -> None:
    for name, tag in [("me/one", "x"), ("me/two", "y"), ("you/one-more", "x")]:
        made = hub.create("models", name, private=name == "me/two")
        push(hub, made, {"README.md": f"---\ntags: [{tag}, all]\n---\n".encode()})
        time.sleep(0.002)  # moments are kept in milliseconds
    hub.create("datasets", "me/data")

    def names(**named: Any) -> list[str]:
        return [found.name for found, _ in hub.repos("models", **{"private": True, **named})]

    assert names() == ["you/one-more", "me/two", "me/one"]
    assert names(private=False) == ["you/one-more", "me/one"]
    assert names(tags=["x", "all"]) == ["you/one-more", "me/one"]
    assert names(search="ONE", author="me") == ["me/one"]
    assert names(author="m") == []
    first = hub.repos("models", private=True, limit=1)[0]
    assert names(after=(first[1].created, first[0].id)) == ["me/two", "me/one"]
    with pytest.raises(Exists):
        hub.create("models", "me/one")
    hub.delete(hub.repo("models", "me/one"))
    with pytest.raises(RepoNotFound):
        hub.repo("models", "me/one")
    assert hub.repo("datasets", "me/data").kind == "datasets"


def test_files_of_several_commits_are_those_of_each(hub: HubStore, repo: Repo) -> None:
    push(hub, repo, {"b/c": b"1", "a": b"2"})
    other = hub.create("models", "me/other")
    push(hub, other, {"a": b"3"})
    empty = hub.create("models", "me/empty")
    commits = [hub.commit_of(one, "main") for one in (repo, other, empty)]
    found = hub.files_of(commits)
    assert found == {commit.id: hub.files(commit) for commit in commits}
    assert list(found[commits[0].id]) == ["a", "b/c"] and hub.files_of([]) == {}


def test_commits_of_repositories_that_one_may_know_of(hub: HubStore, repo: Repo) -> None:
    secret = hub.create("models", "me/secret", private=True)
    old, new = push(hub, repo, {"a": b"1"}), push(hub, repo, {"a": b"2"})
    mine = push(hub, secret, {"a": b"1"})
    names = ["me/model", "me/secret", "me/nothing"]
    everyone = hub.commits_in("models", names, private=False)
    assert everyone > {("me/model", old), ("me/model", new)} and {name for name, _ in everyone} == {
        "me/model"
    }
    assert ("me/secret", mine) in hub.commits_in("models", names, private=True)
    assert hub.commits_in("models", ["me/nothing"], private=True) == set()


# --- content ---


@pytest.mark.parametrize("size, chunks", [(5, [b"hell"]), (5, [b"hello", b"!"]), (5, [b"jello"])])
def test_content_of_another_size_or_hash_is_not_kept(hub: HubStore, size: int, chunks: list[bytes]) -> None:
    sha256 = hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(Refused):
        hub.receive(sha256, size, chunks)
    assert not [p for p in (hub.root / "blobs").rglob("*") if p.is_file()]
    hub.receive(sha256, size, [b"he", b"", b"llo"])
    assert hub.blob(sha256).read_bytes() == b"hello"


def test_what_no_repository_names_is_collected(hub: HubStore, repo: Repo) -> None:
    kept = push(hub, repo, {"a": b"kept"})
    put_large(hub, "x", b"never committed")
    half = hub.blob("ab" * 32).with_name(".half-an-upload")
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"1234")
    os.utime(half, (0, 0))
    hub.create_ref(repo, "branch", "short-lived", "main")
    hub.commit(repo, "short-lived", [hub.put("b", b"of a branch")], title="t")
    assert hub.collect() == (1, 4)  # all the rest is young
    hub.delete_ref(repo, "branch", "short-lived")
    assert hub.collect(0) == (2, len(b"never committed") + len(b"of a branch"))
    assert hub.blob(hub.file(hub.commit_of(repo, kept), "a").sha256).read_bytes() == b"kept"
    hub.delete(repo)
    assert hub.collect(0)[0] == 1
    assert not [p for p in (hub.root / "blobs").rglob("*") if p.is_file()]


def test_what_was_asked_for_again_is_not_collected(hub: HubStore) -> None:
    file = put_large(hub, "x", b"content")
    long_ago = time.time() - 10 * 24 * 3600
    os.utime(hub.blob(file.sha256), (long_ago, long_ago))
    assert hub.claim([file.sha256, "0" * 64]) == {file.sha256: 7, "0" * 64: None}
    assert hub.collect() == (0, 0)


def test_collecting_during_pushes_never_breaks_one(tmp_path: Path) -> None:
    hub = HubStore(tmp_path / "hub")
    repo = hub.create("models", "me/model")
    done, refused, stop = [], [], threading.Event()

    def pushing(who: int) -> None:
        for turn in range(25):
            content = f"{who} {turn % 3}".encode()
            try:
                change = put_large(hub, f"{who}-{turn}", content)
                hub.commit(repo, "main", [change], title="t")
                done.append(change.path)
                hub.commit(repo, "main", [Removal(change.path)], title="t")
            except Refused as error:  # its content went between the two: it says so and can be sent again
                refused.append(error)

    def collecting() -> None:
        other = HubStore(tmp_path / "hub")
        while not stop.is_set():
            other.collect(0)

    collector = threading.Thread(target=collecting)
    pushers = [threading.Thread(target=pushing, args=(who,)) for who in range(3)]
    collector.start()
    for thread in pushers:
        thread.start()
    for thread in pushers:
        thread.join()
    stop.set()
    collector.join()
    assert len(done) + len(refused) == 75 and len(done) > 10
    for commit in hub.commits(repo, "main", limit=1000):
        for file in hub.files(commit).values():
            assert hashlib.sha256(hub.blob(file.sha256).read_bytes()).hexdigest() == file.sha256


def test_a_full_disk_refuses_and_loses_nothing() -> None:
    with small_disk(2_000_000) as disk:
        hub = HubStore(disk / "hub")
        repo = hub.create("models", "me/model")
        kept = push(hub, repo, {"a": b"kept"})
        content = bytes(3_000_000)
        with pytest.raises(StoreError, match="space"):
            hub.receive(hashlib.sha256(content).hexdigest(), len(content), [content[:1000], content[1000:]])
        with pytest.raises(StoreError):
            for turn in range(1000):
                push(hub, repo, {f"{turn}": os.urandom(10_000)})
        again = HubStore(disk / "hub")
        commits = again.commits(repo, "main", limit=1000)
        assert kept in [commit.oid for commit in commits]
        for file in again.files(commits[0]).values():
            assert hashlib.sha256(again.blob(file.sha256).read_bytes()).hexdigest() == file.sha256


# --- names ---


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", ".git/config", "a/.GIT/x", "a\\..\\b",
     "a\0b", "a\nb", "x" * 256, "a/" * 600 + "b"],
)  # fmt: skip
def test_paths_that_could_leave_a_folder_are_refused(path: str) -> None:
    with pytest.raises(Refused):
        check_path(path)


@pytest.mark.parametrize(
    "path", ["a", "a/b c.txt", ".gitattributes", "é/ü.json", "a..b", ".eval_results/x.yaml"]
)
def test_ordinary_paths_are_taken(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "a/b/c",
        "../x",
        "a/..",
        "a/b--c",
        "a/b.git",
        "api/x",
        "datasets/x",
        "a/-b",
        "a/" + "b" * 95,
        "a/b\n",
    ],
)
def test_names_no_client_accepts_are_refused(name: str) -> None:
    with pytest.raises(Refused):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["", "a..b", "/a", "a/", "a//b", "a.lock", ".a", "a/.b", "0" * 40, "refs/heads/x", "a b", "-x"]
)
def test_refs_git_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(Refused):
        check_ref(name)


@pytest.mark.parametrize("sha256", ["../../etc/passwd", "ab", "A" * 64, "a" * 63 + "/", "a" * 64 + "\n"])
def test_only_a_sha256_names_content(hub: HubStore, sha256: str) -> None:
    with pytest.raises(Refused):
        hub.blob(sha256)


# --- tokens, and the store as a whole ---


def test_a_token_is_kept_as_a_hash(hub: HubStore) -> None:
    token = create_token(hub, "someone", "write")
    assert len(token) == 40 and token.startswith("hf_") and token[3:].isalnum()
    found = find_token(hub, token)
    assert found is not None and (found.name, found.scope) == ("someone", "write")
    assert find_token(hub, token[:-1] + "0") is None or token.endswith("0")
    assert find_token(hub, "") is None
    for path in hub.root.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes()
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    with pytest.raises(UsageError, match="already"):
        create_token(hub, "someone", "read")
    with pytest.raises(UsageError):
        create_token(hub, "not/a name", "read")


def test_a_store_of_another_version_is_left_alone(hub: HubStore) -> None:
    database = sqlite3.connect(hub.root / "hub.db")
    database.execute("PRAGMA user_version = 99")
    database.commit()
    with pytest.raises(StoreError, match="another version"):
        HubStore(hub.root)


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "hub.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="does not answer"):
        HubStore(tmp_path)


# --- the YAML of a README ---


def test_card_data_is_what_the_clients_read() -> None:
    from huggingface_hub import ModelCard

    text = (
        "---\nlicense: apache-2.0\ntags:\n- sparse\nbase_model: a/b\nbase_model_relation: quantized\n"
        "language: [en, de]\ndatasets: c/d\nlibrary_name: zoo\npipeline_tag: text-generation\n---\n# T\n---\n"
    )
    data = front_matter.card_data(text)
    assert data == ModelCard(text).data.to_dict()
    assert not front_matter.faults(data)
    assert front_matter.tags(data, ["a.gguf"]) == [
        "zoo", "gguf", "sparse", "en", "de", "text-generation", "dataset:c/d", "base_model:a/b",
        "base_model:quantized:a/b", "license:apache-2.0",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "# no front matter", "---\n---\n", "----\na: 1\n---\n"])
def test_a_readme_without_yaml_has_no_card_data(text: str) -> None:
    assert front_matter.card_data(text) == {}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


# Each level merges the one before ten times.
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 8)
)


@pytest.mark.parametrize(
    "yaml",
    [BOMB, MERGED, "a: " + "[" * 5000 + "]" * 5000, "a: &a [*a]", "- 1\n- 2", "a: [1", "a: b: c",
     "when: 2025-99-99", "n: 0x" + "f" * 5000, "0x" + "f" * 5000 + ": n", "a: " + "x" * 300_000,
     "!!python/object/apply:os.system [id]", "{}: 1\n{x: 1}: 2"],
)  # fmt: skip
def test_hostile_yaml_is_refused_in_no_time(yaml: str) -> None:
    begun = time.process_time()
    with pytest.raises(FormatError):
        front_matter.card_data(f"---\n{yaml}\n---\n")
    assert time.process_time() - begun < 5


def test_anchors_are_read() -> None:
    yaml = "a: &a [x, y]\nb: *a\n'<<': {c: *a}\n"
    assert front_matter.card_data(f"---\n{yaml}---\n") == {
        "a": ["x", "y"],
        "b": ["x", "y"],
        "<<": {"c": ["x", "y"]},
    }


def test_card_data_can_always_be_written_as_json() -> None:
    data = front_matter.card_data(
        "---\na: .nan\nb: 2025-01-31\nc: {1: 2, null: !!binary aGk=}\nd: -.inf\n---\n"
    )
    assert json.loads(json.dumps(data, allow_nan=False)) == data
