"""Who may ask: token, host names, origins, and sizes; checked before anything of the application runs."""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import sys
from collections.abc import Collection, Iterable, Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longvideo.errors import UserError
from longvideo.infer.server.content import HEAD_ONLY, MAX_DIGITS
from longvideo.infer.server.limits import ServerSettings

ID_BYTES = 16
ID_PATTERN = "^[A-Za-z0-9_-]{22}$"
OPEN_PATHS = frozenset({"/", "/healthz", "/v1/server", "/openapi.json"})
OPEN_FOLDER = "/page/"
STREAM_PATH = "/v1/stream"  # looks at the token itself, to say what is wrong where a browser can read it
SAFE_METHODS = frozenset({"GET", "HEAD"})
HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
USUAL_PORTS = {"http": 80, "https": 443}
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


def check_public_hosts(names: Sequence[str]) -> frozenset[str]:
    """Return host names as requests are compared with; raise UserError for what is not one."""
    for name in names:
        if not HOST_NAME.fullmatch(name) or _host_and_port(name) != (name.lower().strip("[]"), None):
            raise UserError(f"{name!r} is not a host name; write it as video.example.org, without scheme or port")
    return frozenset(name.lower().strip("[]") for name in names)


def comes_from_elsewhere(headers: Headers, public_hosts: Collection[str]) -> bool:
    """Tell whether a browser sent this for a page of another server: one with another name or port."""
    return any(not _is_own(origin, headers.get("host", ""), public_hosts) for origin in headers.getlist("origin"))


def _is_own(origin: str, host: str, public_hosts: Collection[str]) -> bool:
    scheme, _, place = origin.partition("://")
    name, port = _host_and_port(place)
    own_name, own_port = _host_and_port(host)
    usual = USUAL_PORTS.get(scheme.lower())
    return name in public_hosts or (name != "" and (name, port or usual) == (own_name, own_port or usual))


def _host_and_port(place: str) -> tuple[str, int | None]:
    """Return a host name in lower case and the port; an empty name for what is not a place."""
    try:
        parts = urlsplit("//" + place)
        is_place = parts.netloc == place and "@" not in place
        return (parts.hostname or "", parts.port) if is_place else ("", None)
    except ValueError:  # no address between brackets, or no number
        return "", None


def error_answer(status: HTTPStatus, code: str, message: str) -> JSONResponse:
    """Return `{"error": {"code", "message"}}`, the form of every error over HTTP."""
    text = message.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot
    return JSONResponse({"error": {"code": code, "message": text}}, status)


class Guard:
    """ASGI middleware: refuses foreign hosts, pages of other servers, large bodies and requests without the token.

    A request gets here when its head is complete. Its body is read to the end before it is answered, whatever the
    answer, because a client that still sends when the connection is closed cannot read it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, _with_headers(send))
        elif (refusal := self._refusal(scope, Headers(scope=scope))) is not None:
            await _deny(refusal, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        token, public_hosts = self._settings.token, self._settings.public_hosts
        if token is None and not all(is_loopback(name) or name in public_hosts for name in _host_names(headers)):
            message = "this server answers to its loopback names only; start it with --token or --public-host"
            return error_answer(HTTPStatus.FORBIDDEN, "bad_host", message)
        is_websocket = scope["type"] == "websocket"
        is_safe = not is_websocket and scope["method"] in SAFE_METHODS
        if not is_safe and comes_from_elsewhere(headers, public_hosts):
            return error_answer(HTTPStatus.FORBIDDEN, "bad_origin", "requests from pages of other servers are refused")
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or (is_websocket and path == STREAM_PATH)
        if not is_open and not token_fits(token, headers):
            refusal = error_answer(
                HTTPStatus.UNAUTHORIZED, "unauthorized", "send the header Authorization: Bearer TOKEN"
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return refusal
        return None

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, limit = Headers(scope=scope), self._settings.limits.message_bytes
        refusal = self._refusal(scope, headers)
        if refusal is None and _announced_bytes(headers) > limit:
            refusal = _too_large(limit)
        if refusal is not None and headers.get("expect", "").lower() == "100-continue":
            refusal.headers["connection"] = "close"  # it will not send the body that this connection waits for
            await refusal(scope, receive, send)
            return
        body = await _read_body(receive, most=0 if refusal is not None else limit)
        if body is None:
            return
        if refusal is None and len(body) > limit:
            refusal = _too_large(limit)
        if refusal is None and self._answering >= self._settings.limits.answering:
            refusal = error_answer(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "too many requests at a time; try later")
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._answering += 1
        try:
            await self._app(_as_get(scope), _replay(body, receive), send)
        finally:
            self._answering -= 1


async def _read_body(receive: Receive, *, most: int) -> bytes | None:
    """Read a body to its end, keeping no more than what shows that it is too large; None if the client leaves."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = (body + message.get("body", b""))[: most + 1], message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _as_get(scope: Scope) -> Scope:
    """HEAD is answered as GET is; the server leaves the body out."""
    if scope["method"] != "HEAD":
        return scope
    return {**scope, "method": "GET", "state": {**scope["state"], HEAD_ONLY: True}}


def _announced_bytes(headers: Headers) -> int:
    length = headers.get("content-length", "0")  # digits, or uvicorn would not have taken the request
    return int(length) if len(length) <= MAX_DIGITS else sys.maxsize


def _too_large(limit: int) -> JSONResponse:
    return error_answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", f"a body has at most {limit} bytes")


async def _deny(refusal: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the request for a WebSocket with a refusal, which browsers show as a failed connection."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await refusal(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # before accepting: HTTP 403


def _host_names(headers: Headers) -> list[str]:
    """Return the names under which a request looks for this server: one, unless somebody tries something."""
    return [_host_and_port(host)[0] for host in headers.getlist("host") or [""]]


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
            extra |= {"cache-control": "no-cache", "referrer-policy": "no-referrer"}
            pairs = [(name.encode(), value.encode()) for name, value in extra.items()]
            message["headers"] = [*message.get("headers", []), *pairs]
        await send(message)

    return with_headers
