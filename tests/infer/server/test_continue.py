"""Streams that continue from their snapshots after a lost connection or a restart."""

from __future__ import annotations

import json
import socket
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longvideo.infer.server.limits import Limits
from tests.infer.server.conftest import PROMPT, Serve, closed_with, decoded, wait_until


def test_a_continued_stream_equals_an_uninterrupted_one(serve: Serve) -> None:
    server = serve(limits=Limits(sessions=1))
    whole = server.connect()
    reference = whole.start(seconds=8, seed=5)["session"]
    whole.receive_until("end")
    lost = server.connect()
    session = lost.start(seconds=8, seed=5)["session"]
    lost.receive_until("chunk", chunk=2)
    lost.socket.socket.shutdown(socket.SHUT_RDWR)
    again = server.connect()
    again.send("continue", session=session)
    ready = again.receive()
    assert (ready["type"], ready["session"], ready["prompt"], ready["seconds"]) == ("ready", session, PROMPT, 8)
    assert again.init == lost.init
    *chunks, end = again.receive_until("end")
    assert end["frames"] == 192 and chunks[0]["chunk"] >= 3
    indices, frames = decoded((server.folder / "streams" / f"{session}.mp4").read_bytes())
    assert indices == list(range(192))
    _, expected = decoded((server.folder / "streams" / f"{reference}.mp4").read_bytes())
    assert np.abs(frames.astype(int) - expected).mean() < 4


def test_continue_ends_the_previous_connection(serve: Serve) -> None:
    server = serve(limits=Limits(sessions=1))
    old = server.connect()
    session = old.start(seconds=8)["session"]
    old.receive_until("chunk", chunk=1)
    new = server.connect()
    new.send("continue", session=session)
    assert new.receive()["type"] == "ready"
    assert new.receive_until("end")[-1]["frames"] == 192
    assert closed_with(old) == 1000
    assert decoded((server.folder / "streams" / f"{session}.mp4").read_bytes())[0] == list(range(192))


def test_continue_works_after_a_restart_and_not_for_unknown_streams(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start(seconds=6)["session"]
    client.receive_until("chunk", chunk=0)
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    *_, error = client.receive_until("error")
    assert error["code"] == "shutting_down"
    assert closed_with(client) == 1012
    stopper.join()
    later = serve()
    for name in ("A" * 22, session[:-1] + "?", "../" + session[:19]):
        other = later.connect()
        other.send("continue", session=name)
        assert other.receive()["code"] in ("not_found", "bad_message")
        assert closed_with(other) == 1008
    again = later.connect()
    again.send("continue", session=session)
    assert again.receive()["type"] == "ready"
    *_, end = again.receive_until("end")
    assert end["frames"] == 144
    assert decoded((later.folder / "streams" / f"{session}.mp4").read_bytes())[0] == list(range(144))


@pytest.mark.filterwarnings("ignore:the frames so far were decoded by")
def test_a_stream_that_continues_with_another_decoder_says_so(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start(seconds=6)["session"]
    client.receive_until("chunk", chunk=0)
    server.stop()
    path = server.folder / "streams" / f"{session}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    other = metadata["session"].replace("the autoencoder in fp32", "TAEW2.2 in bf16")
    save_file(load_file(path), path, metadata={**metadata, "session": other})
    again = serve().connect()
    again.send("continue", session=session)
    assert again.receive()["type"] == "ready"
    message = "the frames so far were decoded by 'TAEW2.2 in bf16'; the session continues with the autoencoder in fp32"
    assert again.receive() == {"type": "warning", "message": message}


def test_a_stream_whose_frames_are_all_generated_ends_with_their_number(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start(seconds=6)["session"]
    client.receive_until("chunk", chunk=1)
    client.socket.close()
    wait_until(lambda: server.streams.num_live == 0)
    path = server.folder / "streams" / f"{session}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["session"])
    chunks = len(state["steps"])
    state["num_frames"] = sum(step["num_frames"] for step in state["steps"])
    save_file(load_file(path), path, metadata={**metadata, "session": json.dumps(state)})
    again = server.connect()
    again.send("continue", session=session)
    end = again.receive_until("end")[-1]
    assert (end["chunks"], end["frames"]) == (chunks, state["num_frames"]) and chunks >= 2


def test_a_stopped_stream_ends_and_is_not_continued(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start()["session"]
    client.receive_until("chunk", chunk=0)
    client.send("stop")
    *_, end = client.receive_until("end")
    assert end["frames"] >= 1 and closed_with(client) == 1000
    again = server.connect()
    again.send("continue", session=session)
    assert again.receive()["code"] == "not_found"


def test_a_damaged_snapshot_is_not_continued(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    session = client.start()["session"]
    client.receive_until("chunk", chunk=1)
    client.socket.close()
    wait_until(lambda: server.streams.num_live == 0)
    (server.folder / "streams" / f"{session}.safetensors").write_bytes(b"nothing")
    again = server.connect()
    again.send("continue", session=session)
    assert again.receive()["code"] == "not_found"
    assert closed_with(again) == 1008


def test_old_snapshots_are_deleted(serve: Serve) -> None:
    server = serve(limits=Limits(snapshots=2))
    for _ in range(4):
        client = server.connect()
        client.start()
        client.receive_until("chunk", chunk=0)
        client.socket.close()
        wait_until(lambda: server.streams.num_live == 0)
    suffixes = [path.suffix for path in (server.folder / "streams").iterdir()]
    assert sorted(suffixes) == [".json"] * 2 + [".mp4"] * 4 + [".safetensors"] * 2
