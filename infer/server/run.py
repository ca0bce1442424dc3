"""Run the application with uvicorn, and end it in order."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.app import build_app
from longvideo.infer.server.connections import HttpConnection
from longvideo.infer.server.limits import ServerSettings

MESSAGE_ROOM = 4  # times the limit: what is a little too large gets an answer, more closes the connection
SHUTDOWN_SECONDS = 10


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UserError where that is not possible. Port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


class VideoServer(uvicorn.Server):
    """Serve from a folder that this process holds (`served_folder`).

    At its end live videos end, with a word to their clients, before uvicorn closes the connections.
    """

    def __init__(self, pipeline: StreamingPipeline, settings: ServerSettings) -> None:
        self.app = build_app(pipeline, settings)
        config = uvicorn.Config(
            self.app,
            log_level="warning",
            server_header=False,
            ws_max_size=MESSAGE_ROOM * settings.limits.message_bytes,
            ws_per_message_deflate=False,  # H.264 does not get smaller
            http=HttpConnection,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End live videos and the job that is being made, then everything else."""
        for server in self.servers:
            server.close()
        await self.app.state.streams.close()
        await asyncio.to_thread(self.app.state.worker.close)
        await super().shutdown(sockets)
