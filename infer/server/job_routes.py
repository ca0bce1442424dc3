"""Jobs over HTTP: make a video in the background, look how far it is, fetch it."""

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
            raise HTTPException(NOT_FOUND, "there is no such video")
        return job

    @router.post(
        "",
        responses=errors(HTTPStatus.BAD_REQUEST, INVALID, HTTPStatus.TOO_MANY_REQUESTS, FULL),
    )
    def create(body: PromptVideo | ShotsVideo) -> VideoAnswer:
        """Queue a video."""
        if body.model not in (None, settings.model):
            raise UserError(f"another model was asked for; {settings.model} is served")
        try:
            script = body.script(limits.prompt_length)
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal
        if script.seconds > limits.job_seconds or len(script.shots) > limits.shots:
            raise UserError(f"a video has at most {limits.job_seconds:g} seconds and {limits.shots} shots")
        frames = pipeline.plan(script).num_frames
        job = Job(new_id(), "queued", script.shots, body.seed, body.steps, body.guidance, frames)
        if (added := store.add(job, max_queued=limits.queued_jobs)) is None:
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, f"{limits.queued_jobs} videos are queued; try later")
        worker.submit(added)
        return answer(added)

    @router.get("", responses=errors(NOT_FOUND, INVALID))
    def page(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[VideoId | None, Query()] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """List videos, the newest first if not asked otherwise."""
        if after is not None:
            stored(after)
        jobs = store.page(limit=limit + 1, after=after, newest_first=order == "desc")
        return VideoList(data=[answer(job) for job in jobs[:limit]], has_more=len(jobs) > limit)

    @router.get("/{name}", responses=errors(NOT_FOUND, INVALID))
    def one(name: VideoId) -> VideoAnswer:
        """Look how far a video is."""
        return answer(stored(name))

    @router.get(
        "/{name}/content",
        response_class=Response,
        responses={**CONTENT, **errors(CONFLICT, INVALID)},
    )
    def content(name: VideoId) -> Response:
        """Fetch a finished video, or what there is of an interrupted or failed one; a range may be asked for."""
        job = stored(name)
        path = worker.path(job.id)
        if job.status not in ("completed", "interrupted", "failed") or not path.is_file():
            raise HTTPException(CONFLICT, f"the video is {job.status}; it has no file")
        return FileContent(path, media_type="video/mp4", download=True)

    @router.post("/{name}/cancel", responses=errors(NOT_FOUND, INVALID))
    def cancel(name: VideoId) -> VideoAnswer:
        """Cancel a video within a chunk; one that is over stays as it is."""
        worker.cancel(stored(name).id)
        return answer(stored(name))

    @router.delete("/{name}", responses=errors(NOT_FOUND, CONFLICT, INVALID, FULL))
    def delete(name: VideoId) -> VideoDeleted:
        """Delete a video that is over, and its file."""
        job = stored(name)
        if not job.is_over:
            raise HTTPException(CONFLICT, f"the video is {job.status}; cancel it first")
        worker.path(job.id).unlink(missing_ok=True)  # first, so that a full disk has room for the rest
        store.delete(job.id)
        return VideoDeleted(id=job.id)

    return router
