"""Turn interlaced frames into progressive ones with FFmpeg's filter bwdif, one frame for each frame."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from longvideo.data.conversion import filter_graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import av

    from longvideo.data.container import OpenVideo

BWDIF = "bwdif", "mode=send_frame:parity=auto:deint=interlaced"


def deinterlaced(video: OpenVideo, start_seconds: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield frames and their times from a frame at or before `start_seconds` on.

    From the first frame that is flagged as interlaced on, flagged frames are filtered. The filter looks at the frames
    before and after, so reading begins before the first frame that is needed.
    """
    frames = video.frames(start_seconds)
    first = next(frames, None)
    if first is not None and first[0].interlaced_frame and first[1] > max(0.0, start_seconds - video.step):
        video.reopen()
        frames = video.frames(max(0.0, start_seconds - 2 * video.step))
        first = next(frames, None)
    for frame, time in chain([] if first is None else [first], frames):
        if frame.interlaced_frame:
            yield from _filtered(chain([(frame, time)], frames), video.stream)
            return
        yield frame, time


def _filtered(frames: Iterable[tuple[av.VideoFrame, float]], stream: Any) -> Iterator[tuple[av.VideoFrame, float]]:
    from av.error import BlockingIOError, EOFError

    graph = filter_graph(stream, [BWDIF])
    times: list[float] = []
    for frame, time in chain(frames, [(None, 0.0)]):
        if frame is not None:
            times.append(time)
        graph.vpush(frame)
        while times:
            try:
                result = graph.vpull()
            except (BlockingIOError, EOFError):
                break
            yield result, times.pop(0)
