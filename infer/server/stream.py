"""The WebSocket of live streams: which of them are being made, and one conversation with a client."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable

from longvideo.files import TEMPORARY_SUFFIX
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.client_socket import ClientLeft, ClientSocket
from longvideo.infer.server.connections import Waiting
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.live import LiveVideo
from longvideo.infer.server.messages import (
    Continue,
    ErrorCode,
    FirstMessage,
    LaterMessage,
    Refusal,
    Start,
    error_text,
    read_message,
)
from longvideo.infer.server.metrics import ServerMetrics
from longvideo.infer.server.outbox import Outgoing
from longvideo.infer.server.security import SUBPROTOCOL, new_id, token_fits
from longvideo.infer.server.served_folder import STREAMS

NORMAL, POLICY, INTERNAL, RESTART, TRY_LATER = 1000, 1008, 1011, 1012, 1013  # RFC 6455 and its registry
CLOSE_CODES: dict[ErrorCode, int] = {
    "internal": INTERNAL,
    "storage": INTERNAL,
    "shutting_down": RESTART,
    "too_many_sessions": TRY_LATER,
}
log = logging.getLogger(__name__)
CLOSING_SECONDS = 2.0  # for the last words to one who may not listen


class Streams:
    """The live videos of a server, at most `limits.sessions`."""

    def __init__(self, pipeline: StreamingPipeline, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.settings = settings
        self._pipeline, self._metrics = pipeline, metrics
        self._live: dict[str, LiveVideo] = {}
        self._lock = threading.Lock()
        self._closed = False
        for leftover in (settings.folder / STREAMS).glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def is_live(self, name: str) -> bool:
        """Tell whether a stream is being made."""
        return name in self._live

    async def begin(self, first: FirstMessage) -> LiveVideo:
        """Start a video and return it; raises Refusal."""
        name = new_id() if isinstance(first, Start) else first.session
        if isinstance(first, Continue) and (before := self._live.get(name)) is not None:
            # its client lost the connection, which this side has not noticed
            await asyncio.to_thread(before.leave, "left")
            await _within(before.done.wait(), self.settings.limits.leaving)
        video = LiveVideo(
            name,
            first,
            pipeline=self._pipeline,
            settings=self.settings,
            metrics=self._metrics,
            loop=asyncio.get_running_loop(),
        )
        with self._lock:
            self._live = {key: other for key, other in self._live.items() if not other.released.is_set()}
            if self._closed:
                raise Refusal("shutting_down", "the server shuts down")
            if name in self._live:
                raise Refusal("too_many_sessions", "this stream is being made for another connection")
            if len(self._live) >= self.settings.limits.sessions:
                self._metrics.count("longvideo_sessions_refused_total")
                raise Refusal("too_many_sessions", f"all {self.settings.limits.sessions} places are taken; try later")
            self._live[name] = video
        self._metrics.count("longvideo_sessions_started_total")
        video.start()
        return video

    def forget(self, video: LiveVideo) -> None:
        """Give a video's place to another. Its thread has ended."""
        with self._lock:
            if self._live.get(video.name) is video:
                del self._live[video.name]
        kept = sorted((self.settings.folder / STREAMS).glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in kept[: -self.settings.limits.snapshots]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)

    async def close(self) -> None:
        """End all videos and take no more."""
        with self._lock:
            self._closed, videos = True, list(self._live.values())
        for video in videos:
            await asyncio.to_thread(video.leave, "shutting_down")
        for video in videos:
            await asyncio.to_thread(video.join)


async def talk(client: ClientSocket, streams: Streams, waiting: Waiting) -> None:
    """Serve one connection from its first message to its close."""
    try:
        await client.accept(SUBPROTOCOL if SUBPROTOCOL in client.subprotocols else None)
        try:
            if not token_fits(streams.settings.token, client.headers, client.subprotocols):
                raise Refusal("unauthorized", "the token is missing or wrong")
            video = await streams.begin(await _awaited_first_message(client, streams.settings, waiting))
        except Refusal as refusal:
            await _within(_refuse(client, refusal), CLOSING_SECONDS)
            return
    except ClientLeft as left:
        log.info("a client left before its stream began: %s", left)
        return
    try:
        await _serve(client, video, streams.settings)
    except ClientLeft as left:
        log.info("the client of stream %s left: %s", video.name, left)
    finally:
        await asyncio.to_thread(video.leave, "left")
        await video.done.wait()
        video.join()
        streams.forget(video)


async def _awaited_first_message(client: ClientSocket, settings: ServerSettings, waiting: Waiting) -> FirstMessage:
    """Return the first message; the connection is one of those that wait until then. Raises Refusal and ClientLeft."""
    message = asyncio.create_task(_first_message(client, settings))
    waiting.enter(message, message.cancel)
    try:
        return await message
    except asyncio.CancelledError:
        if not message.done():  # the server ends
            message.cancel()
            raise
        raise Refusal("too_many_sessions", "too many connections that say nothing") from None
    finally:
        waiting.leave(message)


async def _serve(client: ClientSocket, video: LiveVideo, settings: ServerSettings) -> None:
    """Send and read until one of both ends. Raises ClientLeft when that is because the client did."""
    sender = asyncio.create_task(_send_all(client, video))
    reader = asyncio.create_task(_read_all(client, video, settings))
    done = asyncio.create_task(video.done.wait())
    try:
        await asyncio.wait({sender, reader, done}, return_when=asyncio.FIRST_COMPLETED)
        if not (sender.done() or reader.done()):
            grace = settings.limits.taking if video.failure is None else CLOSING_SECONDS
            await asyncio.wait({sender, reader}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for task in (reader, sender):
            if task.done():
                task.result()
        code = NORMAL if video.failure is None else CLOSE_CODES.get(video.failure, POLICY)
        await _within(client.close(code), CLOSING_SECONDS)
    finally:
        for task in (sender, reader, done):
            task.cancel()
        await asyncio.gather(sender, reader, done, return_exceptions=True)


async def _first_message(client: ClientSocket, settings: ServerSettings) -> FirstMessage:
    limits = settings.limits
    try:
        text = await asyncio.wait_for(client.receive(), limits.first_message)
    except asyncio.TimeoutError:  # not yet TimeoutError in Python 3.10
        raise Refusal("bad_message", f"nothing was said within {limits.first_message:g} s") from None
    message = read_message(text, max_bytes=limits.message_bytes, max_prompt=limits.prompt_length)
    if not isinstance(message, FirstMessage):
        raise Refusal("bad_message", "the first message must be start or continue")
    if isinstance(message, Start) and message.seconds is not None and message.seconds > limits.stream_seconds:
        raise Refusal("bad_message", f"seconds: a stream has at most {limits.stream_seconds:g}")
    return message


async def _read_all(client: ClientSocket, video: LiveVideo, settings: ServerSettings) -> None:
    """Do what the client says until it leaves: raises ClientLeft."""
    limits = settings.limits
    while True:
        text = await client.receive()
        await video.opened.wait()
        await video.outbox.wait_for_fewer(limits.waiting_messages)
        try:
            message = read_message(text, max_bytes=limits.message_bytes, max_prompt=limits.prompt_length)
            await asyncio.to_thread(_act, video, message)
        except Refusal as refusal:
            video.outbox.put(Outgoing(error_text(refusal.code, str(refusal))))


def _act(video: LiveVideo, message: FirstMessage | LaterMessage) -> None:
    video.act(message)


async def _send_all(client: ClientSocket, video: LiveVideo) -> None:
    while (outgoing := await video.outbox.get()) is not None:
        await client.send(outgoing.text, outgoing.data)


async def _refuse(client: ClientSocket, refusal: Refusal) -> None:
    await client.send(error_text(refusal.code, str(refusal)))
    await client.close(CLOSE_CODES.get(refusal.code, POLICY))


async def _within(work: Awaitable[object], seconds: float) -> None:
    """Wait for something, but not longer than that."""
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        return
