"""Generate the videos of jobs, one after the other."""

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
from longvideo.infer.server.served_folder import FOOTAGE, PICTURES, VIDEOS, for_clients
from longvideo.infer.writer import VideoWriter, count_playable_frames

log = logging.getLogger(__name__)
FOOTAGE_SUFFIX = ".video"
INTERRUPTED = "the server stopped before the video was complete; the frames before that are kept"


class JobWorker:
    """A queue of jobs, and the thread that processes it.

    Jobs that an earlier process left queued are queued again; the one that it left in progress is interrupted.
    """

    def __init__(self, pipeline: StreamingPipeline, store: JobStore, folder: Path, metrics: ServerMetrics) -> None:
        """folder: folder of the server."""
        self._pipeline, self._store, self._metrics = pipeline, store, metrics
        self._folder = folder
        self._videos, self._pictures, self._footage = folder / VIDEOS, folder / PICTURES, folder / FOOTAGE
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._closing = threading.Event()
        for own in (self._videos, self._pictures, self._footage):
            for leftover in own.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)
        for upload in (*self._pictures.glob("*.png"), *self._footage.glob(f"*{FOOTAGE_SUFFIX}")):
            if store.get(upload.stem) is None:  # the process was killed before it stored the job
                upload.unlink(missing_ok=True)
        for job in store.unfinished():
            if job.status == "in_progress":
                self._interrupt(job)
            else:
                self.submit(job)

    def path(self, name: str) -> Path:
        """Return the path of a job's video, which may not exist yet."""
        return self._videos / f"{name}.mp4"

    def picture_path(self, name: str) -> Path:
        """Return the path of a job's first frame, which only a job with a given picture has."""
        return self._pictures / f"{name}.png"

    def footage_path(self, name: str) -> Path:
        """Return the path of the video that a job continues, which only a job with footage has."""
        return self._footage / f"{name}{FOOTAGE_SUFFIX}"

    def delete_files(self, name: str) -> None:
        """Delete the video of a job, and its first frame and footage, if there are any."""
        for path in (self.path(name), self.picture_path(name), self.footage_path(name)):
            path.unlink(missing_ok=True)

    def submit(self, job: Job) -> None:
        """Queue a stored job."""
        if self._closing.is_set():
            return  # the job stays queued in the store, for the next process
        self._pool.submit(self._run, job).add_done_callback(partial(self._record_failure, job))

    def cancel(self, name: str) -> None:
        """Cancel a job. One in progress ends after the current chunk; a finished one does not change."""
        if self._store.change(name, "cancelled", among=("queued", "in_progress")):
            self.path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Interrupt the job in progress, leave the queued jobs for the next process, and end the thread."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> None:
        if self._closing.is_set() or not self._store.change(job.id, "in_progress", among=("queued",)):
            return
        models = self._pipeline.models
        self._store.set_models(job.id, decoder=models.decoder_label, adapters=models.adapters)
        chunks = self._pipeline.stream(
            Script(job.shots, job.negative_prompt),
            steps=job.steps,
            guidance=job.guidance,
            seed=job.seed,
            image=self.picture_path(job.id) if job.has_picture else None,
            video=self.footage_path(job.id) if job.has_footage else None,
        )
        with closing(chunks), VideoWriter(self.path(job.id), fps=self._pipeline.fps) as writer:
            for frames in chunks:
                if not self._is_in_progress(job):
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
        if self._is_cancelled(job):
            self.path(job.id).unlink(missing_ok=True)

    def _is_in_progress(self, job: Job) -> bool:
        """Return whether the job is still in progress: not cancelled by a client, nor deleted after that."""
        stored = self._store.get(job.id)
        return stored is not None and stored.status == "in_progress"

    def _is_cancelled(self, job: Job) -> bool:
        """Return whether a client has cancelled the job, or deleted it after that."""
        stored = self._store.get(job.id)
        return stored is None or stored.status == "cancelled"

    def _record_failure(self, job: Job, future: Future[None]) -> None:
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, UserError):
            message = for_clients(error, self._folder)
            log.error("job %s failed: %s", job.id, error)
        else:
            message = "the video could not be generated; the server's log has the reason"
            log.error("job %s failed", job.id, exc_info=error)
        self._store.change(job.id, "failed", among=("in_progress",), error=message)

    def _interrupt(self, job: Job) -> None:
        """Set the status of a job whose process was killed, and keep its video if it plays."""
        frames = count_playable_frames(self.path(job.id))
        if frames == 0:
            self.path(job.id).unlink(missing_ok=True)
        self._store.set_frames(job.id, frames)
        if frames == job.total_frames:  # the process was killed after the last frame and before the change of status
            self._store.change(job.id, "completed", among=("in_progress",))
        else:
            self._store.change(job.id, "interrupted", among=("in_progress",), error=INTERRUPTED)
