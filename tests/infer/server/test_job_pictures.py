"""Thumbnails and sprite sheets of videos, and remixes with the settings of a video."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvideo.errors import UserError
from longvideo.infer.server.job_pictures import sprite_sheet, thumbnail
from longvideo.infer.writer import VideoWriter
from tests.infer.server.conftest import PROMPT, Serve, decoded
from tests.infer.server.test_job_request import PICTURE, video_of
from tests.infer.server.test_jobs import LONG, OVER, create, job_now, wait_for

HEIGHT, WIDTH, PART = 32, 48, 6  # PART: frames of each part of the file


def pixels(data: bytes, kind: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == kind
        return np.asarray(picture.convert("RGB")).astype(int)


def write_video(path: Path, num_parts: int) -> np.ndarray:
    """Write a video whose part number `n` has the gray value 15 + 12 n; return the gray values."""
    grays = np.arange(num_parts) * 12 + 15
    with VideoWriter(path, fps=24) as writer:
        for gray in grays:
            writer.write(np.full((PART, HEIGHT, WIDTH, 3), gray, np.uint8))
    return grays


def test_a_thumbnail_is_the_first_frame(serve: Serve) -> None:
    with serve().http() as http:
        job = create(http, seconds=0.5)
        wait_for(http, job, "completed")
        content = f"/v1/videos/{job['id']}/content"
        _, frames = decoded(http.get(content).content)
        answer = http.get(content, params={"variant": "thumbnail"})
        assert answer.headers["content-type"] == "image/webp"
        difference = np.abs(pixels(answer.content, "WEBP") - frames[0])
        assert difference.mean() < 6 < np.abs(frames[0].astype(int) - frames[0].mean()).mean()
        assert http.get(content, params={"variant": "video"}).content == http.get(content).content
        sheet = http.get(content, params={"variant": "spritesheet"})
        assert sheet.headers["content-type"] == "image/jpeg"
        for unknown in ("poster", "", "THUMBNAIL"):
            refused = http.get(content, params={"variant": unknown})
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, "variant")


@pytest.mark.parametrize(("num_parts", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (6, 2, 4), (16, 4, 4)])
def test_a_sheet_has_the_first_frame_of_each_part(tmp_path: Path, num_parts: int, rows: int, columns: int) -> None:
    grays = write_video(tmp_path / "video.mp4", num_parts)
    sheet = pixels(sprite_sheet(tmp_path / "video.mp4"), "JPEG")
    assert sheet.shape == (rows * HEIGHT, columns * WIDTH, 3)
    tiles = sheet.reshape(rows, HEIGHT, columns, WIDTH, 3).mean((1, 3, 4)).ravel()
    assert np.abs(tiles[:num_parts] - grays).max() < 4 and np.all(tiles[num_parts:] < 4)


def test_the_frames_of_a_long_video_are_evenly_chosen(tmp_path: Path) -> None:
    grays = write_video(tmp_path / "video.mp4", 20)
    sheet = pixels(sprite_sheet(tmp_path / "video.mp4"), "JPEG")
    tiles = sheet.reshape(4, HEIGHT, 4, WIDTH, 3).mean((1, 3, 4)).ravel()
    assert np.abs(tiles - grays[np.arange(16) * 20 // 16]).max() < 4


def test_large_frames_are_scaled(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "video.mp4", fps=24) as writer:
        writer.write(np.full((2, 360, 640, 3), 128, np.uint8))
    assert pixels(sprite_sheet(tmp_path / "video.mp4"), "JPEG").shape == (180, 320, 3)
    assert pixels(thumbnail(tmp_path / "video.mp4"), "WEBP").shape == (360, 640, 3)


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_a_file_without_frames_has_no_pictures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "video.mp4").write_bytes(content)
    for make in (thumbnail, sprite_sheet):
        with pytest.raises(UserError, match="no frame of the video can be decoded"):
            make(tmp_path / "video.mp4")


def test_a_job_without_a_file_has_no_thumbnail(serve: Serve) -> None:
    with serve().http() as http:
        job = create(http, seconds=LONG)
        assert http.get(f"/v1/videos/{job['id']}/content", params={"variant": "thumbnail"}).status_code == 409


def test_a_remix_repeats_the_settings_with_another_prompt(serve: Serve) -> None:
    form = {"prompt": PROMPT, "seconds": "0.5", "seed": "5", "steps": "3", "guidance": "2"}
    with serve().http() as http:
        created = http.post("/v1/videos", data=form, files={"input_reference": PICTURE})
        video, source = video_of(http, created), created.json()
        assert source["remixed_from_video_id"] is None
        same = http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": PROMPT})
        other = http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a blue square spins"})
        assert http.delete(f"/v1/videos/{source['id']}").status_code == 200  # remixes have files of their own
        assert video_of(http, same) == video != video_of(http, other)
        for answer in (same, other):
            job = job_now(http, answer.json())
            assert job["remixed_from_video_id"] == source["id"] and (job["seed"], job["seconds"]) == (5, "0.5")
        assert job["prompt"] == "a blue square spins"


def test_a_remix_of_several_shots_has_one_of_their_length(serve: Serve) -> None:
    shots = [{"prompt": PROMPT, "seconds": 2}, {"prompt": "a blue square spins", "seconds": 3}]
    with serve().http() as http:
        source = http.post("/v1/videos", json={"shots": shots}).json()
        remix = http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a star"}).json()
        assert remix["shots"] == [{"prompt": "a star", "seconds": 5, "cut": True, "negative_prompt": None}]
        assert wait_for(http, remix, *OVER)["frames"] == 120


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": "a", "seed": 3}, {"prompt": "a " * 600}])
def test_a_bad_remix_is_refused(serve: Serve, body: dict[str, str]) -> None:
    with serve().http() as http:
        source = create(http, seconds=0.1)
        assert http.post(f"/v1/videos/{source['id']}/remix", json=body).status_code == 422
        assert http.post("/v1/videos/" + "A" * 22 + "/remix", json={"prompt": "a"}).status_code == 404


def test_the_served_model_is_listed(serve: Serve) -> None:
    with serve().http() as http:
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("small", "model", "longvideo")
        assert http.get("/v1/models/small").json() == model
        assert http.get("/v1/models/other").status_code == 404
