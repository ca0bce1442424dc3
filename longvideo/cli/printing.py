"""Text from files, made fit for a terminal, and a terminal that is closed while a command writes to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2  # file descriptors

MAX_CHARACTERS = 2000
MEBIBYTE, GIBIBYTE = 2**20, 2**30


def printable(text: str, *, limit: int = MAX_CHARACTERS) -> str:
    """Write control characters, which a terminal would obey, as escapes; cut what is longer than the limit."""
    shown = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[:limit]} ..."


def shown_size(num_bytes: int) -> str:
    """Return a size in bytes as MiB, or as GiB from 1 GiB on."""
    return f"{num_bytes / GIBIBYTE:,.2f} GiB" if num_bytes >= GIBIBYTE else f"{num_bytes / MEBIBYTE:,.1f} MiB"


@contextmanager
def without_reader(*descriptors: int) -> Iterator[None]:
    """Go on where nobody reads what the block prints: a terminal that was closed, a pipe whose reader ended.

    What is printed later to these descriptors is dropped, so that the exit code stays that of the command.
    """
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
