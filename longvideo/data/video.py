"""Read and write video files with PyAV: frames are uint8 [T, H, W, 3] RGB tensors.

Frames are read as a player shows them: upright, with square pixels, deinterlaced and in SDR. At another frame rate,
the nearest frame in time is used. At another size, frames are scaled with their aspect ratio and cropped at the center.
Times are in seconds after the first picture.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longvideo.data.container import COPY_AGAIN, COUNTED_FORMATS, TIME_TOLERANCE, OpenVideo, file_url
from longvideo.data.conversion import PictureConversion, picture_size
from longvideo.data.deinterlacing import deinterlaced
from longvideo.data.timeline import Timeline, read_timeline
from longvideo.data.tone_mapping import TRANSFERS
from longvideo.errors import UserError
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path

CONTAINER_TOLERANCE = 0.5
"""Allowed difference in seconds between the length of a file and the end of its last packet, which formats round."""
LENGTH_ESTIMATED = (*COUNTED_FORMATS, "mpegts")
"""Formats without a length in the header, for which FFmpeg takes the time of the last packets."""
NEAR_END = 2.0
"""Distance in seconds before the end of a file from which its last packets are read."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video shows.

    height, width: of the displayed picture, upright and in square pixels. fps: mean frames per second; of the header if
    both are nearly equal. header_fps: frames per second in the header. seconds: from the first picture to the end of
    the last one. num_frames: frames that are shown. transfer: PQ or HLG, whose frames are tone-mapped; None for SDR.
    is_interlaced: whether frames are deinterlaced. timeline: times of all frames.
    """

    height: int
    width: int
    fps: float
    header_fps: float
    seconds: float
    num_frames: int
    transfer: str | None
    is_interlaced: bool
    timeline: Timeline


def probe_video(path: Path) -> VideoInfo:
    """Read the times of a video's frames, and what its first picture shows.

    Reads only the index of an MP4 with a constant frame rate, and all packets of other files; decodes one frame.
    Raises UserError if the file is not a video.
    """
    with OpenVideo(path) as video, _damage_named(path):
        first = video.first_picture()
        if first is None:
            raise UserError(f"{path} has no frame that can be decoded; {COPY_AGAIN}")
        frame, time = first
        timeline = read_timeline(video, time)
        height, width = picture_size(frame, video.stream)
        return VideoInfo(
            height=height,
            width=width,
            fps=timeline.rate(video.rate),
            header_fps=video.rate,
            seconds=timeline.seconds,
            num_frames=len(timeline.times),
            transfer=TRANSFERS.get(int(frame.color_trc or 0)),
            is_interlaced=bool(frame.interlaced_frame),
            timeline=timeline,
        )


def check_complete(path: Path) -> None:
    """Raise UserError if the data is shorter than the header states, as after an interrupted copy.

    Reads from the last key frame on and decodes nothing; `count_frames` detects damage before that.
    """
    from av.error import FFmpegError

    with OpenVideo(path) as video:
        container, stream = video.container, video.stream
        seconds = _duration(container, stream)
        if not seconds or container.format.name in LENGTH_ESTIMATED:
            return  # there is no length to compare with
        # a video stream without its own length may end before the sound
        own_length = stream.duration is not None
        tolerance = 1.5 / video.rate if own_length else CONTAINER_TOLERANCE
        try:
            end = _end_of_data(container, stream, seconds, tolerance, all_streams=not own_length)
        except FFmpegError as error:
            raise UserError(f"{path} is damaged near its end: {error.strerror}; {COPY_AGAIN}") from error
        if end < seconds - tolerance:
            raise UserError(f"{path} is truncated: it ends after {end:.2f} of {seconds:.2f} s; {COPY_AGAIN}")


def count_frames(path: Path) -> int:
    """Decode and count all frames. Raises UserError if the file is not a video, or is damaged at any place."""
    count = 0
    with OpenVideo(path) as video, _damage_named(path, lambda: f" after {count} frames"):
        for _ in video.frames():
            count += 1
    return count


@dataclass(frozen=True)
class VideoReader:
    """Reads frames of files at one rate and size.

    fps: frames per second of the result, each the nearest frame of the file in time (the later of two equally near);
        None takes the rate of the header.
    size: height and width of the result in pixels, by scaling and cropping at the center; None keeps those of the first
        frame.
    """

    fps: float | None = None
    size: tuple[int, int] | None = None

    def read(self, path: Path, *, start_seconds: float = 0.0, max_frames: int | None = None) -> Tensor:
        """Read frames as one tensor uint8 [T, H, W, 3]; see `frames`. Raises UserError if no frame is left."""
        frames = list(self.frames(path, start_seconds=start_seconds, max_frames=max_frames))
        if not frames:
            raise UserError(f"{path} has no frame at {start_seconds:g} s or later; use an earlier start")
        return torch.stack(frames)

    def frames(self, path: Path, *, start_seconds: float = 0.0, max_frames: int | None = None) -> Iterator[Tensor]:
        """Yield frames uint8 [H, W, 3] one by one.

        start_seconds: time of the first frame. max_frames: largest number of frames; None reads to the end.
        Raises UserError if the file is missing, not a video, or damaged.
        """
        number = 0
        with OpenVideo(path) as video, _damage_named(path, lambda: f" after {number} frames"):
            step = 1 / (self.fps or video.rate)
            picture: PictureConversion | None = None
            for frame, begin, end in _shown_until_next(deinterlaced(video, start_seconds), video.step):
                picture = picture or PictureConversion(video.stream, self.size)
                # a frame of the file is used for all times that are nearer to it than to its neighbors
                while begin - TIME_TOLERANCE <= start_seconds + number * step < end - TIME_TOLERANCE:
                    if number == max_frames:
                        return
                    yield picture(frame)
                    number += 1


def write_video(
    path: Path, frames: Iterable[Tensor], *, fps: float, crf: int = 12, pixel_format: str = "yuv420p"
) -> int:
    """Write chunks of frames uint8 [T, H, W, 3] as H.264 and return the number of frames.

    The file gets its name when it is complete. fps: frames per second. crf: rate factor of x264; 12 is visually
    lossless. pixel_format: "yuv420p", or "yuv444p", which keeps color at full resolution but is not supported by every
    player. Raises UserError for a size that the pixel format cannot store.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        count = _encode(temporary, frames, fps=fps, crf=crf, pixel_format=pixel_format, name=path)

    write_file(path, write)
    return count


def _encode(target: Path, frames: Iterable[Tensor], *, fps: float, crf: int, pixel_format: str, name: Path) -> int:
    """Write a video file. name: final path, for errors. Raises OSError for errors of the disk."""
    import av
    from av.error import FFmpegError

    count = 0
    try:
        with av.open(file_url(target), "w", format="mp4") as container:
            stream: Any = None
            for chunk in frames:
                if stream is None:
                    _, height, width, _ = chunk.shape
                    if pixel_format == "yuv420p" and (height % 2 or width % 2):
                        raise UserError(f"{name} has frames of {height}x{width}; yuv420p needs even sizes")
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
                    stream.options = {"crf": str(crf), "preset": "veryfast"}
                for picture in chunk:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.cpu().numpy(), format="rgb24")))
                    count += 1
            if stream is None:
                raise UserError(f"there are no frames to write to {name}; expected at least one")
            container.mux(stream.encode())
    except FFmpegError as error:
        if error.errno is None or error.errno <= 0:
            raise
        raise OSError(error.errno, os.strerror(error.errno)) from error
    return count


@contextmanager
def _damage_named(path: Path, place: Callable[[], str] = str) -> Generator[None]:
    """Raise FFmpeg's errors as UserError. place: returns where in the file it is damaged, in words."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as error:
        raise UserError(f"{path} is damaged{place()}: {error.strerror}; {COPY_AGAIN}") from error


def _shown_until_next(frames: Iterable[tuple[Any, float]], step: float) -> Iterator[tuple[Any, float, float]]:
    """Yield frames with the begin and end of the times to which each is nearest. step: time of the last frame."""
    held: tuple[Any, float] | None = None
    begin = -step
    for frame, time in frames:
        if held is not None:
            middle = (held[1] + time) / 2
            yield held[0], begin, middle
            begin = middle
        held = (frame, time)
    if held is not None:
        yield held[0], begin, held[1] + step / 2


def _end_of_data(container: Any, stream: Any, seconds: float, tolerance: float, *, all_streams: bool) -> float:
    """Return the end time of the last complete packet.

    It is searched at `seconds`, before it, and from the beginning, until it is at most `tolerance` before `seconds`: a
    jump may land after the last packets, because they are not in the order of their times.
    """
    import av

    # the length of a container counts from its own beginning, which may be before the first picture
    origin = (container.start_time or 0) / av.time_base if all_streams else _origin(stream)
    end = 0.0
    for start in (seconds, seconds - NEAR_END, 0.0):
        container.seek(int((max(0.0, start) + origin) / stream.time_base), stream=stream)
        for packet in container.demux(() if all_streams else stream):
            if packet.is_corrupt:
                break
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin)
        if end >= seconds - tolerance:
            break
    return end


def _origin(stream: Any) -> float:
    """Return the time of the first frame, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _duration(container: Any, stream: Any) -> float:
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base
