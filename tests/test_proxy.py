"""The slow line that other tests send real clients through."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

from tests.proxy import slow_line


def test_a_client_that_waits_sees_its_server_die() -> None:
    """Also where nothing more would go up: the line must not keep the client's end open."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        slow_line(f"http://127.0.0.1:{listener.getsockname()[1]}") as line,
    ):
        address = urlsplit(line.endpoint)
        with socket.create_connection((address.hostname, address.port), timeout=30) as client:
            client.sendall(b"all of the request")
            server, _ = listener.accept()
            server.recv(1)
            time.sleep(0.3)  # by now the line waits for more from the client
            server.close()  # bytes are unread, so that the line's end is reset
            assert client.recv(1) == b""
