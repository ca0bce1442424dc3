"""Clients that do not finish a request, send too much or read nothing: answers, closed connections, other clients."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from longvideo.infer.server.connections import HEAD_BYTES
from longvideo.infer.server.limits import Limits
from tests.infer.server.conftest import DEADLINE, PROMPT, RunningServer, Serve, wait_until
from tests.infer.server.test_stream import closed_with

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MANY = 40


@contextmanager
def raw(server: RunningServer, data: bytes = b"") -> Generator[socket.socket]:
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(data)
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def answer_of(data: bytes) -> tuple[int, str, str]:
    """Return the status of data that holds one answer, and the code and the message of its error."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    return int(head.split()[1]), error["code"], error["message"]


@pytest.mark.parametrize(
    "data",
    [HEAD, HEAD + b"X-Long: a", POST + b'Content-Length: 20\r\n\r\n{"pro', HEAD + b"\r\n" + HEAD],
    ids=["head without end", "half a header", "half a body", "second request without end"],
)
def test_a_request_that_is_never_finished_is_answered_and_closed(serve: Serve, data: bytes) -> None:
    server = serve(limits=Limits(head_seconds=0.3, body_seconds=0.3))
    with raw(server, data) as connection:
        last = read_to_end(connection)
    assert answer_of(last[last.rindex(b"HTTP/1.1 ") :]) == (
        408,
        "timeout",
        "the request was not complete in time",
    )
    assert len(server.waiting) == 0


@pytest.mark.parametrize("data", [b"", HEAD + b"\r\n"], ids=["nothing", "one whole request"])
def test_an_idle_connection_is_closed_without_an_answer(serve: Serve, data: bytes) -> None:
    with raw(serve(limits=Limits(head_seconds=0.3)), data) as connection:
        assert b"408" not in read_to_end(connection)


def test_a_handshake_that_is_never_finished_is_closed(serve: Serve) -> None:
    server = serve(limits=Limits(head_seconds=0.3, first_message_seconds=0.3))
    upgrade = b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    with raw(server, upgrade) as connection:
        assert answer_of(read_to_end(connection))[0] == 408
    with raw(server, upgrade + b"\r\n") as connection:  # without a key
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + b"A" * 22 + b"==\r\n\r\n"
    with raw(server, upgrade + key) as silent:
        data = b""
        while b"\x03\xf0" not in data:  # the close code 1008
            data += silent.recv(65536)
        assert data.startswith(b"HTTP/1.1 101 ") and b"no message arrived within 0.3 s" in data
    assert len(server.waiting) == 0


def test_waiting_connections_do_not_block_other_clients(serve: Serve) -> None:
    """With more waiting connections of each kind than the limit, the oldest are closed and requests are answered."""
    limits = Limits(
        waiting_connections=8,
        parallel_requests=4,
        head_seconds=DEADLINE,
        body_seconds=DEADLINE,
        first_message_seconds=DEADLINE,
    )
    server = serve(limits=limits)
    kinds = [b"", HEAD, POST + b"Content-Length: 20\r\n\r\n{"]
    with ExitStack() as stack, server.http() as http:
        connections = [stack.enter_context(raw(server, kinds[index % len(kinds)])) for index in range(MANY)]
        silent = [server.connect() for _ in range(MANY)]
        wait_until(lambda: len(server.waiting) == 8)
        for _ in range(20):
            assert http.get("/healthz").status_code == 200
            with raw(server, HEAD + b"Connection: close\r\n\r\n") as other:
                assert read_to_end(other).startswith(b"HTTP/1.1 200 ")
        assert http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}).status_code == 200
        assert server.connect().start(seconds=1)["type"] == "ready"
        read_to_end(connections[0])
        assert closed_with(silent[0]) == 1013


def test_connections_beyond_the_limit_close_a_waiting_one(serve: Serve) -> None:
    server = serve(limits=Limits(connections=8, head_seconds=DEADLINE))
    with ExitStack() as stack:
        for _ in range(MANY):
            stack.enter_context(raw(server, HEAD))
        with raw(server, HEAD + b"Connection: close\r\n\r\n") as other:
            assert read_to_end(other).startswith(b"HTTP/1.1 200 ")
        assert len(server.waiting) <= 8


def test_parallel_requests_beyond_the_limit_get_an_error(serve: Serve) -> None:
    with serve(limits=Limits(parallel_requests=0)).http() as http:
        answer = http.get("/healthz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")


def test_a_large_head_that_comes_in_one_piece_is_refused(serve: Serve) -> None:
    server = serve()
    for size, status in ((HEAD_BYTES // 2, 200), (HEAD_BYTES + 1, 431), (3 * HEAD_BYTES, 431)):
        with raw(server, HEAD + b"Connection: close\r\nX-Long: " + b"a" * size + b"\r\n\r\n") as connection:
            assert read_to_end(connection).startswith(b"HTTP/1.1 %d " % status)


def test_a_head_without_end_is_refused_for_its_size(serve: Serve) -> None:
    with raw(serve(), HEAD + b"X-Long: ") as connection:
        refused = False
        for _ in range(4 * HEAD_BYTES // 1024):
            try:
                connection.sendall(b"a" * 1024)
            except OSError:  # the server has closed the connection
                refused = True
                break
        status = 431 if refused else answer_of(read_to_end(connection))[0]
    assert status == 431


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 20 + b"\r\n\r\n",
        b"HELLO\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Bad Header: x\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: many\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
    ids=["TLS", "other protocol", "path in bytes", "space in a name", "negative", "not a number", "not a chunk"],
)
def test_invalid_http_gets_an_error_as_json(serve: Serve, data: bytes) -> None:
    with raw(serve(), data) as connection:
        assert answer_of(read_to_end(connection)) == (
            400,
            "bad_request",
            "the request is not valid HTTP",
        )


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize(
    ("path", "token", "status"),
    [("/v1/videos", None, 413), ("/healthz", None, 413), ("/v1/videos", "right-and-long-enough", 401)],
)
def test_a_much_too_large_body_is_read_before_it_is_refused(
    serve: Serve, path: str, token: str | None, status: int, more: bytes
) -> None:
    """A client that sends the whole body before it reads, as most do, receives the answer."""
    size = Limits().upload_bytes + 18 * 2**20
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n".encode() + more
    server = serve(token=token)
    with raw(server, head + b"\r\n") as connection:
        connection.sendall(bytes(size))
        answer = connection.recv(65536)
        while b"}}" not in answer:
            answer += connection.recv(65536)
        assert answer_of(answer)[0] == status
        if not more:
            connection.sendall(HEAD + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_chunked_body_that_is_too_large_is_refused(serve: Serve) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(Limits().upload_bytes // 65536 + 8):
            yield bytes(65536)

    with serve().http() as http:
        answer = http.post("/v1/videos", content=body(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_expect_100_continue_is_refused_before_the_body_is_sent(serve: Serve) -> None:
    head = POST + f"Content-Length: {Limits().upload_bytes + 1}\r\nExpect: 100-continue\r\n\r\n".encode()
    with raw(serve(), head) as connection:
        assert answer_of(read_to_end(connection))[0] == 413


def test_a_client_that_reads_nothing_is_disconnected(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(limits=Limits(send_seconds=0.3), send_buffer=4096)
    name = "A" * 22
    (server.folder / "streams" / f"{name}.mp4").write_bytes(bytes(2**22))
    with raw(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"GET /v1/streams/{name}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: server.count_connections() == 0)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
