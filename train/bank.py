"""Clips that are kept on the training device and replaced a group at a time.

Content c of a bank (a group of clips) is a function of the seed and c alone and is stored in place c mod groups, so the
contents of the bank at a step follow from the step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from longvideo.config.fields import Bounded, bounded
from longvideo.errors import ConfigError
from longvideo.machine.launcher import is_main_process

Group = TypeVar("Group", bound="GroupConfig")

FEW_CLIPS = 4
"""Largest number of clips that a dry run encodes at once."""


@dataclass(frozen=True)
class GroupConfig(Bounded):
    """Size of a bank, and how often a group of its clips is replaced.

    clips: number of clips that the bank holds.
    initial_clips: number of clips that are encoded before the first step.
    group: number of clips that are encoded at once.
    refresh_every: number of steps between two groups.
    """

    clips: int = bounded(8192, least=1)
    initial_clips: int = bounded(4096, least=1)
    group: int = bounded(32, least=1)
    refresh_every: int = bounded(8, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clips", "initial_clips"):
            if getattr(self, name) < self.group or getattr(self, name) % self.group:
                raise ConfigError(
                    f"bank.{name} is {getattr(self, name)}; expected a multiple of bank.group={self.group}"
                )
        if self.initial_clips > self.clips:
            raise ConfigError(
                f"bank.initial_clips is {self.initial_clips}; expected at most {self.clips}, which is bank.clips"
            )

    def of_dry_run(self: Group) -> Group:
        """Return sizes with few clips before the first step; steps that are only timed need no more."""
        few = math.gcd(self.group, FEW_CLIPS)
        return replace(self, initial_clips=few, group=few)


class ClipBank:
    """The groups of a bank. A subclass stores the clips and writes a group in `write`."""

    def __init__(self, sizes: GroupConfig, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        self.groups = sizes.clips // sizes.group
        self.contents = 0

    @property
    def filled(self) -> int:
        """Number of clips that can be drawn."""
        return min(self.contents, self.groups) * self.sizes.group

    def start(self, step: int) -> None:
        """Fill the bank as it is at `step`, whatever it holds now."""
        began = time.monotonic()
        self.contents = max(0, self._contents_at(step) - self.groups)
        self.advance(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if is_main_process():
            print(f"bank of {self.filled} clips encoded in {time.monotonic() - began:.1f} s", flush=True)

    def advance(self, step: int) -> None:
        """Encode the groups that are due by `step`."""
        while self.contents < self._contents_at(step):
            first = self.contents % self.groups * self.sizes.group
            self.write(self.contents, slice(first, first + self.sizes.group))
            self.contents += 1

    def write(self, content: int, place: slice) -> None:
        """Encode the clips of a content and store them. place: their rows."""
        raise NotImplementedError

    def _contents_at(self, step: int) -> int:
        return self.sizes.initial_clips // self.sizes.group + step // self.sizes.refresh_every
