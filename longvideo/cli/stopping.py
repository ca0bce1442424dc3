"""End a command on SIGTERM and SIGHUP as on Ctrl-C: its output is finished, and it exits with 128 + the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

EXIT_SIGNALED = 128
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


class Stopped(KeyboardInterrupt):
    """A signal ends the command. number: number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals() -> Generator[None]:
    """Raise Stopped in the main thread for SIGINT, SIGTERM and SIGHUP while the block runs.

    Ignored signals stay ignored, as `nohup` requires. In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in WORDS}
    handled = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def exit_code(number: int) -> int:
    """Return the exit code of a command that was ended by a signal, as shells report it."""
    return EXIT_SIGNALED + number


def stop_word(code: int) -> str | None:
    """Return the description of the signal that ended a command with this exit code; None if no signal did."""
    return next((word for number, word in WORDS.items() if code == exit_code(number)), None)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)
