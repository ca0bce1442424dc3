"""Progress of `longvideo generate`: counts and times of a video, as a bar or as lines, its warnings and its summary."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from longvideo.cli.printing import STDERR, printable, without_reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.infer.picture_folder import PictureFolder
    from longvideo.infer.pictures import PictureWriter
    from longvideo.infer.writer import VideoWriter

T = TypeVar("T")


def new_display(*, ranks: int = 1) -> Display:
    """Return a bar for a terminal, lines for anything else. ranks: processes that print; several print lines."""
    return ProgressBar() if sys.stderr.isatty() and ranks == 1 else PlainLines()


@dataclass
class VideoTally:
    """Counts and times of a video.

    start, first_at, last_at: times on `time.perf_counter` of the start, of the first part of the video and of the
    latest one. The opening frame of a video is a part of its own, and so is the rest of its chunk and every further
    chunk; a video that continues footage has no opening frame. first_frames: frames of the first part. name:
    start of its lines, if there are several videos.
    """

    start: float
    num_chunks: int
    num_frames: int
    parts: int = 0
    frames: int = 0
    first_frames: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    name: str = ""

    def add(self, frames: int) -> None:
        """Count a part of the video, by its number of frames."""
        self.last_at = time.perf_counter()
        if self.parts == 0:
            self.first_at, self.first_frames = self.last_at, frames
        self.parts += 1
        self.frames += frames

    @property
    def seconds_to_first_frame(self) -> float:
        """Seconds from the start to the first frame."""
        return self.first_at - self.start

    @property
    def frames_per_second(self) -> float | None:
        """Frames per second after the first part; None before the second part."""
        return (self.frames - self.first_frames) / (self.last_at - self.first_at) if self.parts > 1 else None

    def line(self) -> str:
        """Return the state of the run as text."""
        rate = self.frames_per_second
        speed = f"{rate:.1f} frames/s" if rate is not None else "-"
        chunk = max(1, self.parts - (self.first_frames == 1))
        first = f"first frame after {self.seconds_to_first_frame:.1f} s"
        name = f"{self.name}: " if self.name else ""
        return f"{name}chunk {chunk}/{self.num_chunks} | {speed} | {first}"


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


def with_warnings(begin: Callable[[], T], *, name: str = "") -> T:
    """Begin a video, and print the warnings about its prompts. name: name of the video, if there are several."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = begin()
    for warning in caught:
        print(printable(f"warning: {f'{name}: ' if name else ''}{warning.message}"), file=sys.stderr)
    return result


def summary(writer: VideoWriter | PictureWriter | PictureFolder, tally: VideoTally, fps: float) -> str:
    """Return the line about a written video."""
    num_frames = writer.num_frames
    if num_frames == 0:
        return "no frame was generated; nothing was written"
    rate = tally.frames_per_second
    speed = f", {rate:.1f} frames/s after it" if rate is not None else ""
    first = f"; first frame after {tally.seconds_to_first_frame:.1f} s" if tally.parts else ""
    return (
        f"{writer.path}: {num_frames} frames, {num_frames / fps:.2f} s at {fps:g} frames/s, "
        f"{writer.num_bytes / 2**20:.2f} MiB{first}{speed}"
    )
