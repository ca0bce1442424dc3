"""Median times of work on a device. On a GPU, other data is in the second-level cache before each run."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

COPY_BYTES = 2**30
CACHE_BYTES = 2**28  # more than the second-level cache of any GPU
GPU_MS = 200  # time of all repeats together
GPU_REPEATS = 20, 200  # smallest and largest number of repeats
CPU_COPY_BYTES = 2**26
CPU_REPEATS = 5


def median_ms(work: Callable[[], object], device: torch.device, *, captured: bool = False) -> float:
    """Return the median time of a call in milliseconds, after a warm-up.

    captured: whether the work runs in a CUDA graph on a GPU, so that the time of short work does not depend on how fast
    the host launches it.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _median_gpu_ms(_capture(work) if captured else work, device)
    work()
    times = []
    for _ in range(CPU_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _capture(work: Callable[[], object]) -> Callable[[], object]:
    work()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _median_gpu_ms(work: Callable[[], object], device: torch.device) -> float:
    other = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)

    def times(count: int) -> list[float]:
        events = []
        for _ in range(count):
            # read, not written: the work would be charged for writing back the lines that it evicts
            other.max()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in events]

    for _ in range(3):
        work()
    minimum, maximum = GPU_REPEATS
    estimate = statistics.median(times(5))
    return statistics.median(times(min(max(int(GPU_MS / estimate), minimum), maximum)))


def copy_bandwidth(device: torch.device) -> float:
    """Return the bandwidth of a copy on the device: bytes per second, read and written together."""
    size = COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device) / 1000)
