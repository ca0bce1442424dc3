"""How a video is sampled: types and ranges that are checked before anything heavy is imported."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Rational, Real
from pathlib import Path

from longvideo.errors import UserError

MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
MAX_SEED = 2**63 - 1
MOST_SHOWN = 60


@dataclass(frozen=True)
class SamplingOptions:
    """Solver steps a chunk, classifier-free guidance scale (1 is none) and seed; None takes the model's own default.

    Whole numbers of numpy are taken too, and become Python's.
    """

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None:
            object.__setattr__(self, "steps", whole_number(self.steps, "steps", 1, MAX_STEPS))
        guidance = self.guidance
        if guidance is not None:
            if isinstance(guidance, bool) or not isinstance(guidance, Real):
                raise UserError(f"guidance is {shown(guidance)}; it must be a number")
            if not 0 <= guidance <= MAX_GUIDANCE:
                value = shown(guidance) if isinstance(guidance, Rational) else f"{float(guidance):g}"
                raise UserError(f"guidance is {value}; it must be from 0 to {MAX_GUIDANCE:g} (1 means none)")
            object.__setattr__(self, "guidance", float(guidance))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", 0, MAX_SEED))


def whole_number(value: object, name: str, least: int, most: int) -> int:
    """Return a whole number of Python or numpy. Raises UserError for another type, bool too, and out of the range."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it must be a whole number")
    if not least <= number <= most:
        raise UserError(f"{name} is {shown(number)}; it must be from {least} to {most}")
    return number


def check_path(value: object, name: str) -> None:
    """Raise UserError for what is not a path or a name."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise UserError(f"{name} is {shown(value)}; give a name or a path")


def shown(value: object) -> str:
    """Return a value as it is written in Python, shortened, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a number with more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
