"""One file from a URL to its place, whole and checked, whatever happens on the way.

What has come so far lies beside the target as `NAME.incomplete`, and the next call, of this process or
another, goes on from there by a Range request. Nothing appears under the final name before its size and
hashes are right. Processes that want the same file take turns: the lock is on the incomplete file itself,
so it vanishes with its holder and leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import httpx2
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError

from zoo.errors import HubError
from zoo.files import fsync
from zoo.files import told_plainly as files_told_plainly
from zoo.hub.client import Hub, raise_for_status, told_plainly
from zoo.progress import say

CHUNK = 1 << 20  # of reads from the disk
TRIES = 5  # in a row without a byte of progress
TRY_AGAIN = {408, 429, 500, 502, 503, 504}
TIME_LIMITS = httpx2.Timeout(30, connect=10)  # seconds without a byte

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Download:
    """What is to be fetched, and how to know that it is that. Of the hashes, those not None must agree."""

    url: str
    path: str  # in its repository, for messages
    size: int
    sha256: str | None
    git_sha1: str | None  # as git names a blob


class Cancelled(Exception):
    """Another download of the same pull failed."""


class _Digest:
    """Size and hashes of content as it passes."""

    def __init__(self, wanted: Download) -> None:
        self.wanted = wanted
        self.reset()

    def reset(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256() if self.wanted.sha256 else None
        self._git = hashlib.sha1(b"blob %d\0" % self.wanted.size) if self.wanted.git_sha1 else None

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        for digest in filter(None, (self._sha256, self._git)):
            digest.update(chunk)

    def wrong(self) -> tuple[str, str] | None:
        """(found, expected) in words if the content is not what was wanted."""
        if self.size != self.wanted.size:
            return f"{self.size} bytes", f"{self.wanted.size}"
        pairs = (("sha256", self._sha256, self.wanted.sha256), ("git sha1", self._git, self.wanted.git_sha1))
        for name, digest, expected in pairs:
            if digest is not None and digest.hexdigest() != expected:
                return f"{name} {digest.hexdigest()}", f"{name} {expected}"
        return None


def fetch(
    hub: Hub,
    wanted: Download,
    target: Path,
    *,
    force: bool = False,
    advance: Advance = lambda _: None,
    stop: threading.Event | None = None,
) -> None:
    """Bring `wanted` to `target`; with `force` also if it is there. `advance` is told of bytes, back too.

    Raises HubError (connection, refusal, content that is not what was wanted), StoreError (disk).
    """
    if not force and _is_whole(target, wanted):
        advance(wanted.size)
        return
    partial = target.with_name(f"{target.name}.incomplete")
    with files_told_plainly(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(partial, wanted.path) as file:
            if not force and _is_whole(target, wanted):  # made by whom we waited for
                partial.unlink()
                advance(wanted.size)
                return
            _complete(hub, wanted, file, partial, advance, stop or threading.Event())
            os.fsync(file.fileno())
            partial.replace(target)
    fsync(target.parent)


def missing(wanted: Download, target: Path, *, force: bool = False) -> int:
    """Bytes that are still to come, if what is here is right; with `force`, what is whole comes anew."""
    for path in (target, target.with_name(f"{target.name}.incomplete")):
        if path.is_file() and not (force and path == target):
            return max(wanted.size - path.stat().st_size, 0)
    return wanted.size


def _is_whole(path: Path, wanted: Download) -> bool:
    if not path.is_file() or path.stat().st_size != wanted.size:
        return False
    digest = _Digest(wanted)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.wrong() is None


@contextmanager
def _alone(partial: Path, name: str) -> Iterator[FileIO]:
    """The incomplete file, opened by nobody else."""
    waited = False
    while True:
        file = FileIO(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    say(f"{name}: another process is fetching it; waiting")
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_same(file, partial):
                yield file
                return
        finally:
            file.close()


def _is_same(file: FileIO, path: Path) -> bool:
    """Whether `path` is still the opened file: its last holder may have finished and renamed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _complete(
    hub: Hub, wanted: Download, file: FileIO, partial: Path, advance: Advance, stop: threading.Event
) -> None:
    """Fill the file. What was there before is kept if the whole proves right, else fetched once more."""
    digest = _Digest(wanted)
    while digest.size <= wanted.size and (chunk := file.read(CHUNK)):
        digest.update(chunk)
    resumed = digest.size > 0
    advance(digest.size)
    _receive(hub, wanted, file, digest, advance, stop)
    if digest.wrong() and resumed:
        say(f"{wanted.path}: what an earlier call left is damaged; fetching it anew")
        _empty(file, digest, advance)
        _receive(hub, wanted, file, digest, advance, stop)
    if wrong := digest.wrong():
        partial.unlink()
        found, expected = wrong
        raise HubError(
            f"{hub.endpoint} sends another {wanted.path} than was published",
            saw=found,
            expected=expected,
            try_="tell the owner; another --revision may be whole. Nothing was kept of it",
        )


def _receive(
    hub: Hub, wanted: Download, file: FileIO, digest: _Digest, advance: Advance, stop: threading.Event
) -> None:
    """Everything after what `digest` has seen, in as many requests as it takes."""
    failures = 0
    while digest.size < wanted.size:
        if stop.is_set():
            raise Cancelled
        before = digest.size
        try:
            with told_plainly(hub):
                _one_request(hub, wanted, file, digest, advance, stop)
        except HubError as error:
            cause = error.__cause__
            temporary = isinstance(cause, httpx2.TransportError) or (
                isinstance(cause, HfHubHTTPError) and cause.response.status_code in TRY_AGAIN
            )
            failures = 1 if digest.size > before else failures + 1
            if not temporary or failures >= TRIES:
                kept = f"{digest.size} of {wanted.size} bytes of {wanted.path} are kept"
                error.saw = f"{error.saw}; {kept}" if error.saw else kept
                raise
            stop.wait(min(8, 0.5 * 2**failures))


def _one_request(
    hub: Hub, wanted: Download, file: FileIO, digest: _Digest, advance: Advance, stop: threading.Event
) -> None:
    headers = hub.headers | {"Accept-Encoding": "identity"}  # sizes are those of the file
    if digest.size:
        headers["Range"] = f"bytes={digest.size}-"
    with get_session().stream("GET", wanted.url, headers=headers, timeout=TIME_LIMITS) as response:
        raise_for_status(response)
        if digest.size and not _goes_on(response, digest.size):
            _empty(file, digest, advance)  # all of it comes, from the beginning
        file.seek(digest.size)
        for chunk in response.iter_raw():  # as it comes: what is in memory would be lost in a kill
            if stop.is_set():
                raise Cancelled
            if digest.size + len(chunk) > wanted.size:
                raise ValueError(f"{wanted.path} of more than {wanted.size} bytes")
            _write(file, chunk)
            digest.update(chunk)
            advance(len(chunk))
    if digest.size < wanted.size:
        raise httpx2.RemoteProtocolError(f"the answer ended after {digest.size} of {wanted.size} bytes")


def _goes_on(response: httpx2.Response, start: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and found is not None and int(found[1]) == start


def _empty(file: FileIO, digest: _Digest, advance: Advance) -> None:
    advance(-digest.size)
    file.seek(0)
    file.truncate()
    digest.reset()


def _write(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]
