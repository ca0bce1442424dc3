"""A WebSocket whose client can disconnect at any moment. Every method then raises ClientDisconnected, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import WebSocket, WebSocketDisconnect
from starlette.datastructures import Headers


class ClientDisconnected(Exception):
    """The client, the network or this side has closed the connection."""


class ClientSocket:
    """The WebSocket connection of one client."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    @property
    def headers(self) -> Headers:
        return self._websocket.headers

    @property
    def subprotocols(self) -> Sequence[str]:
        """Subprotocols that the client offers."""
        return self._websocket.scope["subprotocols"]

    async def accept(self, subprotocol: str | None) -> None:
        with _disconnection_raised():
            await self._websocket.accept(subprotocol)

    async def receive(self) -> str | None:
        """Return a text message, or None for a binary one."""
        with _disconnection_raised():
            message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise ClientDisconnected("the client closed the connection")
        return message.get("text")

    async def send(self, text: str, data: bytes | None = None) -> None:
        """Send a text message and, if there are data, a binary message after it."""
        with _disconnection_raised():
            await self._websocket.send_text(text)
            if data is not None:
                await self._websocket.send_bytes(data)

    async def close(self, code: int) -> None:
        with _disconnection_raised():
            await self._websocket.close(code)


@contextmanager
def _disconnection_raised() -> Iterator[None]:
    """Raise ClientDisconnected for every error of a closed connection."""
    try:
        yield
    except (WebSocketDisconnect, OSError, RuntimeError) as error:
        # starlette and uvicorn raise any of the three for a closed connection, depending on version and moment
        raise ClientDisconnected(str(error) or type(error).__name__) from error
