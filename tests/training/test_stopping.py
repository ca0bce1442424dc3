"""A run that gets a signal finishes its step, saves it, and prints how to resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from longvideo.cli.main import main
from longvideo.training.engine import LocalEngine
from longvideo.training.stopping import RunStopped
from longvideo.training.trainer import Trainer
from tests.train.small import Toy
from tests.training.processes import run_in_processes
from tests.training.toy import toy_trainer


def stopping_at(folder: Path, step: int, number: int, **config: Any) -> Trainer:
    """Return a trainer that gets a signal in the middle of a step."""
    trainer = toy_trainer(folder, 20, save_every=0, **config)
    train_step = trainer.engine.train_step

    def signaled(shares: Any, at: int, learning_rate: float) -> dict[str, Tensor]:
        if at == step:
            os.kill(os.getpid(), number)
        return train_step(shares, at, learning_rate)

    trainer.engine.train_step = signaled  # type: ignore[method-assign]
    return trainer


@pytest.fixture
def unignored() -> Iterator[None]:
    """Give signals their default handlers, since a process that nohup starts ignores SIGHUP."""
    handlers = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_step_is_finished_and_saved(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(RunStopped) as stopped:
        stopping_at(tmp_path, 6, number).run()
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    again = toy_trainer(tmp_path, 20)
    assert again.checkpoints.steps() == [7]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 7]
    assert again.run()
    assert again.checkpoints.steps() == [10, 20]


def stop_twice(folder: Path) -> None:
    """Train until a signal comes, and send another one before the checkpoint is written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = stopping_at(folder, 3, signal.SIGTERM)
    save = trainer.save

    def again(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(step)

    trainer.save = again  # type: ignore[method-assign]
    trainer.run()


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    # a forked process could wait without end for torch's threads, which a fork does not copy
    process = multiprocessing.get_context("spawn").Process(target=stop_twice, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert not toy_trainer(tmp_path, 20).checkpoints.steps()


WAITING = """
from datetime import timedelta
from torch.distributed import TCPStore
from longvideo.training.stopping import StopSignals

store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
with StopSignals():
    print("waiting", flush=True)
    store.wait(["a key that no rank sets"], timedelta(minutes=5))
"""


def test_a_second_signal_ends_a_process_that_waits_for_another_rank() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "stopping after this step; a second signal ends the run at once\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM


def ranks_stop_together(folder: str) -> int:
    from longvideo.distributed import build_mesh
    from longvideo.training.stopping import StopSignals

    mesh = build_mesh(1)
    trainer = toy_trainer(Path(folder), 20)
    trainer.mesh = mesh
    with StopSignals() as signals:
        for step in range(20):
            if step == 4 and mesh.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if trainer.ending(float("inf"), signals):
                return step
    return -1


def test_all_ranks_stop_at_the_step_in_which_one_was_asked_to(tmp_path: Path) -> None:
    assert run_in_processes(2, ranks_stop_together, str(tmp_path)) == [4, 4]


def test_the_command_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = LocalEngine.train_step

    def signaled(self: LocalEngine, shares: Any, step: int, learning_rate: float) -> dict[str, Tensor]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, shares, step, learning_rate)

    monkeypatch.setattr(LocalEngine, "train_step", signaled)
    out = tmp_path / "a run"
    command = ["train", "vae", "tiny/vae", *Toy.vae, "--out", str(out), "--device", "cpu", "--resume", "never"]
    assert main(command) == 143
    lines = capsys.readouterr().out.splitlines()
    assert "stopped by SIGTERM at step 2 of 4, saved" in lines
    assert lines[-1].startswith("resume with: longvideo train vae tiny/vae 'stages=[")
    assert lines[-1].endswith(f"--output '{out}' --device cpu")
    monkeypatch.undo()
    assert main([argument for argument in command if argument not in ("--resume", "never")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"model: {out / 'model'}"
    assert lines[-1].startswith(f"next: longvideo train ar tiny/ar_opening 'vae={out / 'model'}' --output")
