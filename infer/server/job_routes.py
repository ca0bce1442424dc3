"""Jobs over HTTP: create a video in the background, poll its progress, download it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.answers import (
    Id,
    RemixVideo,
    VideoAnswer,
    VideoDeleted,
    VideoList,
    content_of,
    errors,
)
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.job_admission import JobAdmission
from longvideo.infer.server.job_pictures import SHEET_TYPE, THUMBNAIL_TYPE, sprite_sheet, thumbnail
from longvideo.infer.server.job_request import JobRequest, describe_job_request, read_job_request
from longvideo.infer.server.job_store import Job, JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.reference_files import ReferenceChecker

NOT_FOUND, CONFLICT, INVALID = HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY
FULL = HTTPStatus.INSUFFICIENT_STORAGE
CREATION = (INVALID, HTTPStatus.TOO_MANY_REQUESTS, FULL)


def job_routes(
    pipeline: StreamingPipeline,
    settings: ServerSettings,
    store: JobStore,
    worker: JobWorker,
    checker: ReferenceChecker,
) -> APIRouter:
    """Return the routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos")
    admission = JobAdmission(pipeline, settings, store, worker, checker)

    def answer(job: Job) -> VideoAnswer:
        return VideoAnswer.of(job, model=settings.model, size=admission.size, fps=pipeline.fps)

    def stored(name: str) -> Job:
        if (job := store.get(name)) is None:
            raise HTTPException(NOT_FOUND, "there is no video with this id")
        return job

    @router.post(
        "",
        responses=errors(*CREATION, HTTPStatus.BAD_REQUEST, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
        openapi_extra=describe_job_request(),
    )
    def create(request: Annotated[JobRequest, Depends(read_job_request)]) -> VideoAnswer:
        """Queue a video."""
        return answer(admission.create(request))

    @router.post("/{name}/remix", responses=errors(*CREATION, NOT_FOUND))
    def remix(name: Id, body: RemixVideo) -> VideoAnswer:
        """Queue a video with another prompt, and the length, seed, beginning and options of an existing one."""
        return answer(admission.remix(stored(name), body))

    @router.get("", responses=errors(NOT_FOUND, INVALID))
    def page(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[Id | None, Query()] = None,
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
    def one(name: Id) -> VideoAnswer:
        """Return the status and progress of a video."""
        return answer(stored(name))

    @router.get(
        "/{name}/content",
        response_class=Response,
        responses={**content_of("video/mp4", THUMBNAIL_TYPE, SHEET_TYPE), **errors(CONFLICT, INVALID)},
    )
    def content(name: Id, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
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
    def cancel(name: Id) -> VideoAnswer:
        """Cancel a video after the current chunk. A finished video does not change."""
        worker.cancel(stored(name).id)
        return answer(stored(name))

    @router.delete("/{name}", responses=errors(NOT_FOUND, CONFLICT, INVALID, FULL))
    def delete(name: Id) -> VideoDeleted:
        """Delete a finished video and its files."""
        job = stored(name)
        if not job.is_over:
            raise HTTPException(CONFLICT, f"the video is {job.status}; cancel it first")
        worker.delete_files(job.id)  # first, because this frees space for the change of the list
        store.delete(job.id)
        return VideoDeleted(id=job.id)

    return router
