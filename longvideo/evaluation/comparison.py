"""Compare two evaluations of ShapeWorld video by video, which needs fewer videos than comparing their shares.

Both must have the same prompts, seeds and lengths. Most videos are then right in both or wrong in both, and only the
others add to the error of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from longvideo.errors import UserError
from longvideo.evaluation.results_file import Answers
from longvideo.evaluation.shapeworld import FPS, OPENING_SECONDS, QUESTIONS

if TYPE_CHECKING:
    from longvideo.evaluation.results_file import JudgedVideo, ResultsFile

NORMAL_95 = 1.96
"""Half the width of the 95 % interval of a normal distribution, in standard deviations."""
DECIMALS = 9
"""Decimals of a difference that are compared with a bar. The others contain only rounding errors."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two shares over the same videos.

    num_videos: number of videos with an answer. base, other: mean share of right answers, percent. points: mean of the
    videos' differences, other minus base. low, high: its 95 % interval; None for one video.
    """

    num_videos: int
    base: float
    other: float
    points: float
    low: float | None
    high: float | None

    def is_within(self, bar: float) -> bool:
        """Return whether the difference itself, not its interval, is at least -bar points."""
        return round(self.points, DECIMALS) >= -bar

    def record(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "num_videos": self.num_videos,
            "base": round(self.base, 4),
            "other": round(self.other, 4),
            "points": round(self.points, 4),
            "low": None if self.low is None else round(self.low, 4),
            "high": None if self.high is None else round(self.high, 4),
        }


@dataclass(frozen=True)
class ComparedPart:
    """The differences of every question in one part of the videos.

    name: whole, first or last. heading: name with its time. differences: by question; without those that no video has
    an answer to.
    """

    name: str
    heading: str
    differences: dict[str, PairedDifference]


@dataclass(frozen=True)
class VideoPart:
    """The answers in one part of the videos.

    name, heading: as in `ComparedPart`. answers: of every video, one entry for each window or shot of the part.
    """

    name: str
    heading: str
    answers: Sequence[Sequence[Answers]]


def paired_difference(base: Sequence[float], other: Sequence[float]) -> PairedDifference:
    """Return the mean difference of paired shares in [0, 1], one pair for each video.

    With d_i = other_i - base_i of n videos and their sample standard deviation s (divided by n - 1), the interval is
    mean(d) -+ 1.96 s / sqrt(n), the normal approximation without a correction for continuity. Videos are independent,
    the answers within a video are not; so a video with several answers counts once, with the share that is right. The
    interval is too narrow if only a few videos differ, and has no width if none does.
    """
    assert len(base) == len(other) > 0
    differences = [100 * (b - a) for a, b in zip(base, other, strict=True)]
    points, low, high = fmean(differences), None, None
    if len(differences) > 1:
        half = NORMAL_95 * stdev(differences) / math.sqrt(len(differences))
        low, high = points - half, points + half
    return PairedDifference(len(differences), 100 * fmean(base), 100 * fmean(other), points, low, high)


def compare_results(base: ResultsFile, other: ResultsFile) -> list[ComparedPart]:
    """Return the differences of each part of the videos. Raises UserError for results of other videos.

    The whole video and its last window are compared if there are several windows, or several shots.
    """
    if (difference := first_difference(base.videos, other.videos)) is not None:
        raise UserError(
            f"cannot compare {other.path} with {base.path}: {difference}; use results of the same prompts, seeds,"
            " lengths and shots"
        )
    parts = []
    for first, second in zip(video_parts(base.videos), video_parts(other.videos), strict=True):
        differences = {}
        for question in first.answers[0][0]:
            pairs = [
                (before, after)
                for a, b in zip(first.answers, second.answers, strict=True)
                if (before := right_share(a, question)) is not None and (after := right_share(b, question)) is not None
            ]
            if pairs:
                differences[question] = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        parts.append(ComparedPart(first.name, first.heading, differences))
    return parts


def first_difference(base: Sequence[JudgedVideo], other: Sequence[JudgedVideo]) -> str | None:
    """Return in words why results are of other videos; None if they have the same prompts, seeds and lengths."""
    if len(base) != len(other):
        return f"it has {len(other)} videos, not {len(base)}"
    for number, pair in enumerate(zip(base, other, strict=True), 1):
        # not strict: a different number of shots is found first
        for (name, expected), (_, value) in zip(*map(video_facts, pair), strict=False):
            if value != expected:
                return f"{name} of its video {number} is {value!r}, not {expected!r}"
    return None


def video_facts(video: JudgedVideo) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of everything that must be equal, first the number of shots, then their properties."""
    yield "the number of shots", len(video.shots)
    yield "the seed", video.seed
    for number, shot in enumerate(video.shots, 1):
        yield f"the prompt of shot {number}", shot.prompt
        yield f"the expected first frame of shot {number}", shot.expected_frame
        # a scene with all its properties, or what a caption mentions of it
        yield f"the expected scene of shot {number}", shot.scene
    yield "the number of frames", video.num_frames
    yield "the number of judged windows", len(video.windows)


def video_parts(videos: Sequence[JudgedVideo]) -> list[VideoPart]:
    """Return the parts of videos that can be compared, in the order of their rows."""
    if any(len(video.shots) > 1 for video in videos):
        shots = [[shot.answers for shot in video.shots] for video in videos]
        return [
            VideoPart("whole", "every shot", shots),
            VideoPart("first", "first shot", [answers[:1] for answers in shots]),
            VideoPart("last", "last shot", [answers[-1:] for answers in shots]),
        ]
    # without the questions about prompts and cuts of shots
    openings = [({name: video.shots[0].answers[name] for name in QUESTIONS},) for video in videos]
    first = VideoPart("first", f"first {OPENING_SECONDS:g} s", openings)
    if all(len(video.windows) < 2 for video in videos):
        return [first]
    windows = [video.windows or opening for video, opening in zip(videos, openings, strict=True)]
    start, end = last_window(videos[0])
    same_end = all(last_window(video) == (start, end) for video in videos)
    last = VideoPart(
        "last", f"{start:g} to {end:g} s" if same_end else "last window", [answers[-1:] for answers in windows]
    )
    return [VideoPart("whole", "whole video", windows), first, last]


def last_window(video: JudgedVideo) -> tuple[float, float]:
    """Return start and end of the last window in which a video was judged, seconds."""
    start = OPENING_SECONDS * max(0, len(video.windows) - 1)
    return start, round(min(start + OPENING_SECONDS, video.num_frames / FPS), 1)


def right_share(answers: Sequence[Answers], question: str) -> float | None:
    """Return the share of right answers to a question; None if it applies to none of them."""
    values = [answer[question] for answer in answers if answer[question] is not None]
    return fmean(map(bool, values)) if values else None
