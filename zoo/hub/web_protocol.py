"""uvicorn's HTTP protocol with what a server of large files on an open port needs beside it.

A request's head has a time and a size limit, and a file goes from the page cache to the socket without
passing through Python: ASGI's extension `http.response.zerocopysend`, which uvicorn does not have.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0  # from a connection's beginning, or a request's first byte, to the end of its head
MAX_HEAD = 64 * 1024  # bytes, to the next READ
READ = 16 * 1024  # bytes
PIECE = 4 << 20  # bytes
PIECE_S = 240.0  # a client that takes longer for a piece is cut off


class Protocol(HttpToolsProtocol):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.app = _with_zero_copy(self.app, self)
        self._in_head = False
        self._head_size = 0
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_S, self._refuse, b"408 Request Timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for begin in range(0, len(data), READ):  # so that a long head is seen before it is parsed whole
            piece = data[begin : begin + READ]
            if self._in_head:
                self._head_size += len(piece)
            super().data_received(piece)
            if self._in_head and self._head_size > MAX_HEAD:
                self._refuse(b"431 Request Header Fields Too Large")
            if self.transport.is_closing():
                return

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_size = True, 0
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_S, self._refuse, b"408 Request Timeout")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            self.transport.close()


def _with_zero_copy(app: Any, protocol: Protocol) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.zerocopysend":
                await _send_file(protocol, send, message)
            else:
                await send(message)

        scope.setdefault("extensions", {})["http.response.zerocopysend"] = {}
        await app(scope, receive, sending)

    return wrapped


async def _send_file(protocol: Protocol, send: Any, message: Message) -> None:
    """`message`: file, offset, count; the whole body of the response."""
    cycle = send.__self__  # the request's own, though others may be in the pipeline
    offset, end = message["offset"], message["offset"] + message["count"]
    while offset < end and not cycle.disconnected:
        count = min(PIECE, end - offset)
        try:
            async with asyncio.timeout(PIECE_S):
                sent = await protocol.loop.sendfile(protocol.transport, message["file"], offset, count)
        except (TimeoutError, OSError, RuntimeError):  # too slow, or gone: then the transport is closing
            protocol.transport.abort()
            return
        offset += sent
        cycle.expected_content_length -= sent
        if sent < count:  # the file is shorter than its name says; the client sees a broken download
            protocol.transport.abort()
            return
    await send({"type": "http.response.body", "body": b"", "more_body": False})
