"""The WebSocket of live streams: the list of live videos, and the connection of one client."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable

from longvideo.files import TEMPORARY_SUFFIX
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.client_socket import ClientDisconnected, ClientSocket
from longvideo.infer.server.connections import WaitingConnections
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.live import LiveVideo
from longvideo.infer.server.live_session import SessionStarter
from longvideo.infer.server.messages import (
    Continue,
    ErrorCode,
    FirstMessage,
    Refusal,
    Start,
    error_text,
    read_message,
)
from longvideo.infer.server.metrics import ServerMetrics
from longvideo.infer.server.outbox import Outgoing
from longvideo.infer.server.references import References
from longvideo.infer.server.security import SUBPROTOCOL, has_token, new_id
from longvideo.infer.server.served_folder import STREAMS

NORMAL, POLICY, INTERNAL, RESTART, TRY_LATER = 1000, 1008, 1011, 1012, 1013  # RFC 6455 and its registry
CLOSE_CODES: dict[ErrorCode, int] = {
    "internal": INTERNAL,
    "storage": INTERNAL,
    "shutting_down": RESTART,
    "too_many_sessions": TRY_LATER,
}
CLOSING_SECONDS = 2.0  # time to deliver the last message to a client that may not receive

log = logging.getLogger(__name__)


class Streams:
    """The live videos of a server. There are at most `limits.sessions`."""

    def __init__(
        self, pipeline: StreamingPipeline, settings: ServerSettings, metrics: ServerMetrics, references: References
    ) -> None:
        """references: the pictures and videos that streams may begin with."""
        self.settings = settings
        self._pipeline, self._metrics = pipeline, metrics
        self._starter = SessionStarter(pipeline, settings.model, settings.limits.stream_seconds, references)
        self._live: dict[str, LiveVideo] = {}
        self._lock = threading.Lock()
        self._closed = False
        for leftover in (settings.folder / STREAMS).glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def is_live(self, name: str) -> bool:
        """Return whether a stream is in progress."""
        return name in self._live

    async def begin(self, first: FirstMessage) -> LiveVideo:
        """Start or continue a video and return it. Raises Refusal."""
        name = new_id() if isinstance(first, Start) else first.session
        if isinstance(first, Continue) and (previous := self._live.get(name)) is not None:
            # the client lost its connection, and the server has not detected that yet
            await asyncio.to_thread(previous.end, "disconnected")
            await _wait_at_most(previous.done.wait(), self.settings.limits.handover_seconds)
        video = LiveVideo(
            name,
            first,
            pipeline=self._pipeline,
            starter=self._starter,
            settings=self.settings,
            metrics=self._metrics,
            loop=asyncio.get_running_loop(),
        )
        with self._lock:
            self._live = {key: other for key, other in self._live.items() if not other.released.is_set()}
            if self._closed:
                raise Refusal("shutting_down", "the server is shutting down; retry when it runs again")
            if name in self._live:
                raise Refusal("too_many_sessions", "another connection still uses this stream; retry later")
            if len(self._live) >= self.settings.limits.sessions:
                self._metrics.count("longvideo_sessions_refused_total")
                message = f"the server already generates {len(self._live)} live videos, its maximum; retry later"
                raise Refusal("too_many_sessions", message)
            self._live[name] = video
        self._metrics.count("longvideo_sessions_started_total")
        video.start()
        return video

    def remove(self, video: LiveVideo) -> None:
        """Delete the oldest snapshots beyond the limit, and remove a video whose thread has ended."""
        snapshots = (self.settings.folder / STREAMS).glob("*.safetensors")
        for path in sorted(snapshots, key=lambda path: path.stat().st_mtime)[: -self.settings.limits.snapshots]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
        with self._lock:
            if self._live.get(video.name) is video:
                del self._live[video.name]

    async def close(self) -> None:
        """End all videos and accept no new ones."""
        with self._lock:
            self._closed, videos = True, list(self._live.values())
        for video in videos:
            await asyncio.to_thread(video.end, "shutting_down")
        for video in videos:
            await asyncio.to_thread(video.join)


async def serve_client(client: ClientSocket, streams: Streams, waiting: WaitingConnections) -> None:
    """Serve one connection from its first message to its close."""
    try:
        await client.accept(SUBPROTOCOL if SUBPROTOCOL in client.subprotocols else None)
        try:
            if not has_token(streams.settings.token, client.headers, client.subprotocols):
                raise Refusal("unauthorized", "the token is missing or wrong; offer the subprotocol bearer.TOKEN")
            video = await streams.begin(await _wait_for_first_message(client, streams.settings, waiting))
        except Refusal as refusal:
            await _wait_at_most(_refuse(client, refusal), CLOSING_SECONDS)
            return
    except ClientDisconnected as error:
        log.info("a client disconnected before its stream began: %s", error)
        return
    try:
        await _send_and_read(client, video, streams.settings)
    except ClientDisconnected as error:
        log.info("the client of stream %s disconnected: %s", video.name, error)
    finally:
        await asyncio.to_thread(video.end, "disconnected")
        await video.done.wait()
        video.join()
        streams.remove(video)


async def _wait_for_first_message(
    client: ClientSocket, settings: ServerSettings, waiting: WaitingConnections
) -> FirstMessage:
    """Return the first message; until then the connection is a waiting one. Raises Refusal and ClientDisconnected."""
    message = asyncio.create_task(_first_message(client, settings))
    waiting.add(message, message.cancel)
    try:
        return await message
    except asyncio.CancelledError:
        if not message.done():  # the server is shutting down
            message.cancel()
            raise
        text = "too many connections have sent nothing; send the first message at once"
        raise Refusal("too_many_sessions", text) from None
    finally:
        waiting.remove(message)


async def _send_and_read(client: ClientSocket, video: LiveVideo, settings: ServerSettings) -> None:
    """Send and read messages until the video ends. Raises ClientDisconnected if the client disconnects first."""
    sender = asyncio.create_task(_send_all(client, video))
    reader = asyncio.create_task(_read_all(client, video, settings))
    done = asyncio.create_task(video.done.wait())
    try:
        await asyncio.wait({sender, reader, done}, return_when=asyncio.FIRST_COMPLETED)
        if not (sender.done() or reader.done()):
            grace = settings.limits.receive_seconds if video.failure is None else CLOSING_SECONDS
            await asyncio.wait({sender, reader}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for task in (reader, sender):
            if task.done():
                task.result()
        code = NORMAL if video.failure is None else CLOSE_CODES.get(video.failure, POLICY)
        await _wait_at_most(client.close(code), CLOSING_SECONDS)
    finally:
        for task in (sender, reader, done):
            task.cancel()
        await asyncio.gather(sender, reader, done, return_exceptions=True)


async def _first_message(client: ClientSocket, settings: ServerSettings) -> FirstMessage:
    limits = settings.limits
    try:
        text = await asyncio.wait_for(client.receive(), limits.first_message_seconds)
    except asyncio.TimeoutError:  # not yet TimeoutError in Python 3.10
        message = f"no message arrived within {limits.first_message_seconds:g} s; send start or continue"
        raise Refusal("bad_message", message) from None
    message = read_message(text, max_bytes=limits.message_bytes)
    if not isinstance(message, FirstMessage):
        raise Refusal("bad_message", f"the first message is {message.type}; expected start or continue")
    if isinstance(message, Start) and message.seconds is not None and message.seconds > limits.stream_seconds:
        raise Refusal("bad_message", f"seconds is {message.seconds:g}; expected at most {limits.stream_seconds:g}")
    return message


async def _read_all(client: ClientSocket, video: LiveVideo, settings: ServerSettings) -> None:
    """Carry out the messages of the client until it disconnects: raises ClientDisconnected."""
    limits = settings.limits
    while True:
        text = await client.receive()
        await video.opened.wait()
        await video.outbox.wait_for_fewer(limits.waiting_messages)
        try:
            message = read_message(text, max_bytes=limits.message_bytes)
            await asyncio.to_thread(video.act, message)
        except Refusal as refusal:
            video.outbox.put(Outgoing(error_text(refusal.code, str(refusal))))


async def _send_all(client: ClientSocket, video: LiveVideo) -> None:
    while (outgoing := await video.outbox.get()) is not None:
        await client.send(outgoing.text, outgoing.data)


async def _refuse(client: ClientSocket, refusal: Refusal) -> None:
    await client.send(error_text(refusal.code, str(refusal)))
    await client.close(CLOSE_CODES.get(refusal.code, POLICY))


async def _wait_at_most(work: Awaitable[object], seconds: float) -> None:
    """Wait until `work` is done, but at most `seconds`."""
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        return
