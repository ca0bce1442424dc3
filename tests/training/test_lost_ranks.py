"""A run whose ranks wait in vain for one of them ends in time, and names that rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from longvideo.errors import EXIT_USER_ERROR
from longvideo.training.lost_ranks import RankProgress, word_of

STOPPED_AFTER = 2  # steps
TIMEOUT_MINUTES = 0.05
READINGS = 3


def progress_after(*readings: list[bytes], store_rank: int | None = 0) -> RankProgress:
    """Return the progress that rank 0 has read from these words."""
    progress = RankProgress(len(readings[0]), rank=0, store_rank=store_rank)
    for words in readings:
        progress.read(words)
    return progress


def of_ranks(beat: int, *calls: dict[str, int]) -> list[bytes]:
    return [word_of(beat, each) for each in calls]


def test_a_rank_that_writes_no_more_is_lost() -> None:
    stopped = word_of(0, {"all": 5})
    readings = [[word_of(beat, {"all": 5}), stopped, word_of(beat, {"all": 6})] for beat in range(READINGS + 1)]
    assert progress_after(*readings[:-1]).lost(READINGS) == set()
    assert progress_after(*readings).lost(READINGS) == {1}


def test_a_rank_that_others_wait_for_is_lost_and_one_that_waits_itself_is_not() -> None:
    # ranks 0 and 1, and 2 and 3, share videos; 2 has not come to its partner, and so neither to all
    calls = ({"all": 3, "a": 9}, {"all": 3, "a": 9}, {"all": 2, "b": 7}, {"all": 2, "b": 8})
    readings = [of_ranks(beat, *calls) for beat in range(READINGS + 1)]
    assert progress_after(*readings[:-1]).lost(READINGS) == set()
    assert progress_after(*readings).lost(READINGS) == {2}


def test_no_rank_is_lost_while_none_waits_or_while_they_advance() -> None:
    computing = [of_ranks(beat, {"all": 3}, {"all": 3}) for beat in range(3 * READINGS)]
    assert progress_after(*computing).lost(READINGS) == set()
    slow = [of_ranks(beat, {"all": beat + 2}, {"all": beat}) for beat in range(3 * READINGS)]
    assert progress_after(*slow).lost(READINGS) == set()
    unheard = [[b"", b""] for _ in range(3 * READINGS)]
    assert progress_after(*unheard, store_rank=None).lost(READINGS) == set()


def test_a_silent_store_means_that_the_rank_that_holds_it_is_lost() -> None:
    readings = [of_ranks(0, {"all": 3}, {"all": 2})] * (READINGS + 1)
    assert progress_after(*readings, store_rank=1).lost(READINGS) == {1}
    assert progress_after(*readings, store_rank=None).lost(READINGS) == set()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(rank: int, world: int, port: int, lost: int, how: str, where: str, errors: Path) -> None:
    """Train until the rank `lost` stops itself, or computes without end, and the other one waits for it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    import torch
    import torch.distributed as dist

    from longvideo.distributed import ParallelConfig, build_mesh, start_processes
    from longvideo.training.deepspeed_engine import DeepSpeedEngine
    from longvideo.training.lost_ranks import naming_lost_ranks
    from longvideo.training.optimizer import OptimizerConfig
    from tests.training.toy import CPU, Numbers, Regression

    torch.set_num_threads(1)
    parallel = ParallelConfig(timeout_minutes=TIMEOUT_MINUTES)
    store = start_processes(parallel, CPU)
    mesh = build_mesh(1, timeout_minutes=TIMEOUT_MINUTES, store=store)
    engine = DeepSpeedEngine(
        Regression(), OptimizerConfig(), mesh=mesh, zero_stage=1, precision="fp32", passes=1, ema_decay=0.5
    )
    with naming_lost_ranks(mesh):
        for step in range(STOPPED_AFTER + 1):
            if step == STOPPED_AFTER and rank == lost:
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                threading.Event().wait()
            if step == STOPPED_AFTER and where == "barrier":
                mesh.barrier()
            if step == STOPPED_AFTER and where == "device":
                # as a device does: the wait is in no call of torch.distributed, and has no end
                pending = dist.all_reduce(torch.ones(1), async_op=True)
                threading.Event().wait()
                del pending
            engine.train_step(Numbers().shares(step, mesh, None), step, 1e-3)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "how", "where"),
    [(1, "stop", "step"), (0, "stop", "barrier"), (1, "stop", "device"), (0, "stop", "device"), (1, "hang", "device")],
)
def test_the_run_ends_and_names_the_rank_that_does_not_come(lost: int, how: str, where: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    context = multiprocessing.get_context("spawn")
    port, errors = free_port(), [tmp_path / "0", tmp_path / "1"]
    processes = [
        context.Process(target=train, args=(rank, 2, port, lost, how, where, errors[rank])) for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        processes[1 - lost].join()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert processes[1 - lost].exitcode == EXIT_USER_ERROR
    lines = [line for line in errors[1 - lost].read_text().splitlines() if line.startswith("error: ")]
    timeout = f"parallel.timeout_minutes={TIMEOUT_MINUTES}"
    assert len(lines) == 1 and lines[0].startswith(f"error: rank {lost} did not join the other ranks within {timeout}")
