"""Sampling options, and checks of values that users pass. This module does not import torch."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Rational, Real
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np

MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How the chunks of a video are sampled. Numbers may be those of numpy; they are converted to Python's.

    steps: number of solver steps for each chunk, 1 to 1000; None means the model's own. guidance: scale of
    classifier-free guidance, 0 to 50, where 1 means no guidance; None means the model's own. seed: seed of the noise, 0
    to 2^63 - 1; the same seed gives the same video.
    Raises UserError for a value of another type or out of its range.
    """

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None:
            object.__setattr__(self, "steps", whole_number(self.steps, "steps", 1, MAX_STEPS))
        guidance = self.guidance
        if guidance is not None:
            expected = f"expected a number from 0 to {MAX_GUIDANCE:g}, where 1 means no guidance"
            if isinstance(guidance, bool) or not isinstance(guidance, Real):
                raise UserError(f"guidance is {shown(guidance)}; {expected}")
            if not 0 <= guidance <= MAX_GUIDANCE:
                value = shown(guidance) if isinstance(guidance, Rational) else f"{float(guidance):g}"
                raise UserError(f"guidance is {value}; {expected}")
            object.__setattr__(self, "guidance", float(guidance))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", 0, MAX_SEED))


def whole_number(value: object, name: str, minimum: int, maximum: int) -> int:
    """Return a whole number of Python or numpy as an int.

    name: what the number is, for the error. minimum, maximum: range of the number, both included.
    Raises UserError for another type, bool included, and for a number out of the range.
    """
    expected = f"expected a whole number from {minimum} to {maximum}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; {expected}")
    if not minimum <= number <= maximum:
        raise UserError(f"{name} is {shown(number)}; {expected}")
    return number


def check_frames(frames: np.ndarray) -> None:
    """Raise UserError for frames that are not uint8 [T, H, W, 3]."""
    if frames.dtype != "uint8" or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")


def check_beginning(image: object, video: object, video_seconds: object) -> None:
    """Raise UserError for a first picture together with a video to continue, and for the length of no video."""
    if image is not None and video is not None:
        raise UserError("image and video exclude each other: a video is continued from its own frames; use one of them")
    if video is None and video_seconds is not None:
        raise UserError(f"video_seconds is {shown(video_seconds)}, but there is no video; leave it out")


def check_path(value: object, name: str) -> None:
    """Raise UserError for a value that is not a path or a name. name: what the path is, for the error."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise UserError(f"{name} is {shown(value)}; expected a name or a path")
