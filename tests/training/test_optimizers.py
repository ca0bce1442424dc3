"""SPAM and Stable-SPAM equal definitions in Python numbers, and resume bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longvideo.distributed import Mesh, ParallelConfig
from longvideo.errors import ConfigError
from longvideo.training.checkpoint import CheckpointFolder, layout
from longvideo.training.engine import LocalEngine
from longvideo.training.memory import EngineMemory, engine_memory
from longvideo.training.optimizer import OptimizerConfig, new_optimizer
from tests.training.toy import CPU, Numbers, Regression

STEPS = 20
SPIKES = {6: 40.0, 13: 1000.0}
RATE, BETA1, BETA2, EPS, DECAY = 0.1, 0.9, 0.99, 1e-8, 0.01
SPAM: dict[str, Any] = {"reset_every": 8, "reset_warmup": 3, "spike_ratio": 20.0, "spike_after": 2}
STABLE: dict[str, Any] = {"reset_every": 7, "largest_decay": 0.9, "norm_decay": 0.6, "norm_square_decay": 0.8}


def config(name: str, **more: Any) -> OptimizerConfig:
    settings = (SPAM if name == "spam" else STABLE) | more
    return OptimizerConfig(
        name=name,  # type: ignore[arg-type]
        learning_rate=RATE,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        weight_decay=DECAY,
        **settings,
    )


def gradients() -> list[list[float]]:
    drawn = torch.randn(STEPS, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for step, factor in SPIKES.items():
        drawn[step, 2] *= factor
    return drawn.tolist()


class Adam:
    """AdamW of a vector in Python numbers, with a count of updates since the last reset."""

    def __init__(self, size: int) -> None:
        self.weights, self.m, self.v, self.count = [0.5] * size, [0.0] * size, [0.0] * size, 0

    def reset(self) -> None:
        self.m, self.v, self.count = [0.0] * len(self.m), [0.0] * len(self.v), 0

    def update(self, gradient: list[float], rate: float) -> None:
        self.count += 1
        for i, g in enumerate(gradient):
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * g
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * g * g
            mean, square = self.m[i] / (1 - BETA1**self.count), self.v[i] / (1 - BETA2**self.count)
            self.weights[i] -= rate * DECAY * self.weights[i] + rate * mean / (math.sqrt(square) + EPS)


def spam_by_definition(all_gradients: list[list[float]]) -> list[list[float]]:
    adam, rows = Adam(len(all_gradients[0])), []
    for gradient in all_gradients:
        if adam.count == SPAM["reset_every"]:
            adam.reset()
        clipped = list(gradient)
        if adam.count >= SPAM["spike_after"]:
            for i, g in enumerate(gradient):
                if g * g > SPAM["spike_ratio"] * adam.v[i]:
                    clipped[i] = math.copysign(math.sqrt(SPAM["spike_ratio"] * adam.v[i]), g)
        progress = min(1.0, (adam.count + 1) / SPAM["reset_warmup"])
        adam.update(clipped, RATE * (1 - math.cos(math.pi * progress)) / 2)
        rows.append(list(adam.weights))
    return rows


def stable_spam_by_definition(all_gradients: list[list[float]]) -> list[list[float]]:
    adam, rows = Adam(len(all_gradients[0])), []
    largest = norm_mean = norm_square = 0.0
    for t, gradient in enumerate(all_gradients, start=1):
        if adam.count == STABLE["reset_every"]:
            adam.reset()
        top = max(map(abs, gradient))
        largest = STABLE["largest_decay"] * largest + (1 - STABLE["largest_decay"]) * top
        bound = largest / (1 - STABLE["largest_decay"] ** t)
        clipped = [g / top * bound if abs(g) > bound else g for g in gradient]
        norm = math.sqrt(sum(g * g for g in clipped))
        norm_mean = STABLE["norm_decay"] * norm_mean + (1 - STABLE["norm_decay"]) * norm
        norm_square = STABLE["norm_square_decay"] * norm_square + (1 - STABLE["norm_square_decay"]) * norm**2
        mean = norm_mean / (1 - STABLE["norm_decay"] ** t)
        root = math.sqrt(norm_square / (1 - STABLE["norm_square_decay"] ** t))
        adam.update([g / norm * mean / (root + EPS) for g in clipped], RATE)
        rows.append(list(adam.weights))
    return rows


def trajectory(name: str, all_gradients: list[list[float]], skipped: frozenset[int] = frozenset()) -> list[list[float]]:
    """Return the weights after every step that is not skipped. skipped: steps with a flag of a bad gradient."""
    parameter = nn.Parameter(torch.full((6,), 0.5))
    optimizer = new_optimizer(config(name), [parameter])
    rows = []
    for step, gradient in enumerate(all_gradients):
        parameter.grad = torch.tensor(gradient)
        optimizer.found_inf = torch.tensor(float(step in skipped))
        before = states(optimizer, parameter) if step in skipped else {}
        optimizer.step()
        if step in skipped:
            after = states(optimizer, parameter)
            assert all(torch.equal(before[key], after[key]) for key in before)
        else:
            rows.append(parameter.tolist())
    return rows


def states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state[parameter].items()} | {
        "weight": parameter.detach().clone()
    }


DEFINITIONS = [("spam", spam_by_definition), ("stable-spam", stable_spam_by_definition)]


@pytest.mark.parametrize(("name", "definition"), DEFINITIONS)
def test_weights_follow_the_definition_through_spikes_and_resets(name: str, definition: Any) -> None:
    expected = definition(gradients())
    for got, row in zip(trajectory(name, gradients()), expected, strict=True):
        assert got == pytest.approx(row, rel=1e-5, abs=1e-6)
    # the definition itself clips: AdamW goes elsewhere
    without = definition([[min(max(g, -1.0), 1.0) for g in row] for row in gradients()])
    assert max(abs(a - b) for a, b in zip(expected[-1], without[-1], strict=True)) > 1e-3


@pytest.mark.parametrize(("name", "definition"), DEFINITIONS)
def test_a_skipped_step_changes_no_state_even_where_a_reset_is_due(name: str, definition: Any) -> None:
    skipped = frozenset({3, 8, 9})
    bad = [[math.nan] * 6 if step in skipped else row for step, row in enumerate(gradients())]
    kept = [row for step, row in enumerate(gradients()) if step not in skipped]
    for got, row in zip(trajectory(name, bad, skipped), definition(kept), strict=True):
        assert got == pytest.approx(row, rel=1e-5, abs=1e-6)


def train(engine: LocalEngine, steps: range) -> None:
    for step in steps:
        engine.train_step(Numbers().shares(step, Mesh(), None), step, 0.03)


def new_engine(name: str, **more: Any) -> LocalEngine:
    return LocalEngine(Regression(), config(name, **more), precision="fp32", device=CPU, ema_decay=0.9)


@pytest.mark.parametrize("name", ["spam", "stable-spam"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole, first, second = (new_engine(name) for _ in range(3))
    train(whole, range(12))
    train(first, range(5))
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(5, first, {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert checkpoint.load(second) == []
    train(second, range(5, 12))
    for name_of_tensor in layout(whole.shapes(), whole.more_shapes()):
        parameter, kind = name_of_tensor.rsplit("/", 1)
        assert torch.equal(whole.whole(parameter, kind), second.whole(parameter, kind)), name_of_tensor


def test_a_checkpoint_of_another_optimizer_is_resumed_with_a_line(tmp_path: Path) -> None:
    adam, stable = new_engine("spam"), new_engine("stable-spam")
    train(adam, range(2))
    train(stable, range(2))
    for engine, other, line in (
        (adam, stable, "the checkpoint has no gradient_statistics, which starts again"),
        (stable, adam, "the checkpoint's gradient_statistics is not used by these settings"),
    ):
        folder = CheckpointFolder(tmp_path / line[:20], keep=1)
        folder.save(2, engine, {})
        checkpoint = folder.newest()
        assert checkpoint is not None
        assert checkpoint.load(other) == [line]


@pytest.mark.parametrize("name", ["spam", "stable-spam"])
def test_the_states_take_the_memory_of_the_estimate(name: str) -> None:
    engine = new_engine(name)
    train(engine, range(1))
    numbers = sum(parameter.numel() for parameter in engine.parameters)
    estimate: EngineMemory = engine_memory(numbers, ParallelConfig(), ranks=1, bf16=False, passes=1, averaged=True)
    of_average = sum(average.nbytes for average in engine.ema.average.values())
    large = [x for state in engine.optimizer.state.values() for x in state.values() if x.numel() > 4]
    assert sum(x.nbytes for x in large) + of_average == pytest.approx(estimate.optimizer, rel=0.1)


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="reset_every is 100, but adamw has no resets"):
        OptimizerConfig(reset_every=100)
    with pytest.raises(ConfigError, match="reset_warmup is 150; expected at most 50"):
        OptimizerConfig(name="spam", reset_every=50)
    assert OptimizerConfig(name="spam", reset_every=0).resets == 0
    assert (OptimizerConfig(name="spam").resets, OptimizerConfig(name="stable-spam").resets) == (500, 1000)
