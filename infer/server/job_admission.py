"""Check requests for videos against the limits of the server, and queue their jobs."""

from __future__ import annotations

import threading
from http import HTTPStatus

from starlette.exceptions import HTTPException

from longvideo.errors import UserError
from longvideo.files import write_bytes
from longvideo.infer.options import shown
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.script import Script
from longvideo.infer.server.answers import PromptVideo, RemixVideo, ShotsVideo
from longvideo.infer.server.job_pictures import first_frame_png
from longvideo.infer.server.job_request import PICTURE, FieldError, JobRequest
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import Refusal
from longvideo.infer.server.security import new_id


class JobAdmission:
    """The way of a request into the queue. Methods raise UserError and HTTPException for what is not queued."""

    def __init__(
        self, pipeline: StreamingPipeline, settings: ServerSettings, store: JobStore, worker: JobWorker
    ) -> None:
        self._pipeline, self._settings, self._store, self._worker = pipeline, settings, store, worker
        self._decoding = threading.Lock()  # a large picture takes much memory, so one at a time is decoded

    @property
    def size(self) -> str:
        """Width and height of every video, in the form of OpenAI's interface."""
        model = self._pipeline.models.settings
        return f"{model.width}x{model.height}"

    def create(self, request: JobRequest) -> Job:
        """Queue the video of a request."""
        body, served = request.body, self._settings.model
        if body.model not in (None, served):
            message = f"model names a model that is not served; expected {served}, or leave it out"
            raise FieldError("model", message)
        if body.size not in (None, self.size):
            message = f"size is {shown(body.size)}; this model generates {self.size}; use that, or leave it out"
            raise FieldError("size", message)
        script = self._script(body)
        job = Job(
            new_id(),
            "queued",
            script.shots,
            body.seed,
            body.steps,
            body.guidance,
            self._pipeline.plan(script).num_frames,
            has_picture=request.picture is not None,
        )
        return self._queue(job, None if request.picture is None else self._first_frame(request.picture))

    def remix(self, source: Job, body: RemixVideo) -> Job:
        """Queue a video with another prompt, and the length, seed, first frame and options of an existing one."""
        script = self._script(PromptVideo(prompt=body.prompt, seconds=Script(source.shots).seconds))
        try:
            picture = self._worker.picture_path(source.id).read_bytes() if source.has_picture else None
        except OSError as error:
            message = "the first frame of the video cannot be read; send it again"
            raise HTTPException(HTTPStatus.CONFLICT, message) from error
        return self._queue(source.repeated(new_id(), script.shots), picture)

    def _script(self, body: PromptVideo | ShotsVideo) -> Script:
        limits = self._settings.limits
        try:
            script = body.script(limits.prompt_length)
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal
        if script.seconds > limits.job_seconds:
            raise UserError(f"the video has {script.seconds:g} seconds; expected at most {limits.job_seconds:g}")
        if len(script.shots) > limits.job_shots:
            raise UserError(f"the video has {len(script.shots)} shots; expected at most {limits.job_shots}")
        return script

    def _first_frame(self, data: bytes) -> bytes:
        """Return a client's picture as a PNG of the size of the video. Raises FieldError."""
        model = self._pipeline.models.settings
        try:
            with self._decoding:
                return first_frame_png(data, name=PICTURE, height=model.height, width=model.width)
        except UserError as error:
            raise FieldError(PICTURE, str(error)) from error

    def _queue(self, job: Job, picture: bytes | None) -> Job:
        """Queue a job and return it with its time. picture: PNG of its first frame."""
        max_queued, queued = self._settings.limits.queued_jobs, None
        try:
            if picture is not None:
                write_bytes(self._worker.picture_path(job.id), picture)
            queued = self._store.add(job, max_queued=max_queued)
        finally:
            if queued is None:
                self._worker.delete_files(job.id)
        if queued is None:
            message = f"{max_queued} videos are queued, the maximum; retry later"
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message)
        self._worker.submit(queued)
        return queued
