"""The WebSocket of live streams: which of them are being made, and one conversation with a client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable

from fastapi import WebSocket, WebSocketDisconnect

from longvideo.infer.pipeline import StreamingPipeline
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
from longvideo.infer.server.metrics import Metrics
from longvideo.infer.server.outbox import Outgoing
from longvideo.infer.server.security import SUBPROTOCOL, new_id, token_fits

NORMAL, POLICY, INTERNAL, RESTART, TRY_LATER = 1000, 1008, 1011, 1012, 1013  # RFC 6455 and its registry
CLOSE_CODES: dict[ErrorCode, int] = {
    "internal": INTERNAL,
    "shutting_down": RESTART,
    "too_many_sessions": TRY_LATER,
}
CLOSING_SECONDS = 2.0  # for the last words to one who may not listen


class Streams:
    """The live videos of a server, at most `limits.sessions`."""

    def __init__(self, pipeline: StreamingPipeline, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self._pipeline, self._metrics = pipeline, metrics
        self._live: dict[str, LiveVideo] = {}
        self._lock = threading.Lock()
        self._closed = False

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
        kept = sorted((self.settings.folder / "streams").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
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


async def talk(websocket: WebSocket, streams: Streams) -> None:
    """Serve one connection from its first message to its close."""
    offered = websocket.scope["subprotocols"]
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    try:
        if not token_fits(streams.settings.token, websocket.headers, offered):
            raise Refusal("unauthorized", "the token is missing or wrong")
        video = await streams.begin(await _first_message(websocket, streams.settings))
    except Refusal as refusal:
        await _within(_refuse(websocket, refusal), CLOSING_SECONDS)
        return
    except WebSocketDisconnect:
        return
    try:
        await _serve(websocket, video, streams.settings)
    finally:
        await asyncio.to_thread(video.leave, "left")
        await video.done.wait()
        video.join()
        streams.forget(video)


async def _serve(websocket: WebSocket, video: LiveVideo, settings: ServerSettings) -> None:
    sender = asyncio.create_task(_send_all(websocket, video))
    reader = asyncio.create_task(_read_all(websocket, video, settings))
    done = asyncio.create_task(video.done.wait())
    try:
        await asyncio.wait({sender, reader, done}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            return reader.result()
        grace = settings.limits.taking if video.failure is None else CLOSING_SECONDS
        await asyncio.wait({sender, reader}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        if not reader.done():
            code = NORMAL if video.failure is None else CLOSE_CODES.get(video.failure, POLICY)
            await _within(_close(websocket, code), CLOSING_SECONDS)
    finally:
        for task in (sender, reader, done):
            task.cancel()
        await asyncio.gather(sender, reader, done, return_exceptions=True)


async def _first_message(websocket: WebSocket, settings: ServerSettings) -> FirstMessage:
    limits = settings.limits
    try:
        text = await asyncio.wait_for(_receive(websocket), limits.first_message)
    except asyncio.TimeoutError:  # not yet TimeoutError in Python 3.10
        raise Refusal("bad_message", f"nothing was said within {limits.first_message:g} s") from None
    message = read_message(text, max_bytes=limits.message_bytes, max_prompt=limits.prompt_length)
    if not isinstance(message, FirstMessage):
        raise Refusal("bad_message", "the first message must be start or continue")
    if isinstance(message, Start) and message.seconds is not None and message.seconds > limits.stream_seconds:
        raise Refusal("bad_message", f"seconds: a stream has at most {limits.stream_seconds:g}")
    return message


async def _read_all(websocket: WebSocket, video: LiveVideo, settings: ServerSettings) -> None:
    """Do what the client says until it leaves."""
    limits = settings.limits
    while True:
        try:
            text = await _receive(websocket)
        except WebSocketDisconnect:
            return
        await video.opened.wait()
        await video.outbox.wait_for_fewer(limits.waiting_messages)
        try:
            message = read_message(text, max_bytes=limits.message_bytes, max_prompt=limits.prompt_length)
            await asyncio.to_thread(_act, video, message)
        except Refusal as refusal:
            video.outbox.put(Outgoing(error_text(refusal.code, str(refusal))))


def _act(video: LiveVideo, message: FirstMessage | LaterMessage) -> None:
    video.act(message)


async def _send_all(websocket: WebSocket, video: LiveVideo) -> None:
    try:
        while (outgoing := await video.outbox.get()) is not None:
            await websocket.send_text(outgoing.text)
            if outgoing.data is not None:
                await websocket.send_bytes(outgoing.data)
    except WebSocketDisconnect:
        return


async def _receive(websocket: WebSocket) -> str | None:
    """Return a text message, or None for a binary one; raises WebSocketDisconnect."""
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", NORMAL))
    return message.get("text")


async def _refuse(websocket: WebSocket, refusal: Refusal) -> None:
    try:
        await websocket.send_text(error_text(refusal.code, str(refusal)))
        await websocket.close(CLOSE_CODES.get(refusal.code, POLICY))
    except WebSocketDisconnect:
        return


async def _close(websocket: WebSocket, code: int) -> None:
    try:
        await websocket.close(code)
    except WebSocketDisconnect:
        return


async def _within(work: Awaitable[object], seconds: float) -> None:
    """Wait for something, but not longer than that."""
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        return
