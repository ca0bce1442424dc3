"""Open video files, and decode the frames of their main picture with the times at which they are shown.

Times are in seconds after the first picture of the file. Not every format allows a jump to any time: MPEG-TS may land
after it. So a jump is accepted only if it lands on a key frame at or before the target; otherwise earlier targets are
tried, and at last the beginning. AVI with B-frames and MPEG-PS do not store a time for each frame, so a landing cannot
be checked, and they are always read from the beginning.
"""

from __future__ import annotations

from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from fractions import Fraction
    from pathlib import Path
    from types import TracebackType

    import av

TIME_TOLERANCE = 1e-6
"""Largest difference in seconds of two times that count as equal."""
STEPS_BACK = (0, 1, 4, 16, 64)
"""Seconds before the target to which a jump is tried, one after another, before reading from the beginning."""
FIRST_FRAMES = 32
"""Number of frames after which B-frames have been seen; H.264 and HEVC reorder at most 16."""
COUNTED_FORMATS = ("mpeg", "mpegvideo")
"""FFmpeg's names of formats of MPEG-1 and MPEG-2 in which not every frame has its own time."""
RAW_FORMATS = ("h264", "hevc", "m4v", "vc1")
"""FFmpeg's names of raw streams, which have no times and no certain frame rate."""
COPY_AGAIN = "copy or download it again"


def file_url(path: Path) -> str:
    """Return the name of a file for FFmpeg, which would read the part of a plain name before a colon as a protocol."""
    return f"file:{path}"


class OpenVideo:
    """An open file with its main video stream, which is never a cover picture.

    container, stream: PyAV's objects. rate: frames per second in the header. step: shortest usual distance of two
    frames in seconds, by the header; the last frame is shown for this time. has_decoding_times: whether the file has
    only times of decoding, as AVI with B-frames: a frame is shown when the decoder returns it. can_jump: whether the
    time of a frame is certain after a jump.
    Raises UserError for files that cannot be opened or have no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        if self.container.format.name in RAW_FORMATS:
            self.container.close()
            raise UserError(
                f"{path} is a raw stream without the times of its frames; put it into a container with its frame rate:"
                " `ffmpeg -r RATE -i FILE -c copy FILE.mp4`"
            )
        rate: Fraction | None = self.stream.average_rate or self.stream.guessed_rate
        if not rate:
            self.container.close()
            raise UserError(f"{path} has no frame rate, as a picture; use a video file")
        self.rate = float(rate)
        self.step = 1 / max(self.rate, float(self.stream.guessed_rate or 0))
        self.has_decoding_times = self.container.format.name == "avi" and bool(self.stream.codec_context.has_b_frames)
        self.can_jump = not self.has_decoding_times and self.container.format.name not in COUNTED_FORMATS

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def frames(self, start_seconds: float = 0.0) -> Iterator[tuple[av.VideoFrame, float]]:
        """Yield frames and their times, in order, from a frame at or before `start_seconds` to the end.

        Raises UserError if times go backward, as in joined recordings. FFmpeg's errors are not changed.
        """
        first, all_frames = self._from_beginning()
        if self.can_jump and start_seconds > self.step:
            for back in STEPS_BACK:
                if back >= start_seconds:
                    break
                landed = self._jump(first + start_seconds - back, latest=first + start_seconds + TIME_TOLERANCE)
                if landed is not None:
                    return self._relative(landed, first)
            self.reopen()
            first, all_frames = self._from_beginning()
        return self._relative(all_frames, first)

    def first_picture(self) -> tuple[av.VideoFrame, float] | None:
        """Return the first frame and its time in the file; None if no frame can be decoded. Changes the position.

        Raises UserError if B-frames have the times of decoding, as in packed MPEG-4 that was copied from AVI.
        """
        self.reopen()
        may_lack_times = self._may_lack_times()
        self.reopen()
        frames = islice(self._from_beginning()[1], FIRST_FRAMES if may_lack_times else 1)
        first = next(frames, None)
        times = [time for _, time in chain([] if first is None else [first], frames)]
        if any(later < earlier - TIME_TOLERANCE for earlier, later in pairwise(times)):
            raise UserError(
                f"{self.path} has B-frames with the times at which they are decoded, not shown, as after a copy from"
                " AVI; encode it again"
            )
        return first

    def backward(self, later: float, earlier: float) -> UserError:
        """Return the error for times that go from `later` back to `earlier`, seconds."""
        return UserError(
            f"{self.path}: time goes from {later:.2f} back to {earlier:.2f} s, as in joined recordings or after a copy"
            " of B-frames without their times; split the file there, or encode it again"
        )

    def reopen(self) -> None:
        """Return to the beginning, also in formats that cannot jump there."""
        self.container.close()
        self._open()

    def _open(self) -> None:
        import av
        from av.error import FFmpegError
        from av.stream import Disposition

        if not self.path.is_file():
            raise UserError(f"there is no video {self.path}")
        try:
            self.container = av.open(file_url(self.path))
        except FFmpegError as error:
            raise UserError(f"{self.path} is not a video in a supported format: {error.strerror}") from error
        streams = [stream for stream in self.container.streams.video if stream.height and stream.width]
        videos = {stream.index: stream for stream in streams if not stream.disposition & Disposition.attached_pic}
        if not videos:
            self.container.close()
            only = ", only a cover picture" if streams else ""
            raise UserError(f"{self.path} has no video stream{only}; use a video file")
        best: Any = self.container.streams.best("video")
        self.stream: Any = videos.get(best.index) or next(iter(videos.values()))
        self.stream.thread_type = "AUTO"

    def _may_lack_times(self) -> bool:
        """Return whether the file has B-frames, but no packet is shown at another time than it is decoded."""
        if self.has_decoding_times or not self.stream.codec_context.has_b_frames:
            return False
        packets = islice(self.container.demux(self.stream), FIRST_FRAMES)
        return all(packet.pts == packet.dts for packet in packets if packet.pts is not None)

    def _from_beginning(self) -> tuple[float, Iterator[tuple[av.VideoFrame, float]]]:
        """Return the time of the first frame in the file, and all frames with such times."""
        frames = self._timed(self.container.decode(self.stream))
        held = next(frames, None)
        return (0.0, iter(())) if held is None else (held[1], chain([held], frames))

    def _jump(self, target: float, *, latest: float) -> Iterator[tuple[av.VideoFrame, float]] | None:
        """Return the frames from the key frame on that a jump to `target` reaches; None if it is after `latest`.

        Frames before the key frame are dropped, because they may depend on frames before the jump.
        """
        from av.error import FFmpegError

        try:
            self.container.seek(int(target / self.stream.time_base), stream=self.stream)
            frames = self.container.decode(self.stream)
            for frame in frames:
                if frame.pts is None or (time := float(frame.pts * frame.time_base)) > latest:
                    return None
                if frame.key_frame:
                    return chain([(frame, time)], self._timed(frames, after=time))
        except FFmpegError:
            # formats without an index refuse, or reach the middle of a frame; reading from the beginning needs neither
            return None
        return None

    def _timed(
        self, frames: Iterable[av.VideoFrame], *, after: float | None = None
    ) -> Iterator[tuple[av.VideoFrame, float]]:
        """Add the times of the file to frames; one without a time follows the one before it, at the header's rate.

        The last frames have no times of decoding, because the decoder returns them after the last packet. They follow
        at the last distance.
        """
        previous, step = after, 1 / self.rate
        for frame in frames:
            stamp = frame.dts if self.has_decoding_times else frame.pts
            if stamp is None or frame.time_base is None:
                time = 0.0 if previous is None else previous + step
            else:
                time = float(stamp * frame.time_base)
                if self.has_decoding_times and previous is not None:
                    step = time - previous
            previous = time
            yield frame, time

    def _relative(
        self, frames: Iterable[tuple[av.VideoFrame, float]], first: float
    ) -> Iterator[tuple[av.VideoFrame, float]]:
        latest = -TIME_TOLERANCE
        for frame, time in frames:
            if time - first < latest - TIME_TOLERANCE:
                raise self.backward(latest, time - first)
            latest = time - first
            yield frame, latest
