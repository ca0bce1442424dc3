"""Limits on connections: the time to send a request and to read the answer, and the number of waiting connections.

A waiting connection is one whose client has not yet sent a whole request. Waiting connections do not count against the
limit of parallel requests. When there are too many, the oldest is closed, which is never one whose client sends its
request at once. There is no limit for each address, so a reverse proxy is treated like any other client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from longvideo.infer.server.limits import Limits, ServerSettings
from longvideo.infer.server.security import error_answer, handshake_refusal

HEAD_BYTES = 64 * 1024
FAST_BODY = 16 * 1024  # bytes per second; a body at this speed is read to its end before it is refused for its size
LINGER_SECONDS = 2.0  # time to deliver the last answer to a client that may still be sending

log = logging.getLogger(__name__)


class WaitingConnections:
    """The connections whose client has not yet sent a whole request. Only the event loop uses it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._closers: dict[object, Callable[[], object]] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._closers)

    def add(self, connection: object, close: Callable[[], object]) -> None:
        """Add a connection, with a function that closes it. One that is waiting already keeps its place."""
        if connection not in self._closers and len(self._closers) >= self.limits.waiting_connections:
            self.close_oldest()
        self._closers.setdefault(connection, close)

    def remove(self, connection: object) -> None:
        """Remove a connection. Removing it twice does nothing."""
        self._closers.pop(connection, None)

    def close_oldest(self) -> bool:
        """Close the oldest waiting connection; return whether there was one."""
        oldest = next(iter(self._closers), None)
        if oldest is None:
            return False
        self._closers.pop(oldest)()
        return True


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection with limits, and with errors in the same form as all others.

    It refuses WebSockets of other hosts and pages itself, because uvicorn logs an error if the application does.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        app: Any = config.app
        self._waiting: WaitingConnections = app.state.waiting
        self._settings: ServerSettings = app.state.settings
        self._limits = self._settings.limits
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_body = False
        self._head_bytes = self._body_bytes = 0
        self._parsed_bytes = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._waiting.close_oldest():
            transport.abort()
        self._expect_data(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect_nothing()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # discarded: closing a connection with unread data would also discard the answer
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._parsed_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._parsed_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parsed_bytes += len(name) + len(b": ") + len(value) + len(b"\r\n")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._parsed_bytes > HEAD_BYTES:  # the head arrived in one piece, which `data_received` does not measure
            raise ValueError("the head is too large")  # stops the parser, which then calls `send_400_response`
        self._in_head, self._in_body = False, True
        super().on_headers_complete()
        self._expect_data(self._limits.body_seconds)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()
        self._expect_nothing()
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_data(self._limits.head_seconds)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_data(self._limits.send_seconds)
        elif self.cycle.response_complete and not self._in_body:
            self._expect_data(self._limits.head_seconds)

    def handle_websocket_upgrade(self) -> None:
        self._expect_nothing()  # the WebSocket has its own limits
        headers = Headers(raw=self.headers)
        if (refusal := handshake_refusal(headers, self._settings)) is not None:
            code, message = refusal
            host, origin = headers.get("host", ""), headers.get("origin", "")
            log.info("refused a WebSocket with Host %.100r and Origin %.100r: %s", host, origin, message)
            self._refuse(HTTPStatus.FORBIDDEN, code, message)
            return
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        del msg  # the parser's own words; clients get one message for all of them
        if self._parsed_bytes > HEAD_BYTES:
            self._refuse_head()
            return
        self._refuse(HTTPStatus.BAD_REQUEST, "bad_request", "the request is not valid HTTP")

    def _expect_data(self, seconds: float) -> None:
        """Count the connection as waiting, and close it unless the client proceeds within `seconds`."""
        self._expect_nothing()
        self._body_bytes = 0
        self._deadline = self.loop.call_later(seconds, self._on_deadline)
        self._waiting.add(self, self._close)

    def _expect_nothing(self) -> None:
        """Stop counting the connection as waiting, and cancel its deadline."""
        self._waiting.remove(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        if self._in_body and self._body_bytes > FAST_BODY * self._limits.body_seconds:
            self._expect_data(self._limits.body_seconds)
        else:
            self._close()

    def _close(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        elif self._in_head or self._in_body:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "timeout", "the request was not complete in time")
        else:
            self._expect_nothing()
            self.transport.close()

    def _refuse_head(self) -> None:
        message = f"the head of the request is too large; expected at most {HEAD_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too_large", message)

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer without the application, and close the connection after `LINGER_SECONDS`."""
        self._refused = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw_answer(status, code, message))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._expect_nothing()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _raw_answer(status: HTTPStatus, code: str, message: str) -> bytes:
    answer = error_answer(status, code, message)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode(), b"connection: close"]
    lines += [name + b": " + value for name, value in answer.raw_headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(answer.body)
