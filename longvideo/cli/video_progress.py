"""Progress of `longvideo generate`: counts and times of a video while it is generated, as a bar or as lines."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from longvideo.cli.printing import STDERR, without_reader


def new_display() -> Display:
    """Return a bar for a terminal, lines for anything else."""
    return ProgressBar() if sys.stderr.isatty() else PlainLines()


@dataclass
class VideoTally:
    """Counts and times of a run of the command.

    start, first_at, last_at: times on `time.perf_counter` of the command's start, of the first part of the video and of
    the latest one. The first chunk has two parts, every other chunk one. first_frames: frames of the first part.
    """

    start: float
    num_chunks: int
    num_frames: int
    parts: int = 0
    frames: int = 0
    first_frames: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def add(self, frames: int) -> None:
        """Count a part of the video, by its number of frames."""
        self.last_at = time.perf_counter()
        if self.parts == 0:
            self.first_at, self.first_frames = self.last_at, frames
        self.parts += 1
        self.frames += frames

    @property
    def seconds_to_first_frame(self) -> float:
        """Seconds from the start of the command to the first frame."""
        return self.first_at - self.start

    @property
    def frames_per_second(self) -> float | None:
        """Frames per second after the first part; None before the second part."""
        return (self.frames - self.first_frames) / (self.last_at - self.first_at) if self.parts > 1 else None

    def line(self) -> str:
        """Return the state of the run as text."""
        rate = self.frames_per_second
        speed = f"{rate:.1f} frames/s" if rate is not None else "-"
        chunk = max(1, self.parts - 1)
        return f"chunk {chunk}/{self.num_chunks} | {speed} | first frame after {self.seconds_to_first_frame:.1f} s"


class Display(Protocol):
    """Shows the progress of a run on standard error."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def set_stage(self, text: str, /) -> None:
        """Show what is done before the first frame."""
        ...

    def show(self, tally: VideoTally) -> None:
        """Show the state of the run."""
        ...


class PlainLines:
    """One line for each part of the video, for log files."""

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_stage(self, _text: str) -> None:
        pass

    def show(self, tally: VideoTally) -> None:
        with without_reader(STDERR):
            print(tally.line(), file=sys.stderr, flush=True)


class ProgressBar:
    """A bar in one line that is removed at the end, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with without_reader(STDERR):
            self._progress.stop()

    def set_stage(self, text: str) -> None:
        with without_reader(STDERR):
            self._progress.update(self._task, description=text)

    def show(self, tally: VideoTally) -> None:
        with without_reader(STDERR):
            self._progress.update(self._task, total=tally.num_frames, completed=tally.frames, description=tally.line())
