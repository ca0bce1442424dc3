"""Jobs that continue a video which the client sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.limits import Limits
from longvideo.infer.server.reference_files import begins_as_video
from longvideo.infer.writer import VideoWriter
from tests.data.footage import write
from tests.infer.server.conftest import PROMPT, Serve
from tests.infer.server.test_job_request import PICTURE, data_url, video_of
from tests.infer.server.test_jobs import OVER, create, wait_for

FIELDS = {"prompt": PROMPT, "seconds": "1", "seed": "3"}

pytestmark = pytest.mark.filterwarnings("ignore:the video comes back from the model's autoencoder")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("footage") / "clip.mp4", 70).video


def test_a_video_is_continued_in_every_form(serve: Serve, pipeline: StreamingPipeline, clip: Path) -> None:
    server = serve()
    with VideoWriter(server.folder / "own.mp4", fps=pipeline.fps) as writer:
        for frames in pipeline.stream(PROMPT, seconds=1, seed=3, video=clip):
            writer.write(frames)
    expected, content = (server.folder / "own.mp4").read_bytes(), clip.read_bytes()
    url = data_url(content).replace("image/png", "video/mp4")
    with server.http() as http:
        form = http.post("/v1/videos", data=FIELDS, files={"input_reference": ("clip.mp4", content, "video/mp4")})
        assert video_of(http, form) == expected
        assert video_of(http, http.post("/v1/videos", data=FIELDS, files={"input_reference": content})) == expected
        body = {"prompt": PROMPT, "seconds": 1, "seed": 3, "input_reference": {"image_url": url}}
        assert video_of(http, http.post("/v1/videos", json=body)) == expected
        remix = http.post(f"/v1/videos/{form.json()['id']}/remix", json={"prompt": PROMPT})
        assert video_of(http, remix) == expected
        footage = server.folder / "footage"
        assert len(list(footage.iterdir())) == 4 and form.json()["frames"] == 0
        assert http.delete(f"/v1/videos/{form.json()['id']}").status_code == 200
        assert len(list(footage.iterdir())) == 3


def test_footage_survives_a_restart_and_leftovers_are_deleted(serve: Serve, clip: Path) -> None:
    server = serve()
    with server.http() as http:
        long = create(http, seconds=200)
        waiting = http.post("/v1/videos", data=FIELDS, files={"input_reference": clip.read_bytes()}).json()
        wait_for(http, long, "in_progress")
    server.stop()
    footage = server.folder / "footage"
    (footage / ("A" * 22 + ".video")).write_bytes(b"")  # of a process that was killed before it stored the job
    with serve().http() as http:
        assert wait_for(http, waiting, *OVER)["status"] == "completed"
    assert [path.stem for path in footage.iterdir()] == [waiting["id"]]


def test_a_bad_video_is_one_clear_error(serve: Serve, clip: Path, tmp_path: Path) -> None:
    server = serve(limits=Limits(footage_seconds=2.9))
    content = clip.read_bytes()
    short, long = (write(tmp_path / "videos" / f"{count}.mp4", count).video.read_bytes() for count in (20, 72))
    cases = {
        short: "input_reference has 20 frames at 24 per second, 0.83 s; expected one chunk",
        long: "input_reference has 3.0 s; expected at most 2.9",
        content[:40]: "input_reference is not a video in a supported format",
        content[:-100]: "input_reference",
        b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n": "input_reference is neither a picture nor a video in a supported",
    }
    with server.http() as http:
        for data, message in cases.items():
            answer = http.post("/v1/videos", data=FIELDS, files={"input_reference": data})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (422, "input_reference", "bad_request")
            assert message in error["message"] and "\n" not in error["message"]
            assert str(server.folder) not in error["message"]
        assert http.get("/v1/videos").json()["data"] == []
    assert list((server.folder / "footage").iterdir()) == []


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"\0\0\0\x20ftypisom", True),
        (b"\0\0\0\x14ftypqt  ", True),
        (b"\x1a\x45\xdf\xa3\x01", True),
        (b"\0\0\0\x20ftypavif", False),
        (PICTURE, False),
        (b"#EXTM3U", False),
        (b"ffconcat version 1.0", False),
        (b"", False),
    ],
)
def test_videos_are_recognized_by_their_first_bytes(start: bytes, expected: bool) -> None:
    assert begins_as_video(start) is expected
