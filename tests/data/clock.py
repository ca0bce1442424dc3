"""Videos whose frames show their own time as a bar code above colors, in forms that other programs write; made with
PyAV."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

BITS = 10
HEIGHT, WIDTH = 64, 96
COLORS = ((200, 40, 40), (40, 180, 60), (40, 60, 200), (220, 210, 40), (180, 60, 180), (240, 240, 240))
X264 = {"crf": "12", "preset": "veryfast", "g": "40", "bf": "2", "x264-params": "b-adapt=0:threads=1"}


def picture(seconds: float) -> np.ndarray:
    """Return uint8 [64, 96, 3] with the time in hundredths of a second in black and white bars, and with COLORS."""
    number = round(seconds * 100)
    frame = np.full((HEIGHT, WIDTH, 3), 110, np.uint8)
    for bit in range(BITS):
        frame[20:44, 8 + 8 * bit : 16 + 8 * bit] = 235 if number >> (BITS - 1 - bit) & 1 else 20
    for i, color in enumerate(COLORS):
        frame[50:, 16 * i : 16 * (i + 1)] = color
    return frame


def shown_times(frames: Tensor) -> np.ndarray:
    """Return the time that each frame of uint8 [T, 64, 96, 3] shows, seconds."""
    bars = frames[:, 30:34, 8:88].float().mean((1, 3)).reshape(len(frames), BITS, 8)[:, :, 3:5].mean(2) > 128
    return (bars.numpy() * 2 ** np.arange(BITS - 1, -1, -1)).sum(1) / 100


def write(
    path: Path,
    times: Iterable[float],
    *,
    codec: str = "libx264",
    container: str | None = None,
    options: Mapping[str, str] = X264,
    pixel_format: str = "yuv420p",
    rate: int = 24,
    base: Fraction = Fraction(1, 12000),
    begin: float = 0.0,
    sound: float = 0.0,
    **properties: Any,
) -> Path:
    """Write a video with a frame for each time.

    base: unit of the times. begin: time of the first picture in the file, seconds. sound: seconds of silence next to
    the pictures. properties: attributes of the codec context or, after "frame_", of the frames.
    """
    import av

    with av.open(f"file:{path}", "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, pixel_format, dict(options)
        stream.time_base = stream.codec_context.time_base = base
        silence: Any = out.add_stream("aac", rate=8000, layout="mono") if sound else None
        for name, value in properties.items():
            if not name.startswith("frame_"):
                setattr(stream.codec_context, name, value)
        for seconds in times:
            frame: Any = av.VideoFrame.from_ndarray(picture(seconds), format="rgb24")
            for name, value in properties.items():
                if name.startswith("frame_"):
                    setattr(frame, name.removeprefix("frame_"), value)
            frame.pts, frame.time_base = round((begin + seconds) / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        for number in range(round(sound * 8000 / 1024)):
            samples: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, number * 1024, Fraction(1, 8000)
            out.mux(silence.encode(samples))
        if silence is not None:
            out.mux(silence.encode())
    return path


def cut(source: Path, path: Path, start_seconds: float) -> Path:
    """Copy a video without decoding it, from `start_seconds` on: the frames before it are hidden by an edit list."""
    import av

    with av.open(str(source)) as data, av.open(str(path), "w") as out:
        stream = data.streams.video[0]
        assert stream.time_base is not None
        copy = out.add_stream_from_template(stream)
        for packet in data.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= round(start_seconds / stream.time_base)
                packet.dts -= round(start_seconds / stream.time_base)
                packet.stream = copy
                out.mux(packet)
    return path


def converted(path: Path, size: tuple[int, int], *, filters: Sequence[tuple[str, str | None]] = ()) -> np.ndarray:
    """Return the first frame as FFmpeg's own filter converts it to `size`, height and width: uint8 [H, W, 3].

    filters: name and options of filters before that.
    """
    import av
    from av.filter import Graph

    with av.open(f"file:{path}") as file:
        frame = next(file.decode(video=0))
        graph = Graph()
        kernel = "area" if size[0] < frame.height else "bicubic"
        scale = graph.add("scale", f"{size[1]}:{size[0]}:flags={kernel}")
        source = graph.add_buffer(template=file.streams.video[0])
        before = [graph.add(name, options) for name, options in filters]
        graph.link_nodes(source, *before, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
        graph.vpush(frame)
        result: Any = graph.vpull()
        return result.to_ndarray()


def error(frames: Tensor, times: Sequence[float] | np.ndarray, *, start_seconds: float = 0.0, fps: float = 24) -> float:
    """Return the largest distance in seconds of a frame from the nearest frame in the file to its time."""
    expected = start_seconds + np.arange(len(frames)) / fps
    distance = np.abs(np.asarray(times)[None] - expected[:, None]).min(1)
    return float((np.abs(shown_times(frames) - expected) - distance).max())
