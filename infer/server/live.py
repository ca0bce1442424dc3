"""A live video: the thread that generates and encodes it, and the messages that change it while it runs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import ExitStack
from fractions import Fraction
from functools import singledispatchmethod
from typing import Any, Literal

from longvideo.errors import UserError
from longvideo.files import WriteError
from longvideo.infer.fragments import FragmentedVideo, VideoFormat
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.limits import ServerSettings
from longvideo.infer.server.live_session import SessionStarter
from longvideo.infer.server.media import StreamFile
from longvideo.infer.server.messages import (
    AddShot,
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
    refusal_of,
)
from longvideo.infer.server.metrics import ServerMetrics
from longvideo.infer.server.outbox import Outbox, Outgoing
from longvideo.infer.server.served_folder import STREAMS
from longvideo.infer.server.stream_files import StreamFiles, StreamRecord
from longvideo.infer.session import Session
from longvideo.infer.timeline import Receipt, Step

log = logging.getLogger(__name__)
Ending = Literal["ended", "disconnected", "too_slow", "shutting_down", "storage", "internal"]
ENDING_ERRORS: dict[Ending, tuple[ErrorCode, str]] = {
    "too_slow": ("too_slow", "the client received nothing for too long; continue the stream over a faster connection"),
    "shutting_down": ("shutting_down", "the server is shutting down; continue the stream when it runs again"),
    "storage": ("storage", "the server cannot write the video to its disk; continue the stream when it has free space"),
    "internal": ("internal", "the video failed; the server's log has the reason"),
}


class LiveVideo:
    """One live stream. Its thread iterates over the session and encodes; other threads call `act` and `end`.

    opened: event of the event loop, set when the session exists or cannot be created.
    done: event of the event loop, set at the end of the thread.
    released: set when the stream no longer counts as a session, before its last messages.
    ending: how the stream ended, or None.
    failure: code of the error that ended it, or None.
    """

    def __init__(
        self,
        name: str,
        first: FirstMessage,
        *,
        pipeline: StreamingPipeline,
        starter: SessionStarter,
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
        self._first, self._pipeline, self._starter, self._loop = first, pipeline, starter, loop
        self._settings, self._metrics = settings, metrics
        self._timing, self._first_chunk = pipeline.chunk_timing, 0
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._record: StreamRecord | None = None
        self._paused = False
        self._generated = self._played = 0.0  # seconds of video
        self._dropped = 0  # segments
        self._num_frames: int | None = None  # of a complete video
        self._thread = threading.Thread(target=self._run, name=f"live-{name[:6]}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def end(self, ending: Ending) -> None:
        """End the stream after the current chunk. Any thread can call it; only the first call has an effect."""
        with self._lock:
            if self.ending is not None:
                return
            self.ending, session = ending, self._session
        if ending != "ended":
            self.outbox.stop_waiting()
        if session is not None:
            session.close()

    @singledispatchmethod
    def act(self, message: LaterMessage) -> None:
        """Carry out a client's message and answer it. Raises Refusal where nothing is changed."""
        raise Refusal("bad_message", f"{message.type} is a first message; the video has already begun")

    @act.register
    def _(self, message: SetPrompt) -> None:
        try:
            session, negative_prompt = self._current_session(), message.negative_prompt
            receipt = session.set_prompt(message.prompt, message.mode, negative_prompt=negative_prompt)
        except UserError as error:
            raise refusal_of(error, "too_late") from error
        self._answer(message, receipt)

    @act.register
    def _(self, message: AddShot) -> None:
        max_shots = self._settings.limits.stream_shots
        if len(self._current_session().shots) >= max_shots:
            raise Refusal("bad_message", f"the video already has {max_shots} shots, the maximum")
        try:
            receipt = self._current_session().add_shot(
                message.prompt, chunk=message.chunk, mode=message.mode, negative_prompt=message.negative_prompt
            )
        except UserError as error:
            code: ErrorCode = "bad_chunk" if self._is_after_the_end(message.chunk) else "too_late"
            raise refusal_of(error, code) from error
        self._answer(message, receipt)

    @act.register
    def _(self, message: Seek) -> None:
        try:
            receipt = self._current_session().seek(
                message.chunk, prompt=message.prompt, mode=message.mode, negative_prompt=message.negative_prompt
            )
        except UserError as error:
            raise refusal_of(error, "bad_chunk") from error
        with self._lock:
            self._played = min(self._played, self._seconds_at(message.chunk))
            self._generated = min(self._generated, self._seconds_at(message.chunk))
            self._pace()
        self._answer(message, receipt)

    @act.register
    def _(self, _message: Pause) -> None:
        self._set_paused(True)

    @act.register
    def _(self, _message: Resume) -> None:
        self._set_paused(False)

    @act.register
    def _(self, message: Played) -> None:
        with self._lock:
            self._played = message.seconds
            self._pace()

    @act.register
    def _(self, _message: Stop) -> None:
        self.end("ended")

    def _set_paused(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            self._pace()
        self._send("state", state="paused" if paused else "playing")

    def _pace(self) -> None:
        """Pause the session while the client pauses or more than `lead_seconds` are not played; else resume it.

        Needs the lock.
        """
        lead = self._first.lead_seconds
        is_ahead = lead is not None and self._generated - self._played > lead
        if self._session is None:
            return
        if self._paused or is_ahead:
            self._session.pause()
        else:
            self._session.resume()

    def _current_session(self) -> Session:
        if self._session is None or self.ending is not None:
            raise Refusal("too_late", "the video has ended")
        return self._session

    def _answer(self, message: SetPrompt | AddShot | Seek, receipt: Receipt) -> None:
        self._send(
            "receipt",
            action=message.type,
            prompt=message.prompt,
            negative_prompt=message.negative_prompt,
            mode=message.mode,
            accepted_at=receipt.accepted_at,
            effective_at=receipt.effective_at,
            effective_seconds=self._seconds_at(receipt.effective_at),
        )
        self._warn_unknown_words(message.prompt or "", message.negative_prompt or "")

    def _run(self) -> None:
        ending: Ending = "internal"
        try:
            ending = self._generate()
        except Refusal as refusal:
            self.failure = refusal.code
            self.outbox.put(Outgoing(error_text(refusal.code, str(refusal))))
        finally:  # threading prints any other error
            self._finish(ending)

    def _generate(self) -> Ending:
        """Generate the video up to its end and return how it ended. Raises Refusal where it cannot begin."""
        with ExitStack() as stack:
            session, record = self._starter.begin(self._first, self.files)
            stack.callback(session.close)
            if footage_chunks := session.options.footage_chunks:
                self._timing, self._first_chunk = self._timing.after_footage, footage_chunks
            settings = self._pipeline.models.settings
            video = FragmentedVideo(VideoFormat(settings.width, settings.height, Fraction(settings.fps)))
            stack.callback(video.close)
            file = self._open_file(video)
            stack.callback(file.close)
            with self._lock:
                self._session, self._record = session, record
                self._generated = self._played = self._seconds_at(session.next_chunk)
                if self.ending is not None:  # the stream ended while the session was built
                    session.close()
            self._send_ready(record, video)
            if session.notice is not None:
                self._send("warning", message=session.notice)
            self._loop.call_soon_threadsafe(self.opened.set)
            self._deliver(session, video, file)
            with self._lock:
                ending = self.ending = self.ending or "ended"
            if ending == "ended":
                self._num_frames = file.num_frames
                self.files.discard()
            elif ending != "internal":
                self._save(session, record)
            return ending

    def _open_file(self, video: FragmentedVideo) -> StreamFile:
        """Create or open the file of the stream. Raises Refusal."""
        try:
            return StreamFile(self.files.video, video.init)
        except WriteError as error:
            log.error("stream %s cannot begin: %s", self.name, error)
            raise Refusal(*ENDING_ERRORS["storage"]) from error
        except UserError as error:
            log.error("stream %s cannot be continued: %s", self.name, error)
            message = "the stream was created by another version of the server; start a new video"
            raise Refusal("not_found", message) from error

    def _send_ready(self, record: StreamRecord, video: FragmentedVideo) -> None:
        settings = self._pipeline.models.settings
        ready = message_text(
            "ready",
            session=self.name,
            mime=video.mime,
            width=settings.width,
            height=settings.height,
            fps=settings.fps,
            first_chunk=self._first_chunk,
            first_chunk_frames=self._timing.first,
            chunk_frames=self._timing.later,
            **record.model_dump(),
        )
        self.outbox.put(Outgoing(ready, video.init))
        self._warn_unknown_words(record.prompt, record.negative_prompt)

    def _save(self, session: Session, record: StreamRecord) -> None:
        try:
            self.files.save(session, record)
        except UserError as error:
            log.error("stream %s cannot be continued: %s", self.name, error)

    def _deliver(self, session: Session, video: FragmentedVideo, file: StreamFile) -> None:
        """Write all parts to the file and pass them to the sender."""
        step: Step | None = None
        start = num_frames = 0
        begin = time.perf_counter()
        for chunk in session:
            if chunk.step is not step:  # the first chunk has two parts
                step, start = chunk.step, self._first_frame(chunk.step.index)
            if chunk.is_complete:
                self._metrics.count_chunk(chunk.seconds)
            segment = video.encode(chunk.frames[0], start=start)
            try:
                file.append(segment)
            except WriteError as error:
                log.error("stream %s ends: %s", self.name, error)
                session.seek(chunk.step.index)  # `continue` generates this chunk again
                self.end("storage")
                break
            start += segment.frames
            num_frames += segment.frames
            self._metrics.count("longvideo_frames_total", segment.frames)
            with self._lock:
                self._generated = start / self._timing.fps
                self._pace()
            speed = num_frames / (time.perf_counter() - begin)
            if not self._pass_on(chunk, segment.start, segment.data, fps=speed):
                self.end("too_slow")

    def _pass_on(self, chunk: GeneratedChunk, start: int, data: bytes, *, fps: float) -> bool:
        """Queue a segment for the sender, or drop it. Return False if the client received none for too long.

        start: first frame of the segment. fps: frames generated per second so far.
        """
        drops = self._first.slow == "drop"
        if not self.outbox.wait_for_capacity(0.0 if drops else self._settings.limits.receive_seconds):
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
            negative_prompt=chunk.step.negative_prompts[0],
            cut=chunk.step.cut,
            made_in=round(chunk.seconds, 4),
            fps=round(fps, 2),
            dropped=self._dropped,
        )
        self.outbox.put(Outgoing(text, data, is_segment=True))
        return True

    def _finish(self, ending: Ending) -> None:
        with self._lock:
            self.ending = ending
        self.released.set()  # before the last message, after which a client may start another stream at once
        if ending == "ended" and self._num_frames is not None:
            self._send_end(self._num_frames)
        if ending in ENDING_ERRORS and self.failure is None:
            self.failure, message = ENDING_ERRORS[ending]
            self.outbox.put(Outgoing(error_text(self.failure, message)))
        self.outbox.finish()
        self._loop.call_soon_threadsafe(self.opened.set)
        self._loop.call_soon_threadsafe(self.done.set)

    def _send_end(self, frames: int) -> None:
        chunks = self._timing.chunks_for(frames) if frames else 0
        download = f"/v1/streams/{self.name}/content"
        self._send("end", chunks=chunks, frames=frames, seconds=frames / self._timing.fps, download=download)

    def _warn_unknown_words(self, *texts: str) -> None:
        if message := self._pipeline.unknown_words_warning(texts):
            self._send("warning", message=message)

    def _send(self, kind: str, **fields: Any) -> None:
        self.outbox.put(Outgoing(message_text(kind, **fields)))

    def _is_after_the_end(self, chunk: int) -> bool:
        seconds = self._settings.limits.stream_seconds
        if self._record is not None and self._record.seconds is not None:
            seconds = self._record.seconds
        return self._first_frame(chunk) >= round(seconds * self._timing.fps)

    def _first_frame(self, chunk: int) -> int:
        """Return the first frame of a chunk, counted from the first frame that is generated."""
        return self._timing.start(chunk - self._first_chunk)

    def _seconds_at(self, chunk: int) -> float:
        return self._first_frame(chunk) / self._timing.fps
