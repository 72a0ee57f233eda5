"""The store and atomic files: nothing half-written, whatever happens to the writer."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.process import small_disk
from zoo import files
from zoo.errors import StoreError
from zoo.files import Store, atomic_file, file_table, told_plainly

KEY, OTHER = "a" * 64, "b" * 64
spawn = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def everything(folder: Path) -> list[str]:
    """All files below `folder` but the locks, which stay, and the sums of finished outputs."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if not {"locks", "sums"} & {*Path(name).parts})


# --- hashes ---


@given(st.binary(max_size=1000))
def test_sha256_is_sha256(data: bytes) -> None:
    assert files.sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_sha256_of_a_file_is_what_sha256sum_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_001))
    said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert files.sha256_file(path) == said.split()[0]


def test_a_tree_is_known_by_its_names_and_bytes(tmp_path: Path) -> None:
    def tree(name: str, content: dict[str, str]) -> str:
        for path, data in content.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(data)
        return files.sha256_tree(tmp_path / name)

    one = tree("one", {"a": "1", "b/c": "2"})
    assert one == tree("same", {"b/c": "2", "a": "1"})
    different = [
        tree("content", {"a": "1", "b/c": "3"}),
        tree("name", {"a": "1", "b/d": "2"}),
        tree("place", {"a": "1", "c": "2"}),
        tree("more", {"a": "1", "b/c": "2", "e": ""}),
        tree("shifted", {"a": "2", "b/c": "1"}),
    ]
    assert len({one, *different}) == 6


def test_equal_values_have_one_spelling() -> None:
    assert files.sha256_json({"b": [1.5, None], "a": "é"}) == files.sha256_json({"a": "é", "b": [1.5, None]})
    assert files.sha256_json([1]) != files.sha256_json(["1"])
    assert files.canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'


def test_file_table(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"hello")
    (tmp_path / "a").write_bytes(b"")
    assert dict(file_table(tmp_path)) == {
        "a": (0, hashlib.sha256(b"").hexdigest()),
        "sub/x": (5, hashlib.sha256(b"hello").hexdigest()),
    }


# --- one file ---


def test_a_file_appears_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.stat().st_dev == path.parent.stat().st_dev
    assert path.read_text() == "new"
    assert everything(tmp_path) == ["deep/file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert everything(tmp_path) == ["file"]


def test_a_write_that_wrote_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        pass
    assert everything(tmp_path) == []


def test_json_is_written_whole(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"b": "é", "a": 1})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1,\n  "b": "é"\n}\n'
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert everything(tmp_path) == ["x.json"]


def test_data_is_on_the_disk_before_its_name(tmp_path: Path) -> None:
    """As the system sees it: the file is synced, then renamed, then its folder synced."""
    if (strace := shutil.which("strace")) is None:
        pytest.skip("needs strace")
    program = (
        "import sys; from pathlib import Path; from zoo.files import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        f"with store.writing('{KEY}') as out: (out / 'weights').write_text('x')\n"
    )
    trace = tmp_path / "trace"
    command = [strace, "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", trace]
    subprocess.run([*command, sys.executable, "-c", program, tmp_path / "store"], check=True)
    lines = trace.read_text().splitlines()
    calls = [line for line in lines if str(tmp_path / "store") in line and "/sums" not in line]
    steps = ["rename" if "rename" in call else call.partition("<")[2].partition(">")[0] for call in calls]
    names = [Path(step).name.partition(".")[0] for step in steps]
    assert names == ["weights", KEY, "rename", KEY[:2]]


# --- the store ---


def test_an_object_exists_when_complete(store: Store) -> None:
    assert store.get(KEY) is None
    with store.locked(KEY), store.writing(KEY) as out:
        (out / "sub").mkdir()
        (out / "sub" / "weights").write_text("x")
        assert store.get(KEY) is None
    path = store.get(KEY)
    assert path is not None and (path / "sub" / "weights").read_text() == "x"
    assert everything(store.root) == [f"objects/aa/{KEY}/sub/weights"]


def test_an_object_is_for_all_to_read_and_none_to_change(store: Store) -> None:
    with store.locked(KEY), store.writing(KEY) as out:
        (out / "weights").touch(mode=0o600)
    assert (store.path(KEY) / "weights").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(store: Store, failure: type[BaseException]) -> None:
    with pytest.raises(failure), store.locked(KEY), store.writing(KEY) as out:
        (out / "weights").write_text("half")
        raise failure
    assert store.get(KEY) is None
    assert everything(store.root) == []
    assert list((store.root / "partial").iterdir()) == []


def _write_slowly(store: Store, key: str, pipe: Connection) -> None:
    with store.locked(key):
        if store.get(key) is not None:
            pipe.send("done before")
            return
        with store.writing(key) as out:
            (out / "weights").write_text(f"by {os.getpid()}")
            pipe.send("writing")
            pipe.recv()  # for ever, if the test says nothing
        pipe.send("wrote")


def start(store: Store, key: str) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_write_slowly, args=(store, key, theirs), daemon=True)
    process.start()
    return process, ours


def test_a_killed_writer_leaves_no_object_and_blocks_nobody(store: Store) -> None:
    process, pipe = start(store, KEY)
    assert pipe.recv() == "writing"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.get(KEY) is None
    assert len(list((store.root / "partial").iterdir())) == 1

    with store.locked(KEY), store.writing(KEY) as out:
        assert list((store.root / "partial").iterdir()) == [out]
        assert list(out.iterdir()) == []
        (out / "weights").write_text("mine")
    assert everything(store.root) == [f"objects/aa/{KEY}/weights"]


def test_what_is_half_written_goes_with_the_next_writer_but_not_another_ones(store: Store) -> None:
    killed, pipe = start(store, KEY)
    assert pipe.recv() == "writing"
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    alive, pipe = start(store, OTHER)
    assert pipe.recv() == "writing"
    assert [p.name[0] for p in (store.root / "partial").iterdir()] == ["b"]  # the killed one's is gone
    with store.locked("c" * 64), store.writing("c" * 64) as out:
        assert sorted(p.name[0] for p in (store.root / "partial").iterdir()) == ["b", "c"]
        (out / "x").write_text("")
    pipe.send("go on")
    assert pipe.recv() == "wrote"
    alive.join()
    assert store.get(OTHER) is not None
    assert list((store.root / "partial").iterdir()) == []


def test_two_processes_that_want_one_object(store: Store) -> None:
    first, one = start(store, KEY)
    assert one.recv() == "writing"
    second, two = start(store, KEY)
    assert not two.poll(0.3)  # it waits
    one.send("go on")
    assert one.recv() == "wrote"
    assert two.recv() == "done before"
    first.join()
    second.join()
    assert (store.path(KEY) / "weights").read_text() == f"by {first.pid}"


def test_other_objects_do_not_wait(store: Store) -> None:
    first, one = start(store, KEY)
    assert one.recv() == "writing"
    second, two = start(store, OTHER)
    assert two.recv() == "writing"
    for process, pipe in ((first, one), (second, two)):
        pipe.send("go on")
        assert pipe.recv() == "wrote"
        process.join()


# --- a disk that does not take it ---


@pytest.fixture
def full() -> Iterator[Path]:
    with small_disk(1 << 20) as disk:
        yield disk


def test_a_full_disk_is_told_and_loses_nothing(full: Path) -> None:
    store = Store(full / "store")
    with store.locked(KEY), store.writing(KEY) as out:
        (out / "weights").write_bytes(bytes(600_000))
    no_space = pytest.raises(StoreError, match="no space left")
    with no_space as told, store.locked(OTHER), store.writing(OTHER) as out:
        (out / "first").write_bytes(bytes(100_000))
        (out / "second").write_bytes(bytes(600_000))
    assert "MB free" in str(told.value) and "--store" in str(told.value)
    assert everything(store.root) == [f"objects/aa/{KEY}/weights"]
    assert (store.path(KEY) / "weights").stat().st_size == 600_000
    with store.locked(OTHER), store.writing(OTHER) as out:  # what fits goes on fitting
        (out / "first").write_bytes(bytes(100_000))


def test_a_full_disk_keeps_the_old_file(full: Path) -> None:
    (full / "file").write_text("old")
    with pytest.raises(StoreError, match="no space left"), atomic_file(full / "file") as temporary:
        temporary.write_bytes(bytes(2_000_000))
    assert (full / "file").read_text() == "old"
    assert everything(full) == ["file"]


def test_numpy_tells_a_full_disk_in_its_own_words(full: Path) -> None:
    import numpy as np

    no_space = pytest.raises(StoreError, match="no space left")
    with no_space, atomic_file(full / "x.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.zeros(1_000_000))
    assert everything(full) == []


READ_ONLY = """
import os, sys
from pathlib import Path
from zoo.errors import StoreError
from zoo.files import Store, atomic_file
folder = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # the superuser may write anywhere
store = Store(folder / "store")
for attempt in (store.locked("k"), store.writing("k"), atomic_file(folder / "file")):
    try:
        with attempt as path:
            path.write_text("x") if path else None
            print("wrote")
    except StoreError as error:
        print(error)
"""


def test_a_folder_that_is_not_ours_is_told() -> None:
    folder = Path(tempfile.mkdtemp())  # where another user can come, unlike tmp_path
    folder.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(READ_ONLY), folder], capture_output=True, text=True
        )
        told = done.stdout
        assert (done.stderr, told.count("cannot write"), told.count("wrote")) == ("", 3, 0), done
        assert told.count("Permission denied") == 3 and "--store" in told
        assert everything(folder) == []
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_store_that_is_a_file_is_told(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot write"), Store(tmp_path / root).locked(KEY):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_another_files_trouble_is_not_called_the_stores(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), told_plainly(tmp_path / "store"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "model" / "config.json"))
