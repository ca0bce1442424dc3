"""Spikes of the loss, as several ranks judge them together."""

from __future__ import annotations

import torch

from longvideo.distributed import build_mesh
from longvideo.training.guard import WARMUP, LossGuard
from tests.training.processes import run_in_processes

CPU = torch.device("cpu")
LOSSES = [(1.0, 3.0)] * WARMUP + [(8.5, 3.0), (11.0, 3.0)]
"""Losses of two ranks in each pass; the mean of the last pass alone is a spike."""


def spikes(guard: LossGuard, losses: list[float]) -> list[bool]:
    return [bool(guard(torch.tensor(loss)).isnan()) for loss in losses]


def judged() -> tuple[list[bool], dict[str, float]]:
    mesh = build_mesh(1)
    guard = LossGuard(3.0, CPU, mesh)
    return spikes(guard, [losses[mesh.rank] for losses in LOSSES]), guard.state()


def test_ranks_judge_the_mean_of_their_losses_and_store_the_same_numbers() -> None:
    alone = LossGuard(3.0, CPU)
    expected = spikes(alone, [sum(losses) / 2 for losses in LOSSES])
    assert expected == [False] * (WARMUP + 1) + [True]
    assert run_in_processes(2, judged) == [(expected, alone.state())] * 2
