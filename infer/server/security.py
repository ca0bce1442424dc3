"""Who may ask: token, host names, origins, and sizes; checked before anything of the application runs."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longvideo.errors import UserError
from longvideo.infer.server.limits import ServerSettings

ID_BYTES = 16
ID_PATTERN = "^[A-Za-z0-9_-]{22}$"
OPEN_PATHS = frozenset({"/", "/healthz", "/v1/server", "/openapi.json"})
OPEN_FOLDER = "/page/"
STREAM_PATH = "/v1/stream"  # looks at the token itself, to say what is wrong where a browser can read it
SAFE_METHODS = frozenset({"GET", "HEAD"})
SUBPROTOCOL = "longvideo.v1"
BEARER_SUBPROTOCOL = "bearer."
POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1
PAGE_POLICY = (
    "default-src 'self'; media-src 'self' blob:; connect-src 'self' ws: wss:; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def new_id() -> str:
    """Return a name that cannot be guessed, for a stream or a job."""
    return secrets.token_urlsafe(ID_BYTES)


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_listening(host: str, token: str | None) -> None:
    """Raise UserError unless it is safe to listen there: beyond this machine only with a token."""
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token and len(token) >= 8):
        raise UserError(
            "the token must be 8 or more ASCII characters without spaces; make one with openssl rand -hex 16"
        )
    if token is None and not is_loopback(host):
        raise UserError(f"listening on {host} lets others in; give --token, or listen on 127.0.0.1")


def token_fits(token: str | None, headers: Headers, subprotocols: Iterable[str] = ()) -> bool:
    """Tell whether a request brings the token, in its Authorization header or among the subprotocols it offers."""
    if token is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    offered = [given] if scheme.lower() == "bearer" else []
    offered += [name.removeprefix(BEARER_SUBPROTOCOL) for name in subprotocols if name.startswith(BEARER_SUBPROTOCOL)]
    # bytes: compare_digest refuses text that is not ASCII
    return any(hmac.compare_digest(given.strip().encode(), token.encode()) for given in offered)


def comes_from_elsewhere(headers: Headers) -> bool:
    """Tell whether a browser sent this for a page of another server."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def error_answer(status: HTTPStatus, code: str, message: str) -> JSONResponse:
    """Return `{"error": {"code", "message"}}`, the form of every error over HTTP."""
    text = message.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot
    return JSONResponse({"error": {"code": code, "message": text}}, status)


class Guard:
    """ASGI middleware: refuses foreign hosts, pages of other servers, large bodies and requests without the token."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["type"] == "http":
            await self._http(scope, receive, _with_headers(send))
        elif refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, _with_headers(send))
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # before accepting: HTTP 403

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if self._settings.loopback and not all(map(is_loopback, _host_names(headers))):
            return error_answer(HTTPStatus.FORBIDDEN, "bad_host", "this server answers to its loopback names only")
        is_websocket = scope["type"] == "websocket"
        if (is_websocket or scope["method"] not in SAFE_METHODS) and comes_from_elsewhere(headers):
            return error_answer(HTTPStatus.FORBIDDEN, "bad_origin", "requests from pages of other servers are refused")
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or (is_websocket and path == STREAM_PATH)
        if not is_open and not token_fits(self._settings.token, headers):
            refusal = error_answer(
                HTTPStatus.UNAUTHORIZED, "unauthorized", "send the header Authorization: Bearer TOKEN"
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return refusal
        return None

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        limit = self._settings.limits.message_bytes
        while more and len(body) <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > limit:
            refusal = error_answer(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"a body has at most {limit} bytes"
            )
            await refusal(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def _host_names(headers: Headers) -> list[str]:
    """Return the names under which a request looks for this server: one, unless somebody tries something."""
    try:
        return [urlsplit("//" + host).hostname or "" for host in headers.getlist("host") or [""]]
    except ValueError:  # no address between brackets
        return [""]


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
            extra |= {"cache-control": "no-cache", "referrer-policy": "no-referrer"}
            pairs = [(name.encode(), value.encode()) for name, value in extra.items()]
            message["headers"] = [*message.get("headers", []), *pairs]
        await send(message)

    return with_headers
