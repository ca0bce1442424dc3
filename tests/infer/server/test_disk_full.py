"""A disk that takes nothing more, while jobs and streams are made: errors with their reason, and then as before."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from longvideo.errors import UserError
from longvideo.infer.server.job_store import JobStore
from tests.infer.server.conftest import PROMPT, Client, serve_process, wait_until
from tests.infer.server.test_jobs import LONG, job_now, make, num_frames, wait_for
from tests.infer.server.test_stream import closed_with, decoded

FULL = 512  # bytes that any file may have: less than those that grow have already

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits files of another process (Linux)")


def fill_disk(process: subprocess.Popen[str]) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))


def make_room(process: subprocess.Popen[str]) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def stream(http: httpx.Client) -> Iterator[Client]:
    address = str(http.base_url).replace("http", "ws").rstrip("/") + "/v1/stream"
    with connect(address, max_size=None, compression=None) as socket:
        yield Client(socket)


def test_a_job_fails_with_its_reason_and_the_server_recovers(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        done, running, queued = make(http, seconds=1), make(http, seconds=LONG), make(http, seconds=1)
        wait_until(lambda: job_now(http, running)["frames"] > 100)
        fill_disk(process)
        failed = wait_for(http, running, "failed")
        assert failed["error"]["code"] == "failed" and "cannot write" in failed["error"]["message"]
        assert failed["completed_at"] is not None
        assert wait_for(http, queued, "failed")["error"]["message"].startswith("cannot write")
        refused = http.post("/v1/videos", json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        assert http.post(f"/v1/videos/{running['id']}/cancel").json()["status"] == "failed"
        assert http.delete(f"/v1/videos/{done['id']}").status_code in (200, 507)
        statuses = [job["status"] for job in http.get("/v1/videos").json()["data"]]
        assert statuses.count("failed") == 2 and len(statuses) in (2, 3)
        assert 'longvideo_jobs{status="failed"} 2' in http.get("/metrics").text
        assert http.get("/healthz").status_code == 200

        make_room(process)
        again = make(http, seconds=1)
        assert wait_for(http, again, "completed", "failed")["status"] == "completed"
        assert num_frames(http.get(f"/v1/videos/{again['id']}/content").content) == 24
        assert http.delete(f"/v1/videos/{done['id']}").status_code in (200, 404)
        made = http.get(f"/v1/videos/{running['id']}/content").content
        assert num_frames(made) == failed["frames"] > 100  # what was made before is not lost
        assert http.get(f"/v1/videos/{queued['id']}/content").status_code == 409
        assert {path.stem for path in (tmp_path / "served" / "videos").iterdir()} == {again["id"], running["id"]}
        with sqlite3.connect(f"file:{tmp_path}/served/jobs.sqlite?mode=ro", uri=True) as stored:
            assert dict(stored.execute("SELECT id, status FROM jobs")) == {
                running["id"]: "failed",
                queued["id"]: "failed",
                again["id"]: "completed",
            }


def test_a_job_is_cancelled_on_a_full_disk(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        running, queued = make(http, seconds=LONG), make(http, seconds=1)
        wait_until(lambda: job_now(http, running)["status"] == "in_progress")
        fill_disk(process)
        assert http.post(f"/v1/videos/{queued['id']}/cancel").json()["status"] == "cancelled"
        assert wait_for(http, running, "failed")["status"] == "failed"
        make_room(process)
        assert job_now(http, queued)["status"] == "cancelled"
        assert wait_for(http, make(http, seconds=1), "completed", "failed")["status"] == "completed"


def test_a_stream_ends_with_its_reason_and_is_continued_when_there_is_room(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        with stream(http) as client:
            session = client.start(seconds=20, lead_seconds=4)["session"]
            client.hear_until("chunk", chunk=2)
            fill_disk(process)
            client.say("played", seconds=600)
            *chunks, error = client.hear_until("error")
            assert error["code"] == "storage" and closed_with(client) == 1011
        with stream(http) as client:
            assert client.start(seconds=1)["code"] == "storage"
            assert closed_with(client) == 1011
        file = tmp_path / "served" / "streams" / f"{session}.mp4"
        frames = len(decoded(file.read_bytes())[0])
        assert frames == round((chunks[-1]["start"]) * 24) + chunks[-1]["frames"] if chunks else frames >= 61
        assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half written
        make_room(process)
        with stream(http) as client:
            assert client.start(seconds=1)["type"] == "ready"
            client.hear_until("end")
        process.terminate()
        _, log = process.communicate()
    assert "cannot write" in log and "Traceback" not in log


def test_a_stream_whose_snapshot_fits_is_continued_where_the_disk_was_full(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        with stream(http) as client:
            session = client.start(seconds=60, seed=3)["session"]
            client.hear_until("chunk", chunk=12)
            video = tmp_path / "served" / "streams" / f"{session}.mp4"
            # the snapshot is smaller than that
            limit = video.stat().st_size + 1000
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            assert client.hear_until("error")[-1]["code"] == "storage"
        made = len(decoded(video.read_bytes())[0])
        make_room(process)
        with stream(http) as client:
            client.say("continue", session=session)
            assert client.hear()["type"] == "ready"
            chunks = client.hear_until("end")
            assert round(chunks[0]["start"] * 24) == made and chunks[-1]["frames"] == 1440
        indices, _ = decoded(video.read_bytes())
        assert indices == list(range(1440))


def test_a_server_that_cannot_keep_jobs_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"no database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match=r"cannot open the list of jobs .*jobs.sqlite: file is not a database"):
        JobStore(tmp_path / "jobs.sqlite")
