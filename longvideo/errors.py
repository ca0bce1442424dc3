"""Errors that a user can cause and correct. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

Name = TypeVar("Name", bound=str)

EXIT_USER_ERROR = 2
"""Exit code of a command that ends in a UserError."""
MAX_SHOWN_BITS, MAX_SHOWN_CHARACTERS = 128, 60


class UserError(ValueError):
    """An input cannot be used. The message contains the input, what was expected, and the remedy."""


class ConfigError(UserError):
    """A key or value of a configuration is wrong."""


class CheckpointError(UserError):
    """A model folder or weight file is missing, damaged, or does not fit the model."""


class RefusedByMain(UserError):
    """The main rank of a launcher has refused to continue and prints the reason; other ranks print nothing."""


def known(option: str, name: object, names: Sequence[Name]) -> Name:
    """Return the name of a choice. option: what it is of, for the error. Raises UserError for another name."""
    for choice in names:
        if isinstance(name, str) and choice == name:
            return choice
    raise UserError(f"{option} is {name!r}; expected one of {', '.join(names)}")


def shown(value: object) -> str:
    """Return a value as Python code for an error: on one line, and shortened to 60 characters."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a number inside, with more digits than Python converts
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
