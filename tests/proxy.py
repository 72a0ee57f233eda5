"""A slow line to a server: what passes is counted, can be held back, and can be cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

CHUNK = 1 << 16


class Proxy:
    """Forwards connections to `endpoint`, each way at most at `bytes_per_s`."""

    def __init__(self, endpoint: str, bytes_per_s: float) -> None:
        self.lead_to(endpoint)
        self._rate = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.up = self.down = 0  # bytes to and from the server
        self.seen: Callable[[bytes], None] = lambda data: None  # is told what goes up, before it does
        self._open: list[socket.socket] = []

    def lead_to(self, endpoint: str) -> None:
        """Send new connections there."""
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port)

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:  # nobody is there
                client.close()
                continue
            self._open += [client, server]
            for source, target, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(source, target, up), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(CHUNK):
                if up:
                    self.seen(data)
                    self.up += len(data)
                else:
                    self.down += len(data)
                target.sendall(data)
                time.sleep(len(data) / self._rate)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                _break(end)

    def cut(self) -> None:
        """Break every connection; new ones can be made."""
        broken, self._open = self._open, []
        for end in broken:
            _break(end)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def _break(end: socket.socket) -> None:
    """Close it, also for the thread that waits for its data: `close` alone leaves it open until some come."""
    with suppress(OSError):  # broken already
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def slow_line(endpoint: str, bytes_per_s: float = 1e9) -> Iterator[Proxy]:
    proxy = Proxy(endpoint, bytes_per_s)
    threading.Thread(target=proxy.run, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.close()
