"""A store that machines share: each has its own folder, and finished outputs go to and come from a URL.

Any file system that fsspec knows will do: `s3://bucket/prefix`, `gs://...`, `file:///mnt/zoo`. Of a stage
that is finished here the files are written first, each named by its content, and then one small object that
lists them: without it there is nothing, so no upload that was killed leaves half an output. What is fetched
is checked against that list before it appears in the folder, in one rename.

    blobs/ab/SHA256       a file, once, whatever outputs hold it
    sums/ab/KEY.json      the files of the output KEY: path -> [size, sha256], as `zoo.files.Store` keeps it
    zoo-store             written first of all, to see whether that can be done
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import NonNegativeInt, TypeAdapter

from zoo.entry import Entry, Sha256
from zoo.errors import StoreError, UsageError
from zoo.files import Store, canonical_json, file_table, sha256_file
from zoo.hub.manifest import check_paths
from zoo.progress import say

MAX_SUMS_BYTES = 16 << 20
CHUNK_BYTES = 1 << 22
UPLOAD_TAKES = timedelta(days=1)  # at most; a younger file without a list may be on its way

Table = dict[str, tuple[NonNegativeInt, Sha256]]
_TABLE: TypeAdapter[Table] = TypeAdapter(Table)
_OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Damaged(Exception):
    """An output in a shared store is not what was written. Its words say how; it is to be made again."""


def open_store(folder: Path, shared: str | None) -> Store:
    """The store in `folder`, and behind it the shared one, if there is one."""
    return Store(folder) if shared is None else SharedStore(folder, Remote(shared))


class SharedStore(Store):
    """A store whose finished outputs are shared: what it lacks is fetched, what it finishes is uploaded."""

    def __init__(self, root: Path, remote: Remote) -> None:
        super().__init__(root)
        self.remote = remote

    def get(self, key: str) -> Path | None:
        """As of any store; StoreError if the shared one does not answer."""
        path = super().get(key)
        if path is None:
            return self._fetched(key)
        try:
            known = self.remote.table(key) is not None
        except Damaged:
            known = False
        if not known:  # it was finished while the shared store was away, or nobody had named one
            self._share(key)
        return path

    @contextmanager
    def writing(self, key: str, lock: str | None = None) -> Iterator[Path]:
        """As of any store; if the upload fails, the output stays here, and `get` tries again."""
        with super().writing(key, lock) as folder:
            yield folder
        self._share(key)

    def _fetched(self, key: str) -> Path | None:
        try:
            table = self.remote.table(key)
            if table is None:
                return None
            fetching = f"{key}-fetched"  # whoever asks for an output need not hold its own lock
            with self.locked(fetching):
                if (path := super().get(key)) is not None:  # fetched by another meanwhile
                    return path
                began = time.monotonic()
                with super().writing(key, fetching) as folder:
                    self.remote.fetch(table, folder)
                _tell("fetched", key, table, began)
        except Damaged as damage:
            message = f"  {self.remote.url}: the output {key[:12]} is damaged: {damage}"
            say(message, event="shared-damaged", key=key)
            return None
        return self.path(key)

    def _share(self, key: str) -> None:
        try:
            table = _TABLE.validate_json(self.sums(key).read_bytes())
        except FileNotFoundError:  # by an older zoo, which kept no sums
            table = dict(file_table(self.path(key)))
        began = time.monotonic()
        self.remote.put(key, self.path(key), table)
        _tell("uploaded", key, table, began)


def _tell(what: str, key: str, table: Table, began: float) -> None:
    size, seconds = sum(size for size, _ in table.values()), time.monotonic() - began
    say(f"  {what}: {size / 1e6:.1f} MB, {seconds:.1f} s", event=what, key=key, bytes=size, seconds=seconds)


class Remote:
    """Finished outputs at a URL. Raises StoreError for whatever the file system there says."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = _file_system(url)
        self.url: str = self._fs.unstrip_protocol(self._root)
        self._damaged: set[str] = set()  # files that are there, but were not what their names say

    def table(self, key: str) -> Table | None:
        """The files of an output; None if it is not there."""
        with self._asking("read"):
            try:
                path = self._sums(key)
                size = self._fs.info(path)["size"]
                data = self._fs.cat_file(path) if size <= MAX_SUMS_BYTES else b""
            except FileNotFoundError:
                return None
        try:
            table = _TABLE.validate_json(data)
            check_paths(table)
        except ValueError as error:
            raise Damaged("its list of files is not right") from error
        return table

    def fetch(self, table: Table, folder: Path) -> None:
        """Write the files of an output into `folder`. Raises Damaged if one is missing or another."""
        for name, (size, sha256) in table.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if self._size(sha256) != size:
                raise Damaged(f"{name} is not there as a whole")
            try:
                with self._asking("read"):
                    self._fs.get_file(self._blob(sha256), str(target))
            except FileNotFoundError as error:  # it was removed just now
                raise Damaged(f"{name} is not there") from error
            if target.stat().st_size != size or sha256_file(target) != sha256:
                self._damaged.add(sha256)
                raise Damaged(f"{name} has another sha256")

    def put(self, key: str, folder: Path, table: Table) -> None:
        """Upload an output; it is there when this returns, and not at all before."""
        for name, (size, sha256) in table.items():
            if self._size(sha256) == size and sha256 not in self._damaged:
                continue  # another output has it, or an upload that was interrupted
            with self._asking("write"):
                self._fs.put_file(str(folder / name), self._blob(sha256))
            self._damaged.discard(sha256)
        with self._asking("write"):
            self._fs.pipe_file(self._sums(key), canonical_json(table).encode())

    def check(self) -> None:
        """Raise StoreError if nothing can be written: better now than after hours."""
        with self._asking("write"):
            self._fs.pipe_file(f"{self._root}/zoo-store", b"outputs that zoo run finished: docs/jobs.md\n")

    def holds(self, entry: Entry) -> bool:
        """Whether the files of an entry are there, as the output of its export; its recipe it has itself."""
        for stage in entry.stages:
            if stage.name == "export":
                try:
                    table = self.table(stage.key) or {}
                except Damaged:
                    return False
                files = [a for a in entry.artifacts if a.kind != "recipe"]
                return all(table.get(a.path) == (a.size, a.sha256) for a in files)
        return False

    # --- for `zoo fsck` ---

    def outputs(self) -> list[str]:
        """The keys of all outputs."""
        return sorted(Path(name).stem for name in self._names("sums") if name.endswith(".json"))

    def files(self) -> list[str]:
        """The sha256, as the names say it, of all files."""
        return sorted(self._names("blobs"))

    def is_sound(self, sha256: str) -> bool:
        """Whether a file is what its name says; reads all of it."""
        found = hashlib.sha256()
        try:
            with self._asking("read"), self._fs.open(self._blob(sha256), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    found.update(chunk)
        except FileNotFoundError:
            return False
        return found.hexdigest() == sha256

    def is_old(self, sha256: str) -> bool:
        """Whether a file has been there for longer than an upload takes."""
        try:
            with self._asking("read"):
                changed: datetime = self._fs.modified(self._blob(sha256))
        except FileNotFoundError:
            return False
        return datetime.now(UTC) - changed.astimezone(UTC) > UPLOAD_TAKES

    def discard(self, key: str | None, files: Iterable[str]) -> None:
        """Remove an output, so that it is made again, and these files."""
        paths = [] if key is None else [self._sums(key)]
        for path in [*paths, *map(self._blob, files)]:
            with suppress(FileNotFoundError), self._asking("write"):
                self._fs.rm_file(path)

    # ---

    def _sums(self, key: str) -> str:
        return f"{self._root}/sums/{key[:2]}/{key}.json"

    def _blob(self, sha256: str) -> str:
        return f"{self._root}/blobs/{sha256[:2]}/{sha256}"

    def _names(self, folder: str) -> list[str]:
        with self._asking("read"):
            return [path.rpartition("/")[2] for path in self._fs.find(f"{self._root}/{folder}")]

    def _size(self, sha256: str) -> int | None:
        """Bytes of a file there; None if it is not."""
        try:
            with self._asking("read"):
                size: int = self._fs.info(self._blob(sha256))["size"]
        except FileNotFoundError:
            return None
        return size

    @contextmanager
    def _asking(self, verb: Literal["read", "write"]) -> Iterator[None]:
        """Say plainly what went wrong there; that something is not there to be read is no failure."""
        try:
            yield
        except Exception as error:  # each file system has its own
            here = isinstance(error, OSError) and error.errno in _OF_THIS_DISK
            if verb == "read" and (here or isinstance(error, FileNotFoundError)):
                raise
            raise StoreError(
                f"cannot {verb} the shared store {self.url}",
                saw=" ".join(f"{type(error).__name__}: {error}".split())[:300],
                try_="check the URL, the network and the credentials (of S3: aws s3 ls), and run again; "
                "it goes on after the last finished stage",
            ) from error


def _file_system(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it."""
    from fsspec.core import url_to_fs
    from fsspec.utils import get_protocol

    scheme = get_protocol(url)
    try:
        if urlsplit(url).password:
            raise UsageError(
                "the URL of the shared store holds a password",
                expected="credentials in the environment or the configuration of this machine",
                try_=f"{scheme}://..., and for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
        fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UsageError(
            f"a shared store at {scheme}:// needs another package",
            saw=str(error),
            try_="pip install '.[s3]' in a checkout" if scheme in ("s3", "s3a") else "install it",
        ) from error
    except ValueError as error:
        raise UsageError(
            "the URL of the shared store is none",
            saw=str(error),
            expected="s3://bucket/prefix, file:///folder, or whatever else fsspec knows",
        ) from error
    return fs, root.rstrip("/")
