"""Bounds of the numbers of a configuration: declared with their defaults, checked when a value is set or read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longvideo.errors import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUNDS = "bounds"
MOST_SEED = 2**63 - 1
MOST_STEPS = 10**9


@dataclass(frozen=True)
class Bounds:
    """A range of finite numbers: least and most belong to it, above and below do not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        is_finite = -math.inf < value < math.inf  # math.isfinite cannot take a number of 400 digits
        return is_finite and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        if -math.inf < self.least and self.most < math.inf:
            return f"from {self.least:g} to {self.most:.16g}"
        low = [f"of at least {self.least:g}"] if self.least > -math.inf else []
        low += [f"above {self.above:g}"] if self.above > -math.inf else []
        high = [f"of at most {self.most:.16g}"] if self.most < math.inf else []
        high += [f"below {self.below:g}"] if self.below < math.inf else []
        return " and ".join(low + high)


def bounded(default: Any, **bounds: float) -> Any:
    """Return a dataclass field for a number, an optional one, or a list of them. bounds: arguments of `Bounds`."""
    metadata = {BOUNDS: Bounds(**bounds)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def share(default: float) -> Any:
    """Return a dataclass field for a share, from 0 to 1."""
    return bounded(default, least=0, most=1)


def steps_field(default: int) -> Any:
    """Return a dataclass field for a number of training steps."""
    return bounded(default, least=0, most=MOST_STEPS)


def seed_field() -> Any:
    """Return a dataclass field for a seed, by default 0."""
    return bounded(0, least=0, most=MOST_SEED)


class Bounded:
    """Base class of a configuration that checks its numbers when it is created; ConfigError names the field."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_field(getattr(self, field.name), field, field.name)


def check_field(value: Any, field: dataclasses.Field[Any], key: str) -> None:
    """Raise ConfigError unless a number, or every number of a list, is within the bounds of its field."""
    bounds = field.metadata.get(BOUNDS, Bounds())
    for number, place in _numbers(value, key):
        if not bounds.hold(number):
            expected = f"a number {bounds}" if -math.inf < number < math.inf and str(bounds) else "a finite number"
            raise ConfigError(f"{place} is {shown(number)}; expected {expected}")


def _numbers(value: Any, key: str) -> Iterator[tuple[float, str]]:
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value, key
