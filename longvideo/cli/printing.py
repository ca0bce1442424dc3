"""Print text from files safely, and continue when the terminal is closed."""

import os
from collections.abc import Generator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2  # file descriptors

MAX_CHARACTERS = 2000
MEBIBYTE, GIBIBYTE = 2**20, 2**30


def printable(text: str, *, limit: int = MAX_CHARACTERS) -> str:
    """Return text with control characters as escapes, shortened to `limit` characters.

    A terminal executes control characters, so text from files must not hold any.
    """
    shown = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[:limit]} ..."


def shown_size(num_bytes: int) -> str:
    """Return a size in bytes as MiB, or as GiB from 1 GiB on."""
    return f"{num_bytes / GIBIBYTE:,.2f} GiB" if num_bytes >= GIBIBYTE else f"{num_bytes / MEBIBYTE:,.1f} MiB"


@contextmanager
def without_reader(*descriptors: int) -> Generator[None]:
    """Continue if the output of the block has no reader: the terminal was closed, or the reader of a pipe has ended.

    Later output to these descriptors is discarded, so the exit code is that of the command.
    """
    try:
        yield
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(null, descriptor)
        os.close(null)
