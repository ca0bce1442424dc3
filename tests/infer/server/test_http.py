"""The page, tokens, hosts and origins, counters, and the interface as /openapi.json describes it."""

from __future__ import annotations

import re
import signal
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.app import PAGE, TINY_EXAMPLES
from longvideo.infer.server.limits import Limits
from longvideo.infer.server.security import check_listening, check_public_hosts, is_loopback
from tests.infer.server.conftest import DEADLINE, PROMPT, Serve, serve_process
from tests.infer.server.test_stream import closed_with
from tests.options import option_value

if TYPE_CHECKING:
    from schemathesis.schemas import APIOperation

TOKEN = "correct-horse-battery"
GUARDED = ["/v1/videos", "/v1/videos/" + "A" * 22, "/v1/streams/" + "A" * 22 + "/content", "/v1/models", "/metrics"]


def test_the_server_describes_its_model(serve: Serve) -> None:
    with serve().http() as http:
        assert http.get("/v1/server").json() == {
            "model": "small",
            "needs_token": False,
            "max_seconds": 3600,
            "fps": 24,
            "width": 64,
            "height": 32,
            "steps": 2,
            "guidance": 1,
            "decoder": "the autoencoder in fp32",
            "adapters": [],
            "takes_references": True,
            "max_upload_bytes": 32 * 2**20,
            "max_footage_seconds": 120,
            "examples": [],
        }
        assert http.get("/healthz").json() == {"status": "ok"}


def test_tiny_was_trained_on_every_word_of_the_examples() -> None:
    encoder = StreamingPipeline.from_pretrained("tiny", device="cpu").models.text_encoder
    assert len(TINY_EXAMPLES) == 6
    assert [encoder.unknown_words(prompt) for prompt in TINY_EXAMPLES] == [[]] * 6


def test_the_page_loads_nothing_from_other_servers(serve: Serve) -> None:
    with serve(token=TOKEN).http() as http:
        for path in ("/", *(f"/page/{file.name}" for file in PAGE.iterdir())):
            answer = http.get(path)
            assert answer.status_code == 200 and len(answer.content) > 0
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            assert "access-control-allow-origin" not in answer.headers
        for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2f..%2fwriter.py", "/page//etc/passwd"):
            assert http.get(path).status_code in (401, 404)


def test_the_page_refers_to_all_its_files() -> None:
    """Scripts are imported from page.js on, so a module that nothing imports is an error too."""
    texts = {file.name: file.read_text() for file in PAGE.iterdir()}
    references = set(re.findall(r'(?:href|src)="page/([^"]+)"', texts["index.html"]))
    for name, text in texts.items():
        references |= set(re.findall(r'from "\./([^"]+)"', text)) if name.endswith(".js") else set()
    assert references == set(texts) - {"index.html"}


@pytest.mark.parametrize("path", GUARDED)
def test_the_token_is_required(serve: Serve, path: str) -> None:
    with serve(token=TOKEN).http() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}):
            answer = http.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert http.get(path, headers={b"Authorization": b"Bearer \xff\xfe"}).status_code == 401
        assert http.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code in (200, 404)
        for open_path in ("/healthz", "/v1/server"):
            assert http.get(open_path).status_code == 200


def test_a_stream_accepts_the_token_as_a_subprotocol_or_a_header(serve: Serve) -> None:
    server = serve(token=TOKEN)
    for options in ({}, {"subprotocols": ["longvideo.v1", "bearer.wrong"]}):
        client = server.connect(**options)
        assert client.receive()["code"] == "unauthorized"
        assert closed_with(client) == 1008
    client = server.connect(subprotocols=["longvideo.v1", f"bearer.{TOKEN}"])
    assert client.socket.subprotocol == "longvideo.v1"
    assert client.start(seconds=1)["type"] == "ready"
    client = server.connect(additional_headers={"Authorization": f"Bearer {TOKEN}"})
    assert client.start(seconds=1)["type"] == "ready"


def test_other_host_names_are_refused(serve: Serve) -> None:
    server = serve()
    port = server.address.split(":")[1]
    with server.http() as http:
        for host in ("attacker.example", f"attacker.example:{port}", "127.0.0.1.attacker.example", "localhost.x", ""):
            answer = http.get("/v1/server", headers={"Host": host})
            assert answer.status_code in (400, 403), host
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert http.get("/v1/server", headers={"Host": host}).status_code == 200
    public = serve(public_hosts=frozenset({"video.example.org"}), folder=server.folder / "public")
    for host, status in (("video.example.org", 200), ("VIDEO.example.org:443", 200), ("localhost", 200)):
        assert httpx.get(f"{public.url}/v1/server", headers={"Host": host}).status_code == status
    for host in ("attacker.example", "example.org", "x.video.example.org", "video.example.org.attacker.example"):
        assert httpx.get(f"{public.url}/v1/server", headers={"Host": host}).status_code == 403
    own = socket.create_connection(("127.0.0.1", int(port)))
    with pytest.raises(InvalidStatus), connect(f"ws://attacker.example:{port}/v1/stream", sock=own):
        pass
    # a second Host header
    with pytest.raises(InvalidStatus):
        server.connect(additional_headers={"Host": "attacker.example"})


@pytest.mark.parametrize("host", ["video.example.org", "video.example.org:443", "192.168.1.4:8080", "", "x y"])
def test_with_a_token_any_host_name_is_accepted(serve: Serve, host: str) -> None:
    server = serve(token=TOKEN)
    right, wrong = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer not-the-token"}
    with server.http() as http:
        assert http.get("/v1/videos", headers={"Host": host, **right}).status_code == 200
        assert http.get("/v1/videos", headers={"Host": host, **wrong}).status_code == 401
        assert http.get("/v1/videos", headers={"Host": host}).status_code == 401


@pytest.mark.parametrize(
    ("origin", "host", "public", "status"),
    [
        ("https://video.example.org", "video.example.org", [], 101),
        ("https://video.example.org", "video.example.org:443", [], 101),
        ("http://video.example.org:8080", "Video.example.org:8080", [], 101),
        ("https://video.example.org", "127.0.0.1:8000", [], 403),  # a proxy that replaces Host
        ("https://video.example.org", "127.0.0.1:8000", ["video.example.org"], 101),
        ("https://attacker.example", "127.0.0.1:8000", ["video.example.org"], 403),
        ("https://attacker.example", "video.example.org", [], 403),
        ("https://video.example.org:444", "video.example.org", [], 403),
        ("https://video.example.org@attacker.example", "video.example.org", ["video.example.org"], 403),
        ("null", "video.example.org", ["video.example.org"], 403),
        ("", "video.example.org", [], 403),
    ],
)
def test_a_page_behind_a_proxy_reaches_only_its_own_server(
    serve: Serve, origin: str, host: str, public: list[str], status: int
) -> None:
    server = serve(token=TOKEN, public_hosts=check_public_hosts(public))
    address, port = server.address.split(":")
    request = (
        f"GET /v1/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nConnection: Upgrade\r\n"
        f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
    )
    with socket.create_connection((address, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(request.encode())
        answer = connection.recv(65536)
    assert int(answer.split()[1]) == status
    assert status == 101 or b'"bad_origin"' in answer
    with server.http() as http:
        headers = {"Host": host, "Origin": origin, "Authorization": f"Bearer {TOKEN}"}
        posted = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}, headers=headers)
        assert posted.status_code == (200 if status == 101 else 403)


@pytest.mark.parametrize("name", ["https://video.example.org", "video.example.org:443", "a/b", "a b", "", "a@b"])
def test_a_public_host_is_only_a_name(name: str) -> None:
    assert check_public_hosts(["Video.Example.org", "[::1]"]) == {"video.example.org", "::1"}
    with pytest.raises(UserError, match="is not a host name"):
        check_public_hosts([name])


@pytest.mark.parametrize("origin", ["http://attacker.example", "http://127.0.0.1:1", "null", "https://localhost"])
def test_pages_of_other_servers_are_refused(serve: Serve, origin: str) -> None:
    server = serve()
    with server.http() as http:
        answer = http.post("/v1/videos", json={"prompt": PROMPT}, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "bad_origin")
        own = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}, headers={"Origin": server.url})
        assert own.status_code == 200
    with pytest.raises(InvalidStatus) as refusal:
        server.connect(origin=origin)
    assert refusal.value.response.status_code == 403
    assert server.connect(origin=server.url).start(seconds=1)["type"] == "ready"


def test_listening_for_other_machines_needs_a_token() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.4", "example.org", "localhost.example.org", "")))
    check_listening("127.0.0.1", None)
    check_listening("0.0.0.0", TOKEN)
    for host, token in (("0.0.0.0", None), ("::", None), ("0.0.0.0", "short"), ("127.0.0.1", "with a space in it")):
        with pytest.raises(UserError):
            check_listening(host, token)


def test_counters_count(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    client.start(seconds=3)
    client.receive_until("end")
    with server.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in (
        "longvideo_sessions_started_total 1",
        "longvideo_chunks_total 3",
        "longvideo_frames_total 72",
        "longvideo_segments_dropped_total 0",
        'longvideo_jobs{status="completed"} 0',
        'longvideo_chunk_seconds_bucket{le="+Inf"} 3',
        "longvideo_chunk_seconds_count 3",
    ):
        assert line in lines


def test_the_interface_matches_its_description(serve: Serve, pytestconfig: pytest.Config) -> None:
    """Requests generated from /openapi.json get answers that it describes.

    --api-cases sets the number of requests for each operation.
    """
    server = serve(limits=Limits(job_seconds=1.0), token=TOKEN)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # a schema cannot express limits on several fields together, such as the total length of all shots
    excluded = [positive_data_acceptance]
    statuses: set[int] = set()
    for operation in schema.get_all_operations():
        assert isinstance(operation, Ok)
        run_cases(operation.ok(), excluded, statuses, num_cases=option_value(pytestconfig, "--api-cases"))
    assert {200, 404, 422} <= statuses and max(statuses) < 500


def run_cases(operation: APIOperation, excluded: list[Any], statuses: set[int], *, num_cases: int) -> None:
    slow_checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]

    @hypothesis.settings(max_examples=num_cases, deadline=None, database=None, suppress_health_check=slow_checks)
    @hypothesis.seed(0)
    @hypothesis.given(case=operation.as_strategy())
    def run_case(case: schemathesis.Case) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        statuses.add(answer.status_code)
        case.validate_response(answer, excluded_checks=excluded)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_case()


def test_a_refused_websocket_is_one_line_of_the_log(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        host = http.base_url.netloc.decode()
        with pytest.raises(InvalidStatus) as refusal, connect(f"ws://{host}/v1/stream", origin=Origin("null")):
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    assert refusal.value.response.status_code == 403
    lines = [line for line in errors.splitlines() if "INFO" in line or "ERROR" in line]
    assert lines == [
        f"INFO longvideo.infer.server.connections: refused a WebSocket with Host '{host}' and Origin 'null': "
        "the header Origin names another server; use the page of this server"
    ]
