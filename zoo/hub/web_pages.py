"""What each page of the Hub's interface answers: from a call to a response, over `zoo.hub.store`.

Every function here runs in a thread of its own call; none of them knows how requests arrive.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import anyio.to_thread
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from zoo.errors import FormatError, StoreError, ZooError
from zoo.hub import front_matter, store
from zoo.hub.store import Commit, File, HubStore, Removal, Repo
from zoo.hub.tokens import Token

if TYPE_CHECKING:
    from zoo.registry import Registry

MAX_REGULAR = 1 << 20  # bytes of a file that is sent within a commit; larger ones are uploaded before
MAX_LINE = 2 * MAX_REGULAR  # of a commit's request: such a file in base64
MAX_OPERATIONS = 25_000  # of one commit, or objects of one batch
UPLOAD_URL_S = 3600  # an upload must begin within this time
FREE_BYTES = 256 << 20  # to leave on the disk
PAGE, MAX_PAGE = 100, 1000
# Always uploaded apart: what is large as a rule, and tables, as `datasets` counts on it.
LARGE = re.compile(
    r"\.(safetensors|gguf|bin|pt|pth|ckpt|onnx|parquet|arrow|h5|npy|npz|msgpack|model|pkl|zip|gz|tar|zst|7z)$"
)

log = logging.getLogger("zoo.hub")


class Failure(Exception):
    """An answer that is no success: status, message, and the Hub's code for it if it has one."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        said = " ".join(message.split()).encode("ascii", "replace").decode()[:500]
        said = "".join(c if c.isprintable() else "?" for c in said)
        self.status = status
        self.headers = {
            "X-Error-Message": said,
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


@dataclass(frozen=True)
class Call:
    """A request whose sender is known and whose body has arrived."""

    hub: HubStore
    request: Request
    token: Token | None
    body: IO[bytes]

    def param(self, name: str) -> str:
        """A part of the path, decoded; the router saw it encoded, as %2F is no separator."""
        try:
            return unquote(self.request.path_params[name], errors="strict")
        except UnicodeDecodeError as error:
            raise Failure(400, "the path is not UTF-8") from error

    def flag(self, name: str) -> bool:
        return self.request.query_params.get(name, "").lower() in ("true", "1")

    def json(self) -> dict[str, Any]:
        found = _loads(self.body.read())
        if not isinstance(found, dict):
            raise Failure(400, "the body is not a JSON object")
        return found

    @property
    def base(self) -> str:
        return str(self.request.base_url).rstrip("/")

    def repo(self) -> Repo:
        """The repository in the path, if there is one and the sender may know of it."""
        kind = self.request.path_params.get("kind", "models")
        name = f"{self.param('namespace')}/{self.param('name')}"
        return find_repo(self, kind, name)

    def commit(self, repo: Repo) -> Commit:
        return self.hub.commit_of(repo, self.param("revision"))


def find_repo(call: Call, kind: str, name: str) -> Repo:
    try:
        repo = call.hub.repo(kind, name)
        if call.token is not None or not repo.private:
            return repo
    except store.RepoNotFound:
        pass
    raise no_repo(call.token)


def no_repo(token: Token | None) -> Failure:
    """The one answer for repositories that are not there and those that must not seem to be."""
    if token is None:
        return Failure(401, "Invalid username or password.", "RepoNotFound")
    return Failure(404, "Repository not found", "RepoNotFound")


def answer(error: Failure | ZooError | ClientDisconnect) -> Response:
    """What HTTP says of an error."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # which nobody reads
    if isinstance(error, StoreError):
        log.error("%s", error)
        error = Failure(507, "the server cannot use its store")
    if isinstance(error, ZooError):
        known: dict[type[ZooError], tuple[int, str | None]] = {
            store.RepoNotFound: (404, "RepoNotFound"),
            store.RevisionNotFound: (404, "RevisionNotFound"),
            store.EntryNotFound: (404, "EntryNotFound"),
            store.Exists: (409, None),
            store.Stale: (412, None),
        }
        status, code = known.get(type(error), (400, None))
        error = Failure(status, error.what + (f" (saw {error.saw})" if error.saw else ""), code)
    return JSONResponse({"error": str(error)}, error.status, error.headers)


# --- repositories -----------------------------------------------------------------------------------


def whoami(call: Call) -> Response:
    if call.token is None:
        raise Failure(401, "Invalid username or password.")
    name, scope = call.token.name, call.token.scope
    auth = {"type": "access_token", "accessToken": {"displayName": name, "role": scope}}
    who = {
        "type": "user",
        "id": name,
        "name": name,
        "fullname": name,
        "isPro": False,
        "orgs": [],
        "auth": auth,
    }
    return JSONResponse(who)


def _named(call: Call, asked: dict[str, Any]) -> tuple[str, str]:
    """Kind and full name of the repository that a body is about."""
    kind = f"{asked.get('type') or 'model'}s"
    assert call.token is not None
    namespace = _text(asked, "organization") if asked.get("organization") else call.token.name
    return kind, f"{namespace}/{_text(asked, 'name')}"


def _private(asked: dict[str, Any], otherwise: bool) -> bool:
    if asked.get("visibility") is not None:
        return bool(asked["visibility"] != "public")
    return bool(asked.get("private", otherwise))


def url_of(call: Call, kind: str, name: str) -> str:
    return f"{call.base}/{'' if kind == 'models' else kind + '/'}{name}"


def create_repo(call: Call) -> Response:
    asked = call.json()
    kind, name = _named(call, asked)
    answer = {"url": url_of(call, kind, name), "name": name}
    assert call.token is not None
    try:
        call.hub.create(kind, name, private=_private(asked, False), author=call.token.name)
    except store.Exists as error:
        return JSONResponse({"error": error.what, **answer}, 409)
    return JSONResponse(answer)


def delete_repo(call: Call) -> Response:
    call.hub.delete(find_repo(call, *_named(call, call.json())))
    return JSONResponse({})


def settings(call: Call) -> Response:
    repo, asked = call.repo(), call.json()
    gated = asked.get("gated", repo.gated) or None
    if gated not in (None, "auto", "manual"):
        raise Failure(400, '"gated" must be "auto", "manual" or false')
    call.hub.update(repo, private=_private(asked, repo.private), gated=gated)
    return JSONResponse({"private": _private(asked, repo.private), "gated": gated or False})


def auth_check(call: Call) -> Response:
    _open_gate(call, call.repo())
    return JSONResponse({})


def _open_gate(call: Call, repo: Repo) -> None:
    if repo.gated and call.token is None:
        raise Failure(401, f"Access to {repo.name} is restricted. Please log in.", "GatedRepo")


def validate_yaml(call: Call) -> Response:
    content = call.json().get("content")
    if not isinstance(content, str):
        raise Failure(400, '"content" must be a string')
    try:
        data = front_matter.card_data(content)
        errors = front_matter.faults(data)
    except FormatError as error:
        data, errors = {}, [error.what + (f": {error.saw}" if error.saw else "")]
    warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
    answer = {
        "errors": [{"message": one} for one in errors],
        "warnings": [{"message": one} for one in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


def info(repo: Repo, commit: Commit, files: dict[str, File] | None, *, blobs: bool = False) -> dict[str, Any]:
    """A repository as `HfApi` reads it; without `files` no word of them."""
    told: dict[str, Any] = {
        "_id": f"{repo.id:024x}",
        "id": repo.name,
        "author": repo.name.partition("/")[0],
        "sha": commit.oid,
        "createdAt": repo.created,
        "lastModified": commit.created,
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": commit.tags,
        "cardData": commit.card,
    }
    if repo.kind == "models":
        named = ("pipeline_tag", "library_name", "model-index")
        told |= {"modelId": repo.name, **{key: commit.card[key] for key in named if key in commit.card}}
    if repo.kind == "spaces":
        told["sdk"] = commit.card.get("sdk")
    if files is not None:
        told["siblings"] = [_sibling(file, blobs) for file in files.values()]
        told["usedStorage"] = sum(file.size for file in files.values())
    return told


def _sibling(file: File, blobs: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        told |= {"size": file.size, "blobId": file.oid}
        if file.lfs:
            pointer = len(store.lfs_pointer(file.sha256, file.size))
            told["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer}
    return told


def _expanded(told: dict[str, Any], query: QueryParams) -> dict[str, Any]:
    """Only what `expand` asks for, if it asks."""
    wanted = query.getlist("expand") + query.getlist("expand[]")
    return {k: v for k, v in told.items() if k in ("_id", "id", *wanted)} if wanted else told


def repo_info(call: Call) -> Response:
    repo = call.repo()
    commit = call.commit(repo) if "revision" in call.request.path_params else call.hub.commit_of(repo, "main")
    told = info(repo, commit, call.hub.files(commit), blobs=call.flag("blobs"))
    return JSONResponse(_expanded(told, call.request.query_params))


def list_repos(call: Call) -> Response:
    query = call.request.query_params
    kind = call.request.path_params["kind"]
    if kind not in store.KINDS:
        raise Failure(404, "there is no such page")
    by = "createdAt" if query.get("sort") == "createdAt" else "lastModified"
    limit = number(query.get("limit"), PAGE, MAX_PAGE)
    after = None
    if cursor := query.get("cursor"):
        moment, _, last = cursor.rpartition(" ")
        after = (moment, number(last, 0))
    gated = {"true": True, "false": False}.get(query.get("gated", "").lower())
    wanted = query.getlist("filter") + query.getlist("pipeline_tag")
    tags = [tag for one in wanted for tag in one.split(",") if tag]
    if len(tags) > 50:
        raise Failure(400, "too many filters")
    found = call.hub.repos(
        kind,
        private=call.token is not None,
        tags=tags,
        search=query.get("search"),
        author=query.get("author"),
        gated=gated,
        by=by,
        after=after,
        limit=limit,
    )
    wanted = query.getlist("expand") + query.getlist("expand[]")
    with_files = call.flag("full") or "siblings" in wanted
    with_card = with_files or call.flag("cardData") or "cardData" in wanted or "model-index" in wanted
    files = call.hub.files_of(commit for _, commit in found) if with_files else {}
    listed = []
    for repo, commit in found:
        told = info(repo, commit, files.get(commit.id))
        if not with_card:
            del told["cardData"]
            told.pop("model-index", None)
        listed.append(_expanded(told, query))
    headers = {}
    if len(found) == limit:
        repo, commit = found[-1]
        last = f"{repo.created if by == 'createdAt' else commit.created} {repo.id}"
        headers["Link"] = _next(call, {"cursor": last})
    return JSONResponse(listed, headers=headers)


def _next(call: Call, changed: dict[str, str]) -> str:
    """The Link header to the next page: this request with `changed` in its query."""
    kept = [(k, v) for k, v in call.request.query_params.multi_items() if k not in changed]
    path = call.request.scope["path"]
    return f'<{call.base}{path}?{urlencode([*kept, *changed.items()])}>; rel="next"'


def number(text: str | None, otherwise: int, most: int = 2**62) -> int:
    if text is None:
        return otherwise
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Failure(400, f"not a number: {text[:40]}")
    return max(1, min(int(text), most)) if otherwise else int(text)


def list_entries(registry: Registry, call: Call) -> Response:
    """The registry's entries that are published here, of which the sender may know, as `zoo list --json`.

    Published here is what has a commit here: this server may go by several names, and others may have
    published another entry of the same id.
    """
    from zoo.registry import Summary
    from zoo.registry.figures import figures

    private = call.token is not None
    ids = {name.partition("/")[2] for name in call.hub.names("models", private=private)}
    recorded = [entry for entry_id in registry.known(ids) if (entry := registry.find(entry_id)) is not None]
    places = {entry.id: {(p.repository, p.commit) for p in entry.publications} for entry in recorded}
    names = {name for some in places.values() for name, _ in some}
    here = call.hub.commits_in("models", names, private=private)
    found = [entry for entry in recorded if entry.status != "failed" and places[entry.id] & here]
    found.sort(key=lambda entry: entry.id)
    found.sort(key=lambda entry: entry.created, reverse=True)
    shown = set(Summary.model_fields) - {"figures"}
    told = [entry.model_dump(mode="json", include=shown) for entry in found]
    told = [one | {"figures": figures(e).model_dump(mode="json")} for one, e in zip(told, found, strict=True)]
    return JSONResponse(told)


# --- history ----------------------------------------------------------------------------------------


def list_refs(call: Call) -> Response:
    refs = call.hub.refs(call.repo())
    folder = {"branch": "heads", "tag": "tags"}
    told: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref in refs:
        one = {"name": ref.name, "ref": f"refs/{folder[ref.kind]}/{ref.name}", "targetCommit": ref.oid}
        told["branches" if ref.kind == "branch" else "tags"].append(one)
    return JSONResponse(told)


def list_commits(call: Call) -> Response:
    query = call.request.query_params
    limit = number(query.get("limit"), PAGE, MAX_PAGE)
    page = number(query.get("p"), 0, 2**31)
    found = call.hub.commits(call.repo(), call.param("revision"), skip=page * limit, limit=limit)
    told = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.created,
            "authors": [{"user": commit.author}],
            "formatted": {"title": commit.title, "message": commit.message},
        }
        for commit in found
    ]
    more = {"Link": _next(call, {"p": str(page + 1)})} if len(found) == limit else {}
    return JSONResponse(told, headers=more)


def create_branch(call: Call) -> Response:
    asked = call.json()
    start = _text(asked, "startingPoint") if "startingPoint" in asked else "main"
    call.hub.create_ref(call.repo(), "branch", call.param("revision"), start)
    return JSONResponse({})


def create_tag(call: Call) -> Response:
    call.hub.create_ref(call.repo(), "tag", _text(call.json(), "tag"), call.param("revision"))
    return JSONResponse({})


def delete_branch(call: Call) -> Response:
    call.hub.delete_ref(call.repo(), "branch", call.param("revision"))
    return JSONResponse({})


def delete_tag(call: Call) -> Response:
    call.hub.delete_ref(call.repo(), "tag", call.param("revision"))
    return JSONResponse({})


# --- files ------------------------------------------------------------------------------------------


def list_tree(call: Call) -> Response:
    query = call.request.query_params
    repo = call.repo()
    commit = call.commit(repo)
    below = call.param("path").strip("/") if "path" in call.request.path_params else ""
    files = call.hub.files(commit)
    folders = store.folders(files.values())
    if below not in folders:
        raise _no_entry(commit)
    begin = below + "/" if below else ""
    entries: dict[str, File | str] = {**{folder: oid for folder, oid in folders.items() if folder}, **files}
    chosen = [
        path
        for path in sorted(entries)
        if path.startswith(begin) and (call.flag("recursive") or "/" not in path[len(begin) :])
    ]
    limit = number(query.get("limit"), MAX_PAGE, MAX_PAGE)
    if cursor := query.get("cursor"):
        chosen = [path for path in chosen if path > cursor]
    page = chosen[:limit]
    told = _entries(call, {path: entries[path] for path in page}, files, expand=call.flag("expand"))
    more = {"Link": _next(call, {"cursor": page[-1]})} if len(chosen) > limit else {}
    return JSONResponse(told, headers=more)


def paths_info(call: Call) -> Response:
    kind = call.request.headers.get("content-type", "")
    asked: dict[str, Any]
    if kind.startswith("application/json"):
        asked = call.json()
    else:
        try:
            asked = dict(parse_qs(call.body.read().decode(), max_num_fields=MAX_OPERATIONS))
        except ValueError as error:
            raise Failure(400, "the body is not a form") from error
        asked["expand"] = asked.get("expand", [""])[-1].lower() == "true"
    paths = asked.get("paths", [])
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Failure(400, '"paths" must be a list of strings')
    files = call.hub.files(call.commit(call.repo()))
    known: dict[str, File | str] = {**store.folders(files.values()), **files}
    found = {path: known[path] for path in (path.strip("/") for path in paths) if path and path in known}
    return JSONResponse(_entries(call, found, files, expand=bool(asked.get("expand"))))


def _entries(
    call: Call, chosen: dict[str, File | str], files: dict[str, File], *, expand: bool
) -> list[dict[str, Any]]:
    """Files, and folders by their number, as the Hub lists them; `expand`: with their last commit."""
    told = []
    commits = call.hub.changed_by(files.values()) if expand else {}
    newest = _newest(files) if expand else {}
    for path, entry in chosen.items():
        if isinstance(entry, File):
            one: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
            if entry.lfs:
                pointer = len(store.lfs_pointer(entry.sha256, entry.size))
                one["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}
        else:
            one = {"type": "directory", "path": path, "oid": entry, "size": 0}
        if expand:
            last = commits[newest[path]]
            one["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.created}
        told.append(one)
    return told


def _newest(files: Mapping[str, File]) -> dict[str, int]:
    """The last commit that changed a file, or anything in a folder."""
    newest: dict[str, int] = {}
    for path, file in files.items():
        while path:
            newest[path] = max(newest.get(path, 0), file.changed_id)
            path = path.rpartition("/")[0]
    return newest


def _no_entry(commit: Commit) -> Failure:
    # The clients remember by the commit that it has no such file.
    return Failure(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})


def resolve(call: Call) -> Response:
    repo = call.repo()
    _open_gate(call, repo)
    commit = call.commit(repo)
    try:
        file = call.hub.file(commit, call.param("path"))
    except store.EntryNotFound:
        raise _no_entry(commit) from None
    name = file.path.rpartition("/")[2]
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{file.sha256 if file.lfs else file.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";",
        "Content-Type": "application/octet-stream",  # whatever it claims to be, no browser runs it
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    asked = call.request.headers
    if asked.get("if-none-match") in (headers["ETag"], "*"):
        return Response(status_code=304, headers=headers)
    begin, end, status = 0, file.size, 200
    if "range" in asked and asked.get("if-range", headers["ETag"]) == headers["ETag"]:
        try:
            chosen = byte_range(asked["range"], file.size)
        except ValueError:
            nothing = {"Content-Range": f"bytes */{file.size}"}
            raise Failure(416, "no such range", headers=nothing) from None
        if chosen is not None:
            begin, end, status = *chosen, 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{file.size}"
    try:
        descriptor = os.open(call.hub.blob(file.sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # its repository was deleted this moment
        raise no_repo(call.token) from None
    except OSError as error:  # a link, or not to be read
        raise StoreError(f"cannot read {file.sha256}", saw=error.strerror) from error
    return Content(os.fdopen(descriptor, "rb", buffering=0), begin, end, status, headers)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """The half-open range that a Range header asks for; None for all; ValueError if there is no such range.

    Several ranges, and what is no range of bytes, are answered with all, as RFC 9110 14.2 allows.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.replace(" ", ""))
    if not match or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        begin, end = max(0, size - int(last)), size
    else:
        begin, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    if begin >= end:
        raise ValueError(header)
    return begin, end


class Content(Response):
    """A part of an open file, by sendfile where the server can."""

    def __init__(self, file: Any, begin: int, end: int, status: int, headers: dict[str, str]) -> None:
        self.file, self.begin, self.end = file, begin, end
        self.status_code, self.background = status, None
        self.init_headers({**headers, "Content-Length": str(end - begin)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        with self.file:
            await send(start)
            if scope["method"] == "HEAD" or self.begin == self.end:
                await send({"type": "http.response.body"})
            elif "http.response.zerocopysend" in scope.get("extensions", {}):
                count = self.end - self.begin
                await send(
                    {
                        "type": "http.response.zerocopysend",
                        "file": self.file,
                        "offset": self.begin,
                        "count": count,
                    }
                )
            else:
                while self.begin < self.end:
                    size = min(1 << 20, self.end - self.begin)
                    piece = await anyio.to_thread.run_sync(os.pread, self.file.fileno(), size, self.begin)
                    self.begin += len(piece)
                    await send(
                        {"type": "http.response.body", "body": piece, "more_body": self.begin < self.end}
                    )


# --- pushing ----------------------------------------------------------------------------------------


def preupload(call: Call) -> Response:
    repo = call.repo()
    asked = call.json().get("files")
    if not isinstance(asked, list) or len(asked) > MAX_OPERATIONS:
        raise Failure(400, '"files" must be a list')
    files = call.hub.files(call.commit(repo))
    told = []
    for one in asked:
        path = _text(one, "path")
        store.check_path(path)
        size = _size(one)
        sample = _base64(one.get("sample") or "")
        apart = size > MAX_REGULAR or LARGE.search(path.lower()) or b"\0" in sample
        mode = "lfs" if apart and size else "regular"
        there = files.get(path)
        oid = {"oid": there.sha256 if there.lfs else there.oid} if there else {}
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return JSONResponse({"files": told})


def lfs_batch(call: Call) -> Response:
    call.repo()
    asked = call.json()
    objects = asked.get("objects")
    if asked.get("operation") != "upload":
        raise Failure(400, "only uploads; a download is GET /namespace/name/resolve/revision/path")
    if not isinstance(objects, list) or len(objects) > MAX_OPERATIONS:
        raise Failure(400, '"objects" must be a list')
    wanted = [(_text(one, "oid"), _size(one)) for one in objects]
    there = call.hub.claim(oid for oid, _ in wanted)
    free = shutil.disk_usage(call.hub.root).free - FREE_BYTES
    told: list[dict[str, Any]] = []
    for oid, size in wanted:
        one: dict[str, Any] = {"oid": oid, "size": size}
        if there[oid] is None and size > free:
            one["error"] = {"code": 413, "message": "the server has no room for it"}
        elif there[oid] is None:
            upload = {"href": upload_url(call.hub.secret, call.base, oid, size)}
            one["actions"] = {"upload": upload, "verify": {"href": f"{call.base}/lfs/verify"}}
        elif there[oid] != size:
            one["error"] = {"code": 422, "message": f"its size is {there[oid]}"}
        told.append(one)
    return JSONResponse({"transfer": "basic", "objects": told}, media_type="application/vnd.git-lfs+json")


def lfs_verify(call: Call) -> Response:
    asked = call.json()
    if call.hub.stored(_text(asked, "oid")) != _size(asked):
        raise Failure(404, "there is no such object")
    return JSONResponse({})


def signature(secret: bytes, oid: str, size: int, expires: int) -> str:
    return hmac.new(secret, f"PUT {oid} {size} {expires}".encode(), hashlib.sha256).hexdigest()


def upload_url(secret: bytes, base: str, oid: str, size: int, seconds: int = UPLOAD_URL_S) -> str:
    """Where the content `oid` may be put without a token, for a while: clients send none there."""
    expires = int(time.time()) + seconds
    query = {"size": size, "expires": expires, "signature": signature(secret, oid, size, expires)}
    return f"{base}/lfs/{oid}?{urlencode(query)}"


def commit(call: Call) -> Response:
    repo = call.repo()
    if call.flag("create_pr"):
        raise Failure(400, "this server has no pull requests; commit to a branch")
    header, changes = _operations(call)
    assert call.token is not None
    parent = _text(header, "parentCommit") if "parentCommit" in header else None
    done = call.hub.commit(
        repo,
        call.param("revision"),
        changes,
        title=_text(header, "summary"),
        message=str(header.get("description") or ""),
        author=call.token.name,
        parent=parent,
    )
    url = f"{url_of(call, repo.kind, repo.name)}/commit/{done.oid}"
    return JSONResponse({"success": True, "commitOid": done.oid, "commitUrl": url, "hookOutput": ""})


def _operations(call: Call) -> tuple[dict[str, Any], list[File | Removal]]:
    """A commit's header and changes; the content of regular files is stored meanwhile."""
    header: dict[str, Any] | None = None
    changes: list[File | Removal] = []
    while line := call.body.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise Failure(413, f"files over {MAX_REGULAR} bytes must be uploaded before they are committed")
        if not line.strip():
            continue
        one = _loads(line)
        value = one.get("value") if isinstance(one, dict) else None
        if not isinstance(value, dict):
            raise Failure(400, 'a line of the body is not {"key": ..., "value": {...}}')
        match one.get("key"):
            case "header" if header is None:
                header = value
            case "file":
                path = _text(value, "path")
                store.check_path(path)
                changes.append(call.hub.put(path, _base64(value.get("content"))))
            case "lfsFile":
                oid = _text(value, "oid")
                size = call.hub.stored(oid)
                if size is None or size != value.get("size", size):
                    raise Failure(400, f"{oid} has not been uploaded in this size")
                changes.append(store.lfs_file(_text(value, "path"), oid, size))
            case "deletedFile":
                changes.append(Removal(_text(value, "path")))
            case "deletedFolder":
                changes.append(Removal(_text(value, "path"), folder=True))
            case key:
                raise Failure(400, f"no operation {str(key)[:40]!r}")
        if len(changes) > MAX_OPERATIONS:
            raise Failure(413, f"at most {MAX_OPERATIONS} operations in one commit")
    if header is None:
        raise Failure(400, "a commit needs a header")
    return header, changes


def _loads(raw: bytes) -> Any:
    try:
        found = json.loads(raw)
        if b"\\ud" in raw.lower():  # half of a surrogate pair is no text
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Failure(400, "the body is not JSON") from error
    return found


def _text(value: Any, key: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise Failure(400, f'"{key}" must be a string')
    return found


def _size(value: dict[str, Any]) -> int:
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**53:
        raise Failure(400, '"size" must be a number of bytes')
    return size


def _base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Failure(400, "not base64") from error


def no_such_page(call: Call) -> Response:
    """What no other route takes: names without a namespace, of which there are none, and unknown pages."""
    if "namespace" not in call.request.path_params:
        raise no_repo(call.token)
    call.repo()
    raise Failure(404, "there is no such page")
