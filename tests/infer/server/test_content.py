"""Files over HTTP: HEAD, ranges, conditions, and files that change while they are sent."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from longvideo.infer.server.content import read_range
from tests.infer.server.conftest import PROMPT, RunningServer, Serve, wait_until

NAME = "A" * 22
CONTENT = f"/v1/streams/{NAME}/content"
DATA = bytes(range(256)) * 4
SIZE = len(DATA)


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    server = serve()
    file_of(server).write_bytes(DATA)
    return server


def file_of(server: RunningServer) -> Path:
    return server.folder / "streams" / f"{NAME}.mp4"


def test_head_is_answered_as_get_without_a_body(server: RunningServer) -> None:
    with server.http() as http:
        job = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}).json()["id"]
        wait_until(lambda: http.get(f"/v1/videos/{job}").json()["status"] == "completed")
        paths = ["/", "/page/page.js", "/healthz", "/v1/server", "/metrics", "/openapi.json", "/v1/videos", CONTENT]
        for path in (*paths, f"/v1/videos/{job}", f"/v1/videos/{job}/content", "/nowhere", "/v1/videos/x"):
            whole, head = http.get(path), http.head(path)
            assert head.status_code == whole.status_code and head.content == b""
            assert whole.status_code in (404, 422) or whole.status_code == 200 and whole.content
            for name in ("content-length", "content-type", "accept-ranges", "etag", "last-modified"):
                assert head.headers.get(name) == whole.headers.get(name), (path, name)
            assert int(head.headers["content-length"]) == len(whole.content)
        assert http.head(CONTENT).headers["accept-ranges"] == "bytes"
        part = http.head(CONTENT, headers={"Range": "bytes=0-9"})
        assert (part.status_code, part.headers["content-length"]) == (206, "10")
        assert http.head("/v1/videos/x/cancel").status_code == 405


def test_a_connection_stays_open_after_head(server: RunningServer) -> None:
    host, _, port = server.address.partition(":")
    request = f"HEAD {CONTENT} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for _ in range(3):
            connection.sendall(request)
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("value", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=1000-", 1000, SIZE),
        ("bytes=-5", SIZE - 5, SIZE),
        ("bytes=-99999", 0, SIZE),
        ("bytes=5-" + "9" * 5000, 5, SIZE),
        ("BYTES = 3 - 4", 3, 5),
        ("bytes=1-2,", 1, 3),
    ],
)
def test_a_range_is_a_part_of_the_file(server: RunningServer, value: str, start: int, end: int) -> None:
    with server.http() as http:
        answer = http.get(CONTENT, headers={"Range": value})
    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("bytes", 400),
        ("bytes=", 400),
        ("bytes=-", 400),
        ("bytes=abc", 400),
        ("bytes=5-2", 400),
        ("bytes=--5", 400),
        ("bytes=0x1-2", 400),
        ("bytes=1-2-3", 400),
        ("bytes=0-1,x", 400),
        ("bytes=1,2", 400),
        ("", 400),
        (f"bytes={SIZE}-", 416),
        ("bytes=" + "9" * 5000 + "-", 416),
        ("bytes=-0", 416),
    ],
)
def test_an_invalid_range_is_refused(server: RunningServer, value: str, status: int) -> None:
    with server.http() as http:
        answer = http.get(CONTENT, headers={"Range": value})
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})
        assert status == 400 or answer.headers["content-range"] == f"bytes */{SIZE}"
        for path in ("/", "/page/page.js"):
            assert http.get(path, headers={"Range": "bytes=abc"}).json()["error"]["code"] == "bad_request"


@pytest.mark.parametrize("value", ["bytes=0-1,5-6", "pages=1-2"])
def test_multiple_ranges_and_unknown_units_get_the_whole_file(server: RunningServer, value: str) -> None:
    with server.http() as http:
        answer = http.get(CONTENT, headers={"Range": value})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_an_empty_file_has_no_ranges() -> None:
    with pytest.raises(Exception, match="416"):
        read_range("bytes=0-", 0)


def test_conditional_requests(server: RunningServer) -> None:
    with server.http() as http:
        whole = http.get(CONTENT)
        etag, modified = whole.headers["etag"], whole.headers["last-modified"]
        for tags in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            answer = http.get(CONTENT, headers={"If-None-Match": tags})
            assert (answer.status_code, answer.content) == (304, b"")
        assert http.get(CONTENT, headers={"If-None-Match": '"x"'}).content == DATA
        for condition, status in ((etag, 206), (modified, 206), ('"x"', 200)):
            answer = http.get(CONTENT, headers={"Range": "bytes=0-9", "If-Range": condition})
            assert answer.status_code == status
        file_of(server).write_bytes(DATA + b"more")
        assert http.get(CONTENT, headers={"If-None-Match": etag}).status_code == 200


def test_a_file_that_is_deleted_while_it_is_sent_is_sent_to_its_end(server: RunningServer) -> None:
    big = DATA * 8192
    file_of(server).write_bytes(big)
    with server.http() as http, http.stream("GET", CONTENT) as answer:
        parts = answer.iter_raw()
        data = next(parts)
        file_of(server).unlink()
        data += b"".join(parts)
    assert data == big


def test_a_file_that_gets_shorter_while_it_is_sent_cuts_the_connection(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with file_of(server).open("wb") as file:
        file.truncate(2**28)
    with server.http() as http, http.stream("GET", CONTENT) as answer:
        parts = answer.iter_raw()
        next(parts)
        with file_of(server).open("r+b") as file:
            file.truncate(10)
        with pytest.raises(httpx.RemoteProtocolError, match="peer closed"):
            for _ in parts:
                pass
        assert http.get("/healthz").status_code == 200
    assert "became shorter while it was sent" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
