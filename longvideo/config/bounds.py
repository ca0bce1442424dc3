"""Values of configurations that come from outside: numbers within bounds, or an error that says so."""

from __future__ import annotations

from longvideo.errors import ConfigError

MAX_BITS = 128


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise ConfigError unless a value is a whole number (True and False are none) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name}={shown(value)}, wanted a whole number from {least} to {most}")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise ConfigError unless a value is a finite number (True and False are none) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{name}={shown(value)}, wanted a number from {least:g} to {most:g}")


def check_numbers(name: str, values: object, count: int, least: float, most: float) -> None:
    """Raise ConfigError unless values are a tuple of so many finite numbers from `least` to `most`."""
    if not isinstance(values, tuple) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, tuple) else repr(values)
        raise ConfigError(f"{name} has {got}, wanted a list of {count}")
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, least, most)


def shown(value: object) -> str:
    """Write a value, but not the thousands of digits or characters that it may have."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
