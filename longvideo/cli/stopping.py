"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it writes is finished, and it exits with 128 + the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_SIGNALED = 128
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


class Stopped(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise Stopped in the main thread for SIGINT, SIGTERM and SIGHUP while the block runs.

    A signal that is ignored stays so: `nohup` asks for that. In another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in WORDS}
    heard = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])


def exit_code(number: int) -> int:
    """Return the exit code of a command that a signal ended, as shells report it."""
    return EXIT_SIGNALED + number


def stop_word(code: int) -> str | None:
    """Say what ended a command with this exit code, None if no signal did."""
    return next((word for number, word in WORDS.items() if code == exit_code(number)), None)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
