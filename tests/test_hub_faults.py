"""The server when things go wrong: killed, raced, lied to, and kept waiting."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import pytest

from tests.hub import PATIENCE_S, Server, new_token, serving, start
from zoo.hub.store import HubStore, lfs_file

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")


def check_whole(root: Path) -> dict[str, dict[str, bytes]]:
    """Every commit of a store is complete and right; the files of every branch and tag, by its name."""
    hub, found = HubStore(root), {}
    for repo, _ in [one for kind in ("models", "datasets") for one in hub.repos(kind, private=True)]:
        for ref in hub.refs(repo):
            line = hub.commits(repo, ref.oid, limit=10_000)
            assert len({commit.oid for commit in line}) == len(line) and line[-1].title == "initial commit"
            for commit in line:
                for file in hub.files(commit).values():
                    content = hub.blob(file.sha256).read_bytes()
                    assert hashlib.sha256(content).hexdigest() == file.sha256 and len(content) == file.size
            files = hub.files(line[0])
            found[f"{repo.name}@{ref.name}"] = {
                path: hub.blob(file.sha256).read_bytes() for path, file in files.items()
            }
    return found


# --- kill -9 ---


def pushing(root: Path) -> None:
    """A push as the server does it, and a tag: what must be whole after every kill."""
    hub = HubStore(root)
    repo = hub.repo("models", "me/model")
    large = b"weights" * 1000
    sha256 = hashlib.sha256(large).hexdigest()
    hub.receive(sha256, len(large), [large[:3000], large[3000:]])
    files = [
        hub.put("README.md", b"---\ntags: [new]\n---\n"),
        hub.put("a/b", b"new"),
        lfs_file("w", sha256, len(large)),
    ]
    hub.commit(repo, "main", files, title="new", parent=hub.commit_of(repo, "main").oid)
    hub.create_ref(repo, "tag", "v1", "main")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed at its `step`-th open, rename or SQL statement; was it?"""
    child = os.fork()
    if child == 0:
        left = [step]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, _: object) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.utime"):
                count()

        ours = HubStore._db

        def traced(self: HubStore) -> Any:
            db = ours(self)
            db.set_trace_callback(count)
            return db

        HubStore._db = traced  # type: ignore[method-assign]
        sys.addaudithook(audit)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_push_is_whole_wherever_it_is_killed(tmp_path: Path) -> None:
    old = {"a/b": b"old"}
    new = {"README.md": b"---\ntags: [new]\n---\n", "a/b": b"new", "w": b"weights" * 1000}
    step, outcomes = 0, []
    while True:
        step += 1
        root = tmp_path / str(step)
        hub = HubStore(root)
        repo = hub.create("models", "me/model")
        hub.commit(repo, "main", [hub.put("a/b", b"old")], title="old")
        killed = killed_at(step, lambda root=root: pushing(root))  # type: ignore[misc]
        found = check_whole(root)
        assert found["me/model@main"] in (old, new)
        assert found.get("me/model@v1", new) == new
        if not killed:
            break
        outcomes.append(found)
        if "me/model@v1" not in found:  # the same push completes
            pushing(root)
            assert check_whole(root) == {"me/model@main": new, "me/model@v1": new}
    assert len(outcomes) > 30 and found == {"me/model@main": new, "me/model@v1": new}
    assert {"me/model@main": old} in outcomes and {"me/model@main": new} in outcomes


PUSH = """
import os, random, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
api, turn = HfApi(), int(sys.argv[1])
random.seed(turn)
content = {f"d{n % 3}/{n}.txt": random.randbytes(200) for n in range(8)}
content |= {f"{n}.safetensors": random.randbytes(2_000_000) for n in range(3)} | {f"only-{turn}": b"x"}
print("ready", flush=True)
api.create_repo("me/model", exist_ok=True)
head = api.repo_info("me/model").sha
there = api.list_repo_files("me/model")
operations = [CommitOperationAdd(path, data) for path, data in content.items()]
operations += [CommitOperationDelete(path) for path in there if path not in content]
print(api.create_commit("me/model", operations, commit_message=str(turn), parent_commit=head).oid)
"""


def expected(turn: int) -> dict[str, bytes]:
    random.seed(turn)
    content = {f"d{n % 3}/{n}.txt": random.randbytes(200) for n in range(8)}
    return (
        content | {f"{n}.safetensors": random.randbytes(2_000_000) for n in range(3)} | {f"only-{turn}": b"x"}
    )


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=pytest.mark.real)])
def test_the_server_is_killed_during_pushes(tmp_path: Path, kills: int) -> None:
    store = tmp_path / "store"
    token = new_token(store, "me")
    dice = random.Random(kills)

    def push(server: Server, turn: int) -> subprocess.Popen[str]:
        client = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(turn)],
            env=server.environment(tmp_path / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert client.stdout is not None and client.stdout.readline() == "ready\n"
        return client

    server, duration = start(store, token), 0.3
    interrupted = 0
    try:
        for turn in range(kills):
            client = push(server, turn)
            time.sleep(duration * dice.random())
            server.kill()
            interrupted += client.poll() is None
            client.kill()
            client.communicate()
            found = check_whole(store / "hub").get("me/model@main", {})
            assert found in ({}, expected(turn), *([expected(turn - 1)] if turn else []))
            server = start(store, token)
            client = push(server, turn)
            begun = time.monotonic()
            _, errors = client.communicate(timeout=PATIENCE_S)
            duration = time.monotonic() - begun
            assert client.returncode == 0, errors
            assert check_whole(store / "hub")["me/model@main"] == expected(turn)
    finally:
        server.kill()
    assert interrupted


# --- many at once ---


@pytest.mark.real
def test_eight_concurrent_pushes_land_whole_or_not_at_all(tmp_path: Path) -> None:
    program = """
        import os, sys
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
        api, who, stale = HfApi(), sys.argv[1], 0
        print("ready", flush=True); sys.stdin.readline()
        for turn in range(3):
            me = who.encode()
            files = {f"{who}/{turn}.txt": me, f"{who}/{turn}.gguf": me * 50_000, "shared": me}
            while True:
                head = api.repo_info("me/model").sha
                try:
                    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
                    said = f"{who} {turn}"
                    api.create_commit("me/model", operations, commit_message=said, parent_commit=head)
                    break
                except HfHubHTTPError as error:
                    assert error.response.status_code == 412, error
                    stale += 1
        print(stale)
    """
    with serving(tmp_path / "store") as server:
        HubStore(tmp_path / "store" / "hub").create("models", "me/model")
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", dedent(program), str(who)],
                env=server.environment(tmp_path / "home"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for who in range(8)
        ]
        for client in clients:
            assert client.stdout is not None and client.stdout.readline() == "ready\n"
        stale = 0
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in clients:
            said, errors = client.communicate(timeout=PATIENCE_S)
            assert client.returncode == 0, errors
            stale += int(said)
    found = check_whole(tmp_path / "store" / "hub")["me/model@main"]
    pushed = {f"{who}/{turn}.txt": str(who).encode() for who in range(8) for turn in range(3)}
    pushed |= {path.replace(".txt", ".gguf"): who * 50_000 for path, who in pushed.items()}
    assert {path: content for path, content in found.items() if path != "shared"} == pushed
    hub = HubStore(tmp_path / "store" / "hub")
    titles = [commit.title for commit in hub.commits(hub.repo("models", "me/model"), "main", limit=1000)]
    assert len(titles) == 25 and set(titles) == {f"{w} {t}" for w in range(8) for t in range(3)} | {
        "initial commit"
    }
    assert stale > 0  # they did meet


# --- lies ---


class Wire:
    """A connection that sends whatever bytes it is given, and reads one answer."""

    def __init__(self, server: Server) -> None:
        address = urlsplit(server.endpoint)
        self.address = (address.hostname or "", address.port or 0)
        self.socket: socket.socket | None = None

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; status 0 where the connection ended without an answer."""
        for fresh in (False, True):  # a kept connection may have been closed meanwhile
            if self.socket is None or fresh:
                self.close()
                self.socket = socket.create_connection(self.address, timeout=10)
            answer = None
            with contextlib.suppress(OSError):  # refused before it was all sent: there may be an answer
                self.socket.sendall(request)
            with contextlib.suppress(OSError):
                answer = self._read(request.startswith(b"HEAD"))
            if answer is not None:
                return answer
        return 0, {}, b""

    def _read(self, head_only: bool) -> tuple[int, dict[str, str], bytes] | None:
        assert self.socket is not None
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self.socket.recv(65536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        while not head_only and len(body) < int(headers.get("content-length", 0)):
            piece = self.socket.recv(65536)
            if not piece:
                break
            body += piece
        if "close" in headers.get("connection", ""):
            self.close()
        return int(lines[0].split()[1]), headers, body

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None


def request(method: str, path: str, token: str | None = None, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: zoo", f"Content-Length: {len(body)}"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


TRAVERSALS = [
    "../{x}",
    "..%2f{x}",
    "%2e%2e/{x}",
    "%2e%2e%2f{x}",
    "..%252f{x}",
    "....//{x}",
    "..\\{x}",
    "..%5c{x}",
    "/{x}",
    "//{x}",
    "%00{x}",
    "{x}%00",
    "a/../../{x}",
    "a/./{x}",
    "%c0%ae%c0%ae/{x}",
    "%ff%fe{x}",
    ".git/{x}",
    "~/{x}",
    "C:%5c{x}",
    "{x}/.",
    "{x}/..",
    "%0d%0aX-Evil:1{x}",
    "%F0%9F%92%A9{x}",
    "..;/{x}",
    "?{x}",
    "%3f{x}",
    "{x}%20",
    "-{x}",
    "refs%2fpr%2f{x}",
]
TARGETS = [
    "etc/passwd",
    "hub.db",
    "secret",
    "blobs",
    "../../../../etc/shadow",
    "x",
    "",
    "main",
    "blobs/../hub.db",
]


def anything(dice: random.Random, depth: int = 0) -> Any:
    """A random JSON value, often of the wrong kind."""
    plain: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        10**400,
        1e308,
        "",
        "x",
        "main",
        "../x",
        "\0",
        "\ud800",
        "a" * 3000,
        "é",
        "0" * 64,
        {},
        [],
    ]
    kind = dice.random()
    if depth > 3 or kind < 0.6:
        return dice.choice(plain)
    if kind < 0.8:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    keys = [
        "key",
        "value",
        "path",
        "content",
        "oid",
        "size",
        "files",
        "objects",
        "operation",
        "name",
        "summary",
    ]
    return {dice.choice(keys): anything(dice, depth + 1) for _ in range(dice.randrange(4))}


def mangled(dice: random.Random, good: bytes) -> bytes:
    """Bytes that are nearly right."""
    raw = bytearray(good)
    for _ in range(dice.randrange(1, 4)):
        match dice.randrange(5):
            case 0:
                raw = raw[: dice.randrange(len(raw) + 1)]
            case 1 if raw:
                raw[dice.randrange(len(raw))] = dice.randrange(256)
            case 2:
                place = dice.randrange(len(raw) + 1)
                raw[place:place] = dice.choice(
                    [b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\\ud800", b"1e999"]
                )
            case 3:
                raw = raw + raw
            case _:
                raw = raw[dice.randrange(len(raw) + 1) :]
    return bytes(raw)


class Attacker:
    """Makes requests that must be refused, each with the statuses and Hub codes that may answer it."""

    def __init__(self, dice: random.Random, write: str, read: str, hub: HubStore, content: bytes) -> None:
        self.dice, self.write, self.read, self.hub, self.content = dice, write, read, hub, content
        self.kinds: list[Callable[[], tuple[bytes, set[int]]]] = [
            self.traversal_in_urls,
            self.traversal_in_bodies,
            self.wrong_content,
            self.forged_url,
            self.bad_json,
            self.bad_commit,
            self.bad_token,
            self.bad_http,
            self.too_large,
            self.bad_names,
        ]

    def next(self) -> tuple[str, bytes, set[int]]:
        kind = self.dice.choice(self.kinds)
        asked, statuses = kind()
        return kind.__name__, asked, statuses

    def hostile(self) -> str:
        path = self.dice.choice(TARGETS)
        for _ in range(self.dice.randrange(1, 4)):
            path = self.dice.choice(TRAVERSALS).replace("{x}", path)
        return path

    def traversal_in_urls(self) -> tuple[bytes, set[int]]:
        evil = self.hostile()
        path = self.dice.choice(
            [
                f"/me/model/resolve/main/{evil}",
                f"/me/model/resolve/{evil}/README.md",
                f"/{evil}/resolve/main/README.md",
                f"/api/models/me/{evil}",
                f"/api/models/{evil}/tree/main",
                f"/api/models/me/model/tree/{evil}",
                f"/api/models/me/model/tree/main/{evil}x",
                f"/api/models/me/model/revision/{evil}",
                f"/api/{evil}/me/model",
                f"/api/models/me/model/commits/{evil}",
                f"/lfs/{evil}",
                f"/me/{evil}.git/info/lfs/objects/batch",
                f"/{evil}",
            ]
        )
        if urlsplit(path).path.rstrip("/") in ("/api/models/me/model/tree/main", "/api/models/me/model"):
            path = "/me/model/resolve/main/.."
        method = self.dice.choice(["GET", "GET", "HEAD", "PUT", "POST", "DELETE"])
        token = self.dice.choice([None, self.write, self.read])
        return request(method, path, token), {400, 401, 403, 404, 405}

    def traversal_in_bodies(self) -> tuple[bytes, set[int]]:
        evil = self.dice.choice(
            ["../x", "/etc/passwd", "a/../../x", "a//b", ".git/config", "a\\..\\b", "x\0", "./x", "a/..", ""]
        )
        oid = self.dice.choice(
            [
                "../../etc/passwd",
                "..",
                "/etc/passwd",
                "a" * 63,
                "A" * 64,
                "%2e%2e",
                "a" * 64 + "/../x",
                "\0" * 64,
            ]
        )
        lines = [{"key": "header", "value": {"summary": "x"}}]
        file = {"path": evil, "content": base64.b64encode(b"evil").decode(), "encoding": "base64"}
        large = {"path": "x", "algo": "sha256", "oid": oid, "size": 4}
        lines.append(self.dice.choice([{"key": "file", "value": file}, {"key": "lfsFile", "value": large}]))
        batch = {"operation": "upload", "objects": [{"oid": oid, "size": 4}]}
        known = lfs_file(evil, hashlib.sha256(self.content).hexdigest(), len(self.content))
        named = {"path": evil, "oid": known.sha256, "size": known.size}
        return self.dice.choice(
            [
                (commit(lines, self.write), {400}),
                (commit([lines[0], {"key": "lfsFile", "value": named}], self.write), {400}),
                (
                    commit(
                        [lines[0], {"key": "deletedFile", "value": {"path": "../../" + evil}}], self.write
                    ),
                    {400, 404},
                ),
                (
                    request(
                        "POST", "/me/model.git/info/lfs/objects/batch", self.write, json.dumps(batch).encode()
                    ),
                    {400},
                ),
                (
                    request(
                        "POST",
                        "/api/models/me/model/preupload/main",
                        self.write,
                        json.dumps({"files": [{"path": evil, "size": 3, "sample": ""}]}).encode(),
                    ),
                    {400},
                ),
            ]
        )

    def signed(self, oid: str, size: int, seconds: int = 60) -> str:
        from zoo.hub.web_pages import upload_url

        return upload_url(self.hub.secret, "", oid, size, seconds)

    def wrong_content(self) -> tuple[bytes, set[int]]:
        content = self.dice.randbytes(self.dice.randrange(1, 5000))
        oid = hashlib.sha256(content).hexdigest()
        body = self.dice.choice([content + b"x", content[:-1], bytes([content[0] ^ 1]) + content[1:], b""])
        size = self.dice.choice([len(content), len(body)])
        chunked = b"".join(
            b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:100], body[100:]) if piece
        )
        wire = request("PUT", self.signed(oid, size), None, body)
        if self.dice.random() < 0.3:
            wire = request("PUT", self.signed(oid, size)).replace(
                b"Content-Length: 0", b"Transfer-Encoding: chunked"
            )
            wire += chunked + b"0\r\n\r\n"
        return wire, {400, 413}

    def forged_url(self) -> tuple[bytes, set[int]]:
        content = self.dice.randbytes(100)
        oid, other = hashlib.sha256(content).hexdigest(), hashlib.sha256(b"other").hexdigest()
        good = self.signed(oid, 100)
        digit = self.dice.choice("0123456789abcdef")
        place = self.dice.randrange(len(good) - 64, len(good))
        forged = self.dice.choice(
            [
                self.signed(oid, 100, seconds=-self.dice.randrange(1, 10**6)),
                good.replace("size=100", "size=99"),
                good.replace(oid, other),
                good[:place] + digit + good[place + 1 :],
                good[:-1],
                good.partition("?")[0],
                good + "0",
                re.sub("expires=[0-9]+", f"expires={10 ** self.dice.randrange(25)}", good),
                good.replace("signature=", "signature=%00"),
                good.replace("size=100", "size=-1"),
            ]
        )
        if forged == good:
            forged = good[:-1] + ("0" if good[-1] != "0" else "1")
        return request("PUT", forged, None, content), {400, 403}

    def bad_json(self) -> tuple[bytes, set[int]]:
        method, path = self.dice.choice(
            [
                ("POST", "/api/models/me/model/preupload/main"),
                ("POST", "/me/model.git/info/lfs/objects/batch"),
                ("POST", "/api/repos/create"),
                ("DELETE", "/api/repos/delete"),
                ("POST", "/api/models/me/model/tag/main"),
                ("POST", "/lfs/verify"),
                ("POST", "/api/validate-yaml"),
            ]
        )
        body = self.dice.choice(
            [
                json.dumps(anything(self.dice)).encode(),
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"\xff\xfe",
                b"",
                b"null",
                b"NaN",
                b'{"files": 1}',
                b'{"objects": {}, "operation": "upload"}',
                b'{"name": "\\ud800"}',
                self.dice.randbytes(50),
                mangled(self.dice, b'{"operation": "download", "objects": [{"oid": "x", "size": 1}]}'),
            ]
        )
        return request(method, path, self.write, body), {400, 404}

    def bad_commit(self) -> tuple[bytes, set[int]]:
        header = {"key": "header", "value": {"summary": "x"}}
        absent = {"path": "x.bin", "algo": "sha256", "oid": self.dice.randbytes(32).hex(), "size": 5}
        wrong = {"path": "x.bin", "oid": hashlib.sha256(self.content).hexdigest(), "size": 5}
        clash = {"path": "README.md/x", "content": "", "encoding": "base64"}
        bad = self.dice.choice(
            [
                [{"key": "lfsFile", "value": absent}],
                [{"key": "lfsFile", "value": wrong}],
                [{"key": "file", "value": clash}],
                [{"key": "file", "value": {"path": "x", "content": "not base64!"}}],
                [{"key": "nothing", "value": {}}],
                [{"key": "deletedFile", "value": {"path": "not there"}}],
                [header],
                [anything(self.dice)],
                [{"key": "deletedFolder", "value": {"path": ""}}],
                [{"key": "file", "value": anything(self.dice)}],
            ]
        )
        lines = self.dice.choice([[header, *bad], bad])
        if lines == [header]:
            lines = []
        revision = self.dice.choice(["main", "main", "nowhere", "v1", "0" * 40, "refs%2Fpr%2F1"])
        wire = commit(lines, self.write, revision)
        if self.dice.random() < 0.2:
            header["value"]["parentCommit"] = self.dice.choice(["0" * 40, "", "main", "../x"])  # type: ignore[index]
            good = {"path": "x", "content": "eA==", "encoding": "base64"}
            return commit([header, {"key": "file", "value": good}], self.write), {400, 412}
        return wire, {400, 404}

    def bad_token(self) -> tuple[bytes, set[int]]:
        method, path = self.dice.choice(
            [
                ("POST", "/api/repos/create"),
                ("DELETE", "/api/repos/delete"),
                ("POST", "/api/models/me/model/commit/main"),
                ("POST", "/api/models/me/model/preupload/main"),
                ("POST", "/me/model.git/info/lfs/objects/batch"),
                ("PUT", "/api/models/me/model/settings"),
                ("DELETE", "/api/models/me/model/branch/main"),
                ("POST", "/api/models/me/model/tag/main"),
                ("POST", "/lfs/verify"),
                ("GET", "/api/models/me/model/auth-check/write"),
            ]
        )
        body = b'{"name": "model", "organization": "me"}'
        match self.dice.randrange(3):
            case 0:
                return request(method, path, None, body), {401}
            case 1:
                return request(method, path, self.read, body), {403}
            case _:
                wrong = self.dice.choice(
                    [self.write[:-1], self.write + "x", "hf_", "' OR 1=1 --", "a" * 5000, "é"]
                )
                return request(method, path, wrong, body), {401}

    def bad_http(self) -> tuple[bytes, set[int]]:
        big = self.dice.choice([100_000, 300_000, 2_000_000])
        return self.dice.choice(
            [
                (request("GET", "/api/models", None, X="y" * big), {400, 431}),
                (request("GET", "/" + "x" * big), {400, 401, 404, 431}),
                (
                    request("GET", "/api/models").replace(
                        b"\r\n\r\n", b"\r\n" + b"A: b\r\n" * (big // 6) + b"\r\n"
                    ),
                    {400, 431},
                ),
                (b"GARBAGE\r\n\r\n", {400}),
                (self.dice.randbytes(60) + b"\r\n\r\n", {400}),
                (b"GET /api/models HTTP/1.1\r\nHost: zoo\r\nContent-Length: -1\r\n\r\n", {400}),
                (
                    b"POST /api/repos/create HTTP/1.1\r\nHost: zoo\r\nContent-Length: "
                    + b"9" * 20
                    + b"\r\n\r\n",
                    {400},
                ),
                (b"GET /api/models HTTP/1.1\r\nHost: zoo\r\nBad Header: x\r\n\r\n", {400}),
                (b"GET /api/models HTTP/1.1\r\nHost: zoo\r\nX: a\0b\r\n\r\n", {400}),
                (b"GET /%zz/%/x HTTP/1.1\r\nHost: zoo\r\n\r\n", {400, 404}),
                (b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: zoo\r\n\r\n", {400, 404}),
                (request("PATCH", "/api/models"), {405}),
                (request("TRACE", "/api/models/me/model"), {405}),
                (
                    request(
                        "GET", f"/api/models?limit={quote(str(anything(self.dice)), errors='replace')[:50]}x"
                    ),
                    {400},
                ),
                (
                    request(
                        "GET",
                        "/me/model/resolve/main/w.gguf",
                        None,
                        Range=f"bytes={10 ** self.dice.randrange(6, 17)}-",
                    ),
                    {416},
                ),
            ]
        )

    def too_large(self) -> tuple[bytes, set[int]]:
        path = self.dice.choice(["/api/repos/create", "/api/models/me/model/preupload/main"])
        announced = request("POST", path, self.write, Connection="close").replace(
            b"Content-Length: 0", b"Content-Length: 5000000"
        )
        line = b'{"key": "file", "value": {"path": "x", "content": "' + b"A" * 3_000_000 + b'"}}'
        head = b'{"key": "header", "value": {"summary": "x"}}\n'
        return self.dice.choice(
            [
                (announced + b"x" * 1000, {413}),
                (request("POST", "/api/models/me/model/commit/main", self.write, head + line), {413}),
            ]
            if self.dice.random() < 0.1
            else [(announced + b"x" * 1000, {413})]
        )

    def bad_names(self) -> tuple[bytes, set[int]]:
        evil = self.dice.choice(
            ["../x", "a/b", "..", ".", "a--b", "x.git", "a b", "\0", "é", "a" * 200, "/x", "x/", "-x", "a..b"]
        )
        named = {"name": evil, "organization": self.dice.choice(["me", "..", "api", "datasets", "a/b"])}
        ref = quote(
            self.dice.choice(
                [
                    "..",
                    "a..b",
                    "a//b",
                    ".x",
                    "x.lock",
                    "-x",
                    "a b",
                    "0" * 40,
                    "refs/heads/x",
                    "~",
                    "a:b",
                    "@{",
                ]
            ),
            "",
        )
        return self.dice.choice(
            [
                (request("POST", "/api/repos/create", self.write, json.dumps(named).encode()), {400}),
                (
                    request(
                        "POST",
                        "/api/repos/create",
                        self.write,
                        b'{"name": "x", "organization": "me", "type": "evil"}',
                    ),
                    {400},
                ),
                (request("POST", f"/api/models/me/model/branch/{ref}", self.write, b"{}"), {400}),
                (
                    request(
                        "POST",
                        "/api/models/me/model/tag/main",
                        self.write,
                        json.dumps({"tag": "../x"}).encode(),
                    ),
                    {400},
                ),
                (request("DELETE", "/api/models/me/model/branch/main", self.write), {400}),
            ]
        )


def commit(lines: list[Any], token: str, revision: str = "main") -> bytes:
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return request("POST", f"/api/models/me/model/commit/{revision}", token, body)


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the store's own."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "hub" not in path.relative_to(folder).parts
    }


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.real)])
def test_hostile_requests_are_refused(tmp_path: Path, count: int) -> None:
    store = tmp_path / "around" / "store"
    store.mkdir(parents=True)
    (tmp_path / "around" / "etc").mkdir()
    (tmp_path / "around" / "etc" / "passwd").write_text("outside")
    hub = HubStore(store / "hub")
    content = b"weights" * 1000
    hub.receive(hashlib.sha256(content).hexdigest(), len(content), [content])
    repo = hub.create("models", "me/model")
    large = lfs_file("w.gguf", hashlib.sha256(content).hexdigest(), len(content))
    hub.commit(repo, "main", [hub.put("README.md", b"hi"), large], title="t")
    hub.create_ref(repo, "tag", "v1", "main")
    before, refs = everything(tmp_path), hub.refs(repo)
    read, log = new_token(store, "reader", "read"), tmp_path / "hub.log"
    with serving(store, log=log) as server:
        attacker = Attacker(random.Random(count), server.token, read, hub, content)
        wire, seen = Wire(server), set()
        for turn in range(count):
            kind, asked, statuses = attacker.next()
            status, headers, body = wire.ask(asked)
            said = f"request {turn}, {kind}: {asked[:300]!r} got {status} {headers} {body[:300]!r}"
            assert status in statuses, said
            if (
                status == 401
                and headers.get("x-error-message") != "Invalid credentials in Authorization header"
            ):
                assert headers["x-error-code"] == "RepoNotFound", said
            if status == 404 and "RepoNotFound" not in headers.get("x-error-code", ""):
                assert headers.get("x-error-code") in ("EntryNotFound", "RevisionNotFound", None), said
            assert b"Traceback" not in body and b'File "' not in body, said
            assert b"outside" not in body and b"root:" not in body, said
            assert not any(name.startswith("x-evil") for name in headers), said
            seen.add((kind, status))
        wire.close()
        assert len({kind for kind, _ in seen}) == len(attacker.kinds)
        assert server.process.poll() is None
        assert psutil.Process(server.process.pid).memory_info().rss < 300e6
        assert wire.ask(request("GET", "/me/model/resolve/main/w.gguf"))[::2] == (200, content)
        assert hub.refs(repo) == refs and [r.name for r, _ in hub.repos("models", private=True)] == [
            "me/model"
        ]
        assert hub.repos("datasets", private=True) == []
    assert "Traceback" not in log.read_text(), log.read_text()
    log.unlink()
    assert everything(tmp_path) == before
    for path in (store / "hub").rglob("*"):
        inside = path.relative_to(store / "hub").as_posix()
        assert re.fullmatch(r"hub\.db(-wal|-shm)?|blobs(/[0-9a-f]{2}(/[0-9a-f]{64})?)?", inside), inside
        if path.is_file() and path.parent.parent.name == "blobs":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_link_in_the_store_is_not_followed(tmp_path: Path) -> None:
    hub = HubStore(tmp_path / "hub")
    (tmp_path / "outside").write_bytes(b"12345")
    repo = hub.create("models", "me/model")
    file = hub.put("x", b"inner")
    hub.commit(repo, "main", [file], title="t")
    hub.blob(file.sha256).unlink()
    hub.blob(file.sha256).symlink_to(tmp_path / "outside")
    with serving(tmp_path) as server:
        status, _, body = Wire(server).ask(request("GET", "/me/model/resolve/main/x"))
        assert status >= 400 and b"12345" not in body
        again = {"key": "lfsFile", "value": {"path": "y", "oid": file.sha256, "size": 5}}
        header = {"key": "header", "value": {"summary": "x"}}
        assert Wire(server).ask(commit([header, again], server.token))[0] == 400


# --- patience ---

IMPATIENT = """
import zoo.hub.web_protocol as protocol, zoo.hub.server as server
protocol.HEAD_S = protocol.PIECE_S = server.BODY_S = 1.0
server.SLOWEST = 1e9
"""


@contextmanager
def connected(server: Server, count: int) -> Iterator[list[socket.socket]]:
    address = urlsplit(server.endpoint)
    opened = [socket.create_connection((address.hostname, address.port), timeout=30) for _ in range(count)]
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


def test_slow_clients_are_sent_away_and_hold_up_nobody(tmp_path: Path) -> None:
    content = bytes(64_000_000)
    hub = HubStore(tmp_path / "hub")
    sha256 = hashlib.sha256(content).hexdigest()
    hub.receive(sha256, len(content), [content])
    hub.commit(hub.create("models", "me/model"), "main", [lfs_file("w", sha256, len(content))], title="t")
    token = new_token(tmp_path, "writer")
    from zoo.hub.web_pages import upload_url

    url = upload_url(hub.secret, "", sha256, len(content))
    beginnings = [
        b"",
        b"GET /api/mod",
        b"GET /api/models HTTP/1.1\r\nHost: x\r\n",  # heads that do not end
        request("POST", "/api/repos/create", token).replace(
            b"Length: 0", b"Length: 100"
        ),  # bodies that do not come
        request("PUT", url).replace(b"Length: 0", b"Length: %d" % len(content)) + b"x" * 1000,
    ]
    with serving(tmp_path, token=token, before=IMPATIENT) as server, connected(server, 50) as waiting:
        for number, one in enumerate(waiting):
            one.sendall(beginnings[number % len(beginnings)])
        begun = time.monotonic()
        assert Wire(server).ask(request("GET", "/api/models"))[0] == 200  # with all of them there
        assert time.monotonic() - begun < 1
        for number, one in enumerate(waiting):
            answer = one.recv(65536)
            assert b" 408 " in answer, (beginnings[number % len(beginnings)], answer)
        assert not list((tmp_path / "hub" / "blobs").rglob(".*"))

        # One who asks for a file and does not read it.
        with connected(server, 1) as (lazy,):
            lazy.sendall(request("GET", "/me/model/resolve/main/w"))
            time.sleep(2.5)
            came = 0
            with pytest.raises(ConnectionError):
                while piece := lazy.recv(1 << 20):
                    came += len(piece)
                raise ConnectionError
            assert came < len(content)
        assert psutil.Process(server.process.pid).memory_info().rss < 300e6


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    hub = HubStore(tmp_path / "hub")
    from zoo.hub.web_pages import upload_url

    content = os.urandom(1_000_000)
    sha256 = hashlib.sha256(content).hexdigest()
    url = upload_url(hub.secret, "", sha256, len(content))
    whole = request("PUT", url, None, content)
    with serving(tmp_path) as server:
        for part in (0.1, 0.5, 0.99):
            with connected(server, 1) as (one,):
                one.sendall(whole[: int(len(whole) * part)])
                time.sleep(0.2)
        deadline = time.monotonic() + 10
        while list((tmp_path / "hub" / "blobs").rglob(".*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list((tmp_path / "hub").rglob(".*")) and hub.stored(sha256) is None
        assert Wire(server).ask(whole)[0] == 200 and hub.stored(sha256) == len(content)


def test_sixteen_clients_share_a_file_without_memory(tmp_path: Path) -> None:
    content = os.urandom(8_000_000)
    sha256 = hashlib.sha256(content).hexdigest()
    hub = HubStore(tmp_path / "hub")
    hub.receive(sha256, len(content), [content])
    hub.commit(hub.create("models", "me/model"), "main", [lfs_file("w", sha256, len(content))], title="t")
    with serving(tmp_path) as server:
        process, got = psutil.Process(server.process.pid), []
        before = process.memory_info().rss

        def pull() -> None:
            status, _, body = Wire(server).ask(request("GET", "/me/model/resolve/main/w"))
            got.append((status, hashlib.sha256(body).hexdigest()))

        threads = [threading.Thread(target=pull) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [(200, sha256)] * 16
        assert process.memory_info().rss - before < 30e6
