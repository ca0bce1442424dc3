"""Requests are answered while hundreds of other connections never finish theirs.

--hold-seconds sets the time for which these connections are held.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.infer.server.conftest import ServerProcess
from tests.options import option_value

NUM_CONNECTIONS = 300
BOUND = 1.0  # for the 99th percentile, in seconds
HOST = b"Host: localhost\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
BEGINNINGS = {
    "nothing": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\n" + HOST,
    "half a body": b"POST /v1/videos HTTP/1.1\r\n" + HOST + b"Content-Length: 999\r\n\r\n{",
    "half a handshake": b"GET /v1/stream HTTP/1.1\r\n" + HOST + UPGRADE,
    "a silent WebSocket": b"GET /v1/stream HTTP/1.1\r\n"
    + HOST
    + UPGRADE
    + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
}


class HalfOpen:
    """Connections whose requests are never finished. A closed connection is replaced at once."""

    def __init__(self, port: int) -> None:
        self._port, self._stop = port, threading.Event()
        self.num_opened = 0
        self._kinds: Iterator[bytes] = itertools.cycle(BEGINNINGS.values())
        self._connections = [self._open() for _ in range(NUM_CONNECTIONS)]
        self._thread = threading.Thread(target=self._hold)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def _open(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=30)
        connection.sendall(next(self._kinds))
        connection.setblocking(False)
        self.num_opened += 1
        return connection

    def _hold(self) -> None:
        while not self._stop.wait(0.1):
            for index, connection in enumerate(self._connections):
                if _is_closed(connection):
                    connection.close()
                    self._connections[index] = self._open()


def _is_closed(connection: socket.socket) -> bool:
    with suppress(BlockingIOError):
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
        return True
    return False


@pytest.mark.slow
@pytest.mark.time_limit("--hold-seconds", 3)
@pytest.mark.parametrize("token", [None, "right-and-long-enough"], ids=["without a token", "with a token"])
def test_requests_are_answered_while_connections_are_held(
    tmp_path: Path, pytestconfig: pytest.Config, token: str | None
) -> None:
    hold_seconds = option_value(pytestconfig, "--hold-seconds")
    server = ServerProcess(tmp_path, token=token)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    seconds: list[float] = []
    try:
        half_open = HalfOpen(server.port)
        try:
            end = time.monotonic() + hold_seconds
            while time.monotonic() < end:
                for path in ("/healthz", "/", "/v1/server", "/v1/videos"):
                    begin = time.monotonic()
                    # each request uses its own connection
                    assert httpx.get(server.url + path, headers=headers, timeout=30).status_code == 200
                    seconds.append(time.monotonic() - begin)
                time.sleep(0.05)
        finally:
            half_open.close()
    finally:
        server.stop()
    median, p99 = np.percentile(seconds, [50, 99])
    print(
        f"{len(seconds)} requests while {NUM_CONNECTIONS} connections were held for {hold_seconds:g} s"
        f" ({half_open.num_opened} opened): median {1000 * median:.0f} ms, p99 {1000 * p99:.0f} ms,"
        f" {1000 * max(seconds):.0f} ms at most"
    )
    assert p99 < BOUND
