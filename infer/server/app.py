"""The ASGI application: the page, the WebSocket, jobs over HTTP, metrics and error handlers."""

from __future__ import annotations

import logging
import time
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
from longvideo.infer.server.answers import Health, ModelAnswer, ModelList, ServerAnswer, errors
from longvideo.infer.server.client_socket import ClientSocket
from longvideo.infer.server.connections import WaitingConnections
from longvideo.infer.server.content import FileContent
from longvideo.infer.server.job_request import FieldError
from longvideo.infer.server.job_routes import job_routes
from longvideo.infer.server.job_store import JobStore, StoreError
from longvideo.infer.server.job_worker import JobWorker
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.messages import first_field, first_reason
from longvideo.infer.server.metrics import CONTENT_TYPE, ServerMetrics
from longvideo.infer.server.reference_files import ReferenceChecker
from longvideo.infer.server.references import References
from longvideo.infer.server.security import OPEN_FOLDER, Guard, error_answer
from longvideo.infer.server.served_folder import DATABASE, REFERENCES, for_clients
from longvideo.infer.server.stream import Streams, serve_client
from longvideo.infer.server.stream_routes import stream_routes

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

log = logging.getLogger(__name__)


def build_app(pipeline: StreamingPipeline, settings: ServerSettings) -> FastAPI:
    """Build the application for a folder that this process has locked (`served_folder`).

    `app.state` holds `streams` and `worker`, which must be closed before the application, and what `HttpConnection`
    uses: `settings`, and `waiting`, the waiting connections. The application must be served with `HttpConnection`,
    which refuses WebSockets of other hosts and pages.
    """
    metrics = ServerMetrics()
    checker = ReferenceChecker(pipeline, settings.limits)
    references = References(checker, settings.folder / REFERENCES, capacity=settings.limits.references)
    streams = Streams(pipeline, settings, metrics, references)
    store = JobStore(settings.folder / DATABASE)
    worker = JobWorker(pipeline, store, settings.folder, metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await streams.close()
        worker.close()
        store.close()

    app = FastAPI(
        title="longvideo",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from another server
        redoc_url=None,
        responses=errors(*EVERYWHERE),
    )
    app.state.settings, app.state.waiting = settings, WaitingConnections(settings.limits)
    app.state.streams, app.state.worker = streams, worker
    app.add_middleware(Guard, settings=settings)
    _add_error_handlers(app, settings)
    token = _described_token(settings)
    _add_descriptions(app, pipeline, settings)
    _add_metrics(app, metrics, streams, store, token)
    app.include_router(stream_routes(settings, streams, references), dependencies=token)
    app.include_router(job_routes(pipeline, settings, store, worker, checker), dependencies=token)
    _add_websocket(app, streams)
    _add_page(app)
    return app


def _add_websocket(app: FastAPI, streams: Streams) -> None:
    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await serve_client(ClientSocket(websocket), streams, app.state.waiting)


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileContent(files["index.html"], media_type="text/html")

    @app.get(OPEN_FOLDER + "{name}", include_in_schema=False)
    def page(name: str) -> Response:
        if (path := files.get(name)) is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the page has no file with this name")
        return FileContent(path, media_type=PAGE_TYPES[path.suffix])


def _add_descriptions(app: FastAPI, pipeline: StreamingPipeline, settings: ServerSettings) -> None:
    model, limits = pipeline.models.settings, settings.limits

    @app.get("/healthz")
    def health() -> Health:
        """Answer as long as the server runs."""
        return Health()

    @app.get("/v1/server")
    def server() -> ServerAnswer:
        """Describe the model that is served and whether a token is required."""
        return ServerAnswer(
            model=settings.model,
            needs_token=settings.token is not None,
            max_seconds=limits.stream_seconds,
            fps=model.fps,
            width=model.width,
            height=model.height,
            steps=model.steps,
            guidance=model.guidance,
            decoder=pipeline.models.decoder_label,
            adapters=list(pipeline.models.adapters),
            takes_references=pipeline.models.encoder.exists,
            max_upload_bytes=limits.upload_bytes,
            max_footage_seconds=limits.footage_seconds,
            examples=TINY_EXAMPLES if settings.model == "tiny" else [],
        )

    token = _described_token(settings)
    served = ModelAnswer(id=settings.model, created=int(time.time()))

    @app.get("/v1/models", dependencies=token)
    def models() -> ModelList:
        """List the model that is served."""
        return ModelList(data=[served])

    @app.get("/v1/models/{name}", dependencies=token, responses=errors(HTTPStatus.NOT_FOUND))
    def one_model(name: str) -> ModelAnswer:
        """Describe the model that is served."""
        if name != settings.model:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no model with this name; expected {settings.model}")
        return served


def _add_metrics(app: FastAPI, metrics: ServerMetrics, streams: Streams, store: JobStore, token: list[Any]) -> None:
    @app.get("/metrics", dependencies=token, response_class=PlainTextResponse)
    def counters() -> PlainTextResponse:
        """Return counters in Prometheus' text format."""
        text = metrics.text(live=streams.num_live, jobs=store.counts())
        return PlainTextResponse(text, media_type=CONTENT_TYPE)


def _described_token(settings: ServerSettings) -> list[Any]:
    """Return the dependency that describes the token in /openapi.json, if there is one. `Guard` checks the token."""
    return [] if settings.token is None else [Depends(HTTPBearer(auto_error=False))]


def _add_error_handlers(app: FastAPI, settings: ServerSettings) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        return error_answer(status, "bad_request", first_reason(errors), field=first_field(errors))

    @app.exception_handler(UserError)
    def unusable(_request: Request, error: UserError) -> JSONResponse:
        field = error.field if isinstance(error, FieldError) else None
        return error_answer(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_request", str(error), field=field)

    @app.exception_handler(WriteError)
    @app.exception_handler(StoreError)
    def full(_request: Request, error: UserError) -> JSONResponse:
        log.error("a request failed: %s", error)
        return error_answer(HTTPStatus.INSUFFICIENT_STORAGE, "storage", for_clients(error, settings.folder))

    @app.exception_handler(Exception)
    def broken(_request: Request, _error: Exception) -> JSONResponse:
        message = "the request failed; the server's log has the reason"
        return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message)

    @app.exception_handler(HTTPException)
    def refused(_request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        answer = error_answer(status, status.name.lower(), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
