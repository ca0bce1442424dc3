"""Make the videos of jobs, one after the other."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import TEMPORARY_SUFFIX
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.script import Script
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.metrics import ServerMetrics
from longvideo.infer.writer import VideoWriter

log = logging.getLogger(__name__)
INTERRUPTED = "the server ended before the video did; what was made until then is kept"


class JobWorker:
    """A queue of jobs and the thread that works it off. Jobs of an earlier process are taken up or given up."""

    def __init__(self, pipeline: StreamingPipeline, store: JobStore, folder: Path, metrics: ServerMetrics) -> None:
        self._pipeline, self._store, self._folder, self._metrics = pipeline, store, folder, metrics
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._closing = threading.Event()
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        for job in store.unfinished():
            self._give_up(job) if job.status == "in_progress" else self.submit(job)

    def path(self, name: str) -> Path:
        """Return where the video of a job is, or will be."""
        return self._folder / f"{name}.mp4"

    def submit(self, job: Job) -> None:
        """Make a stored job when it is its turn."""
        if self._closing.is_set():
            return  # it stays queued for the next process
        self._pool.submit(self._run, job).add_done_callback(partial(self._ended, job))

    def cancel(self, name: str) -> None:
        """Cancel a job; one that is being made ends with its next chunk. One that is over stays as it is."""
        if self._store.change(name, "cancelled", among=("queued", "in_progress")):
            self.path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Interrupt the job that is being made, leave the queued ones for the next process, and end the thread."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> None:
        if self._closing.is_set() or not self._store.change(job.id, "in_progress", among=("queued",)):
            return
        chunks = self._pipeline.stream(Script(job.shots), steps=job.steps, guidance=job.guidance, seed=job.seed)
        with closing(chunks), VideoWriter(self.path(job.id), fps=self._pipeline.fps) as writer:
            for frames in chunks:
                if not self._is_wanted(job):
                    break
                writer.write(frames)
                self._metrics.count("longvideo_frames_total", len(frames))
                self._store.set_frames(job.id, writer.num_frames)
                if self._closing.is_set():
                    break
        if writer.num_frames == job.total_frames:
            self._store.change(job.id, "completed", among=("in_progress",))
        else:
            self._store.change(job.id, "interrupted", among=("in_progress",), error=INTERRUPTED)
        if not self._is_wanted(job, or_over=True):
            self.path(job.id).unlink(missing_ok=True)

    def _is_wanted(self, job: Job, *, or_over: bool = False) -> bool:
        """Tell whether nobody has cancelled (and deleted) a job meanwhile."""
        stored = self._store.get(job.id)
        return stored is not None and (stored.status == "in_progress" or (or_over and stored.status != "cancelled"))

    def _ended(self, job: Job, future: Future[None]) -> None:
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, UserError):
            message = str(error)
            log.error("job %s failed: %s", job.id, message)
        else:
            message = "the video could not be made; the log says why"
            log.error("job %s failed", job.id, exc_info=error)
        self._store.change(job.id, "failed", among=("in_progress",), error=message)

    def _give_up(self, job: Job) -> None:
        """Mark a job whose process died, and keep its video if it plays."""
        frames = _count_frames(self.path(job.id))
        if frames == 0:
            self.path(job.id).unlink(missing_ok=True)
        self._store.set_frames(job.id, frames)
        if frames == job.total_frames:  # it died between the last frame and saying so
            self._store.change(job.id, "completed", among=("in_progress",))
        else:
            self._store.change(job.id, "interrupted", among=("in_progress",), error=INTERRUPTED)


def _count_frames(path: Path) -> int:
    """Count the frames that play; 0 where there is no file or it is none."""
    import av

    frames = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                frames += 1
    except (av.FFmpegError, FileNotFoundError):
        pass  # a torn end: those before it play
    return frames
