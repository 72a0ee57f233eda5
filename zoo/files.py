"""Hashing, atomic writes, and the content-addressed store that makes every step resumable.

Nothing is ever half-written: a file or folder appears under its final name only when complete
(unique temporary name on the same file system, fsync, rename).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoo.errors import StoreError


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no white space. Hashes are taken of this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    return sha256_bytes(canonical_json(value).encode())


def sha256_tree(folder: Path) -> str:
    """One hash for a folder: of the sorted (relative path, sha256) pairs of its files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return sha256_json([[p.relative_to(folder).as_posix(), sha256_file(p)] for p in files])


def fsync(path: Path) -> None:
    """Wait until a file, or which names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on `path` into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename  # of a copy or a rename, what was to be written
        where = Path(named) if isinstance(named, str | os.PathLike) else path
        if where.is_relative_to(path):
            where = path
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or _NUMPY_SHORT_WRITE.fullmatch(str(error)):
            free = shutil.disk_usage(_nearest_existing(where)).free
            raise StoreError(
                f"no space left to write {where}",
                saw=f"{free / 1e6:.0f} MB free; nothing that was complete is lost",
                try_="free some space, or name a folder elsewhere (the store: --store), and run again",
            ) from error
        ours = path.is_relative_to(where)  # and not a file that was to be read
        if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StoreError(
                f"cannot write {where}",
                saw=os.strerror(error.errno),
                try_="make it writable, or name another folder (with --store, if it is the store)",
            ) from error
        raise


_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # all that it says of a full disk


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place on success, remove it on failure."""
    with told_plainly(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class Store:
    """Finished step outputs, each a folder named by the key of what made it.

    A key is the hash of a step's settings, its inputs' keys and the code version, so a folder's
    existence means that the step is done. `locked` serialises two runs that want the same key; the
    kernel drops the lock when a process dies, so a killed run never blocks the next.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def path(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def get(self, key: str) -> Path | None:
        """The finished output of `key`, or None; also if it is damaged, when it is to be made again."""
        path = self.path(key)
        return path if path.is_dir() and not self.damage(key) else None

    def sums(self, key: str) -> Path:
        """The file that says what the finished output of `key` holds: path -> [size, sha256]."""
        return self.root / "sums" / key[:2] / f"{key}.json"

    def damage(self, key: str) -> list[str]:
        """The files of a finished output that are not what was written: changed, missing, or others."""
        try:
            said = json.loads(self.sums(key).read_bytes())
        except FileNotFoundError:
            return []  # by an older zoo, which kept no sums
        except ValueError:
            return [self.sums(key).name]
        there = {name: list(found) for name, found in file_table(self.path(key)).items()}
        return sorted(name for name in {*said, *there} if said.get(name) != there.get(name))

    def keys(self) -> list[str]:
        """Of all that is finished, damaged or not."""
        return sorted(path.name for path in (self.root / "objects").glob("??/*") if path.is_dir())

    def discard(self, key: str) -> None:
        """Remove a finished output, so that it is made again."""
        with told_plainly(self.root):
            gone = self.root / "partial" / f"{key}.{uuid.uuid4().hex}"
            gone.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self.path(key).replace(gone)
            self.sums(key).unlink(missing_ok=True)
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        path = self.root / "locks" / key
        with told_plainly(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def is_locked(self, key: str) -> bool:
        """Whether someone works on this key now."""
        try:
            with (self.root / "locks" / key).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    @contextmanager
    def writing(self, key: str, lock: str | None = None) -> Iterator[Path]:
        """Yield an empty folder that becomes `key`'s output if the block succeeds.

        Call it inside `locked(lock)`, by default `key`. What killed processes left half-written, of any key,
        is removed.
        """
        lock = lock or key
        partial = self.root / "partial"
        final = self.path(key)
        with told_plainly(self.root):
            partial.mkdir(parents=True, exist_ok=True)
            for stale in partial.iterdir():
                owner = stale.name.partition(".")[0]
                if owner == lock or not self.is_locked(owner):
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = partial / f"{lock}.{uuid.uuid4().hex}"
            try:
                temporary.mkdir()
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    if path.is_file():  # safetensors makes files private; and a finished output never changes
                        path.chmod(0o444)
                    fsync(path)
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.exists():  # damaged, else `get` had found it
                    self.discard(key)
                write_json(self.sums(key), file_table(temporary))
                temporary.replace(final)
                fsync(final.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def file_table(folder: Path) -> Mapping[str, tuple[int, str]]:
    """Relative path -> (size in bytes, sha256) of every file below `folder`, in sorted order."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, sha256_file(p)) for p in paths}
