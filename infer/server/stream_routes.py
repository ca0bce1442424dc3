"""Live streams over HTTP: upload what a stream begins with, and download its file."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from longvideo.infer.server.answers import ReferenceAnswer, content_of, errors
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import Id
from longvideo.infer.server.references import References
from longvideo.infer.server.served_folder import STREAMS
from longvideo.infer.server.stream import Streams

FILE_TYPE = "application/octet-stream"


def stream_routes(settings: ServerSettings, streams: Streams, references: References) -> APIRouter:
    """Return the routes of live streams except for the WebSocket."""
    router = APIRouter(prefix="/v1")

    @router.post(
        "/references",
        responses=errors(HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.INSUFFICIENT_STORAGE),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {FILE_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    def upload(content: Annotated[bytes, Depends(_read_body)]) -> ReferenceAnswer:
        """Store a picture or a video with which a live stream can begin. The body is the file, of any Content-Type."""
        reference = references.add(content)
        return ReferenceAnswer(id=reference.id, kind="video" if reference.is_video else "picture")

    @router.get(
        "/streams/{name}/content",
        response_class=Response,
        responses={**content_of("video/mp4"), **errors(HTTPStatus.UNPROCESSABLE_ENTITY)},
    )
    def content(name: Id) -> Response:
        """Download the part of a live stream that is generated. Ranges are supported once the stream has ended."""
        path = settings.folder / STREAMS / f"{name}.mp4"
        return FileContent(path, media_type="video/mp4", download=True, grows=streams.is_live(name))

    return router


async def _read_body(request: Request) -> bytes:
    return await request.body()
