"""A self-hosted server that speaks the Hub's HTTP interface: who asks, what may come, and where it goes.

Reading public repositories needs no token; writing needs one of scope `write`; any token reads the private
and the gated ones. Without a token a private repository answers as an absent one does.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import anyio.from_thread
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from zoo.errors import UsageError, ZooError
from zoo.hub import web_pages as pages
from zoo.hub.store import HubStore
from zoo.hub.tokens import Token, any_token, find_token
from zoo.hub.web_pages import Call, Failure
from zoo.hub.web_protocol import Protocol

if TYPE_CHECKING:
    from zoo.registry import Registry

MAX_BODY = 4 << 20  # bytes of any request but the two below
MAX_COMMIT = 512 << 20  # bytes of a commit's request; it goes through a temporary file
BODY_S = 60.0  # a body may take so long,
SLOWEST = 16 * 1024  # and longer in proportion to its length: a second for so many bytes
MAX_CONNECTIONS = 512


def application(hub: HubStore, registry: Registry | None = None) -> ASGIApp:
    """The ASGI application over a store; with the entries of a registry, if one is given."""
    uploads = anyio.CapacityLimiter(32)  # threads of their own: slow uploads must not hold up everybody

    def route(
        path: str,
        work: Callable[[Call], Response],
        method: str = "GET",
        *,
        writes: bool = False,
        limit: int = 0,
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                token = await anyio.to_thread.run_sync(_sender, hub, request)
                if writes and token is None:
                    raise pages.no_repo(None)
                if writes and token is not None and token.scope != "write":
                    raise Failure(403, "this token may only read; a write token is needed")
                with tempfile.SpooledTemporaryFile(max_size=1 << 20, dir=str(hub.root)) as body:
                    async for chunk in _body(request, limit):
                        body.write(chunk)
                    body.seek(0)
                    return await anyio.to_thread.run_sync(work, Call(hub, request, token, body))
            except (Failure, ZooError, ClientDisconnect) as error:
                return pages.answer(error)

        return Route(path, endpoint, methods=[method])

    async def put_lfs(request: Request) -> Response:
        def receive() -> None:
            hub.receive(oid, size, chunks())

        def chunks() -> Iterator[bytes]:
            while chunk := anyio.from_thread.run(anext, stream, b""):
                yield chunk

        try:
            oid, query = request.path_params["oid"], request.query_params
            size = pages.number(query.get("size"), 0)
            expires = pages.number(query.get("expires"), 0)
            right = pages.signature(hub.secret, oid, size, expires)
            if not hmac.compare_digest(right.encode(), query.get("signature", "").encode()):
                raise Failure(403, "the upload URL is not one of this server's")
            if expires < time.time():
                raise Failure(403, "the upload URL has expired; ask for another")
            if request.headers.get("content-length", str(size)) != str(size):
                raise Failure(400, f"the length is not {size}, as was announced")
            stream = _body(request, size)
            await anyio.to_thread.run_sync(receive, limiter=uploads)
            return Response(status_code=200)
        except (Failure, ZooError, ClientDisconnect) as error:
            return pages.answer(error)

    repo = "/api/{kind}/{namespace}/{name}"
    routes = [
        route("/api/whoami-v2", pages.whoami),
        route("/api/validate-yaml", pages.validate_yaml, "POST", limit=MAX_BODY),
        route("/api/repos/create", pages.create_repo, "POST", writes=True, limit=MAX_BODY),
        route("/api/repos/delete", pages.delete_repo, "DELETE", writes=True, limit=MAX_BODY),
        route("/api/{kind}", pages.list_repos),
        route(repo, pages.repo_info),
        route(repo + "/revision/{revision}", pages.repo_info),
        route(repo + "/settings", pages.settings, "PUT", writes=True, limit=MAX_BODY),
        route(repo + "/auth-check", pages.auth_check),
        route(repo + "/auth-check/write", pages.auth_check, writes=True),
        route(repo + "/refs", pages.list_refs),
        route(repo + "/commits/{revision}", pages.list_commits),
        route(repo + "/branch/{revision}", pages.create_branch, "POST", writes=True, limit=MAX_BODY),
        route(repo + "/branch/{revision}", pages.delete_branch, "DELETE", writes=True),
        route(repo + "/tag/{revision}", pages.create_tag, "POST", writes=True, limit=MAX_BODY),
        route(repo + "/tag/{revision}", pages.delete_tag, "DELETE", writes=True),
        route(repo + "/tree/{revision}", pages.list_tree),
        route(repo + "/tree/{revision}/{path:path}", pages.list_tree),
        route(repo + "/paths-info/{revision}", pages.paths_info, "POST", limit=MAX_BODY),
        route(repo + "/preupload/{revision}", pages.preupload, "POST", writes=True, limit=MAX_BODY),
        route(repo + "/commit/{revision}", pages.commit, "POST", writes=True, limit=MAX_COMMIT),
        route("/lfs/verify", pages.lfs_verify, "POST", writes=True, limit=MAX_BODY),
        Route("/lfs/{oid}", put_lfs, methods=["PUT"]),
    ]
    if registry is not None:
        routes.insert(0, route("/api/zoo/entries", partial(pages.list_entries, registry)))
    for begin in ("/{namespace}/{name}", "/{kind}/{namespace}/{name}"):
        batch = begin + ".git/info/lfs/objects/batch"
        routes += [
            route(batch, pages.lfs_batch, "POST", writes=True, limit=MAX_BODY),
            route(begin + "/resolve/{revision}/{path:path}", pages.resolve),
        ]
    routes += [
        route(path, pages.no_such_page)
        for path in ("/{name}/resolve/{rest:path}", "/api/{kind}/{name}", repo + "/{rest:path}")
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _unrouted})
    app.router.redirect_slashes = False
    return _with_raw_paths(app)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return pages.answer(Failure(error.status_code, error.detail, headers=dict(error.headers or {})))


def _with_raw_paths(app: ASGIApp) -> ASGIApp:
    """Route by the path as it was sent: revisions and paths hold %2F, which separates nothing."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("latin-1")
        await app(scope, receive, send)

    return wrapped


def _sender(hub: HubStore, request: Request) -> Token | None:
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, given = header.partition(" ")
    token = find_token(hub, given.strip()) if scheme.lower() == "bearer" else None
    if token is None:
        raise Failure(401, "Invalid credentials in Authorization header")
    return token


async def _body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in pieces. Failure if it is longer than `limit`, or slower than anybody's line."""
    if not limit:
        return
    length = request.headers.get("content-length", "")
    announced = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else limit
    if announced > limit:
        raise Failure(413, f"at most {limit} bytes")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + BODY_S + announced / SLOWEST
    stream, came = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(stream, b"")
        except TimeoutError:
            raise Failure(408, "the body came too slowly", headers={"Connection": "close"}) from None
        if not chunk:
            return
        came += len(chunk)
        if came > limit:
            raise Failure(413, f"at most {limit} bytes", headers={"Connection": "close"})
        yield chunk


def check_address(hub: HubStore, host: str) -> None:
    """UsageError if others could reach the server at `host` though no token has been made yet."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not any_token(hub):
        raise UsageError(
            f"no server at {host} without tokens: others can reach it",
            expected="127.0.0.1, or a token",
            try_="zoo token create --name NAME --scope write",
        )


def serve(
    hub: HubStore, host: str, port: int, registry: Registry | None, ready: Callable[[str], None]
) -> None:
    """Serve until interrupted. `ready` gets the URL once connections are accepted; port 0: a free one."""
    check_address(hub, host)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise ZooError(
            f"cannot listen at {host}, port {port}",
            saw=error.strerror or str(error),
            try_="--port 0 for a free one",
        ) from error
    config = uvicorn.Config(
        application(hub, registry),
        http=Protocol,
        loop="asyncio",  # its sendfile needs no copy; uvloop has none
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=MAX_CONNECTIONS,
    )
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listener])
