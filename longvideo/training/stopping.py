"""Stop a run on a signal: it finishes its step, saves, and prints the command that resumes it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from longvideo.machine.launcher import launched

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEATED_SECONDS = 1.0
"""Time within which a repeated signal under a launcher is the same one: a launcher passes on a signal that the terminal
or a scheduler has also sent to its workers.
"""


class RunStopped(Exception):
    """A signal has stopped a run, and its state is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} has stopped the run at step {step}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code that shells report for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopSignals:
    """Remembers the first SIGTERM, SIGINT or SIGHUP inside a `with` block; a second one ends the process at once.

    A signal that is ignored stays so, as `nohup` asks for.
    Outside the main thread Python can take no signal, and nothing is remembered.

    Python runs a handler only after the native call that the main thread is in, such as waiting for another rank.
    Therefore a thread reads each signal, which the interpreter writes to a pipe when it comes.
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
        if self._before:
            pipe, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)  # set_wakeup_fd requires it
            self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            self._reader = threading.Thread(target=_answer_signals, args=(pipe, frozenset(self._before)), daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            signal.set_wakeup_fd(self._pipe_before)
            os.close(self._pipe)
            self._reader.join()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
        elif _is_second(self._came):
            _end(number)


def _answer_signals(pipe: int, numbers: frozenset[int]) -> None:
    """Announce the first signal, and end the process at the second one; return when the pipe is closed."""
    came: float | None = None
    with open(pipe, "rb", buffering=0) as stream:
        while byte := stream.read(1):
            number = byte[0]
            if number not in numbers:
                continue
            if came is None:
                came = time.monotonic()
                # os.write, because the main thread may be in the middle of printing another line
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, b"stopping after this step; a second signal ends the run at once\n")
            elif _is_second(came):
                _end(number)


def _is_second(came: float) -> bool:
    return not launched() or time.monotonic() - came > REPEATED_SECONDS


def _end(number: int) -> None:
    """End the process without waiting for what any thread of it does."""
    os._exit(128 + number)
