"""Jobs in SQLite: what was asked for, how far it is and how it ended. Survives the process."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from longvideo.infer.script import ShotRequest

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "interrupted"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    shots TEXT NOT NULL,
    seed INTEGER NOT NULL,
    steps INTEGER,
    guidance REAL,
    total_frames INTEGER NOT NULL,
    frames INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    completed_at INTEGER,
    error TEXT
)
"""


@dataclass(frozen=True)
class Job:
    """frames: made so far, of total_frames. created_at, completed_at: seconds since 1970. error: for the client."""

    id: str
    status: JobStatus
    shots: tuple[ShotRequest, ...]
    seed: int
    steps: int | None
    guidance: float | None
    total_frames: int
    frames: int = 0
    created_at: int = 0
    completed_at: int | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "in_progress")


class JobStore:
    """One connection in one lock; every change is on the disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute(SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def add(self, job: Job, *, max_queued: int) -> Job | None:
        """Store a new job and return it with its time; None when enough are queued."""
        values = {
            "id": job.id,
            "status": job.status,
            "shots": json.dumps([[shot.prompt, shot.seconds, shot.cut] for shot in job.shots]),
            "seed": job.seed,
            "steps": job.steps,
            "guidance": job.guidance,
            "total_frames": job.total_frames,
            "created_at": int(time.time()),
            "max_queued": max_queued,
        }
        query = (
            "INSERT INTO jobs (id, status, shots, seed, steps, guidance, total_frames, created_at) "
            "SELECT :id, :status, :shots, :seed, :steps, :guidance, :total_frames, :created_at "
            "WHERE (SELECT count(*) FROM jobs WHERE status = 'queued') < :max_queued"
        )
        return self.get(job.id) if self._execute(query, values).rowcount else None

    def get(self, name: str) -> Job | None:
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", (name,))
        return _job(rows[0]) if rows else None

    def change(self, name: str, status: JobStatus, *, among: tuple[JobStatus, ...], error: str | None = None) -> bool:
        """Give a job another status if it has one of these; return whether it had."""
        over = status not in ("queued", "in_progress")
        marks = ", ".join("?" * len(among))
        query = f"UPDATE jobs SET status = ?, error = ?, completed_at = ? WHERE id = ? AND status IN ({marks})"
        return self._execute(query, (status, error, int(time.time()) if over else None, name, *among)).rowcount > 0

    def set_frames(self, name: str, frames: int) -> None:
        self._execute("UPDATE jobs SET frames = ? WHERE id = ?", (frames, name))

    def delete(self, name: str) -> bool:
        """Delete a job that is over; return whether there was one."""
        over = "('queued', 'in_progress')"
        return self._execute(f"DELETE FROM jobs WHERE id = ? AND status NOT IN {over}", (name,)).rowcount > 0

    def page(self, *, limit: int, after: str | None, newest_first: bool) -> list[Job]:
        """Return up to `limit` jobs behind one in the order of their making."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        behind = f"WHERE number {sign} (SELECT number FROM jobs WHERE id = :after)" if after is not None else ""
        query = f"SELECT * FROM jobs {behind} ORDER BY number {order} LIMIT :limit"
        return [_job(row) for row in self._rows(query, {"after": after, "limit": limit})]

    def with_status(self, status: JobStatus) -> list[Job]:
        """Return the jobs of a status, the oldest first."""
        return [_job(row) for row in self._rows("SELECT * FROM jobs WHERE status = ? ORDER BY number", (status,))]

    def counts(self) -> dict[str, int]:
        """Return how many jobs have each status."""
        rows = self._rows("SELECT status, count(*) AS number FROM jobs GROUP BY status", ())
        found = {row["status"]: row["number"] for row in rows}
        return {status: found.get(status, 0) for status in STATUSES}

    def _execute(self, query: str, values: Any) -> sqlite3.Cursor:
        with self._lock:
            return self._connection.execute(query, values)

    def _rows(self, query: str, values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


def _job(row: sqlite3.Row) -> Job:
    fields = {name: row[name] for name in row.keys() if name not in ("number", "shots", "status")}
    shots = tuple(ShotRequest(*shot) for shot in json.loads(row["shots"]))
    return Job(status=cast(JobStatus, row["status"]), shots=shots, **fields)
