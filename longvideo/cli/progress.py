"""Show the progress of work on bytes: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

    from longvideo.checkpoint.conversion import Progress

TENTHS = 10
MIN_BYTES_FOR_LINES = 10**9
"""Smallest total for which lines are printed; less is finished before a line is read."""


@contextmanager
def bytes_progress(label: str) -> Generator[Progress]:
    """Show the number of finished bytes, the total, the speed and the remaining time. label: name of the work."""
    from longvideo.checkpoint.conversion import Progress

    if not sys.stderr.isatty():
        lines = _Lines(label)
        yield Progress(lines.set_total, lines.add)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield Progress(lambda total: bars.update(task, total=total), lambda count: bars.advance(task, count))


def items_progress(console: Console) -> Bars:
    """Return a progress display that counts items and estimates the remaining time."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(*Bars.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console)


class _Lines:
    def __init__(self, label: str) -> None:
        self.label, self.total, self.done = label, 0, 0

    def set_total(self, total: int) -> None:
        self.total = total

    def add(self, count: int) -> None:
        before, self.done = self.done, self.done + count
        if self.total > MIN_BYTES_FOR_LINES and self.done * TENTHS // self.total > before * TENTHS // self.total:
            print(f"{self.label}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB", file=sys.stderr, flush=True)
