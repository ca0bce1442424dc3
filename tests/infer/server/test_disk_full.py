"""A full disk while jobs and streams run: errors name the reason, and the server recovers when there is space."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from longvideo.errors import UserError
from longvideo.infer.server.job_store import JobStore
from tests.infer.server.conftest import PROMPT, Client, serve_process, wait_until
from tests.infer.server.test_jobs import LONG, create, job_now, num_frames, wait_for
from tests.infer.server.test_stream import closed_with, decoded

FULL = 512  # size limit of all files, in bytes: less than the growing files have already

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit (Linux)")


def fill_disk(process: subprocess.Popen[str]) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))


def free_disk(process: subprocess.Popen[str]) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def stream(http: httpx.Client) -> Generator[Client]:
    address = str(http.base_url).replace("http", "ws").rstrip("/") + "/v1/stream"
    with connect(address, max_size=None, compression=None) as socket:
        yield Client(socket)


def test_a_job_fails_with_the_reason_and_the_server_recovers(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        done, running, queued = create(http, seconds=1), create(http, seconds=LONG), create(http, seconds=1)
        wait_until(lambda: job_now(http, running)["frames"] > 100)
        fill_disk(process)
        failed = wait_for(http, running, "failed")
        assert failed["error"]["code"] == "failed"
        assert failed["error"]["message"].startswith(f"cannot write videos/{running['id']}.mp4: ")
        assert failed["completed_at"] is not None
        assert wait_for(http, queued, "failed")["error"]["message"].startswith("cannot write")
        refused = http.post("/v1/videos", json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        assert refused.json()["error"]["message"].startswith("cannot write the list of jobs jobs.sqlite: ")
        assert http.post(f"/v1/videos/{running['id']}/cancel").json()["status"] == "failed"
        assert http.delete(f"/v1/videos/{done['id']}").status_code in (200, 507)
        statuses = [job["status"] for job in http.get("/v1/videos").json()["data"]]
        assert statuses.count("failed") == 2 and len(statuses) in (2, 3)
        assert 'longvideo_jobs{status="failed"} 2' in http.get("/metrics").text
        assert http.get("/healthz").status_code == 200

        free_disk(process)
        again = create(http, seconds=1)
        assert wait_for(http, again, "completed", "failed")["status"] == "completed"
        assert num_frames(http.get(f"/v1/videos/{again['id']}/content").content) == 24
        assert http.delete(f"/v1/videos/{done['id']}").status_code in (200, 404)
        content = http.get(f"/v1/videos/{running['id']}/content").content
        assert num_frames(content) == failed["frames"] > 100  # the frames before the failure are kept
        assert http.get(f"/v1/videos/{queued['id']}/content").status_code == 409
        assert {path.stem for path in (tmp_path / "served" / "videos").iterdir()} == {again["id"], running["id"]}
        with sqlite3.connect(f"file:{tmp_path}/served/jobs.sqlite?mode=ro", uri=True) as connection:
            assert dict(connection.execute("SELECT id, status FROM jobs")) == {
                running["id"]: "failed",
                queued["id"]: "failed",
                again["id"]: "completed",
            }


def test_a_job_is_cancelled_on_a_full_disk(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        running, queued = create(http, seconds=LONG), create(http, seconds=1)
        wait_until(lambda: job_now(http, running)["status"] == "in_progress")
        fill_disk(process)
        assert http.post(f"/v1/videos/{queued['id']}/cancel").json()["status"] == "cancelled"
        assert wait_for(http, running, "failed")["status"] == "failed"
        free_disk(process)
        assert job_now(http, queued)["status"] == "cancelled"
        assert wait_for(http, create(http, seconds=1), "completed", "failed")["status"] == "completed"


def test_a_stream_ends_with_the_reason_and_the_server_recovers(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        with stream(http) as client:
            session = client.start(seconds=20, lead_seconds=4)["session"]
            client.receive_until("chunk", chunk=2)
            fill_disk(process)
            client.send("played", seconds=600)
            *chunks, error = client.receive_until("error")
            assert error["code"] == "storage" and closed_with(client) == 1011
        with stream(http) as client:
            assert client.start(seconds=1)["code"] == "storage"
            assert closed_with(client) == 1011
        file = tmp_path / "served" / "streams" / f"{session}.mp4"
        frames = len(decoded(file.read_bytes())[0])
        assert frames == round((chunks[-1]["start"]) * 24) + chunks[-1]["frames"] if chunks else frames >= 61
        assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file
        free_disk(process)
        with stream(http) as client:
            assert client.start(seconds=1)["type"] == "ready"
            client.receive_until("end")
        process.terminate()
        _, log = process.communicate()
    assert "cannot write" in log and "Traceback" not in log


def test_a_stream_whose_snapshot_was_written_is_continued_after_a_full_disk(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        with stream(http) as client:
            session = client.start(seconds=60, seed=3)["session"]
            client.receive_until("chunk", chunk=12)
            video = tmp_path / "served" / "streams" / f"{session}.mp4"
            # larger than the snapshot
            limit = video.stat().st_size + 1000
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            assert client.receive_until("error")[-1]["code"] == "storage"
        num_frames_before = len(decoded(video.read_bytes())[0])
        free_disk(process)
        with stream(http) as client:
            client.send("continue", session=session)
            assert client.receive()["type"] == "ready"
            chunks = client.receive_until("end")
            assert round(chunks[0]["start"] * 24) == num_frames_before and chunks[-1]["frames"] == 1440
        indices, _ = decoded(video.read_bytes())
        assert indices == list(range(1440))


def test_a_damaged_list_of_jobs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database, but long enough to be read" * 100)
    with pytest.raises(UserError, match=r"cannot open the list of jobs .*jobs.sqlite: file is not a database"):
        JobStore(tmp_path / "jobs.sqlite")
