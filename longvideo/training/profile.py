"""Time a few steps of every stage, to plan a run before starting it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longvideo.training.run_log import peak_memory_gib
from longvideo.training.window import Window, synchronize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longvideo.training.trainer import Trainer

LISTED = 20
"""Number of operations in the table of a trace."""
COMMUNICATION = "nccl"
"""Prefix of the names of NCCL's kernels."""


@dataclass(frozen=True)
class StageProfile:
    """Times of one stage.

    stage: number of the stage, from 0. steps: number of its steps. first_seconds: duration of the first step, with
    compilation. seconds: mean duration of the timed steps. batch_seconds: mean time to make a batch. rate: units per
    second. unit: what `rate` counts. memory_gib: peak memory. tera_flops: operations per second of a device, in 10^12;
    operations that are masked away or computed twice do not count.
    """

    stage: int
    steps: int
    first_seconds: float
    seconds: float
    batch_seconds: float
    rate: float
    unit: str
    memory_gib: float
    tera_flops: float | None = None

    def line(self) -> str:
        """Return the times in one line, with the minutes that the whole stage takes."""
        minutes = self.steps * self.seconds / 60 + self.first_seconds / 60
        return (
            f"stage {self.stage} | {self.steps} steps | first {self.first_seconds:.1f} s"
            f" | step {self.seconds * 1000:.1f} ms, {self.batch_seconds * 1000:.1f} ms of it for the batch"
            f" | {self.rate:.3g} {self.unit}/s | {self.memory_gib:.1f} GiB | {minutes:.1f} min"
            + ("" if self.tera_flops is None else f" | {self.tera_flops:.0f} TFLOP/s per device")
        )


def profile(trainer: Trainer, steps: int, *, trace: bool = False) -> Iterator[str]:
    """Run 1 or 2 steps of every stage, time `steps` more, and yield a line with their times. Nothing is written.

    All are the first step of the stage, repeated: what happens only in other steps is not timed. trace: also yield a
    table of the operations that take the most time.
    """
    trainer.recipe.start(0)
    begin = 0
    for number, segment in enumerate(trainer.recipe.segments):
        if not segment.steps:
            continue
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        first = _timed(trainer, begin, 1)
        if trainer.device.type == "cuda":
            _timed(trainer, begin, 1)  # may record a CUDA graph
        seconds = _timed(trainer, begin, steps)
        size, flops = trainer.recipe.source.size(begin), trainer.recipe.flops(begin)
        yield StageProfile(
            stage=number,
            steps=segment.steps,
            first_seconds=first,
            seconds=seconds,
            batch_seconds=_timed_batches(trainer, begin, steps),
            rate=size / seconds,
            unit=trainer.recipe.source.unit,
            memory_gib=peak_memory_gib(trainer.device),
            tera_flops=None if flops is None else flops / seconds / trainer.mesh.world / 1e12,
        ).line()
        if trace:
            yield _operations(trainer, begin)
        begin += segment.steps


def _timed(trainer: Trainer, step: int, count: int) -> float:
    """Repeat a step; return its mean duration, seconds."""
    window = Window(trainer.device)
    synchronize(trainer.device)
    began = time.monotonic()
    for _ in range(count):
        trainer.one_step(step, window)
    synchronize(trainer.device)
    return (time.monotonic() - began) / count


def _timed_batches(trainer: Trainer, step: int, count: int) -> float:
    """Make the batch of a step again and again; return the mean duration, seconds."""
    synchronize(trainer.device)
    began = time.monotonic()
    for _ in range(count):
        trainer.recipe.source.shares(step, trainer.mesh, trainer.micro_batch)
    synchronize(trainer.device)
    return (time.monotonic() - began) / count


def _operations(trainer: Trainer, step: int) -> str:
    """Return a table of the operations of a step that take the most time, and the waiting time of ranks."""
    from torch.profiler import ProfilerActivity, profile

    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        _timed(trainer, step, 1)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=LISTED, max_name_column_width=90)
    if not cuda:
        return table
    kernels = [event for event in recorded.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, exchanging = (
        sum(event.time_range.elapsed_us() for event in kernels if event.name.startswith(COMMUNICATION) == chosen) / 1e6
        for chosen in (False, True)
    )
    return f"{table}\n{_balance(trainer, busy, exchanging)}"


def _balance(trainer: Trainer, busy: float, exchanging: float) -> str:
    """Describe how evenly the ranks are loaded.

    busy, exchanging: seconds of this rank's kernels without NCCL's, and of NCCL's. A rank that waits for another does
    so inside NCCL's kernels, so the least time in them is the time of the exchange itself.
    """
    mesh = trainer.mesh
    per_rank = torch.zeros(mesh.world, 2, device=trainer.device)
    per_rank[mesh.rank] = torch.tensor((busy, exchanging), device=trainer.device)
    work, exchange = mesh.sum(per_rank).T.tolist()
    skew = (max(work) - min(work)) / max(work)
    whole = max(a + b for a, b in zip(work, exchange, strict=True))
    return (
        f"kernels of a rank: {min(work):.2f} to {max(work):.2f} s of work (skew {skew:.1%}),"
        f" {min(exchange):.2f} to {max(exchange):.2f} s in NCCL (at least {min(exchange) / whole:.1%} of all kernels)"
    )
