"""Access control: token, host names, origins and sizes, checked before the application handles a request."""

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
UPLOAD_PATHS = frozenset({"/v1/videos", "/v1/references"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
DEFAULT_PORTS = {"http": 80, "https": 443}
SUBPROTOCOL = "longvideo.v1"
BEARER_SUBPROTOCOL = "bearer."
PAGE_POLICY = (
    "default-src 'self'; media-src 'self' blob:; connect-src 'self' ws: wss:; img-src 'self' blob:; style-src 'self'; "
    "script-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def new_id() -> str:
    """Return a random id for a stream or a job, which cannot be guessed."""
    return secrets.token_urlsafe(ID_BYTES)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_listening(host: str, token: str | None) -> None:
    """Raise UserError for a weak token, and for an address that other machines reach without a token."""
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token and len(token) >= 8):
        raise UserError(
            "the token is too short or has other characters; expected 8 or more ASCII characters without spaces; "
            "generate one with openssl rand -hex 16"
        )
    if token is None and not is_loopback(host):
        raise UserError(f"{host} is reachable from other machines; use --token, or listen on 127.0.0.1")


def has_token(token: str | None, headers: Headers, subprotocols: Iterable[str] = ()) -> bool:
    """Return whether a request has the token in its Authorization header or in a subprotocol that it offers."""
    if token is None:
        return True
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    tokens = [credentials] if scheme.lower() == "bearer" else []
    tokens += [name.removeprefix(BEARER_SUBPROTOCOL) for name in subprotocols if name.startswith(BEARER_SUBPROTOCOL)]
    # bytes: compare_digest refuses text that is not ASCII
    return any(hmac.compare_digest(candidate.strip().encode(), token.encode()) for candidate in tokens)


def check_public_hosts(names: Sequence[str]) -> frozenset[str]:
    """Return host names in lower case, without brackets. Raises UserError for a text that is not a host name."""
    for name in names:
        if not HOST_NAME.fullmatch(name) or _host_and_port(name) != (name.lower().strip("[]"), None):
            raise UserError(
                f"{name!r} is not a host name; expected one such as video.example.org, without scheme or port"
            )
    return frozenset(name.lower().strip("[]") for name in names)


def is_cross_origin(headers: Headers, public_hosts: Collection[str]) -> bool:
    """Return whether a browser sent the request for a page of a server with another name or port."""
    return any(not _is_own(origin, headers.get("host", ""), public_hosts) for origin in headers.getlist("origin"))


def _is_own(origin: str, host: str, public_hosts: Collection[str]) -> bool:
    scheme, _, address = origin.partition("://")
    name, port = _host_and_port(address)
    own_name, own_port = _host_and_port(host)
    default_port = DEFAULT_PORTS.get(scheme.lower())
    return name in public_hosts or (name != "" and (name, port or default_port) == (own_name, own_port or default_port))


def _host_and_port(address: str) -> tuple[str, int | None]:
    """Return the host name in lower case and the port; the name is empty if the text is not an address."""
    try:
        parts = urlsplit("//" + address)
        is_address = parts.netloc == address and "@" not in address
        return (parts.hostname or "", parts.port) if is_address else ("", None)
    except ValueError:  # the brackets do not contain an address, or the port is not a number
        return "", None


def error_answer(status: HTTPStatus, code: str, message: str, *, field: str | None = None) -> JSONResponse:
    """Return an answer with the body `{"error": {"message", "type", "param", "code"}}`, the form of all HTTP errors.

    It is that of OpenAI's interface. field: name of the field or of the parameter that is wrong, if it is one.
    """
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    error = {"message": _encodable(message), "type": kind, "param": field and _encodable(field), "code": code}
    return JSONResponse({"error": error}, status)


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON can escape and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def handshake_refusal(headers: Headers, settings: ServerSettings) -> tuple[str, str] | None:
    """Return the code and message of the error for a WebSocket of another host or page, or None to accept it."""
    return _host_refusal(headers, settings) or _origin_refusal(headers, settings)


class Guard:
    """ASGI middleware that refuses other hosts, pages of other servers, large bodies and requests without the token.

    A request arrives here when its head is complete. Its body is read to the end before any answer is sent, because a
    client that is still sending when the connection is closed cannot read the answer. WebSockets pass: `HttpConnection`
    has refused those of other hosts and pages, and the token is checked after the handshake, because browsers cannot
    read a refused handshake.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._num_requests = self._num_uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, _with_headers(send))
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        refusal = _host_refusal(headers, self._settings)
        if refusal is None and scope["method"] not in SAFE_METHODS:
            refusal = _origin_refusal(headers, self._settings)
        if refusal is not None:
            return error_answer(HTTPStatus.FORBIDDEN, *refusal)
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if not is_open and not has_token(self._settings.token, headers):
            message = "the token is missing or wrong; send the header Authorization: Bearer TOKEN"
            refusal = error_answer(HTTPStatus.UNAUTHORIZED, "unauthorized", message)
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return refusal
        return None

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, limits = Headers(scope=scope), self._settings.limits
        is_upload = scope["path"] in UPLOAD_PATHS and _may_exceed(headers, limits.message_bytes)
        limit = limits.upload_bytes if is_upload else limits.message_bytes
        refusal = self._refusal(scope, headers)
        if refusal is None and _announced_bytes(headers) > limit:
            refusal = _too_large(limit)
        if refusal is None and is_upload and self._num_uploads >= limits.parallel_uploads:
            refusal = _busy("too many parallel uploads; retry later")
        if refusal is not None and headers.get("expect", "").lower() == "100-continue":
            refusal.headers["connection"] = "close"  # the client does not send its body after a refusal
            await refusal(scope, receive, send)
            return
        counts = is_upload and refusal is None
        self._num_uploads += counts
        try:
            body = await _read_body(receive, max_bytes=0 if refusal is not None else limit)
            if body is None:
                return
            if refusal is None and len(body) > limit:
                refusal = _too_large(limit)
            await self._answer(scope, _replay(body, receive), send, refusal)
        finally:
            self._num_uploads -= counts

    async def _answer(self, scope: Scope, receive: Receive, send: Send, refusal: JSONResponse | None) -> None:
        """Answer a request whose body has been read. refusal: answer without the application, or None."""
        if refusal is None and self._num_requests >= self._settings.limits.parallel_requests:
            refusal = _busy("too many parallel requests; retry later")
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._num_requests += 1
        try:
            await self._app(_as_get(scope), receive, send)
        finally:
            self._num_requests -= 1


async def _read_body(receive: Receive, *, max_bytes: int) -> bytes | None:
    """Read a body to its end and return its first `max_bytes` + 1 bytes; return None if the client disconnects."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")[: max_bytes + 1 - len(body)]
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that yields a body that was read before, then the messages after it."""
    is_first = True

    async def replay() -> Message:
        nonlocal is_first
        if not is_first:
            return await receive()
        is_first = False
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _as_get(scope: Scope) -> Scope:
    """Turn a HEAD request into a GET request whose answer has no body."""
    if scope["method"] != "HEAD":
        return scope
    return {**scope, "method": "GET", "state": {**scope["state"], HEAD_ONLY: True}}


def _announced_bytes(headers: Headers) -> int:
    length = headers.get("content-length", "0")  # uvicorn refuses values that are not digits
    return int(length) if len(length) <= MAX_DIGITS else sys.maxsize


def _may_exceed(headers: Headers, num_bytes: int) -> bool:
    """Return whether a body may have more bytes than this; one that is sent in chunks announces no length."""
    return "transfer-encoding" in headers or _announced_bytes(headers) > num_bytes


def _busy(message: str) -> JSONResponse:
    return error_answer(HTTPStatus.SERVICE_UNAVAILABLE, "busy", message)


def _too_large(limit: int) -> JSONResponse:
    message = f"the body is too large; expected at most {limit} bytes"
    return error_answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)


def _host_refusal(headers: Headers, settings: ServerSettings) -> tuple[str, str] | None:
    if settings.token is None and not all(
        is_loopback(name) or name in settings.public_hosts for name in _host_names(headers)
    ):
        return "bad_host", "the header Host is not a loopback name; start the server with --public-host or --token"
    return None


def _origin_refusal(headers: Headers, settings: ServerSettings) -> tuple[str, str] | None:
    if is_cross_origin(headers, settings.public_hosts):
        return "bad_origin", "the header Origin names another server; use the page of this server"
    return None


def _host_names(headers: Headers) -> list[str]:
    """Return the host names of a request: one, or several if an attacker sends several Host headers."""
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
