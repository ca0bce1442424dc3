"""A WebSocket whose client may be gone at any moment: every call then raises one error, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import WebSocket, WebSocketDisconnect
from starlette.datastructures import Headers


class ClientLeft(Exception):
    """The connection is closed, by the client, the network or this side."""


class ClientSocket:
    """One connection, as the ASGI server gives it."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    @property
    def headers(self) -> Headers:
        return self._websocket.headers

    @property
    def subprotocols(self) -> Sequence[str]:
        """What the client offers."""
        return self._websocket.scope["subprotocols"]

    async def accept(self, subprotocol: str | None) -> None:
        with _client_may_leave():
            await self._websocket.accept(subprotocol)

    async def receive(self) -> str | None:
        """Return a text message, or None for a binary one."""
        with _client_may_leave():
            message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise ClientLeft("the client closed the connection")
        return message.get("text")

    async def send(self, text: str, data: bytes | None = None) -> None:
        """Send a text message, and the binary one that follows it."""
        with _client_may_leave():
            await self._websocket.send_text(text)
            if data is not None:
                await self._websocket.send_bytes(data)

    async def close(self, code: int) -> None:
        with _client_may_leave():
            await self._websocket.close(code)


@contextmanager
def _client_may_leave() -> Iterator[None]:
    try:
        yield
    except (WebSocketDisconnect, OSError, RuntimeError) as error:
        # starlette and uvicorn raise, by version and moment, any of the three for a connection that is closed
        raise ClientLeft(str(error) or type(error).__name__) from error
