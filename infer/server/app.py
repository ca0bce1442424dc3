"""The application: the page, the WebSocket, the jobs over HTTP, and what watches over them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from longvideo import __version__
from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.answers import VIDEO_BYTES, Health, ServerAnswer, VideoId, errors
from longvideo.infer.server.job_routes import job_routes
from longvideo.infer.server.job_store import JobStore
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import first_reason
from longvideo.infer.server.metrics import CONTENT_TYPE, Metrics
from longvideo.infer.server.security import Guard, error_answer
from longvideo.infer.server.stream import Streams, talk

READ_BYTES = 64 * 1024
PAGE = Path(__file__).parent / "page"
TINY_EXAMPLES = [
    "a small red circle drifts left over a black background",
    "a large blue star spins on a meadow",
    "a yellow ring circles clockwise at night",
    "a large orange cross zigzags up and down over a checkerboard",
    "a green triangle pulses and a small pink square moves right over a gray background",
    "at night, a red star falls while a large cyan ring flies to the left",
]


def build_app(pipeline: StreamingPipeline, settings: ServerSettings) -> FastAPI:
    """Build the application; `app.state` has the streams and the worker of jobs, which are to be closed first."""
    for name in ("streams", "videos"):
        (settings.folder / name).mkdir(parents=True, exist_ok=True)
    metrics = Metrics()
    streams = Streams(pipeline, settings, metrics)
    store = JobStore(settings.folder / "jobs.sqlite")
    worker = JobWorker(pipeline, store, settings.folder / "videos", metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await streams.close()
        worker.close()
        store.close()

    app = FastAPI(
        title="longvideo",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # the page of FastAPI loads scripts from elsewhere
        redoc_url=None,
        responses=errors(HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN),
    )
    app.state.streams, app.state.worker = streams, worker
    app.add_middleware(Guard, settings=settings)
    _add_error_handlers(app)
    _add_routes(app, pipeline, settings, streams, store, metrics)
    app.include_router(job_routes(pipeline, settings, store, worker), dependencies=_token_in_description(settings))
    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _add_routes(
    app: FastAPI,
    pipeline: StreamingPipeline,
    settings: ServerSettings,
    streams: Streams,
    store: JobStore,
    metrics: Metrics,
) -> None:
    model = pipeline.models.settings

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    @app.get("/healthz")
    def health() -> Health:
        """Whether the server answers."""
        return Health()

    @app.get("/v1/server")
    def server() -> ServerAnswer:
        """What is served, and whether it takes a token."""
        return ServerAnswer(
            model=settings.model,
            needs_token=settings.token is not None,
            max_seconds=settings.limits.stream_seconds,
            fps=model.fps,
            width=model.width,
            height=model.height,
            steps=model.steps,
            guidance=model.guidance,
            examples=TINY_EXAMPLES if settings.model == "tiny" else [],
        )

    token = _token_in_description(settings)

    @app.get("/metrics", dependencies=token, response_class=PlainTextResponse)
    def counters() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        text = metrics.text(live=streams.num_live, jobs=store.counts())
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.get(
        "/v1/streams/{name}/content",
        dependencies=token,
        response_class=FileResponse,
        responses={200: VIDEO_BYTES, **errors(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY)},
    )
    def stream_content(name: VideoId) -> Response:
        """What a live stream has made so far; ranges may be asked for when it has ended."""
        path = settings.folder / "streams" / f"{name}.mp4"
        if not path.is_file():
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such stream")
        if streams.is_live(name):  # FileResponse promises a length and then sends what the file has grown to
            return StreamingResponse(_read_start(path, path.stat().st_size), media_type="video/mp4")
        return FileResponse(path, media_type="video/mp4", filename=f"{name}.mp4")

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await talk(websocket, streams)


def _read_start(path: Path, size: int) -> Iterator[bytes]:
    """Read the first bytes of a file that changes; fewer if a seek makes it shorter meanwhile."""
    with path.open("rb") as file:
        while size > 0 and (data := file.read(min(size, READ_BYTES))):
            size -= len(data)
            yield data


def _token_in_description(settings: ServerSettings) -> list[Any]:
    """Say in /openapi.json that a token is wanted, if so; `Guard` is who looks at it."""
    return [] if settings.token is None else [Depends(HTTPBearer(auto_error=False))]


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_answer(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_request", first_reason(error.errors()))

    @app.exception_handler(UserError)
    def unusable(request: Request, error: UserError) -> JSONResponse:
        return error_answer(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_request", str(error))

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        answer = error_answer(status, status.name.lower(), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
