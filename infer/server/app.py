"""The application: the page, the WebSocket, the jobs over HTTP, and what watches over them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from longvideo import __version__
from longvideo.errors import UserError
from longvideo.files import WriteError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.answers import CONTENT, Health, ServerAnswer, VideoId, errors
from longvideo.infer.server.client_socket import ClientSocket
from longvideo.infer.server.connections import Waiting
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.job_routes import job_routes
from longvideo.infer.server.job_store import JobStore, StoreError
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import first_reason
from longvideo.infer.server.metrics import CONTENT_TYPE, ServerMetrics
from longvideo.infer.server.security import OPEN_FOLDER, Guard, error_answer
from longvideo.infer.server.served_folder import DATABASE, STREAMS, VIDEOS
from longvideo.infer.server.stream import Streams, talk

EVERYWHERE = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
TINY_EXAMPLES = [
    "a small red circle drifts left over a black background",
    "a large blue star spins on a meadow",
    "a yellow ring circles clockwise at night",
    "a large orange cross zigzags up and down over a checkerboard",
    "a green triangle pulses and a small pink square moves right over a gray background",
    "at night, a red star falls while a large cyan ring flies to the left",
]


def build_app(pipeline: StreamingPipeline, settings: ServerSettings) -> FastAPI:
    """Build the application for a folder that this process holds (`served_folder`).

    `app.state` has the streams and the worker of jobs, which are to be closed first, and the waiting connections.
    """
    metrics = ServerMetrics()
    streams = Streams(pipeline, settings, metrics)
    store = JobStore(settings.folder / DATABASE)
    worker = JobWorker(pipeline, store, settings.folder / VIDEOS, metrics)

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
        responses=errors(*EVERYWHERE),
    )
    app.state.streams, app.state.worker, app.state.waiting = streams, worker, Waiting(settings.limits)
    app.add_middleware(Guard, settings=settings)
    _add_error_handlers(app)
    _add_routes(app, pipeline, settings, streams, store, metrics)
    app.include_router(job_routes(pipeline, settings, store, worker), dependencies=_token_in_description(settings))
    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileContent(files["index.html"], media_type="text/html")

    @app.get(OPEN_FOLDER + "{name}", include_in_schema=False)
    def page(name: str) -> Response:
        if (path := files.get(name)) is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the page has no such file")
        return FileContent(path, media_type=PAGE_TYPES[path.suffix])


def _add_routes(
    app: FastAPI,
    pipeline: StreamingPipeline,
    settings: ServerSettings,
    streams: Streams,
    store: JobStore,
    metrics: ServerMetrics,
) -> None:
    model = pipeline.models.settings

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
        response_class=Response,
        responses={**CONTENT, **errors(HTTPStatus.UNPROCESSABLE_ENTITY)},
    )
    def stream_content(name: VideoId) -> Response:
        """What a live stream has made so far; ranges may be asked for when it has ended."""
        path = settings.folder / STREAMS / f"{name}.mp4"
        return FileContent(path, media_type="video/mp4", download=True, grows=streams.is_live(name))

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await talk(ClientSocket(websocket), streams, app.state.waiting)


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

    @app.exception_handler(WriteError)
    @app.exception_handler(StoreError)
    def full(request: Request, error: UserError) -> JSONResponse:
        return error_answer(HTTPStatus.INSUFFICIENT_STORAGE, "storage", str(error))

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> JSONResponse:
        return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "this cannot be answered; the log says why")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        answer = error_answer(status, status.name.lower(), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
