"""A training run that is killed and resumed with another number of processes has the losses of a run left alone.

`--soak N` sets the number of random moments for each direction and each command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from longvideo.cli.main import main
from tests.checkpoint import small
from tests.data import footage
from tests.options import option_value

pytest.importorskip("deepspeed")

STEPS = 16
LAST_KILL = 8
COMPARED = 3
PRELOADED = ["torch", "deepspeed", "longvideo.train.clips.recipe", "longvideo.distill.dmd_recipe"]
STAGES = {"train": (0, 1, 2, 3), "distill": (0, 1, 2)}  # of ZeRO
CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-3")
OFTEN = ("trainer.precision=fp32", "trainer.log_every=1", "trainer.sample_every=0", "parallel.micro_batch=1")
SMALL = {
    "train": (f"stages=[{{steps: {STEPS}, chunks: 2, batch: 2}}]", "objective.context=window"),
    "distill": (
        f"stages=[{{steps: {STEPS}, frames: 16, batch: 2}}]",
        "lora.rank=4",
        "lora.alpha=8",
        "student_every=2",
        "backbone.precision=bf16",
        "critic_optimizer.schedule=constant",
        "critic_optimizer.warmup_steps=0",
    ),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, clips encoded with it, and prompts."""
    folder = tmp_path_factory.mktemp("soak")
    small.save(folder / "model")
    manifest = footage.footage(folder)
    options = ["--chunks", "2", "--device", "cpu", "--workers", "0", "--out", str(folder / "clips")]
    assert main(["data", "encode", str(manifest), "--model", str(folder / "model"), *options]) == 0
    (folder / "prompts.txt").write_text("a red ball moves left\na blue ball\n", encoding="utf-8")
    return folder


def arguments(home: Path, command: str, out: str, *more: str) -> list[str]:
    model = str(home / "model")
    data = {
        "train": ["clips", f"data={home / 'clips'}", f"initialize={model}"],
        "distill": ["tiny/dmd", f"model={model}", f"prompts={home / 'prompts.txt'}"],
    }
    settings = [*SMALL[command], *CONSTANT, *OFTEN, *more]
    return [command, *data[command], *settings, "--out", str(home / out), "--device", "cpu"]


def work(command: Sequence[str], log: str, ranks: Sequence[str], reports: Connection) -> None:
    """Train in one process, reporting every step. ranks: rank, number of ranks and port, or nothing."""
    if ranks:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ |= {**dict(zip(names, ranks, strict=True)), "LOCAL_RANK": ranks[0], "MASTER_ADDR": "127.0.0.1"}
    import torch

    from longvideo.training.trainer import Trainer

    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    one_step = Trainer.one_step

    def reported(self: Trainer, step: int, window: object) -> None:
        one_step(self, step, window)  # type: ignore[arg-type]
        reports.send(step)

    Trainer.one_step = reported  # type: ignore[method-assign]
    os._exit(main(list(command)))


def run_and_kill(
    command: Sequence[str], log: Path, *, ranks: int, reports: int, moment: float = 0.0
) -> tuple[int, float]:
    """Start training and kill all its processes after a number of steps and a share of one; return the first step.

    ranks: 0 starts one process without a launcher. Also returns the seconds of a step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, processes, ends = free_port(), [], []
    for rank in range(max(ranks, 1)):
        ours, theirs = context.Pipe(duplex=False)
        own = (str(rank), str(ranks), str(port)) if ranks else ()
        process = context.Process(target=work, args=(list(command), f"{log}.{rank}", own, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        first = ends[0].recv()
        began = time.monotonic()
        for _ in range(reports - 1):
            ends[0].recv()
        seconds = (time.monotonic() - began) / max(reports - 1, 1)
        time.sleep(moment * seconds)
    except EOFError:
        pytest.fail(f"training ended by itself: {Path(f'{log}.0').read_text()[-2000:]}")
    finally:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(processes)
    return first, seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.time_limit("--soak", 120)
@pytest.mark.parametrize("command", ["train", "distill"])
@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)], ids=["two_ranks_then_one", "one_then_two_ranks"])
def test_killed_and_resumed_with_other_processes_the_losses_are_equal(
    home: Path, command: str, before: int, after: int, pytestconfig: pytest.Config
) -> None:
    name, moments = f"{command}_{before}_{after}", option_value(pytestconfig, "--soak")
    whole = arguments(home, command, f"{name}_whole", "trainer.save_every=0")
    run_and_kill(whole, home / f"{name}.log", ranks=before, reports=LAST_KILL + COMPARED + 3)
    expected, lottery, worst = losses(home / f"{name}_whole"), random.Random(name), 0.0
    for number in range(moments):
        out, log = f"{name}_{number}", home / f"{name}_{number}.log"
        resumed_at = killed_at = -1
        for ranks in (before, after):
            stage, sequence = lottery.choice(STAGES[command]), lottery.choice((1, 2)) if command == "train" else 1
            more = (f"parallel.zero_stage={stage}", f"parallel.sequence={sequence if ranks else 1}")
            argument = arguments(home, command, out, "trainer.save_every=1", *more)
            if ranks == before:
                killed_at = lottery.randint(1, LAST_KILL)
                run_and_kill(argument, log, ranks=ranks, reports=killed_at, moment=lottery.random())
            else:
                resumed_at, _ = run_and_kill(argument, log, ranks=ranks, reports=COMPARED + 1)
        # what is saved after a step is there unless the kill came before the end of the next one
        assert killed_at - 1 <= resumed_at <= killed_at + 1
        got = losses(home / out)
        for step in range(resumed_at + 1, resumed_at + COMPARED + 1):
            worst = max(worst, abs(got[step] / expected[step] - 1))
            assert got[step] == pytest.approx(expected[step], rel=1e-5), (number, step)
    print(f"{name}: {moments} kills, largest relative difference of a loss {worst:.1e}")
