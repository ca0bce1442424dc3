"""Run a function in several processes that can talk to each other: through gloo, or with a GPU each through NCCL."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_in_processes(world: int, work: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Return what `work(*arguments)` returns in each of `world` processes, in the order of their ranks.

    work: a function of a module, which every process imports itself. backend: "nccl" gives each its GPU.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=context) as pool:
        store = Path(folder) / "store"
        jobs = [pool.submit(_run, rank, world, str(store), backend, work, arguments) for rank in range(world)]
        return [job.result() for job in jobs]


def _run(rank: int, world: int, store: str, backend: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # when one rank fails the others wait for it this long
    waiting = timedelta(seconds=60)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=waiting)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()
