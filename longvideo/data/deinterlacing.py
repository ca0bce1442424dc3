"""Turn interlaced frames into progressive ones with FFmpeg's filter bwdif, one frame for each frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import av

FILTER, OPTIONS = "bwdif", "mode=send_frame:parity=auto:deint=interlaced"


def deinterlaced(frames: Iterator[tuple[av.VideoFrame, float]], stream: Any) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield frames and their times; from the first frame that is flagged as interlaced on, flagged frames are filtered.

    The filter looks at the frames before and after, so it returns frames one later than it gets them. stream: PyAV's
    video stream.
    """
    for frame, time in frames:
        if frame.interlaced_frame:
            yield from _filtered(frame, time, frames, stream)
            return
        yield frame, time


def _filtered(
    first: av.VideoFrame, first_time: float, frames: Iterator[tuple[av.VideoFrame, float]], stream: Any
) -> Iterator[tuple[av.VideoFrame, float]]:
    from itertools import chain

    from av.error import BlockingIOError, EOFError
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(template=stream)
    bwdif, sink = graph.add(FILTER, OPTIONS), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    times: list[float] = []
    for frame, time in chain([(first, first_time)], frames, [(None, 0.0)]):
        if frame is not None:
            times.append(time)
        graph.vpush(frame)
        while times:
            try:
                result = graph.vpull()
            except (BlockingIOError, EOFError):
                break
            yield result, times.pop(0)
