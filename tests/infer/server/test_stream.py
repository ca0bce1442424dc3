"""Live streams over a real WebSocket: order of messages, changes of the prompt, limits, and lost connections."""

from __future__ import annotations

import json
import logging
import random
import shutil
import socket
import struct
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.limits import Limits
from tests.infer.server.conftest import FPS, PROMPT, Client, RunningServer, Serve, closed_with, decoded, wait_until
from tests.options import option_value

FIRST, LATER = 29, 32


def hang_up(client: Client) -> None:
    """End the TCP connection without a close frame."""
    client.socket.socket.shutdown(socket.SHUT_RDWR)


def reset(client: Client) -> None:
    """End the TCP connection so that the next packet of the server is answered with a reset, as after a kill."""
    client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hang_up(client)


def test_a_stream_sends_ready_chunks_and_end_and_can_be_downloaded(serve: Serve, pipeline: StreamingPipeline) -> None:
    server = serve()
    client = server.connect(subprotocols=["longvideo.v1"])
    assert client.socket.subprotocol == "longvideo.v1"
    ready = client.start(seconds=3, seed=4)
    assert ready["mime"].startswith('video/mp4; codecs="avc1.42')
    assert (ready["width"], ready["height"], ready["fps"]) == (64, 32, FPS)
    assert (ready["first_chunk_frames"], ready["chunk_frames"], ready["steps"]) == (FIRST, LATER, 2)
    assert (ready["prompt"], ready["seed"], ready["guidance"], ready["seconds"]) == (PROMPT, 4, 1.0, 3)
    *chunks, end = client.receive_until("end")
    assert [(c["chunk"], c["start"] * FPS, c["frames"]) for c in chunks] == [
        (0, 0, 1),
        (0, 1, 28),
        (1, 29, 32),
        (2, 61, 11),
    ]
    assert all(c["prompt"] == PROMPT and not c["cut"] and c["dropped"] == 0 and c["made_in"] > 0 for c in chunks)
    assert (end["chunks"], end["frames"], end["seconds"]) == (3, 72, 3)
    assert closed_with(client) == 1000
    data = client.init + b"".join(client.segments)
    with server.http() as http:
        assert http.get(end["download"]).content == data
    indices, frames = decoded(data)
    assert indices == list(range(72))
    generated = np.concatenate(list(pipeline.stream(PROMPT, seconds=3, seed=4)))
    # the random model generates noise, whose colors are averaged by 4:2:0
    brightness, expected = (video.astype(float) @ (0.2126, 0.7152, 0.0722) for video in (frames, generated))
    assert np.abs(brightness - expected).mean() < 6
    assert sorted(path.suffix for path in (server.folder / "streams").iterdir()) == [".mp4"]


def test_a_growing_file_can_be_downloaded(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start()["session"]
    content = f"/v1/streams/{session}/content"
    client.receive_until("chunk", chunk=3)
    with server.http() as http:
        for chunk in range(4, 7):
            indices, _ = decoded(http.get(content).content)
            assert indices == list(range(len(indices))) and len(indices) >= FIRST
            client.receive_until("chunk", chunk=chunk)
        client.send("stop")
        client.receive_until("end")
        wait_until(lambda: server.streams.num_live == 0)
        whole = http.get(content)
        assert http.get(content, headers={"Range": "bytes=-20"}).content == whole.content[-20:]


def test_a_prompt_is_shown_from_the_chunk_of_its_receipt(serve: Serve) -> None:
    client = serve().connect()
    client.start(lead_seconds=2)
    client.receive_until("chunk", chunk=1)
    client.send("set_prompt", prompt="a blue square spins", mode="cut")
    client.send("add_shot", prompt="a red square spins", mode="keep", chunk=7)
    *_, first = client.receive_until("receipt")
    *_, second = client.receive_until("receipt")
    assert first["action"] == "set_prompt" and first["mode"] == "cut" and first["prompt"] == "a blue square spins"
    assert 1 <= first["accepted_at"] < first["effective_at"] <= 5
    assert first["effective_seconds"] == pytest.approx((FIRST + (first["effective_at"] - 1) * LATER) / FPS)
    assert (second["action"], second["effective_at"], second["mode"]) == ("add_shot", 7, "keep")
    client.send("played", seconds=600)
    chunks = {c["chunk"]: c for c in client.receive_until("chunk", chunk=8) if c["type"] == "chunk"}
    blue = [index for index in chunks if chunks[index]["prompt"] == "a blue square spins"]
    assert blue == list(range(first["effective_at"], 7)) and chunks[blue[0]]["cut"]
    assert chunks[7]["prompt"] == "a red square spins" and not chunks[7]["cut"]


def test_no_chunk_begins_far_ahead_of_the_player(serve: Serve) -> None:
    client = serve().connect()
    client.start(lead_seconds=2)
    client.receive_until("chunk", chunk=1)  # ends at 2.5 s
    latest = 1
    for _ in range(3):  # the chunks in progress arrive, then nothing
        try:
            text = client.socket.recv(timeout=1)
        except TimeoutError:
            break
        client.socket.recv()
        latest = json.loads(text)["chunk"]
    assert latest <= 4
    client.send("played", seconds=4)
    assert client.receive_until("chunk")[-1]["chunk"] == latest + 1


def test_pause_stops_the_stream_and_resume_continues_it(serve: Serve) -> None:
    client = serve().connect()
    client.start()
    client.receive_until("chunk", chunk=0)
    client.send("pause")
    *before, paused = client.receive_until("state")
    assert paused["state"] == "paused"
    late = []
    with pytest.raises(TimeoutError):
        while True:
            text = client.socket.recv(timeout=1)
            late.append(json.loads(text)["chunk"])
            client.socket.recv()
    client.send("resume")
    *_, playing = client.receive_until("state")
    assert playing["state"] == "playing"
    latest = max([0, *late, *(c["chunk"] for c in before)])
    assert client.receive_until("chunk")[-1]["chunk"] == latest + 1 or latest == 0
    assert len(late) <= 6


def test_seek_replaces_later_chunks_in_the_file_too(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start(seconds=8, lead_seconds=4.5)["session"]
    client.receive_until("chunk", chunk=3)
    client.send("seek", chunk=2, prompt="a blue square spins", mode="cut")
    *_, receipt = client.receive_until("receipt")
    assert (receipt["action"], receipt["effective_at"]) == ("seek", 2)
    assert receipt["effective_seconds"] == pytest.approx((FIRST + LATER) / FPS)
    *_, again = client.receive_until("chunk", chunk=2)
    assert again["prompt"] == "a blue square spins" and again["start"] == receipt["effective_seconds"]
    client.send("played", seconds=600)
    *chunks, end = client.receive_until("end")
    assert [c["chunk"] for c in chunks if c["type"] == "chunk"] == [3, 4, 5, 6]
    assert end["frames"] == 192
    indices, _ = decoded((server.folder / "streams" / f"{session}.mp4").read_bytes())
    assert indices == list(range(192))


def test_streams_beyond_the_limit_are_refused_until_one_ends(serve: Serve) -> None:
    server = serve(limits=Limits(sessions=1))
    first = server.connect()
    first.start()
    second = server.connect()
    assert second.start()["code"] == "too_many_sessions"
    assert closed_with(second) == 1013
    first.socket.close()
    wait_until(lambda: server.streams.num_live == 0)
    assert server.connect().start()["type"] == "ready"


def test_clients_that_disconnect_at_any_moment_leave_no_threads(
    serve: Serve, caplog: pytest.LogCaptureFixture, pytestconfig: pytest.Config
) -> None:
    """--disconnects sets the number of clients."""
    num_clients = option_value(pytestconfig, "--disconnects")
    caplog.set_level(logging.INFO, "longvideo")
    server = serve(limits=Limits(sessions=num_clients))
    # one stream first, because threads of the event loop's pool remain
    client = server.connect()
    client.start()
    client.socket.close()
    wait_until(lambda: server.streams.num_live == 0)
    chance = random.Random(0)
    for _ in range(num_clients):
        client = server.connect()
        for _ in range(chance.randrange(4)):
            if client.init:
                client.receive()
            else:
                client.start()
        chance.choice([client.socket.close, partial(hang_up, client), partial(reset, client)])()
    wait_until(lambda: server.streams.num_live == 0)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert len([record for record in caplog.records if "disconnected" in record.getMessage()]) >= num_clients
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(("live-", "denoise", "decode"))])


def frame(**message: Any) -> bytes:
    """Return a text message of fewer than 126 bytes as a client's WebSocket frame, masked with zeros."""
    data = json.dumps(message).encode()
    return bytes([0x81, 0x80 | len(data)]) + bytes(4) + data


@contextmanager
def reader_of_nothing(server: RunningServer) -> Generator[socket.socket]:
    """Yield the connection of a stream whose client reads nothing and whose sender is blocked.

    When it is closed, it answers every packet with a reset.
    """
    host, _, port = server.address.partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + b"A" * 22 + b"==\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 101 ")
        connection.sendall(frame(type="start", prompt=PROMPT))
        streams = server.folder / "streams"
        wait_until(lambda: any(file.stat().st_size > 70_000 for file in streams.glob("*.mp4")))
        yield connection


@pytest.mark.parametrize("more", [b"", frame(type="sing") * 50], ids=["", "answers are queued"])
def test_a_client_that_disconnects_while_the_server_sends_is_one_line_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture, more: bytes
) -> None:
    """While answers are queued, no messages are read, so only the sender detects that the client has disconnected."""
    caplog.set_level(logging.INFO, "longvideo")
    server = serve(limits=Limits(waiting_messages=1), send_buffer=4096)
    with reader_of_nothing(server) as connection:
        connection.sendall(more)
    wait_until(lambda: server.streams.num_live == 0)
    wait_until(lambda: "disconnected" in caplog.text)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_stream_ends_if_its_client_receives_nothing(serve: Serve) -> None:
    server = serve(limits=Limits(receive_seconds=0.5), send_buffer=4096)
    client = server.connect_idle()
    session = client.start()["session"]
    wait_until(lambda: server.streams.num_live == 0)
    assert (server.folder / "streams" / f"{session}.safetensors").exists()
    client.socket.socket.shutdown(socket.SHUT_RDWR)


def test_segments_are_dropped_for_a_slow_client_but_not_in_the_file(serve: Serve) -> None:
    server = serve(limits=Limits(waiting_segments=1), send_buffer=4096)
    client = server.connect_idle()
    session = client.start(slow="drop", seconds=20)["session"]
    file = server.folder / "streams" / f"{session}.mp4"
    with server.http() as http:
        wait_until(lambda: "segments_dropped_total 0\n" not in http.get("/metrics").text)
    chunks = [c for c in client.receive_until("end") if c["type"] == "chunk"]
    assert chunks[-1]["dropped"] > 0
    indices, _ = decoded(file.read_bytes())
    assert indices == list(range(480))
    indices, _ = decoded(client.init + b"".join(client.segments))
    assert len(indices) < 480 and indices == sorted(set(indices))


@pytest.mark.filterwarnings("ignore:the model's vocabulary does not contain")
def test_unknown_words_are_named(serve: Serve) -> None:
    client = serve().connect()
    client.start("a red zeppelin bounces", seconds=2)
    *_, warning = client.receive_until("warning")
    assert "'zeppelin'" in warning["message"]


def test_a_stream_that_cannot_be_written_ends_and_the_server_does_not(serve: Serve) -> None:
    server = serve(limits=Limits(sessions=1))
    shutil.rmtree(server.folder / "streams")
    client = server.connect()
    error = client.start()
    assert error["code"] == "storage" and str(server.folder) not in error["message"]
    assert closed_with(client) == 1011
    (server.folder / "streams").mkdir()
    assert server.connect().start()["type"] == "ready"


def test_repeated_seeks_to_the_start_leave_a_complete_file(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start(seconds=6, lead_seconds=2)["session"]
    for chunk in (1, 0, 1, 0):
        client.receive_until("chunk", chunk=chunk)
        client.send("seek", chunk=0)
        *_, receipt = client.receive_until("receipt")
        assert (receipt["effective_at"], receipt["effective_seconds"], receipt["prompt"]) == (0, 0, None)
    client.send("played", seconds=600)
    *_, end = client.receive_until("end")
    assert end["frames"] == 144
    indices, _ = decoded((server.folder / "streams" / f"{session}.mp4").read_bytes())
    assert indices == list(range(144))


BAD = {
    "binary": b"\x00\x01",
    "no JSON": "hello",
    "an array": "[]",
    "no type": "{}",
    "unknown type": '{"type": "sing"}',
    "missing field": '{"type": "set_prompt"}',
    "extra field": '{"type": "pause", "x": 1}',
    "wrong type": '{"type": "set_prompt", "prompt": 5}',
    "text for a number": '{"type": "seek", "chunk": "3"}',
    "huge number": '{"type": "seek", "chunk": 1' + "0" * 400 + "}",
    "negative": '{"type": "seek", "chunk": -1}',
    "not a number": '{"type": "played", "seconds": NaN}',
    "infinite": '{"type": "played", "seconds": 1e999}',
    "deep": '{"type": ' + "[" * 5000 + "]" * 5000 + "}",
    "large": '{"type": "set_prompt", "prompt": "' + "a" * 70_000 + '"}',
    "half a surrogate pair": '{"type": "set_prompt", "prompt": "\\ud800"}',
    "second start": '{"type": "start", "prompt": "a red ball"}',
    "unknown mode": '{"type": "set_prompt", "prompt": "a red ball", "mode": "melt"}',
}


def test_a_negative_prompt_is_kept_until_another_one_is_sent(serve: Serve) -> None:
    client = serve().connect()
    ready = client.start(lead_seconds=0, guidance=2.5, negative_prompt="a square")
    assert ready["negative_prompt"] == "a square"
    client.send("set_prompt", prompt="a blue ball", mode="keep")
    receipt = client.receive_until("receipt")[-1]
    assert (receipt["prompt"], receipt["negative_prompt"]) == ("a blue ball", None)
    client.send("add_shot", prompt="a red ball", chunk=receipt["effective_at"] + 1, mode="keep", negative_prompt="")
    assert client.receive_until("receipt")[-1]["negative_prompt"] == ""
    client.send("played", seconds=600)
    messages = client.receive_until("chunk", chunk=receipt["effective_at"] + 1)
    texts = {(one["prompt"], one["negative_prompt"]) for one in messages if one["type"] == "chunk"}
    assert ("a blue ball", "a square") in texts and ("a red ball", "") in texts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "ball " * 40}, "the prompt has 41 tokens; expected at most 32"),
        ({"negative_prompt": "a square"}, "guidance is 1; set guidance above 1 (this model runs without it)"),
        ({"negative_prompt": "ball " * 40, "guidance": 2}, "the negative prompt has 41 tokens"),
    ],
)
def test_prompts_that_the_model_cannot_read_start_no_stream(fields: dict[str, Any], message: str, serve: Serve) -> None:
    client = serve().connect()
    client.send("start", **{"prompt": "a red ball", **fields})
    error = client.receive_until("error")[-1]
    assert error["code"] == "bad_prompt" and message in error["message"]
    assert closed_with(client) == 1008


def test_malformed_messages_are_answered_and_the_stream_continues(serve: Serve) -> None:
    client = serve().connect()
    client.start(lead_seconds=0)
    for text in BAD.values():
        for _ in range(20):
            client.socket.send(text)
            *_, error = client.receive_until("error")
            assert error["code"] == "bad_message" and len(error["message"]) < 500
    too_long, guided = "the prompt has 41 tokens; expected at most 32", "guidance is 1; set guidance above 1"
    for fields, message in (
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "ball " * 40}, too_long),
        ({"prompt": "a red ball", "negative_prompt": "a square"}, guided),
    ):
        client.send("set_prompt", **fields)
        error = client.receive_until("error")[-1]
        assert error["code"] == "bad_prompt" and message in error["message"]
    client.send("add_shot", chunk=900, prompt="ball " * 40)
    assert too_long in client.receive_until("error")[-1]["message"]
    client.send("seek", chunk=0, prompt="a red ball", negative_prompt="a square")
    assert guided in client.receive_until("error")[-1]["message"]
    client.send("seek", chunk=1000)
    assert client.receive_until("error")[-1]["code"] == "bad_chunk"
    client.send("add_shot", chunk=0, prompt="a red ball")
    assert client.receive_until("error")[-1]["code"] == "too_late"
    client.send("add_shot", chunk=999_999, prompt="a red ball")
    assert client.receive_until("error")[-1]["code"] == "bad_chunk"
    client.send("played", seconds=600)
    client.receive_until("chunk", chunk=4)


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "second start"])
def test_malformed_first_messages_close_the_connection(serve: Serve, kind: str) -> None:
    client = serve().connect()
    client.socket.send(BAD[kind])
    assert client.receive()["code"] == "bad_message"
    assert closed_with(client) == 1008


def test_a_client_that_sends_nothing_is_disconnected(serve: Serve) -> None:
    client = serve(limits=Limits(first_message_seconds=0.1)).connect()
    assert client.receive()["code"] == "bad_message"
    assert closed_with(client) == 1008


@pytest.mark.parametrize("fields", [{"steps": 0}, {"guidance": -1}, {"seed": -1}, {"seconds": 1e6}, {"slow": "never"}])
def test_options_out_of_range_are_refused(serve: Serve, fields: dict[str, Any]) -> None:
    client = serve().connect()
    assert client.start(**fields)["code"] == "bad_message"
