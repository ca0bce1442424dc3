"""Bounds on connections: how long a client takes to send a request and to read the answer, and how many wait.

A client that has not yet sent a whole request takes none of the places of requests that are answered. When too many
wait, the one that has waited longest is closed: a client that sends its request at once is never that one. There is no
bound for each address, so a proxy in front is treated as any other client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from longvideo.infer.server.limits import Limits
from longvideo.infer.server.security import error_answer

HEAD_BYTES = 64 * 1024
FAST_BODY = 16 * 1024  # bytes per second; a body at this speed is read to its end, however large, and then refused
LINGER_SECONDS = 2.0  # for the last answer to one that may still be sending


class Waiting:
    """The connections whose client has not yet said what it wants. Used by the event loop alone."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._closers: dict[object, Callable[[], object]] = {}  # in the order in which they came

    def __len__(self) -> int:
        return len(self._closers)

    def enter(self, connection: object, close: Callable[[], object]) -> None:
        """Count a connection as waiting; one that is counted already keeps its turn."""
        if connection not in self._closers and len(self._closers) >= self.limits.waiting:
            self.close_oldest()
        self._closers.setdefault(connection, close)

    def leave(self, connection: object) -> None:
        """Count a connection no more. Leaving twice does nothing."""
        self._closers.pop(connection, None)

    def close_oldest(self) -> bool:
        """Close the connection that has waited longest; return whether there was one."""
        oldest = next(iter(self._closers), None)
        if oldest is None:
            return False
        self._closers.pop(oldest)()
        return True


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection with bounds, and with errors in the form of all others."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        app: Any = config.app
        self._waiting: Waiting = app.state.waiting
        self._limits = self._waiting.limits
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
        self._wait(self._limits.head)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._settle()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # taken and dropped: a connection that is closed with unread data loses the answer as well
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
        if self._parsed_bytes > HEAD_BYTES:  # it came whole in one piece, so `data_received` never waits for its end
            raise ValueError("the head is too large")  # ends the parser, and `send_400_response` is called
        self._in_head, self._in_body = False, True
        super().on_headers_complete()
        self._wait(self._limits.body)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()
        self._settle()
        if self.cycle is not None and self.cycle.response_complete:
            self._wait(self._limits.head)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait(self._limits.sending)
        elif self.cycle.response_complete and not self._in_body:
            self._wait(self._limits.head)

    def handle_websocket_upgrade(self) -> None:
        self._settle()  # the conversation has bounds of its own
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.sending, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        if self._parsed_bytes > HEAD_BYTES:
            self._refuse_head()
            return
        self._refuse(HTTPStatus.BAD_REQUEST, "bad_request", "this is not an HTTP request that can be read")

    def _wait(self, seconds: float) -> None:
        """Expect something of the client within so many seconds."""
        self._settle()
        self._body_bytes = 0
        self._deadline = self.loop.call_later(seconds, self._give_up)
        self._waiting.enter(self, self._close)

    def _settle(self) -> None:
        """Expect nothing of the client."""
        self._waiting.leave(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self._in_body and self._body_bytes > FAST_BODY * self._limits.body:
            self._wait(self._limits.body)
        else:
            self._close()

    def _close(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        elif self._in_head or self._in_body:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "timeout", "the request was not complete in time")
        else:
            self._settle()
            self.transport.close()

    def _refuse_head(self) -> None:
        message = f"the head of a request has at most {HEAD_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too_large", message)

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer outside of the application, and close the connection when the client could read that."""
        self._refused = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw_answer(status, code, message))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._settle()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _raw_answer(status: HTTPStatus, code: str, message: str) -> bytes:
    answer = error_answer(status, code, message)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode(), b"connection: close"]
    lines += [name + b": " + value for name, value in answer.raw_headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(answer.body)
