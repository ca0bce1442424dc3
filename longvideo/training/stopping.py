"""Signals that ask a run to stop: it finishes its step, saves, and says how to resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from longvideo.distributed import launched

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEATED_SECONDS = 1.0
"""A launcher passes on a signal that the terminal, or a scheduler, has sent to its workers too."""


class RunStopped(Exception):
    """A signal has stopped a run, whose state is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} has stopped the run at step {step}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report of a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopSignals:
    """Remembers the first SIGTERM, SIGINT or SIGHUP inside a `with` block; a second one ends the process at once.

    A signal that is ignored stays so, as `nohup` asks for.
    Outside the main thread Python can take no signal, and nothing is remembered.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came, or 0."""
        self._came = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._receive)
                for number in SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
            # plain writing: printing may be in the middle of another line, and cannot be entered twice
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step; a second signal ends the run at once\n")
        elif not launched() or time.monotonic() - self._came > REPEATED_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
