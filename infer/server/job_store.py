"""Jobs in an SQLite file: request, progress and result. They survive the process."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from longvideo.errors import UserError
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
"""The table of the first version; `LATER_COLUMNS` are added to it."""
FLAG = "INTEGER NOT NULL DEFAULT 0"
LATER_COLUMNS = {
    "decoder": "TEXT",
    "has_picture": FLAG,
    "has_footage": FLAG,
    "remixed_from": "TEXT",
    "adapters": "TEXT",
    "negative_prompt": "TEXT NOT NULL DEFAULT ''",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A request for a video, and its progress.

    frames: number of frames generated so far, out of total_frames.
    created_at, completed_at: seconds since 1970.
    error: reason of a failure, for the client.
    decoder: name and precision of the decoder of its video; None before it is generated.
    adapters: names and strengths of the adapters in the transformer; None before it is generated.
    has_picture: whether the first frame is given, as a file of the server.
    has_footage: whether it continues a video, which is a file of the server.
    remixed_from: id of the job whose settings it repeats with another prompt, or None.
    negative_prompt: that of shots that state none.
    """

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
    decoder: str | None = None
    has_picture: bool = False
    has_footage: bool = False
    remixed_from: str | None = None
    adapters: tuple[str, ...] | None = None
    negative_prompt: str = ""

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def repeated(self, name: str, shots: tuple[ShotRequest, ...]) -> Job:
        """Return a new job with the options of this one. name: its id. shots: with the same total length."""
        return replace(
            self,
            id=name,
            status="queued",
            shots=shots,
            frames=0,
            completed_at=None,
            error=None,
            decoder=None,
            adapters=None,
            remixed_from=self.id,
        )


class StoreError(UserError):
    """The list of jobs cannot be read, or a change of it cannot be written."""


class JobStore:
    """Jobs in one SQLite file. One lock protects its connection. A change is on the disk when its method returns.

    On a full disk, changes of status and progress are kept in memory, included in all answers, and written with the
    next change that succeeds. A job that a client adds or deletes raises StoreError instead.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises StoreError where it cannot be used."""
        self._path = path
        self._lock = threading.RLock()
        self._unwritten: dict[str, dict[str, Any]] = {}  # columns that are not yet on the disk, by job
        with self._store_errors("open"):
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(SCHEMA)
            columns = {row["name"] for row in self._connection.execute("PRAGMA table_info(jobs)")}
            for name, kind in LATER_COLUMNS.items():
                if name not in columns:
                    self._connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")

    def close(self) -> None:
        with self._lock:
            self._write_changes()
            self._connection.close()

    def add(self, job: Job, *, max_queued: int) -> Job | None:
        """Store a new job and return it with its time; return None when the queue is full. Raises StoreError."""
        values = {
            "id": job.id,
            "status": job.status,
            "shots": json.dumps([astuple(shot) for shot in job.shots]),
            "seed": job.seed,
            "steps": job.steps,
            "guidance": job.guidance,
            "total_frames": job.total_frames,
            "created_at": int(time.time()),
            "has_picture": job.has_picture,
            "has_footage": job.has_footage,
            "remixed_from": job.remixed_from,
            "negative_prompt": job.negative_prompt,
        }
        query = f"INSERT INTO jobs ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"
        with self._lock:
            if self.counts()["queued"] >= max_queued:
                return None
            self._write(query, values)
            return self.get(job.id)

    def get(self, name: str) -> Job | None:
        jobs = self._jobs("SELECT * FROM jobs WHERE id = ?", (name,))
        return jobs[0] if jobs else None

    def change(self, name: str, status: JobStatus, *, among: tuple[JobStatus, ...], error: str | None = None) -> bool:
        """Set the status of a job whose status is in `among`; return whether it was set."""
        with self._lock:
            job = self.get(name)
            if job is None or job.status not in among:
                return False
            is_over = status not in ("queued", "in_progress")
            self._change(name, status=status, error=error, completed_at=int(time.time()) if is_over else None)
            return True

    def set_frames(self, name: str, frames: int) -> None:
        self._change(name, frames=frames)

    def set_models(self, name: str, *, decoder: str, adapters: Sequence[str]) -> None:
        """Set the decoder and the adapters with which a video is generated."""
        self._change(name, decoder=decoder, adapters=json.dumps(list(adapters)))

    def delete(self, name: str) -> None:
        """Delete a finished job. Raises StoreError."""
        with self._lock:
            self._write("DELETE FROM jobs WHERE id = ?", (name,))
            self._unwritten.pop(name, None)

    def page(self, *, limit: int, after: str | None, newest_first: bool) -> list[Job]:
        """Return up to `limit` jobs in the order of their creation. after: id of the job before them, or None."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where = f"WHERE number {sign} (SELECT number FROM jobs WHERE id = :after)" if after is not None else ""
        query = f"SELECT * FROM jobs {where} ORDER BY number {order} LIMIT :limit"
        return self._jobs(query, {"after": after, "limit": limit})

    def unfinished(self) -> list[Job]:
        """Return the queued jobs and those in progress, oldest first."""
        jobs = self._jobs("SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') ORDER BY number", ())
        return [job for job in jobs if not job.is_over]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status."""
        with self._lock:
            rows = self._rows("SELECT status, count(*) AS number FROM jobs GROUP BY status", ())
            numbers = Counter({row["status"]: row["number"] for row in rows})
            for name in self._unwritten:
                for row in self._rows("SELECT status FROM jobs WHERE id = ?", (name,)):
                    numbers[row["status"]] -= 1
                    numbers[self._unwritten[name].get("status", row["status"])] += 1
        return {status: numbers[status] for status in STATUSES}

    def _change(self, name: str, **columns: Any) -> None:
        with self._lock:
            self._unwritten[name] = {**self._unwritten.get(name, {}), **columns}
            self._write_changes()

    def _write_changes(self) -> None:
        """Write the changes that are in memory, up to the first one that fails."""
        for name, columns in list(self._unwritten.items()):
            assignments = ", ".join(f"{column} = :{column}" for column in columns)
            try:
                self._write(f"UPDATE jobs SET {assignments} WHERE id = :name", {**columns, "name": name})
            except StoreError as error:
                log.warning("%s; the change is kept in memory", error)
                return
            del self._unwritten[name]

    def _write(self, query: str, values: Any) -> None:
        with self._store_errors("write"):
            self._connection.execute(query, values)

    def _jobs(self, query: str, values: Any) -> list[Job]:
        with self._lock:
            return [_job({**row, **self._unwritten.get(row["id"], {})}) for row in self._rows(query, values)]

    def _rows(self, query: str, values: Any) -> list[dict[str, Any]]:
        with self._store_errors("read"):
            return [dict(row) for row in self._connection.execute(query, values)]

    @contextmanager
    def _store_errors(self, action: str) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"cannot {action} the list of jobs {self._path}: {error}") from error


def _job(row: Mapping[str, Any]) -> Job:
    fields = {name: value for name, value in row.items() if name != "number"}
    fields["shots"] = tuple(ShotRequest(*shot) for shot in json.loads(row["shots"]))
    fields["status"] = cast("JobStatus", row["status"])
    fields["adapters"] = None if row["adapters"] is None else tuple(json.loads(row["adapters"]))
    fields |= {name: bool(row[name]) for name in ("has_picture", "has_footage")}
    return Job(**fields)
