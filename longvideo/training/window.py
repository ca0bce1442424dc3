"""Means and times of the steps between two lines of the log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.distributed import Mesh
from longvideo.training.objective import as_ratio

if TYPE_CHECKING:
    from collections.abc import Generator


class Window:
    """Sums of metrics since the last log line, kept on the device, and the time of their steps."""

    def __init__(self, device: torch.device, mesh: Mesh | None = None) -> None:
        self.device = device
        self.mesh = mesh or Mesh()
        self.names: list[str] = []
        self.clear()

    def add(self, metrics: dict[str, Tensor], *, size: int) -> None:
        """Add the metrics of a step, which have the same names in every step. size: number of units of its batch."""
        rows = [as_ratio(value) for value in metrics.values()]
        if self.sums is None:
            self.names, self.sums = list(metrics), torch.stack(rows)
        else:
            self.sums += torch.stack(rows)
        self.steps += 1
        self.size += size

    def means(self) -> dict[str, float]:
        """Return the means over all ranks, without metrics of no weight. The host waits for the device here."""
        assert self.sums is not None
        sums = self.mesh.sum(self.sums.clone()).tolist()
        return {name: total / weight for name, (total, weight) in zip(self.names, sums, strict=True) if weight > 0}

    def seconds(self) -> float:
        """Return the duration of the steps until now."""
        return time.monotonic() - self.began

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave out the time of the block, which belongs to samples or checkpoints and not to steps."""
        synchronize(self.device)
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused

    def clear(self) -> None:
        """Begin with the next step."""
        self.sums: Tensor | None = None
        self.steps = 0
        self.size = 0
        self.began = time.monotonic()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
