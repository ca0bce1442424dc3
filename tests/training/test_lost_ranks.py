"""A rank that waits for another gives up in time, and says for which one it waited."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection

import pytest

pytest.importorskip("deepspeed")

STOPPED_AFTER = 2  # steps
TIMEOUT_MINUTES = 0.05


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(rank: int, world: int, port: int, stopped: int, where: str, outcome: Connection) -> None:
    """Train until the rank `stopped` stops itself, in a step or at a barrier; send the error that comes of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from longvideo.distributed import ParallelConfig, build_mesh, start_processes
    from longvideo.training.deepspeed_engine import DeepSpeedEngine
    from longvideo.training.lost_ranks import LostRank, naming_lost_ranks
    from longvideo.training.optimizer import OptimizerConfig
    from tests.training.toy import CPU, Numbers, Regression

    torch.set_num_threads(1)
    parallel = ParallelConfig(timeout_minutes=TIMEOUT_MINUTES)
    store = start_processes(parallel, CPU)
    mesh = build_mesh(1, timeout_minutes=TIMEOUT_MINUTES, store=store)
    engine = DeepSpeedEngine(
        Regression(), OptimizerConfig(), mesh=mesh, zero_stage=1, precision="fp32", passes=1, ema_decay=0.5
    )
    try:
        with naming_lost_ranks(mesh):
            for step in range(STOPPED_AFTER + 1):
                if step == STOPPED_AFTER and rank == stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                if step == STOPPED_AFTER and where == "barrier":
                    mesh.barrier()
                engine.train_step(Numbers().shares(step, mesh, None), step, 1e-3)
        outcome.send("no error")
    except LostRank as error:
        outcome.send((str(error), error.is_speaker))
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "where"), [(1, "step"), (0, "barrier")])
def test_the_error_names_the_rank_that_does_not_come(stopped: int, where: str) -> None:
    context = multiprocessing.get_context("spawn")
    port, pipes = free_port(), [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=train, args=(rank, 2, port, stopped, where, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        message, is_speaker = pipes[1 - stopped][0].recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert message.startswith(f"rank {stopped} did not come to where all ranks meet"), message
    assert f"parallel.timeout_minutes={TIMEOUT_MINUTES}" in message and is_speaker
