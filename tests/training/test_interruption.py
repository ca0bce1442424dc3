"""A run that is killed again and again ends as one that never was."""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path

from longvideo.training.window import Window
from tests.training.killing import run_killed
from tests.training.toy import toy_trainer

STEPS, KILLS = 30, 8
PRELOADED = ["torch", "longvideo.training.trainer", "longvideo.train.vae.recipe", "longvideo.training.engine"]


def train(folder: Path, reports: Connection) -> None:
    """Train to the end, reporting every step."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer = toy_trainer(folder, STEPS, save_every=4, log_every=1)
    one_step = trainer.one_step

    def reported(step: int, window: Window) -> None:
        one_step(step, window)
        reports.send(step)

    trainer.one_step = reported
    trainer.run(resume="auto")
    reports.close()


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    run_killed(train, tmp_path / "killed", kills=KILLS, most_steps=6, preloaded=PRELOADED)
    toy_trainer(tmp_path / "whole", STEPS, save_every=4, log_every=1).run()
    losses, weights = [], []
    for name in ("killed", "whole"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["step"], line["loss"], line["grad"]) for line in lines if "loss" in line])
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert len(losses[1]) == STEPS and losses[0] == losses[1]
    assert weights[0] == weights[1]
