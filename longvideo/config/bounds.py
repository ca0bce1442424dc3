"""Checks of configuration values that come from outside: numbers within bounds, or an error that names them."""

from __future__ import annotations

from longvideo.errors import ConfigError, shown


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise ConfigError unless a value is a whole number from `least` to `most`; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; expected a whole number from {least} to {most}")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise ConfigError unless a value is a finite number from `least` to `most`; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; expected a number from {least:g} to {most:g}")


def check_numbers(name: str, values: object, count: int, least: float, most: float) -> None:
    """Raise ConfigError unless values are a tuple of `count` finite numbers from `least` to `most`."""
    if not isinstance(values, tuple) or len(values) != count:
        got = f"has {len(values)} values" if isinstance(values, tuple) else f"is {values!r}"
        raise ConfigError(f"{name} {got}; expected a list of {count} numbers")
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, least, most)
