"""A live video: the thread that makes and encodes it, and what clients may do to it meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import ExitStack
from functools import singledispatchmethod
from typing import Any, Literal

from longvideo.errors import UserError
from longvideo.files import WriteError
from longvideo.infer.fragments import FragmentedVideo
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.pipeline import StreamingPipeline, chunk_timing
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.media import StreamFile
from longvideo.infer.server.messages import (
    AddShot,
    Continue,
    ErrorCode,
    FirstMessage,
    LaterMessage,
    Pause,
    Played,
    Refusal,
    Resume,
    Seek,
    SetPrompt,
    Stop,
    error_text,
    message_text,
)
from longvideo.infer.server.metrics import ServerMetrics
from longvideo.infer.server.outbox import Outbox, Outgoing
from longvideo.infer.server.served_folder import STREAMS
from longvideo.infer.server.stream_files import StreamFiles, StreamRecord
from longvideo.infer.session import Session
from longvideo.infer.timeline import Receipt, Step

log = logging.getLogger(__name__)
Ending = Literal["ended", "left", "too_slow", "shutting_down", "storage", "internal"]
WHY: dict[Ending, tuple[ErrorCode, str]] = {
    "too_slow": ("too_slow", "nothing was taken for too long; continue when the connection is better"),
    "shutting_down": ("shutting_down", "the server shuts down; continue when it is back"),
    "storage": ("storage", "the server's disk takes no more of the video; continue when it has room again"),
    "internal": ("internal", "the video cannot go on; the server's log says why"),
}


class LiveVideo:
    """One stream. Its thread iterates over the session and encodes; `act` and `leave` come from other threads.

    opened: there is a session to act on, or there never will be one. done: the thread has ended. Both belong to the
    event loop. ending: how it ended.
    """

    def __init__(
        self,
        name: str,
        first: FirstMessage,
        *,
        pipeline: StreamingPipeline,
        settings: ServerSettings,
        metrics: ServerMetrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.name = name
        self.files = StreamFiles(settings.folder / STREAMS, name)
        self.outbox = Outbox(loop, capacity=settings.limits.waiting_segments)
        self.opened, self.done = asyncio.Event(), asyncio.Event()
        self.released = threading.Event()
        self.ending: Ending | None = None
        self.failure: ErrorCode | None = None
        self._first, self._pipeline, self._settings, self._metrics = first, pipeline, settings, metrics
        self._loop = loop
        self._timing = chunk_timing(pipeline.models.settings, pipeline.models.autoencoder.config)
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._record: StreamRecord | None = None
        self._paused = False
        self._made = self._played = 0.0  # seconds of video
        self._dropped = 0
        self._total: tuple[int, int] | None = None  # chunks and frames of a video that ended
        self._thread = threading.Thread(target=self._run, name=f"live-{name[:6]}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def leave(self, why: Ending) -> None:
        """End within a chunk. From any thread; only the first call counts."""
        with self._lock:
            if self.ending is not None:
                return
            self.ending, session = why, self._session
        if why != "ended":
            self.outbox.stop_waiting()
        if session is not None:
            session.close()

    @singledispatchmethod
    def act(self, message: LaterMessage) -> None:
        """Do what a client asks for and answer it; raises Refusal where nothing is done."""
        raise Refusal("bad_message", "the video has begun already")

    @act.register
    def _(self, message: SetPrompt) -> None:
        try:
            receipt = self._steered().set_prompt(message.prompt, message.mode)
        except UserError as error:
            raise Refusal("too_late", str(error)) from error
        self._answer(message, receipt, prompt=message.prompt, mode=message.mode)

    @act.register
    def _(self, message: AddShot) -> None:
        most = self._settings.limits.planned_shots
        if len(self._steered().shots) >= most:
            raise Refusal("bad_message", f"a video has at most {most} shots")
        try:
            receipt = self._steered().add_shot(message.prompt, chunk=message.chunk, mode=message.mode)
        except UserError as error:
            raise Refusal("bad_chunk" if self._is_behind_the_end(message.chunk) else "too_late", str(error)) from error
        self._answer(message, receipt, prompt=message.prompt, mode=message.mode)

    @act.register
    def _(self, message: Seek) -> None:
        try:
            receipt = self._steered().seek(message.chunk, prompt=message.prompt, mode=message.mode)
        except UserError as error:
            raise Refusal("bad_chunk", str(error)) from error
        with self._lock:
            self._played = min(self._played, self._seconds_at(message.chunk))
            self._made = min(self._made, self._seconds_at(message.chunk))
            self._pace()
        self._answer(message, receipt, prompt=message.prompt, mode=message.mode)

    @act.register
    def _(self, message: Pause) -> None:
        self._set_paused(True)

    @act.register
    def _(self, message: Resume) -> None:
        self._set_paused(False)

    @act.register
    def _(self, message: Played) -> None:
        with self._lock:
            self._played = message.seconds
            self._pace()

    @act.register
    def _(self, message: Stop) -> None:
        self.leave("ended")

    def _set_paused(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            self._pace()
        self._say("state", state="paused" if paused else "playing")

    def _pace(self) -> None:
        """Begin no chunk while paused, or while more is made than the client wants in advance. Under the lock."""
        lead = self._first.lead_seconds
        is_ahead = lead is not None and self._made - self._played > lead
        if self._session is not None:
            (self._session.pause if self._paused or is_ahead else self._session.resume)()

    def _steered(self) -> Session:
        if self._session is None or self.ending is not None:
            raise Refusal("too_late", "the video has ended")
        return self._session

    def _answer(self, message: SetPrompt | AddShot | Seek, receipt: Receipt, *, prompt: str | None, mode: str) -> None:
        self._say(
            "receipt",
            action=message.type,
            prompt=prompt,
            mode=mode,
            accepted_at=receipt.accepted_at,
            effective_at=receipt.effective_at,
            effective_seconds=self._seconds_at(receipt.effective_at),
        )
        if prompt is not None:
            self._warn_unknown_words(prompt)

    def _run(self) -> None:
        why: Ending = "internal"
        try:
            why = self._make()
        except Refusal as refusal:
            self.failure = refusal.code
            self.outbox.put(Outgoing(error_text(refusal.code, str(refusal))))
        finally:  # whatever else it was, threading prints it
            self._end(why)

    def _make(self) -> Ending:
        with ExitStack() as stack:
            session, record = self._open()
            stack.callback(session.close)
            settings = self._pipeline.models.settings
            video = FragmentedVideo(width=settings.width, height=settings.height, fps=settings.fps)
            stack.callback(video.close)
            file = self._open_file(video)
            stack.callback(file.close)
            with self._lock:
                self._session, self._record = session, record
                self._made = self._played = self._seconds_at(session.next_chunk)
                if self.ending is not None:  # the client left while the session was built
                    session.close()
            self._say_ready(record, video)
            self._loop.call_soon_threadsafe(self.opened.set)
            chunks = self._deliver(session, video, file)
            with self._lock:
                why = self.ending = self.ending or "ended"
            if why == "ended":
                self._total = (chunks, file.num_frames)
                self.files.forget()
            elif why != "internal":
                self._keep(session, record)
            return why

    def _open_file(self, video: FragmentedVideo) -> StreamFile:
        """Open the file of the stream; raises Refusal."""
        try:
            return StreamFile(self.files.video, video.init)
        except WriteError as error:
            log.error("stream %s cannot begin: %s", self.name, error)
            raise Refusal(*WHY["storage"]) from error
        except UserError as error:
            log.error("stream %s cannot be continued: %s", self.name, error)
            raise Refusal("not_found", "the stream was begun by another version of the server") from error

    def _say_ready(self, record: StreamRecord, video: FragmentedVideo) -> None:
        settings = self._pipeline.models.settings
        ready = message_text(
            "ready",
            session=self.name,
            mime=video.mime,
            width=settings.width,
            height=settings.height,
            fps=settings.fps,
            first_chunk_frames=self._timing.first_frames,
            chunk_frames=self._timing.later_frames,
            **record.model_dump(),
        )
        self.outbox.put(Outgoing(ready, video.init))
        self._warn_unknown_words(record.prompt)

    def _keep(self, session: Session, record: StreamRecord) -> None:
        try:
            self.files.keep(session, record)
        except UserError as error:
            log.error("stream %s cannot be continued: %s", self.name, error)

    def _open(self) -> tuple[Session, StreamRecord]:
        """Return the session and what is kept of it; raises Refusal."""
        first, settings = self._first, self._pipeline.models.settings
        limit = self._settings.limits.stream_seconds
        if isinstance(first, Continue):
            record = self.files.read_record()
            if record.model != self._settings.model:
                raise Refusal("not_found", f"the stream was made by the model {record.model}, which is not served now")
            try:
                session = self._pipeline.restore(self.files.snapshot)
            except UserError as error:
                raise Refusal("not_found", str(error)) from error
            return session, record
        try:
            session = self._pipeline.session(
                first.prompt,
                seconds=first.seconds or limit,
                steps=first.steps,
                guidance=first.guidance,
                seed=first.seed,
            )
        except UserError as error:
            raise Refusal("bad_message", str(error)) from error
        record = StreamRecord(
            model=self._settings.model,
            prompt=first.prompt,
            seed=first.seed,
            steps=settings.steps if first.steps is None else first.steps,
            guidance=settings.guidance if first.guidance is None else first.guidance,
            seconds=first.seconds,
        )
        return session, record

    def _deliver(self, session: Session, video: FragmentedVideo, file: StreamFile) -> int:
        """Write and hand over all parts; return the number of chunks in the file."""
        step: Step | None = None
        start = made = 0
        began = time.perf_counter()
        for chunk in session:
            if chunk.step is not step:  # the first chunk comes in two parts
                step, start = chunk.step, self._timing.start(chunk.step.index)
            if chunk.is_complete:
                self._metrics.chunk_made(chunk.seconds)
            segment = video.encode(chunk.frames[0], start=start)
            try:
                file.append(segment)
            except WriteError as error:
                log.error("stream %s ends: %s", self.name, error)
                session.seek(chunk.step.index)  # whoever continues it makes this chunk again
                self.leave("storage")
                break
            start += segment.frames
            made += segment.frames
            self._metrics.count("longvideo_frames_total", segment.frames)
            with self._lock:
                self._made = start / self._timing.fps
                self._pace()
            speed = made / (time.perf_counter() - began)
            if not self._hand_over(chunk, segment.start, segment.data, fps=speed):
                self.leave("too_slow")
        return 0 if step is None else step.index + 1

    def _hand_over(self, chunk: GeneratedChunk, start: int, data: bytes, *, fps: float) -> bool:
        """Give a segment to the sender, or drop it; return whether the client took one in time."""
        drops = self._first.slow == "drop"
        if not self.outbox.wait_for_room(0.0 if drops else self._settings.limits.taking):
            if drops:
                self._dropped += 1
                self._metrics.count("longvideo_segments_dropped_total")
            return drops
        text = message_text(
            "chunk",
            chunk=chunk.step.index,
            start=start / self._timing.fps,
            frames=chunk.frames.shape[1],
            bytes=len(data),
            prompt=chunk.step.prompts[0],
            cut=chunk.step.cut,
            made_in=round(chunk.seconds, 4),
            fps=round(fps, 2),
            dropped=self._dropped,
        )
        self.outbox.put(Outgoing(text, data, is_segment=True))
        return True

    def _end(self, why: Ending) -> None:
        with self._lock:
            self.ending = why
        self.released.set()  # before the last words: who hears them may want the place at once
        if why == "ended" and self._total is not None:
            self._say_end(*self._total)
        if why in WHY and self.failure is None:
            self.failure, message = WHY[why]
            self.outbox.put(Outgoing(error_text(self.failure, message)))
        self.outbox.finish()
        self._loop.call_soon_threadsafe(self.opened.set)
        self._loop.call_soon_threadsafe(self.done.set)

    def _say_end(self, chunks: int, frames: int) -> None:
        seconds = frames / self._timing.fps
        download = f"/v1/streams/{self.name}/content"
        self._say("end", chunks=chunks, frames=frames, seconds=seconds, download=download)

    def _warn_unknown_words(self, prompt: str) -> None:
        if unknown := self._pipeline.models.text_encoder.unknown_words(prompt):
            words = ", ".join(repr(word) for word in unknown)
            self._say("warning", message=f"the model never learned {words}; expect something else there")

    def _say(self, kind: str, **fields: Any) -> None:
        self.outbox.put(Outgoing(message_text(kind, **fields)))

    def _is_behind_the_end(self, chunk: int) -> bool:
        seconds = self._settings.limits.stream_seconds
        if self._record is not None and self._record.seconds is not None:
            seconds = self._record.seconds
        return self._timing.start(chunk) >= round(seconds * self._timing.fps)

    def _seconds_at(self, chunk: int) -> float:
        return self._timing.start(chunk) / self._timing.fps
