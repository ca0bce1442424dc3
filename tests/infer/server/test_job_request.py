"""Bodies of `POST /v1/videos` as JSON and as forms, with pictures, and the limits on them."""

from __future__ import annotations

import base64
import io
import json
import socket
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.limits import Limits
from longvideo.infer.writer import VideoWriter
from tests.infer.server.conftest import DEADLINE, PROMPT, Serve, wait_until
from tests.infer.server.test_jobs import LONG, OVER, create, wait_for

JSON_TYPE, FORM_TYPE = {"Content-Type": "application/json"}, {"Content-Type": "application/x-www-form-urlencoded"}
REFERENCE = "input_reference[image_url]"


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


GRADIENT = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 90)])
PICTURE = encoded(GRADIENT)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def video_of(http: httpx.Client, answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    assert wait_for(http, answer.json(), *OVER)["status"] == "completed"
    return http.get(f"/v1/videos/{answer.json()['id']}/content").content


def test_json_and_forms_create_the_same_job(serve: Serve) -> None:
    fields = {"model": "small", "prompt": PROMPT, "size": "64x32", "seed": "7", "steps": "3", "guidance": "1.5"}
    numbers = {"seed": 7, "steps": 3, "guidance": 1.5}
    with serve().http() as http:
        answers = [
            http.post("/v1/videos", json={**fields, **numbers, "seconds": 4}),
            http.post("/v1/videos", json={**fields, **numbers, "seconds": "4"}),
            http.post("/v1/videos", data={**fields, "seconds": "4"}),
            http.post("/v1/videos", files={name: (None, value) for name, value in {**fields, "seconds": "4"}.items()}),
        ]
        jobs = [answer.json() for answer in answers]
        own = ("id", "created_at", "status", "frames", "progress", "decoder", "adapters")
        shared = [{name: value for name, value in job.items() if name not in own} for job in jobs]
        assert shared == [shared[0]] * 4 and len({job["id"] for job in jobs}) == 4
        assert (shared[0]["seconds"], shared[0]["size"], shared[0]["seed"]) == ("4", "64x32", 7)
        files = {video_of(http, answer) for answer in answers}
        assert len(files) == 1


def test_shots_of_a_form_are_json(serve: Serve) -> None:
    shots = [{"prompt": PROMPT, "seconds": 2, "cut": True}, {"prompt": "a blue square", "seconds": 3, "cut": False}]
    shots = [{**shot, "negative_prompt": None} for shot in shots]
    with serve().http() as http:
        assert http.post("/v1/videos", data={"shots": json.dumps(shots)}).json()["shots"] == shots
        refused = http.post("/v1/videos", data={"shots[][prompt]": PROMPT})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "shots[][prompt]")


def test_a_picture_is_the_first_frame_in_every_form(serve: Serve, pipeline: StreamingPipeline) -> None:
    server = serve()
    picture = server.folder / "own.png"
    picture.write_bytes(PICTURE)
    chunks = pipeline.stream(PROMPT, seconds=1, seed=3, image=picture)
    with VideoWriter(server.folder / "own.mp4", fps=pipeline.fps) as writer:
        for frames in chunks:
            writer.write(frames)
    expected = (server.folder / "own.mp4").read_bytes()
    fields = {"prompt": PROMPT, "seconds": "1", "seed": "3"}
    reference = {"image_url": data_url(PICTURE)}
    with server.http() as http:
        assert video_of(http, http.post("/v1/videos", data=fields, files={"input_reference": PICTURE})) == expected
        assert video_of(http, http.post("/v1/videos", data={**fields, REFERENCE: data_url(PICTURE)})) == expected
        body = {"prompt": PROMPT, "seconds": 1, "seed": 3, "input_reference": reference}
        assert video_of(http, http.post("/v1/videos", json=body)) == expected
        assert video_of(http, http.post("/v1/videos", json={**body, "input_reference": None})) != expected


def test_a_picture_belongs_to_its_job(serve: Serve) -> None:
    server = serve()
    pictures = server.folder / "pictures"
    with server.http() as http:
        job = http.post("/v1/videos", data={"prompt": PROMPT, "seconds": "0.1"}, files={"input_reference": PICTURE})
        (file,) = pictures.iterdir()
        assert file.stem == job.json()["id"]
        with Image.open(file) as picture:
            assert picture.size == (64, 32)
        video_of(http, job)
        http.delete(f"/v1/videos/{job.json()['id']}")
        assert list(pictures.iterdir()) == []
        kept = http.post("/v1/videos", data={"prompt": PROMPT, "seconds": "0.1"}, files={"input_reference": PICTURE})
        video_of(http, kept)
    server.stop()
    (pictures / ("A" * 22 + ".png")).write_bytes(PICTURE)  # of a process that was killed before it stored the job
    with serve().http():
        assert [file.stem for file in pictures.iterdir()] == [kept.json()["id"]]


def test_a_refused_job_leaves_no_picture(serve: Serve) -> None:
    server = serve(limits=Limits(queued_jobs=1))
    with server.http() as http:
        wait_for(http, create(http, seconds=LONG), "in_progress")
        create(http)
        answer = http.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": PICTURE})
        assert answer.status_code == 429 and list((server.folder / "pictures").iterdir()) == []


HUGE = encoded(Image.new("1", (5001, 5000)))
ANIMATION = io.BytesIO()
Image.new("L", (8, 8)).save(ANIMATION, "WEBP", save_all=True, append_images=[Image.new("L", (8, 8), 255)])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"files": {"input_reference": b"no picture"}}, "input_reference is neither a picture nor a video in"),
        ({"files": {"input_reference": PICTURE[:-500]}}, "input_reference is a damaged image"),
        ({"files": {"input_reference": encoded(GRADIENT, "EPS")}}, "is neither a picture nor a video in"),
        ({"files": {"input_reference": encoded(GRADIENT, "GIF")}}, "is neither a picture nor a video in"),
        ({"files": {"input_reference": ANIMATION.getvalue()}}, "contains 2 pictures"),
        ({"files": {"input_reference": HUGE}}, "has 5001 x 5000 pixels; expected from 1 to 25,000,000"),
        ({"data": {"input_reference": "first.png"}}, "input_reference is text; expected a file"),
        ({"data": {REFERENCE: data_url(PICTURE)}, "files": {"input_reference": PICTURE}}, "a file and a data URL"),
        ({"data": {REFERENCE: "https://example.org/a.png"}}, "other addresses are not fetched"),
        ({"data": {REFERENCE: "file:///etc/passwd"}}, "other addresses are not fetched"),
        ({"data": {REFERENCE: "data:image/png;base64,AAA?"}}, "is not base64"),
        ({"data": {REFERENCE: "data:image/png;base64,"}}, "is neither a picture nor a video in"),
    ],
)
def test_a_bad_picture_is_one_clear_error(serve: Serve, body: dict[str, Any], message: str) -> None:
    server = serve()
    with server.http() as http:
        answer = http.post("/v1/videos", **{**body, "data": {"prompt": PROMPT, **body.get("data", {})}})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (422, "input_reference", "bad_request")
        assert message in error["message"] and "\n" not in error["message"] and len(error["message"]) < 300
        assert http.get("/v1/videos").json()["data"] == []
    assert list((server.folder / "pictures").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "headers", "status", "param", "message"),
    [
        (b"prompt=a&prompt=b", FORM_TYPE, 422, "prompt", "has 'prompt' more than once"),
        (b"prompt=a&num_frames=33", FORM_TYPE, 422, "num_frames", "'num_frames' is not a field; the fields are model"),
        (b"prompt=a&seed=x", FORM_TYPE, 422, "seed", "seed: Input should be a valid integer"),
        (b"prompt=a&seconds=four", FORM_TYPE, 422, "seconds", "seconds: Input should be a valid number"),
        (b"prompt=a&seconds=nan", FORM_TYPE, 422, "seconds", "seconds: Input should be"),
        (b"prompt=a&seconds=0", FORM_TYPE, 422, "seconds", "seconds: Input should be greater than 0"),
        (b"prompt=a&size=32x64", FORM_TYPE, 422, "size", "size is '32x64'; this model generates 64x32"),
        (b"seconds=4", FORM_TYPE, 422, "prompt", "prompt: Field required"),
        (b"shots=[", FORM_TYPE, 422, None, "shots is not JSON"),
        (b'{"prompt": "a"}', FORM_TYPE, 422, None, "the body is JSON, but its Content-Type is that of a form"),
        (b'{"prompt": "a", "seed": "7"}', JSON_TYPE, 422, "seed", "seed: Input should be a valid integer"),
        (b'{"prompt": "a", "seconds": "4s"}', JSON_TYPE, 422, "seconds", "seconds: Input should be a valid number"),
        (b'"a"', JSON_TYPE, 422, None, "the body is 'a'; expected an object"),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415, None, "the header Content-Type is 'text/plain'"),
        (b'{"prompt": "a"}', {}, 415, None, "the header Content-Type is ''; expected application/json"),
        (b"--x", {"Content-Type": "multipart/form-data"}, 400, None, "boundary"),
        (b"--x", {"Content-Type": "multipart/form-data; boundary=y"}, 400, None, ""),
    ],
)  # fmt: skip
def test_a_bad_body_is_one_clear_error(
    serve: Serve, content: bytes, headers: dict[str, str], status: int, param: str | None, message: str
) -> None:
    with serve().http() as http:
        answer = http.post("/v1/videos", content=content, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param)
        assert message in error["message"] and len(error["message"]) < 300


def test_only_the_picture_may_be_a_file(serve: Serve) -> None:
    with serve().http() as http:
        answer = http.post("/v1/videos", files={"prompt": b"a", "input_reference": (None, "x")})
        assert answer.json()["error"]["message"] == "'prompt' is a file; only input_reference may be one"
        files = [("input_reference", PICTURE), ("input_reference", PICTURE)]
        assert http.post("/v1/videos", data={"prompt": PROMPT}, files=files).status_code == 400


def test_uploads_have_their_own_limits(serve: Serve) -> None:
    server = serve(limits=Limits(upload_bytes=200_000, parallel_uploads=1))
    noise = np.random.default_rng(0).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    large, small = encoded(Image.fromarray(noise)), encoded(GRADIENT)
    assert len(large) > 100_000 and len(small) < 30_000
    host, _, port = server.address.partition(":")
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with server.http() as http:

        def status(picture: bytes) -> int:
            body = {"prompt": PROMPT, "seconds": "0.1"}
            return http.post("/v1/videos", data=body, files={"input_reference": picture}).status_code

        assert status(large) == 200
        with socket.create_connection((host, int(port)), timeout=DEADLINE) as unfinished:
            unfinished.sendall(head + b"Content-Length: 150000\r\nExpect: 100-continue\r\n\r\n")
            assert unfinished.recv(1000).startswith(b"HTTP/1.1 100 ")  # the server waits for the body
            assert status(large) == 503
            assert status(small) == 200
        wait_until(lambda: status(large) == 200)
        assert status(bytes(200_000)) == 413
        too_large = http.post("/v1/videos/" + "A" * 22 + "/remix", json={"prompt": "a" * 70_000})
        assert too_large.status_code == 413
