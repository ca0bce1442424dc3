"""Read and write video files with PyAV: frames are uint8 [T, H, W, 3] RGB tensors.

At another frame rate, the nearest frame in time is used. At another size, frames are scaled with their aspect ratio and
cropped at the center.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import av

TIME_TOLERANCE = 1e-6
"""Largest difference in seconds of two times that count as equal."""
CONTAINER_TOLERANCE = 0.5
"""Allowed difference in seconds between the length of a file and the end of its last packet, which formats round."""
COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class VideoInfo:
    """The header of a video.

    height, width: of the displayed picture, in square pixels. fps: frames per second. num_frames: as in the header, or
    computed from fps and seconds if it has no count.
    """

    height: int
    width: int
    fps: float
    seconds: float
    num_frames: int


def probe_video(path: Path) -> VideoInfo:
    """Read the header of a video. Raises UserError if the file is not a video."""
    with _OpenVideo(path) as (container, stream):
        height, width = _shown_size(stream.height, stream.width, _pixel_aspect(stream))
        fps, seconds = float(_frame_rate(stream, path)), _duration(container, stream)
        return VideoInfo(height, width, fps, seconds, stream.frames or round(seconds * fps))


def check_whole(path: Path) -> None:
    """Raise UserError if the data is shorter than the header states, as after an interrupted copy.

    Reads from the last key frame on and decodes nothing; `count_frames` detects damage before that.
    """
    from av.error import FFmpegError

    with _OpenVideo(path) as (container, stream):
        seconds = _duration(container, stream)
        # a video stream without its own length may end before the sound
        own_length = stream.duration is not None
        tolerance = 1.5 / float(_frame_rate(stream, path)) if own_length else CONTAINER_TOLERANCE
        try:
            end = _end_of_data(container, stream, seconds, all_streams=not own_length)
        except FFmpegError as error:
            raise UserError(f"{path} is damaged near its end: {error.strerror}; {COPY_AGAIN}") from error
        if end < seconds - tolerance:
            raise UserError(f"{path} is truncated: it ends after {end:.2f} of {seconds:.2f} s; {COPY_AGAIN}")


def count_frames(path: Path) -> int:
    """Decode and count all frames. Raises UserError if the file is not a video, or is damaged at any place."""
    from av.error import FFmpegError

    count = 0
    with _OpenVideo(path) as (container, stream):
        try:
            for _ in container.decode(stream):
                count += 1
        except FFmpegError as error:
            raise UserError(f"{path} is damaged after {count} frames: {error.strerror}; {COPY_AGAIN}") from error
    return count


def read_video(
    path: Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    start_seconds: float = 0.0,
    max_frames: int | None = None,
) -> Tensor:
    """Read frames as one tensor [T, H, W, 3]; see `iterate_frames`."""
    frames = list(iterate_frames(path, fps=fps, size=size, start_seconds=start_seconds, max_frames=max_frames))
    if not frames:
        raise UserError(f"{path} has no frame at {start_seconds:g} s or later; use an earlier start")
    return torch.stack(frames)


def iterate_frames(
    path: Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    start_seconds: float = 0.0,
    max_frames: int | None = None,
) -> Iterator[Tensor]:
    """Yield frames uint8 [H, W, 3] one by one.

    fps: frames per second of the result, each the nearest frame of the file in time (the later of two equally near);
        None keeps the frames of the file.
    size: height and width of the result in pixels, by scaling and cropping at the center; None keeps those of the file.
    start_seconds: time of the first frame. max_frames: largest number of frames; None reads to the end.
    Raises UserError if the file is missing, not a video, or damaged.
    """
    from av.error import FFmpegError

    with _OpenVideo(path) as (container, stream):
        rate = float(_frame_rate(stream, path))
        step = 1 / (fps or rate)
        emitted = 0
        try:
            if start_seconds > 0:
                container.seek(int(start_seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
            for frame, begin, end in _timed_frames(container, stream, rate):
                # a frame of the file is used for all times that are nearer to it than to its neighbors
                while begin - TIME_TOLERANCE <= start_seconds + emitted * step < end - TIME_TOLERANCE:
                    if emitted == max_frames:
                        return
                    yield _picture(frame, size, _pixel_aspect(stream))
                    emitted += 1
        except FFmpegError as error:
            raise UserError(f"{path} is damaged after {emitted} frames: {error.strerror}; {COPY_AGAIN}") from error


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
        with av.open(str(target), "w", format="mp4") as container:
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


class _OpenVideo:
    """An open container and its first video stream. Raises UserError for files that cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        import av
        from av.error import FFmpegError

        if not self.path.is_file():
            raise UserError(f"there is no video {self.path}")
        try:
            self.container = av.open(str(self.path))
        except FFmpegError as error:
            raise UserError(f"{self.path} is not a video in a supported format: {error.strerror}") from error
        streams = self.container.streams.video
        if not streams or not streams[0].height or not streams[0].width:
            self.container.close()
            raise UserError(f"{self.path} has no video stream")
        streams[0].thread_type = "AUTO"
        return self.container, streams[0]

    def __exit__(self, *error: object) -> None:
        self.container.close()


def _timed_frames(container: Any, stream: Any, rate: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Yield frames with the begin and end of the times to which each is nearest, in seconds from the stream's start."""
    origin = _origin(stream)
    held: tuple[Any, float] | None = None
    begin = -1 / rate
    for number, frame in enumerate(container.decode(stream)):
        time = number / rate if frame.pts is None else float(frame.pts * frame.time_base) - origin
        if held is not None:
            middle = (held[1] + time) / 2
            yield held[0], begin, middle
            begin = middle
        held = (frame, time)
    if held is not None:
        yield held[0], begin, held[1] + 0.5 / rate


def _end_of_data(container: Any, stream: Any, seconds: float, *, all_streams: bool) -> float:
    """Return the end time of the last complete packet, searched near `seconds` if the format supports seeking."""
    origin = _origin(stream)
    for start in (seconds, 0.0):
        container.seek(int((start + origin) / stream.time_base), stream=stream)
        ends: list[float] = []
        for packet in container.demux(() if all_streams else stream):
            if packet.is_corrupt:
                break
            if packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin)
        if ends:
            return max(ends)
    return 0.0


def _origin(stream: Any) -> float:
    """Return the time of the first frame, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _picture(frame: Any, size: tuple[int, int] | None, pixel_aspect: Fraction) -> Tensor:
    """Convert a frame to RGB, upright and with square pixels, scaled and cropped to `size`."""
    turned = frame.rotation % 180 != 0
    target = size if size is None or not turned else (size[1], size[0])
    height, width = _shown_size(frame.height, frame.width, pixel_aspect)
    if target is not None:
        scale = max(target[0] / height, target[1] / width)
        height, width = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    interpolation = "AREA" if height < frame.height else "BICUBIC"
    array = frame.reformat(width=width, height=height, format="rgb24", interpolation=interpolation).to_ndarray()
    picture = torch.from_numpy(array)
    if target is not None:
        top, left = (height - target[0]) // 2, (width - target[1]) // 2
        picture = picture[top : top + target[0], left : left + target[1]]
    if frame.rotation % 360:
        picture = torch.rot90(picture, frame.rotation // 90, (0, 1))
    return picture.contiguous()


def _shown_size(height: int, width: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Return height and width in square pixels; the height of the file is kept."""
    return height, round(width * pixel_aspect)


def _pixel_aspect(stream: Any) -> Fraction:
    return stream.sample_aspect_ratio or Fraction(1)


def _frame_rate(stream: Any, path: Path) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{path} has no frame rate, as a picture; use a video file")
    return rate


def _duration(container: Any, stream: Any) -> float:
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base
