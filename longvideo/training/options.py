"""Options of a training run that are not part of its configuration. Nothing here imports torch."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longvideo.errors import ConfigError
from longvideo.machine.launcher import launched, process_rank

ResumeChoice = Literal["auto", "never"]


@dataclass(frozen=True)
class RunOptions:
    """Options of one training command.

    command: words after `longvideo` that start the run, such as "train ar". folder: run folder. arguments:
    configuration files and `key=value` settings, as they were typed. resume: whether to resume from the newest
    checkpoint ("auto"), or to refuse a folder that holds a run ("never"). max_minutes: time after which the run saves
    and stops, without end where None. device: name of a torch device; by default the GPU if there is one. dry_run:
    number of steps of each stage to time instead of training; 0 trains. trace: whether a dry run also lists the
    operations that take longest. start_seconds: when the command began, on the clock of `time.monotonic`.
    """

    command: str
    folder: Path
    arguments: Sequence[str] = ()
    resume: ResumeChoice = "auto"
    max_minutes: float | None = None
    device: str | None = None
    dry_run: int = 0
    trace: bool = False
    start_seconds: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ConfigError(f"--max-minutes is {self.max_minutes:g}; expected a finite number above 0")
        if self.dry_run < 0:
            raise ConfigError(f"--dry-run is {self.dry_run}; expected a number of steps, at least 1")
        if self.trace and not self.dry_run:
            raise ConfigError("--trace lists the operations of a dry run; add --dry-run STEPS, or leave it out")

    @property
    def configs(self) -> list[str]:
        """Configuration files, or names of packaged ones, in the order in which they are read."""
        return [argument for argument in self.arguments if "=" not in argument]

    @property
    def overrides(self) -> list[str]:
        """Settings of the form `key=value`."""
        return [argument for argument in self.arguments if "=" in argument]

    @property
    def deadline(self) -> float:
        """Time after which the run saves and stops, on the clock of `time.monotonic`."""
        return math.inf if self.max_minutes is None else self.start_seconds + 60 * self.max_minutes

    @property
    def resume_command(self) -> str:
        """The command that resumes the run, with the launcher that this process was started by."""
        words = [*self.arguments, "--output", str(self.folder)]
        if self.device is not None:
            words += ["--device", self.device]
        if self.max_minutes is not None:
            words += ["--max-minutes", f"{self.max_minutes:g}"]
        return f"{_program()} {self.command} {shlex.join(words)}"


def _program() -> str:
    """Return the words before the command: `longvideo`, or a launcher that runs it in as many processes."""
    if not launched():
        return "longvideo"
    place = process_rank()
    nodes = f"--nnodes {place.world // place.local_world} " if place.world > place.local_world else ""
    return f"torchrun {nodes}--nproc-per-node {place.local_world} -m longvideo"
