"""Read and write video files with PyAV: frames are uint8 [T, H, W, 3] RGB tensors.

Reading at another frame rate takes the nearest frame in time; reading at another size scales with the aspect kept and
crops the centre. Nothing is ever stretched.
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
"""Seconds by which two times may differ and count as equal."""
CONTAINER_TOLERANCE = 0.5
"""Seconds by which the length of a whole file and its last packet may differ: formats count and round differently."""
COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself; height and width are those of the picture as shown, in square pixels.

    num_frames: as the header counts them, or what fps and seconds make where it does not.
    """

    height: int
    width: int
    fps: float
    seconds: float
    num_frames: int


def probe_video(path: Path) -> VideoInfo:
    """Read the header of a video. Raises UserError when the file is no video."""
    with _opened(path) as (container, stream):
        height, width = _shown_size(stream.height, stream.width, _pixel_aspect(stream))
        fps, seconds = float(_frame_rate(stream, path)), _duration(container, stream)
        return VideoInfo(height, width, fps, seconds, stream.frames or round(seconds * fps))


def check_whole(path: Path) -> None:
    """Raise UserError when the data ends before the header says, as in a copy that was interrupted.

    Reads from the last key frame on and decodes nothing; damage before that is found by `count_frames`.
    """
    from av.error import FFmpegError

    with _opened(path) as (container, stream):
        seconds = _duration(container, stream)
        # without a length of its own, the video may end before the sound does
        own_length = stream.duration is not None
        tolerance = 1.5 / float(_frame_rate(stream, path)) if own_length else CONTAINER_TOLERANCE
        try:
            end = _end_of_data(container, stream, seconds, all_streams=not own_length)
        except FFmpegError as error:
            raise UserError(f"{path} is damaged near its end: {error.strerror}; {COPY_AGAIN}") from error
        if end < seconds - tolerance:
            raise UserError(f"{path} is cut short: it ends after {end:.2f} of {seconds:.2f} s; {COPY_AGAIN}")


def count_frames(path: Path) -> int:
    """Decode every frame and count them. Raises UserError when the file is no video, or damaged anywhere."""
    from av.error import FFmpegError

    count = 0
    with _opened(path) as (container, stream):
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
    """Read frames as one tensor; see `iterate_frames`."""
    frames = list(iterate_frames(path, fps=fps, size=size, start_seconds=start_seconds, max_frames=max_frames))
    if not frames:
        raise UserError(f"{path} has no frame at {start_seconds:g} s or later")
    return torch.stack(frames)


def iterate_frames(
    path: Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    start_seconds: float = 0.0,
    max_frames: int | None = None,
) -> Iterator[Tensor]:
    """Yield frames uint8 [H, W, 3] from `start_seconds` on, one by one.

    fps: frames a second of the result, each the nearest frame of the file in time (the later of two equally near);
        None keeps those of the file.
    size: (height, width) of the result, by scaling and cropping the centre; None keeps that of the file.
    Raises UserError when the file is missing, no video, or damaged.
    """
    from av.error import FFmpegError

    with _opened(path) as (container, stream):
        rate = float(_frame_rate(stream, path))
        step = 1 / (fps or rate)
        emitted = 0
        try:
            if start_seconds > 0:
                container.seek(int(start_seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
            for frame, begin, end in _timed_frames(container, stream, rate):
                # a file's frame stands for the times nearer to it than to its neighbours
                while begin - TIME_TOLERANCE <= start_seconds + emitted * step < end - TIME_TOLERANCE:
                    if emitted == max_frames:
                        return
                    yield _picture(frame, size, _pixel_aspect(stream))
                    emitted += 1
        except FFmpegError as error:
            raise UserError(f"{path} is damaged after {emitted} frames: {error.strerror}") from error


def write_video(
    path: Path, frames: Iterable[Tensor], *, fps: float, crf: int = 12, pixel_format: str = "yuv420p"
) -> int:
    """Write chunks of frames uint8 [T, H, W, 3] as H.264 and return the number of frames.

    The file appears under its name only when it is complete. crf 12 is visually lossless; yuv444p keeps colour at full
    resolution but not every player shows it. Raises UserError for a size that the pixel format cannot hold.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        count = _encode(temporary, frames, fps=fps, crf=crf, pixel_format=pixel_format, name=path)

    write_file(path, write)
    return count


def _encode(target: Path, frames: Iterable[Tensor], *, fps: float, crf: int, pixel_format: str, name: Path) -> int:
    """Write a video file; name: what it will be called, for errors. Raises OSError where the disk refuses."""
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
                        raise UserError(f"{name} would be {height}x{width}; yuv420p needs even sizes")
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
                    stream.options = {"crf": str(crf), "preset": "veryfast"}
                for picture in chunk:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.cpu().numpy(), format="rgb24")))
                    count += 1
            if stream is None:
                raise UserError(f"no frames to write to {name}")
            container.mux(stream.encode())
    except FFmpegError as error:
        if error.errno is None or error.errno <= 0:
            raise
        raise OSError(error.errno, os.strerror(error.errno)) from error
    return count


class _opened:
    """An open container and its first video stream; errors of opening become UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        import av
        from av.error import FFmpegError

        if not self.path.is_file():
            raise UserError(f"no video at {self.path}")
        try:
            self.container = av.open(str(self.path))
        except FFmpegError as error:
            raise UserError(f"{self.path} is not a video that can be read: {error.strerror}") from error
        streams = self.container.streams.video
        if not streams or not streams[0].height or not streams[0].width:
            self.container.close()
            raise UserError(f"{self.path} has no video stream")
        streams[0].thread_type = "AUTO"
        return self.container, streams[0]

    def __exit__(self, *error: object) -> None:
        self.container.close()


def _timed_frames(container: Any, stream: Any, rate: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Yield frames with the span of times to which each is nearest, in seconds from the stream's start."""
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
    """Time at which the last whole packet ends, found near `seconds` if the format can be searched."""
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
    """Time of the first frame, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _picture(frame: Any, size: tuple[int, int] | None, pixel_aspect: Fraction) -> Tensor:
    """Convert to RGB, upright and with square pixels, scaled and cropped to `size`."""
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
    """Size in square pixels; the height of the file is kept."""
    return height, round(width * pixel_aspect)


def _pixel_aspect(stream: Any) -> Fraction:
    return stream.sample_aspect_ratio or Fraction(1)


def _frame_rate(stream: Any, path: Path) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{path} does not say its frame rate; is it a picture?")
    return rate


def _duration(container: Any, stream: Any) -> float:
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base
