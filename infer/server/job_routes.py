"""Jobs over HTTP: create a video in the background, poll its progress, download it."""

from __future__ import annotations

import threading
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from longvideo.errors import UserError
from longvideo.files import write_bytes
from longvideo.infer.options import shown
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.script import Script
from longvideo.infer.server.answers import (
    PromptVideo,
    RemixVideo,
    ShotsVideo,
    VideoAnswer,
    VideoDeleted,
    VideoId,
    VideoList,
    content_of,
    errors,
)
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.job_pictures import SHEET_TYPE, THUMBNAIL_TYPE, first_frame_png, sprite_sheet, thumbnail
from longvideo.infer.server.job_request import (
    PICTURE,
    FieldError,
    JobRequest,
    describe_job_request,
    read_job_request,
)
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import Refusal
from longvideo.infer.server.security import new_id

NOT_FOUND, CONFLICT, INVALID = HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY
FULL = HTTPStatus.INSUFFICIENT_STORAGE
CREATION = (INVALID, HTTPStatus.TOO_MANY_REQUESTS, FULL)


def job_routes(pipeline: StreamingPipeline, settings: ServerSettings, store: JobStore, worker: JobWorker) -> APIRouter:
    """Return the routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos")
    limits = settings.limits
    model = pipeline.models.settings
    size = f"{model.width}x{model.height}"
    decoding = threading.Lock()  # a large picture takes much memory, so one at a time is decoded

    def answer(job: Job) -> VideoAnswer:
        return VideoAnswer.of(job, model=settings.model, size=size, fps=pipeline.fps)

    def stored(name: str) -> Job:
        if (job := store.get(name)) is None:
            raise HTTPException(NOT_FOUND, "there is no video with this id")
        return job

    def script_of(body: PromptVideo | ShotsVideo) -> Script:
        """Return the script of a request, which is checked against the limits. Raises UserError."""
        try:
            script = body.script(limits.prompt_length)
        except Refusal as refusal:
            raise UserError(str(refusal)) from refusal
        if script.seconds > limits.job_seconds:
            raise UserError(f"the video has {script.seconds:g} seconds; expected at most {limits.job_seconds:g}")
        if len(script.shots) > limits.job_shots:
            raise UserError(f"the video has {len(script.shots)} shots; expected at most {limits.job_shots}")
        return script

    def queue(job: Job, picture: bytes | None) -> VideoAnswer:
        """Queue a job. picture: PNG of its first frame."""
        queued = None
        try:
            if picture is not None:
                write_bytes(worker.picture_path(job.id), picture)
            queued = store.add(job, max_queued=limits.queued_jobs)
        finally:
            if queued is None:
                worker.delete_files(job.id)
        if queued is None:
            message = f"{limits.queued_jobs} videos are queued, the maximum; retry later"
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message)
        worker.submit(queued)
        return answer(queued)

    def first_frame(data: bytes) -> bytes:
        """Return a client's picture as a PNG of the size of the video. Raises FieldError."""
        try:
            with decoding:
                return first_frame_png(data, name=PICTURE, height=model.height, width=model.width)
        except UserError as error:
            raise FieldError(PICTURE, str(error)) from error

    @router.post(
        "",
        responses=errors(*CREATION, HTTPStatus.BAD_REQUEST, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
        openapi_extra=describe_job_request(),
    )
    def create(request: Annotated[JobRequest, Depends(read_job_request)]) -> VideoAnswer:
        """Queue a video."""
        body = request.body
        if body.model not in (None, settings.model):
            message = f"model names a model that is not served; expected {settings.model}, or leave it out"
            raise FieldError("model", message)
        if body.size not in (None, size):
            raise FieldError(
                "size", f"size is {shown(body.size)}; this model generates {size}; use that, or leave it out"
            )
        script = script_of(body)
        job = Job(
            new_id(),
            "queued",
            script.shots,
            body.seed,
            body.steps,
            body.guidance,
            pipeline.plan(script).num_frames,
            has_picture=request.picture is not None,
        )
        return queue(job, None if request.picture is None else first_frame(request.picture))

    @router.post("/{name}/remix", responses=errors(*CREATION, NOT_FOUND))
    def remix(name: VideoId, body: RemixVideo) -> VideoAnswer:
        """Queue a video with another prompt, and the length, seed, first frame and options of an existing one."""
        source = stored(name)
        script = script_of(PromptVideo(prompt=body.prompt, seconds=Script(source.shots).seconds))
        job = source.repeated(new_id(), script.shots)
        try:
            picture = worker.picture_path(source.id).read_bytes() if source.has_picture else None
        except OSError as error:
            raise HTTPException(CONFLICT, "the first frame of the video cannot be read; send it again") from error
        return queue(job, picture)

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
        videos = [answer(job) for job in jobs[:limit]]
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoList(data=videos, first_id=first, last_id=last, has_more=len(jobs) > limit)

    @router.get("/{name}", responses=errors(NOT_FOUND, INVALID))
    def one(name: VideoId) -> VideoAnswer:
        """Return the status and progress of a video."""
        return answer(stored(name))

    @router.get(
        "/{name}/content",
        response_class=Response,
        responses={**content_of("video/mp4", THUMBNAIL_TYPE, SHEET_TYPE), **errors(CONFLICT, INVALID)},
    )
    def content(name: VideoId, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
        """Download a completed video, or the frames of an interrupted or failed one. Ranges are supported.

        variant: `thumbnail` is the first frame as WebP, `spritesheet` a JPEG with up to 16 frames.
        """
        job = stored(name)
        path = worker.path(job.id)
        if job.status not in ("completed", "interrupted", "failed") or not path.is_file():
            raise HTTPException(CONFLICT, f"the video is {job.status} and has no file")
        if variant == "thumbnail":
            return Response(thumbnail(path), media_type=THUMBNAIL_TYPE)
        if variant == "spritesheet":
            return Response(sprite_sheet(path), media_type=SHEET_TYPE)
        return FileContent(path, media_type="video/mp4", download=True)

    @router.post("/{name}/cancel", responses=errors(NOT_FOUND, INVALID))
    def cancel(name: VideoId) -> VideoAnswer:
        """Cancel a video after the current chunk. A finished video does not change."""
        worker.cancel(stored(name).id)
        return answer(stored(name))

    @router.delete("/{name}", responses=errors(NOT_FOUND, CONFLICT, INVALID, FULL))
    def delete(name: VideoId) -> VideoDeleted:
        """Delete a finished video and its files."""
        job = stored(name)
        if not job.is_over:
            raise HTTPException(CONFLICT, f"the video is {job.status}; cancel it first")
        worker.delete_files(job.id)  # first, because this frees space for the change of the list
        store.delete(job.id)
        return VideoDeleted(id=job.id)

    return router
