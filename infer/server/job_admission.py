"""Check requests for videos against the limits of the server, and queue their jobs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from starlette.exceptions import HTTPException

from longvideo.errors import UserError, shown
from longvideo.files import write_bytes
from longvideo.infer.options import SamplingOptions
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.script import PromptError, Script
from longvideo.infer.server.answers import PromptVideo, RemixVideo, ShotsVideo
from longvideo.infer.server.job_request import REFERENCE, FieldError, JobRequest
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.reference_files import ReferenceChecker
from longvideo.infer.server.security import new_id


class JobAdmission:
    """The way of a request into the queue. Methods raise UserError and HTTPException for what is not queued."""

    def __init__(
        self,
        pipeline: StreamingPipeline,
        settings: ServerSettings,
        store: JobStore,
        worker: JobWorker,
        checker: ReferenceChecker,
    ) -> None:
        self._pipeline, self._settings, self._store, self._worker = pipeline, settings, store, worker
        self._checker = checker

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
        script, content = self._script(body), request.reference
        with _reference_errors():
            has_footage = content is not None and self._checker.is_video(content, name=REFERENCE)
            has_picture = content is not None and not has_footage
            if content is not None and has_picture:
                content = self._checker.first_frame(content, name=REFERENCE)
        job = Job(
            new_id(),
            "queued",
            script.shots,
            body.seed,
            body.steps,
            body.guidance,
            self._pipeline.plan(script, continues=has_footage).num_frames,
            has_picture=has_picture,
            has_footage=has_footage,
            negative_prompt=script.negative_prompt,
        )
        return self._queue(job, content)

    def remix(self, source: Job, body: RemixVideo) -> Job:
        """Queue a video with another prompt, and the length, seed, beginning and options of an existing one."""
        remix = PromptVideo(
            prompt=body.prompt,
            seconds=Script(source.shots).seconds,
            negative_prompt=source.negative_prompt,
            guidance=source.guidance,
        )
        script, path = self._script(remix), self._reference_path(source)
        try:
            content = None if path is None else path.read_bytes()
        except OSError as error:
            message = f"the {REFERENCE} of the video cannot be read; send it again"
            raise HTTPException(HTTPStatus.CONFLICT, message) from error
        return self._queue(source.repeated(new_id(), script.shots), content)

    def _script(self, body: PromptVideo | ShotsVideo) -> Script:
        limits = self._settings.limits
        try:
            script = body.script()
            if script.seconds > limits.job_seconds:
                raise UserError(f"the video has {script.seconds:g} seconds; expected at most {limits.job_seconds:g}")
            if len(script.shots) > limits.job_shots:
                raise UserError(f"the video has {len(script.shots)} shots; expected at most {limits.job_shots}")
            for text in script.texts:  # a body with a file may be large, and counting tokens takes time
                if (size := len(text.encode())) > limits.message_bytes:
                    raise PromptError(f"a prompt has {size} bytes; expected at most {limits.message_bytes}")
            self._pipeline.prompt_rules(SamplingOptions(guidance=body.guidance)).check_script(script)
        except PromptError as error:
            field = "shots" if isinstance(body, ShotsVideo) else "negative_prompt" if error.is_negative else "prompt"
            raise FieldError(field, str(error)) from error
        return script

    def _reference_path(self, job: Job) -> Path | None:
        """Return the path of the file that a job begins with, which may not exist yet; None without one."""
        if job.has_footage:
            return self._worker.footage_path(job.id)
        return self._worker.picture_path(job.id) if job.has_picture else None

    def _queue(self, job: Job, content: bytes | None) -> Job:
        """Queue a job and return it with its time. content: PNG of its first frame, or the video that it continues."""
        max_queued, path, queued = self._settings.limits.queued_jobs, self._reference_path(job), None
        try:
            if path is not None and content is not None:
                write_bytes(path, content)
            if path is not None and job.has_footage:
                with _reference_errors():
                    self._checker.check_footage(path, name=REFERENCE)
            queued = self._store.add(job, max_queued=max_queued)
        finally:
            if queued is None:
                self._worker.delete_files(job.id)
        if queued is None:
            message = f"{max_queued} videos are queued, the maximum; retry later"
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message)
        self._worker.submit(queued)
        return queued


@contextmanager
def _reference_errors() -> Generator[None]:
    """Raise errors about a client's picture or video as FieldError."""
    try:
        yield
    except UserError as error:
        raise FieldError(REFERENCE, str(error)) from error
