"""Jobs over HTTP: completed, cancelled, interrupted, queued across restarts, and after a kill."""

from __future__ import annotations

import io
import signal
import sqlite3
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from longvideo.infer.script import ShotRequest
from longvideo.infer.server.job_store import LATER_COLUMNS, Job, JobStore
from longvideo.infer.server.limits import Limits
from longvideo.infer.server.security import new_id
from tests.infer.server.conftest import PROMPT, Serve, serve_process, wait_until

FPS = 24
OVER = ("completed", "failed", "cancelled", "interrupted")
LONG = 300  # seconds of video: takes minutes even with the small model


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/videos", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def job_now(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    return http.get(f"/v1/videos/{job['id']}").json()


def wait_for(http: httpx.Client, job: dict[str, Any], *statuses: str) -> dict[str, Any]:
    wait_until(lambda: job_now(http, job)["status"] in statuses)
    return job_now(http, job)


def test_a_job_produces_a_file_that_plays(serve: Serve) -> None:
    with serve().http() as http:
        job = create(http, seconds=3, seed=2)
        assert job["decoder"] is None and job["adapters"] is None
        assert (job["object"], job["model"], job["status"], job["progress"]) == ("video", "small", "queued", 0)
        assert (job["seconds"], job["size"], job["seed"], job["expires_at"]) == ("3", "64x32", 2, None)
        done = wait_for(http, job, *OVER)
        assert (done["status"], done["progress"], done["frames"], done["error"]) == ("completed", 100, 72, None)
        assert done["decoder"] == "the autoencoder in fp32" and done["adapters"] == []
        assert done["completed_at"] >= done["created_at"] > 1.7e9
        whole = http.get(f"/v1/videos/{job['id']}/content")
        assert whole.headers["content-type"] == "video/mp4" and num_frames(whole.content) == 72
        part = http.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=10-19"})
        assert part.status_code == 206 and part.content == whole.content[10:20]
        outside = http.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=999999999-"})
        assert outside.status_code == 416
        deleted = {"id": job["id"], "object": "video.deleted", "deleted": True}
        assert http.delete(f"/v1/videos/{job['id']}").json() == deleted
        assert http.get(f"/v1/videos/{job['id']}").status_code == 404
        assert http.get(f"/v1/videos/{job['id']}/content").status_code == 404


def test_shots_follow_each_other(serve: Serve) -> None:
    shots = [{"prompt": PROMPT, "seconds": 2}, {"prompt": "a blue square spins", "seconds": 3, "cut": False}]
    with serve().http() as http:
        job = http.post("/v1/videos", json={"shots": shots}).json()
        assert job["shots"] == [{"cut": True, "negative_prompt": None, **shot} for shot in shots]
        assert job["prompt"] == PROMPT
        assert wait_for(http, job, *OVER)["frames"] == 120


def test_a_job_leads_away_from_its_negative_prompts(serve: Serve) -> None:
    own = {"prompt": PROMPT, "seconds": 2, "negative_prompt": "a square"}
    with serve().http() as http:
        job = create(http, seconds=1, guidance=3, negative_prompt="night")
        assert job["negative_prompt"] == "night" and job["shots"][0]["negative_prompt"] is None
        remix = http.post(f"/v1/videos/{job['id']}/remix", json={"prompt": "a blue ball"}).json()
        assert (remix["prompt"], remix["negative_prompt"]) == ("a blue ball", "night")
        shots = http.post("/v1/videos", json={"shots": [own], "guidance": 3}).json()
        assert (shots["negative_prompt"], shots["shots"][0]["negative_prompt"]) == ("", "a square")
        plain = create(http, seconds=1, guidance=3)
        assert {wait_for(http, one, *OVER)["status"] for one in (job, remix, shots, plain)} == {"completed"}
        videos = [http.get(f"/v1/videos/{one['id']}/content").content for one in (job, plain)]
        assert videos[0] != videos[1]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "ball " * 40}, "prompt", "the prompt has 41 tokens; expected at most 32"),
        ({"prompt": PROMPT, "negative_prompt": "a"}, "negative_prompt", "guidance is 1; set guidance above 1"),
        ({"shots": [{"prompt": "ball " * 40, "seconds": 2}]}, "shots", "the prompt has 41 tokens"),
        ({"shots": [{"prompt": PROMPT, "seconds": 2, "negative_prompt": "a"}]}, "shots", "guidance is 1"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused_with_their_field(
    fields: dict[str, Any], param: str, message: str, serve: Serve
) -> None:
    with serve().http() as http:
        answer = http.post("/v1/videos", json=fields)
        error = answer.json()["error"]
        assert answer.status_code == 422 and message in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_progress_rises_and_a_cancel_ends_the_job(serve: Serve) -> None:
    server = serve()
    with server.http() as http:
        job, queued = create(http, seconds=LONG), create(http, seconds=1)
        seen = []
        wait_until(lambda: seen.append(job_now(http, job)["frames"]) or seen[-1] > 100)
        assert all(later >= earlier for earlier, later in pairwise(seen)) and seen[-1] < LONG * FPS
        assert job_now(http, queued)["status"] == "queued"
        assert http.get(f"/v1/videos/{job['id']}/content").status_code == 409
        assert http.delete(f"/v1/videos/{job['id']}").status_code == 409
        cancelled = http.post(f"/v1/videos/{job['id']}/cancel").json()
        assert cancelled["status"] == "cancelled"
        num_frames_then = cancelled["frames"]
        assert wait_for(http, queued, *OVER)["status"] == "completed"
        assert job_now(http, job)["frames"] - num_frames_then <= 32
        assert http.post(f"/v1/videos/{queued['id']}/cancel").json()["status"] == "completed"
    assert [path.stem for path in (server.folder / "videos").iterdir()] == [queued["id"]]


def test_a_cancelled_queued_job_is_not_generated(serve: Serve) -> None:
    with serve().http() as http:
        long, queued = create(http, seconds=LONG), create(http, seconds=1)
        assert http.post(f"/v1/videos/{queued['id']}/cancel").json()["status"] == "cancelled"
        http.post(f"/v1/videos/{long['id']}/cancel")
        last = create(http, seconds=1)
        assert wait_for(http, last, *OVER)["status"] == "completed"
        assert job_now(http, queued)["frames"] == 0


def test_jobs_beyond_the_queue_are_refused(serve: Serve) -> None:
    with serve(limits=Limits(queued_jobs=2)).http() as http:
        running = create(http, seconds=LONG)
        wait_for(http, running, "in_progress")
        for _ in range(2):
            create(http)
        assert http.post("/v1/videos", json={"prompt": PROMPT}).status_code == 429


def test_pages_of_the_list_contain_every_job_once(serve: Serve) -> None:
    with serve().http() as http:
        jobs = [create(http, seconds=0.1)["id"] for _ in range(5)]
        newest = http.get("/v1/videos").json()
        assert [job["id"] for job in newest["data"]] == jobs[::-1] and not newest["has_more"]
        seen, after = [], {}
        while True:
            page = http.get("/v1/videos", params={"limit": 2, "order": "asc", **after}).json()
            seen += [job["id"] for job in page["data"]]
            after = {"after": seen[-1]}
            if not page["has_more"]:
                break
        assert seen == jobs
        assert http.get("/v1/videos", params={"after": "A" * 22}).status_code == 404


def test_a_stopped_server_interrupts_its_job_and_the_next_one_continues_the_queue(serve: Serve) -> None:
    first = serve()
    with first.http() as http:
        running, queued = create(http, seconds=LONG), create(http, seconds=1)
        wait_until(lambda: job_now(http, running)["frames"] > 0)
    first.stop()
    with serve().http() as http:
        interrupted = job_now(http, running)
        assert interrupted["status"] == interrupted["error"]["code"] == "interrupted"
        content = http.get(f"/v1/videos/{running['id']}/content").content
        assert num_frames(content) == interrupted["frames"] > 0
        assert wait_for(http, queued, *OVER)["status"] == "completed"


def test_after_a_kill_the_database_opens_and_playable_files_are_kept(
    model_folder: Path, tmp_path: Path, serve: Serve
) -> None:
    with serve_process(model_folder, tmp_path, "--folder", ".") as (process, http):
        done, running, queued = create(http, seconds=1), create(http, seconds=LONG), create(http, seconds=1)
        wait_until(lambda: job_now(http, running)["frames"] > 100)
        assert job_now(http, done)["status"] == "completed"
        whole = http.get(f"/v1/videos/{done['id']}/content").content
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "videos" / f"{done['id']}.mp4").read_bytes() == whole
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with serve().http() as http:
        interrupted = job_now(http, running)
        assert (interrupted["status"], job_now(http, done)["status"]) == ("interrupted", "completed")
        content = http.get(f"/v1/videos/{running['id']}/content").content
        assert num_frames(content) == interrupted["frames"] > 0
        assert wait_for(http, queued, *OVER)["status"] == "completed"


def test_a_list_of_an_earlier_version_opens(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(path)
    job = Job(new_id(), "queued", (ShotRequest(PROMPT, 2),), 0, None, None, total_frames=48)
    store.add(job, max_queued=9)
    store.close()
    with sqlite3.connect(path) as connection:
        for column in LATER_COLUMNS:
            connection.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    store = JobStore(path)
    store.set_models(job.id, decoder="TAEW2.2 in bf16", adapters=["style:0.5"])
    stored = store.get(job.id)
    assert stored is not None and (stored.decoder, stored.shots) == ("TAEW2.2 in bf16", job.shots)
    assert (stored.has_picture, stored.remixed_from, stored.adapters) == (False, None, ("style:0.5",))
    assert stored.negative_prompt == ""
    store.close()


def test_a_job_with_a_damaged_file_keeps_none(serve: Serve, tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    job = Job(new_id(), "in_progress", (ShotRequest(PROMPT, 4),), 0, None, None, 96)
    store.add(job, max_queued=1)
    store.close()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / f"{job.id}.mp4").write_bytes(b"not a video")
    (tmp_path / "videos" / f".{job.id}.mp4.7.part").write_bytes(b"")
    with serve().http() as http:
        assert http.get(f"/v1/videos/{job.id}").json()["status"] == "interrupted"
        assert http.get(f"/v1/videos/{job.id}/content").status_code == 409
    assert list((tmp_path / "videos").iterdir()) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": "a"',
        b'{"prompt": 5}',
        b'{"prompt": ""}',
        b'{"prompt": "a", "shots": []}',
        b'{"shots": []}',
        b'{"prompt": "a", "seconds": NaN}',
        b'{"prompt": "a", "seconds": 1e999}',
        b'{"prompt": "a", "seconds": 601}',
        b'{"prompt": "a", "seconds": 0.0001}',
        b'{"prompt": "a", "seed": 99999999999999999999999999}',
        b'{"prompt": "a", "model": "other"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "' + b"a " * 40 + b'"}',
        b'{"shots": [{"prompt": "a", "seconds": 0.1}, {"prompt": "b", "seconds": 0.1}]}',
        b"\xff\xfe",
        b"[" * 20_000,
        b"x" * 70_000,
    ],
)
def test_bad_requests_are_refused_as_json(serve: Serve, body: bytes) -> None:
    with serve().http() as http:
        answer = http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 413, 422)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 1000
        assert http.get("/v1/videos").json()["data"] == []
