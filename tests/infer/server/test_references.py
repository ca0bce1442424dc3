"""Live streams that begin with a picture, or continue a video, which the client uploaded."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from longvideo.infer.encode import FrameEncoder
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.limits import Limits
from tests.data.footage import write
from tests.infer.server.conftest import FPS, PROMPT, RunningServer, Serve, closed_with, decoded
from tests.infer.server.test_job_request import PICTURE

LATER = 32
UNKNOWN = "A" * 22

pytestmark = pytest.mark.filterwarnings("ignore:the (picture|video) comes back from the model's autoencoder")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of two chunks, 29 and 32 frames, and 9 frames that are not used."""
    return write(tmp_path_factory.mktemp("footage") / "clip.mp4", 70).video


def upload(http: httpx.Client, content: bytes) -> dict[str, Any]:
    answer = http.post("/v1/references", content=content)
    assert answer.status_code == 200, answer.text
    return answer.json()


def upload_id(server: RunningServer, content: bytes) -> str:
    with server.http() as http:
        return upload(http, content)["id"]


def brightness(frames: np.ndarray) -> np.ndarray:
    """Return the brightness of frames. The random model generates noise, whose colors are averaged by 4:2:0."""
    return frames.astype(float) @ (0.2126, 0.7152, 0.0722)


def file_of(server: RunningServer, session: str) -> tuple[list[int], np.ndarray]:
    return decoded((server.folder / "streams" / f"{session}.mp4").read_bytes())


def test_a_stream_begins_with_a_picture(serve: Serve, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    server = serve()
    picture = tmp_path / "picture.png"
    picture.write_bytes(PICTURE)
    with server.http() as http:
        reference = upload(http, PICTURE)
    assert (reference["object"], reference["kind"]) == ("reference", "picture")
    client = server.connect()
    ready = client.start(seconds=2, seed=3, input_reference=reference["id"])
    assert (ready["first_chunk"], ready["first_chunk_frames"], ready["chunk_frames"]) == (0, 29, LATER)
    messages = client.receive_until("end")
    assert messages[-1]["chunks"] == 2 and messages[-1]["frames"] == 48
    assert "the picture comes back from the model's autoencoder" in messages[0]["message"]
    generated = np.concatenate(list(pipeline.stream(PROMPT, seconds=2, seed=3, image=picture)))
    indices, frames = file_of(server, ready["session"])
    assert indices == list(range(48))
    assert np.abs(brightness(frames) - brightness(generated)).mean() < 6


def test_a_stream_continues_a_video_after_its_chunks(serve: Serve, pipeline: StreamingPipeline, clip: Path) -> None:
    server = serve()
    with server.http() as http:
        reference = upload(http, clip.read_bytes())
    assert reference["kind"] == "video"
    client = server.connect()
    ready = client.start(seconds=3, seed=3, input_reference=reference["id"])
    assert (ready["first_chunk"], ready["first_chunk_frames"], ready["seconds"]) == (2, LATER, 3)
    *messages, end = client.receive_until("end")
    chunks = [(c["chunk"], c["start"] * FPS, c["frames"]) for c in messages if c["type"] == "chunk"]
    assert chunks == [(2, 0, 32), (3, 32, 32), (4, 64, 8)]
    assert (end["chunks"], end["frames"], end["seconds"]) == (3, 72, 3)
    generated = np.concatenate(list(pipeline.stream(PROMPT, seconds=3, seed=3, video=clip)))
    indices, frames = file_of(server, ready["session"])
    assert indices == list(range(72))
    assert np.abs(brightness(frames) - brightness(generated)).mean() < 6


def test_a_continued_video_is_steered_by_the_numbers_of_its_chunks(serve: Serve, clip: Path) -> None:
    server = serve()
    client = server.connect()
    reference = upload_id(server, clip.read_bytes())
    session = client.start(seconds=8, lead_seconds=4, input_reference=reference)["session"]
    client.receive_until("chunk", chunk=4)
    client.send("seek", chunk=1)
    error = client.receive_until("error")[-1]
    assert error["code"] == "bad_chunk" and "chunk 1 is footage; use 2 or a later one" in error["message"]
    client.send("add_shot", chunk=0, prompt="a blue square spins")
    assert client.receive_until("error")[-1]["code"] == "too_late"
    client.send("add_shot", chunk=8, prompt="a blue square spins")
    assert client.receive_until("error")[-1]["code"] == "bad_chunk"  # 6 chunks of 32 frames are 192
    client.send("seek", chunk=3, prompt="a blue square spins")
    receipt = client.receive_until("receipt")[-1]
    assert (receipt["effective_at"], receipt["effective_seconds"] * FPS) == (3, LATER)
    again = client.receive_until("chunk", chunk=3)[-1]
    assert again["start"] * FPS == LATER and again["prompt"] == "a blue square spins"
    client.send("played", seconds=600)
    assert client.receive_until("end")[-1]["chunks"] == 6
    assert file_of(server, session)[0] == list(range(192))


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_a_lost_stream_continues_without_its_reference(serve: Serve, clip: Path, kind: str) -> None:
    server = serve()
    reference = upload_id(server, PICTURE if kind == "picture" else clip.read_bytes())
    whole, lost = server.connect(), server.connect()
    expected = whole.start(seconds=6, seed=5, input_reference=reference)["session"]
    whole.receive_until("end")
    begun = lost.start(seconds=6, seed=5, input_reference=reference)
    lost.receive_until("chunk", chunk=begun["first_chunk"] + 1)
    lost.socket.socket.shutdown(socket.SHUT_RDWR)
    for file in (server.folder / "references").iterdir():
        file.unlink()
    again = server.connect()
    again.send("continue", session=begun["session"])
    assert again.receive() == begun
    assert again.receive_until("end")[-1]["frames"] == 144
    indices, frames = file_of(server, begun["session"])
    assert indices == list(range(144))
    assert np.abs(frames.astype(int) - file_of(server, expected)[1]).mean() < 4


def test_the_newest_references_are_kept_and_can_be_used_twice(serve: Serve) -> None:
    server = serve(limits=Limits(references=2))
    with server.http() as http:
        first, *kept = (upload(http, PICTURE)["id"] for _ in range(3))
    assert {file.stem for file in (server.folder / "references").iterdir()} == set(kept)
    for name in (kept[0], kept[0]):
        client = server.connect()
        assert client.start(seconds=0.5, input_reference=name)["type"] == "ready"
        client.receive_until("end")
    for name in (first, UNKNOWN):
        client = server.connect()
        error = client.start(input_reference=name)
        assert error["code"] == "bad_reference" and "upload it again" in error["message"]
        assert closed_with(client) == 1008
    for name in ("../streams/" + "A" * 11, "picture.png", ""):
        assert server.connect().start(input_reference=name)["code"] == "bad_message"


def test_a_bad_file_is_one_clear_error_and_is_not_kept(serve: Serve, clip: Path, tmp_path: Path) -> None:
    server = serve(limits=Limits(footage_seconds=2.9))
    short, long = (write(tmp_path / "videos" / f"{count}.mp4", count).video.read_bytes() for count in (20, 72))
    cases = {
        b"": "the file is neither a picture nor a video in a supported format; expected JPEG",
        b"ID3\x04 music": "the file is neither a picture nor a video",
        PICTURE[:-500]: "the file is a damaged image",
        short: "the file has 20 frames at 24 per second, 0.83 s; expected one chunk",
        long: "the file has 3.0 s; expected at most 2.9",
        clip.read_bytes()[:40]: "the file is not a video in a supported format",
    }
    with server.http() as http:
        for content, message in cases.items():
            answer = http.post("/v1/references", content=content)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (422, "bad_request")
            assert message in error["message"] and "\n" not in error["message"]
            assert str(server.folder) not in error["message"]
    assert list((server.folder / "references").iterdir()) == []


def test_a_reference_may_be_as_large_as_an_upload(serve: Serve) -> None:
    server = serve(limits=Limits(upload_bytes=200_000))
    with server.http() as http:
        assert http.post("/v1/references", content=PICTURE + bytes(150_000)).status_code == 200
        refused = http.post("/v1/references", content=PICTURE + bytes(200_000))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")


def test_a_model_without_an_encoder_takes_no_references(
    serve: Serve, pipeline: StreamingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Any:
        raise AssertionError("the encoder is loaded")

    models = replace(pipeline.models, encoder=FrameEncoder(load, exists=False))
    monkeypatch.setattr(pipeline, "stages", type(pipeline.stages)(models))
    with serve().http() as http:
        assert http.get("/v1/server").json()["takes_references"] is False
        message = "cannot be used: the model has no encoder of pictures and videos"
        error = http.post("/v1/references", content=PICTURE).json()["error"]
        assert f"the file {message}" in error["message"]
        job = http.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": PICTURE})
        assert job.status_code == 422 and f"input_reference {message}" in job.json()["error"]["message"]
