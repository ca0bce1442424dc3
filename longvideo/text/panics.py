"""Call the tokenizers library so that a panic of its Rust code is an error, without the report that Rust prints."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TYPE_CHECKING, TypeVar

from longvideo.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

Result = TypeVar("Result")

PANIC = "PanicException"
STDERR = 2  # file descriptor
MAX_REASON = 200
_one_at_a_time = threading.Lock()
"""Held while standard error is a file: a second thread would restore the file in place of standard error."""


class TokenizerError(CheckpointError):
    """The reason why a tokenizer cannot be used; the caller adds the name of its file."""


def guarded(call: Callable[[str], Result], text: str) -> Result:
    """Return the result of a function of the library. Raises TokenizerError for its errors and panics.

    Rust reports a panic on standard error before Python gets the exception. The report is discarded, because the error
    contains its reason. What other threads print during the call appears after it, or is lost with such a report.
    """
    with _stderr_kept() as kept:
        try:
            return call(text)
        except BaseException as error:
            # the library raises a plain Exception for invalid input; its panics do not derive from Exception
            is_panic = type(error).__name__ == PANIC
            if type(error) is not Exception and not is_panic:
                raise
            if is_panic and kept is not None:
                kept.seek(0)
                kept.truncate()
            raise TokenizerError(" ".join(str(error).split())[:MAX_REASON]) from error


@contextmanager
def _stderr_kept() -> Generator[IO[bytes] | None]:
    """Write standard error into a file during the block, and print the content of the file after it.

    Yield the file, or None if the process has no standard error or no folder for temporary files.
    """
    with _one_at_a_time, ExitStack() as stack:
        try:
            stderr = os.dup(STDERR)
            stack.callback(os.close, stderr)
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        except OSError:
            yield None
            return
        try:
            os.dup2(file.fileno(), STDERR)
            yield file
        finally:
            os.dup2(stderr, STDERR)
            file.seek(0)
            if text := file.read():
                with suppress(OSError):  # its reader has ended
                    os.write(stderr, text)
