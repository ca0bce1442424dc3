"""Run the application with uvicorn, and shut it down in order."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.app import build_app
from longvideo.infer.server.connections import HttpConnection
from longvideo.infer.server.limits import ServerSettings

MESSAGE_MARGIN = 4  # times the limit: slightly larger messages get an `error`, larger ones close the connection
SHUTDOWN_SECONDS = 10


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. port: 0 selects a free port. Raises UserError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; use another --host or --port") from error


class VideoServer(uvicorn.Server):
    """A uvicorn server for a folder that this process has locked (`served_folder`).

    On shutdown, live videos end and their clients receive an `error` before uvicorn closes the connections.
    """

    def __init__(self, pipeline: StreamingPipeline, settings: ServerSettings) -> None:
        self.app = build_app(pipeline, settings)
        config = uvicorn.Config(
            self.app,
            log_level="warning",
            server_header=False,
            ws_max_size=MESSAGE_MARGIN * settings.limits.message_bytes,
            ws_per_message_deflate=False,  # H.264 cannot be compressed further
            http=HttpConnection,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End live videos and the job in progress, then close all connections."""
        for server in self.servers:
            server.close()
        await self.app.state.streams.close()
        await asyncio.to_thread(self.app.state.worker.close)
        await super().shutdown(sockets)
