"""The times of a video's frames, read without decoding where the format allows it.

Frames are numbered in the order in which they are shown, and times are in seconds after the first one. Frames that an
edit list hides do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from longvideo.data.container import TIME_TOLERANCE
from longvideo.errors import UserError

if TYPE_CHECKING:
    from longvideo.data.container import OpenVideo

HIDES_FRAMES = ("vp8",)
"""Codecs with packets that are decoded but not shown, so packets do not count frames."""
SAME_RATE = 0.01
"""Relative difference up to which the header's frame rate is taken for that of the frames."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """times: of all frames, in seconds, ascending from 0. step: time for which the last frame is shown, seconds."""

    times: np.ndarray = field(repr=False)
    step: float

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return float(self.times[-1]) + self.step

    @property
    def read_end(self) -> float:
        """End of the times for which a frame can be read: the last frame is used for half of its own time."""
        return float(self.times[-1]) + self.step / 2

    def time_of(self, frame: int) -> float:
        """Return the time of a frame, or the length of the video for frames after the last one."""
        return float(self.times[frame]) if frame < len(self.times) else self.seconds

    def rate(self, header: float) -> float:
        """Return the mean frames per second, or the header's rate if both are nearly equal, as it is not rounded."""
        if len(self.times) < 2 or not self.times[-1] > 0:
            return header
        mean = (len(self.times) - 1) / float(self.times[-1])
        return header if abs(mean - header) <= SAME_RATE * header else mean


def frames_until(read_end: float, fps: float) -> int:
    """Return the number of frames that are read from a whole video at `fps`. read_end: as in `Timeline`."""
    return int(read_end * fps - TIME_TOLERANCE) + 1


def read_timeline(video: OpenVideo, first_seconds: float) -> Timeline:
    """Read the times of all frames.

    first_seconds: time of the first decoded frame in the file; packets before it cannot be decoded.
    Raises UserError if times go backward. FFmpeg's errors are not changed.
    """
    times = _of_index(video)
    if times is None and video.stream.codec_context.name not in HIDES_FRAMES:
        video.reopen()
        times = _of_packets(video, first_seconds)
    if times is None:
        video.reopen()
        times = np.array([time for _, time in video.frames()])
    if not len(times):
        raise UserError(f"{video.path} has no frame; copy or download it again")
    return Timeline(times, video.step)


def _of_index(video: OpenVideo) -> np.ndarray | None:
    """Return the times of an MP4 whose index lists all frames at a constant distance, without reading their data."""
    entries = video.stream.index_entries
    if "mp4" not in video.container.format.name.split(",") or not 0 < len(entries) == video.stream.frames:
        return None
    stamps = np.empty(len(entries), np.int64)
    for number, entry in enumerate(entries):
        if entry.is_discard:
            return None
        stamps[number] = entry.timestamp
    if len(stamps) == 1:
        return np.zeros(1)
    steps = np.diff(stamps)
    if steps.min() <= 0 or steps.max() - steps.min() > 1:
        return None
    return np.arange(len(stamps)) * (float(stamps[-1] - stamps[0]) / (len(stamps) - 1) * float(video.stream.time_base))


def _of_packets(video: OpenVideo, first_seconds: float) -> np.ndarray | None:
    """Return the times of all packets in order; None if one has no time, as in MPEG-PS."""
    times: list[float] = []
    decoding = -np.inf
    for packet in video.container.demux(video.stream):
        if not packet.size or packet.is_discard:
            continue
        stamp = packet.dts if video.has_decoding_times else packet.pts
        if stamp is None:
            return None
        if packet.dts is not None:
            time = float(packet.dts * packet.time_base)
            if time < decoding:
                raise video.backward(decoding - first_seconds, time - first_seconds)
            decoding = time
        times.append(float(stamp * packet.time_base))
    ordered = np.sort(np.array(times)) - first_seconds
    shown = ordered[ordered > -video.step / 2]
    if video.has_decoding_times and len(shown) > 1:
        # as for decoded frames: the last ones have no time and follow at the last distance
        later = np.arange(1, len(ordered) - len(shown) + 1) * (shown[-1] - shown[-2])
        shown = np.append(shown, shown[-1] + later)
    return shown
