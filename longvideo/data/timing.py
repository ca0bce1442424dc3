"""Compare the entries of a manifest with their files, and give their shots in seconds.

Checking, encoding and training all plan with the result, so they give one verdict on a line.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.data.manifest import ShotEntry, TimedShotEntry, VideoEntry
from longvideo.data.video import VideoInfo, probe_video
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FPS_TOLERANCE = 5e-4
"""Allowed relative error of fps: 23.98 is accepted for 24000/1001, but 24 is not."""
FRAMES_TOLERANCE = 1
"""Allowed difference of num_frames, because not every program counts the last frame."""
END_TOLERANCE_FRAMES = 1.5
"""Allowed distance of end_seconds after the end of the video, in mean frames."""
THREADS = 8
"""Files that are read at the same time, as most of the time is spent on waiting for the disk."""


@dataclass(frozen=True)
class ShotSpan:
    """A shot from `start` to `end`, seconds after the first picture of its file."""

    start: float
    end: float
    caption: str


@dataclass(frozen=True)
class TimedVideo:
    """One video of a manifest, measured in time.

    seconds: length. read_end: end of the times for which a frame can be read. shots: in order. sample: as in
    `VideoEntry`. transfer, is_interlaced: as in `VideoInfo`.
    """

    video: Path
    seconds: float
    read_end: float
    shots: tuple[ShotSpan, ...]
    sample: str | None = None
    transfer: str | None = None
    is_interlaced: bool = False


def measure(entries: Sequence[VideoEntry]) -> list[TimedVideo]:
    """Read the times of all videos.

    A file that cannot be read keeps its place by the numbers of its line, so its clips are planned, and reading them
    reports the damage. Raises UserError for the first line that does not fit its file, and for a file that cannot be
    read and whose line has no fps and num_frames.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_measured, entries))


def time_entry(entry: VideoEntry, info: VideoInfo) -> TimedVideo:
    """Return an entry in seconds. info: of its file. Raises UserError if they do not fit."""
    problems = differences(entry.video, info, fps=entry.fps, num_frames=entry.num_frames)
    problems += shot_differences(entry, info)
    if problems:
        raise UserError(f"{problems[0]}; correct its line of the manifest")
    shots = tuple(_span(shot, info) for shot in entry.shots)
    return TimedVideo(
        entry.video,
        seconds=info.seconds,
        read_end=info.timeline.read_end,
        shots=shots,
        sample=entry.sample,
        transfer=info.transfer,
        is_interlaced=info.is_interlaced,
    )


def differences(video: Path, info: VideoInfo, *, fps: float | None, num_frames: int | None) -> list[str]:
    """Return the differences between the numbers of a line and its file, in words. None is not compared."""
    problems = []
    rates = sorted({info.fps, info.header_fps})
    if fps is not None and all(abs(fps - rate) > FPS_TOLERANCE * rate for rate in rates):
        problems.append(f"fps is {fps:g}, expected {' or '.join(f'{rate:.6g}' for rate in rates)} as in {video}")
    if num_frames is not None and abs(num_frames - info.num_frames) > FRAMES_TOLERANCE:
        problems.append(f"num_frames is {num_frames}, expected {info.num_frames} as in {video}")
    return problems


def shot_differences(entry: VideoEntry, info: VideoInfo) -> list[str]:
    """Return the shots that end after their file, in words."""
    problems = []
    for i, shot in enumerate(entry.shots):
        if isinstance(shot, ShotEntry):
            if entry.num_frames is None and shot.end > info.num_frames + FRAMES_TOLERANCE:
                problems.append(
                    f"shots[{i}]: end is {shot.end}, expected at most {info.num_frames} as in {entry.video}"
                )
        else:
            latest = info.seconds + END_TOLERANCE_FRAMES / info.fps
            name, value = ("end", shot.end_seconds) if shot.end_seconds is not None else ("start", shot.start_seconds)
            if value > latest:
                problems.append(
                    f"shots[{i}]: {name}_seconds is {value:g}, expected at most {info.seconds:.3f} as in {entry.video}"
                )
    return problems


def _measured(entry: VideoEntry) -> TimedVideo:
    try:
        info = probe_video(entry.video)
    except UserError as error:
        if entry.fps is None or entry.num_frames is None:
            raise UserError(f"{error}; or remove its line from the manifest") from error
        return _by_numbers(entry, fps=entry.fps, num_frames=entry.num_frames)
    return time_entry(entry, info)


def _by_numbers(entry: VideoEntry, *, fps: float, num_frames: int) -> TimedVideo:
    seconds = num_frames / fps
    shots = tuple(
        ShotSpan(shot.start / fps, shot.end / fps, shot.caption)
        if isinstance(shot, ShotEntry)
        else ShotSpan(shot.start_seconds, seconds if shot.end_seconds is None else shot.end_seconds, shot.caption)
        for shot in entry.shots
    )
    return TimedVideo(entry.video, seconds, (num_frames - 0.5) / fps, shots, entry.sample)


def notices(videos: Iterable[TimedVideo]) -> list[str]:
    """Return what is converted while videos are read, one sentence for each kind, for users."""
    known = list(videos)
    sentences = []
    for transfer in sorted({video.transfer for video in known if video.transfer is not None}):
        number = sum(video.transfer == transfer for video in known)
        sentences.append(f"{_videos(number)} HDR ({transfer}), tone-mapped to SDR")
    if interlaced := sum(video.is_interlaced for video in known):
        sentences.append(f"{_videos(interlaced)} interlaced, deinterlaced when read")
    return sentences


def _videos(number: int) -> str:
    return "1 video is" if number == 1 else f"{number} videos are"


def _span(shot: ShotEntry | TimedShotEntry, info: VideoInfo) -> ShotSpan:
    if isinstance(shot, ShotEntry):
        return ShotSpan(info.timeline.time_of(shot.start), info.timeline.time_of(shot.end), shot.caption)
    end = info.seconds if shot.end_seconds is None else min(shot.end_seconds, info.seconds)
    return ShotSpan(shot.start_seconds, end, shot.caption)
