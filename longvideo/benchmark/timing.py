"""Time work on a device: medians, with the second-level cache emptied between runs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

COPY_BYTES = 2**30
CPU_COPY_BYTES = 2**26
CPU_REPEATS = 5


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call in milliseconds, after warming up."""
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            median = do_bench(work, warmup=50, rep=200, return_mode="median")
        assert isinstance(median, float)
        return median
    work()
    times = []
    for _ in range(CPU_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second that a copy on the device reads and writes together."""
    size = COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device) / 1000)
