"""Jobs over HTTP: create a video in the background, poll its progress, download it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.answers import (
    CONTENT,
    PromptVideo,
    ShotsVideo,
    VideoAnswer,
    VideoDeleted,
    VideoId,
    VideoList,
    errors,
)
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import Refusal
from longvideo.infer.server.security import new_id

NOT_FOUND, CONFLICT, INVALID = HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY
FULL = HTTPStatus.INSUFFICIENT_STORAGE


def job_routes(pipeline: StreamingPipeline, settings: ServerSettings, store: JobStore, worker: JobWorker) -> APIRouter:
    """Return the routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos")
    limits = settings.limits
    size = f"{pipeline.models.settings.width}x{pipeline.models.settings.height}"

    def answer(job: Job) -> VideoAnswer:
        return VideoAnswer.of(job, model=settings.model, size=size, fps=pipeline.fps)

    def stored(name: str) -> Job:
        if (job := store.get(name)) is None:
            raise HTTPException(NOT_FOUND, "there is no video with this id")
        return job

    @router.post(
        "",
        responses=errors(HTTPStatus.BAD_REQUEST, INVALID, HTTPStatus.TOO_MANY_REQUESTS, FULL),
    )
    def create(body: PromptVideo | ShotsVideo) -> VideoAnswer:
        """Queue a video."""
        if body.model not in (None, settings.model):
            raise UserError(f"model names a model that is not served; expected {settings.model}, or leave it out")
        try:
            script = body.script(limits.prompt_length)
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal
        if script.seconds > limits.job_seconds:
            raise UserError(f"the video has {script.seconds:g} seconds; expected at most {limits.job_seconds:g}")
        if len(script.shots) > limits.job_shots:
            raise UserError(f"the video has {len(script.shots)} shots; expected at most {limits.job_shots}")
        frames = pipeline.plan(script).num_frames
        job = Job(new_id(), "queued", script.shots, body.seed, body.steps, body.guidance, frames)
        if (queued := store.add(job, max_queued=limits.queued_jobs)) is None:
            message = f"{limits.queued_jobs} videos are queued, the maximum; retry later"
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message)
        worker.submit(queued)
        return answer(queued)

    @router.get("", responses=errors(NOT_FOUND, INVALID))
    def page(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[VideoId | None, Query()] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """List videos, by default the newest first."""
        if after is not None:
            stored(after)
        jobs = store.page(limit=limit + 1, after=after, newest_first=order == "desc")
        return VideoList(data=[answer(job) for job in jobs[:limit]], has_more=len(jobs) > limit)

    @router.get("/{name}", responses=errors(NOT_FOUND, INVALID))
    def one(name: VideoId) -> VideoAnswer:
        """Return the status and progress of a video."""
        return answer(stored(name))

    @router.get(
        "/{name}/content",
        response_class=Response,
        responses={**CONTENT, **errors(CONFLICT, INVALID)},
    )
    def content(name: VideoId) -> Response:
        """Download a completed video, or the frames of an interrupted or failed one. Ranges are supported."""
        job = stored(name)
        path = worker.path(job.id)
        if job.status not in ("completed", "interrupted", "failed") or not path.is_file():
            raise HTTPException(CONFLICT, f"the video is {job.status} and has no file")
        return FileContent(path, media_type="video/mp4", download=True)

    @router.post("/{name}/cancel", responses=errors(NOT_FOUND, INVALID))
    def cancel(name: VideoId) -> VideoAnswer:
        """Cancel a video after the current chunk. A finished video does not change."""
        worker.cancel(stored(name).id)
        return answer(stored(name))

    @router.delete("/{name}", responses=errors(NOT_FOUND, CONFLICT, INVALID, FULL))
    def delete(name: VideoId) -> VideoDeleted:
        """Delete a finished video and its file."""
        job = stored(name)
        if not job.is_over:
            raise HTTPException(CONFLICT, f"the video is {job.status}; cancel it first")
        worker.path(job.id).unlink(missing_ok=True)  # first, because this frees space for the change of the list
        store.delete(job.id)
        return VideoDeleted(id=job.id)

    return router
