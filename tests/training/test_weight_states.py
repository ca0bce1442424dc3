"""States of weights in 4 bits: engines agree, runs resume bit for bit, and the estimate counts their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError
from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe, WeightsOverTime
from longvideo.quantization.training.weights_over_time import OSCILLATING, WeightHistory, state_bytes
from longvideo.training.checkpoint import CheckpointFolder, layout
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.objective import Objective, seeded
from longvideo.training.optimizer import OptimizerConfig
from tests.training.processes import run_in_processes
from tests.training.toy import CPU

STEPS, STOP = 10, 5
WIDTH = 32
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=1)
NAMES = ("first.weight", "second.weight")


class FourBits(Objective):
    """Learn a fixed map with two layers in 4 bits."""

    def __init__(self, part: WeightsOverTime, mesh: Mesh) -> None:
        super().__init__()
        recipe = TrainingRecipe(
            gradients=GradientRounding.NEAREST,
            weights_over_time=part,
            measure_oscillation=True,
            average_decay=0.8,
            oscillation_every=4,
            oscillation_steps=3,
            oscillation_bound=1.5,
            ramping_unit=1.0,
            ramping_gain=2,
        )
        torch.manual_seed(0)
        self.first, self.second = (
            NVFP4TrainingLinear(WIDTH, WIDTH, bias=False, recipe=recipe, seeds=torch.tensor([1, 2])) for _ in range(2)
        )
        self.target = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
        weights = {name: self.get_parameter(name) for name in NAMES}
        self.weight_states = history = WeightHistory(weights, recipe, mesh=mesh, start=1)
        for name, average in history.averages.items():
            layer = self.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, NVFP4TrainingLinear)
            layer.round_toward(average)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.second(self.first(batch)) - batch @ self.target).square().mean(), {}


def train(engine: Engine, steps: range) -> list[list[float]]:
    metrics = []
    for step in steps:
        batch = torch.randn(16, WIDTH, generator=seeded(torch.Generator(), 0, step))
        metrics.append(engine.train_step([batch], step, 0.01)[OSCILLATING].tolist())
    return metrics


def tensors(engine: Engine) -> dict[str, Tensor]:
    names = layout(engine.shapes(), engine.more_shapes())
    return {name: engine.whole(*name.rsplit("/", 1)).detach().float().clone() for name in names}


def local_engine(part: WeightsOverTime) -> LocalEngine:
    return LocalEngine(FourBits(part, Mesh()), OPTIMIZER, precision="fp32", device=CPU, ema_decay=0.9)


PARTS = [WeightsOverTime.Q_EMA, WeightsOverTime.Q_RAMPING, WeightsOverTime.RESET]


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, part: WeightsOverTime) -> None:
    whole, first, second = (local_engine(part) for _ in range(3))
    expected = train(whole, range(STEPS))
    train(first, range(STOP))
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(STOP, first, {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert checkpoint.load(second) == []
    assert train(second, range(STOP, STEPS)) == expected[STOP:]
    mine, theirs = tensors(whole), tensors(second)
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert sum(oscillating for oscillating, _ in expected) > 0
    assert [step for step, (_, total) in enumerate(expected) if total] == [4, 8]


def test_the_parts_change_the_run() -> None:
    ends = {}
    for part in (WeightsOverTime.NONE, *PARTS):
        engine = local_engine(part)
        train(engine, range(STEPS))
        ends[part] = engine.named[NAMES[0]].detach().clone()
    for part in PARTS:
        assert not ends[part].equal(ends[WeightsOverTime.NONE]), part


def test_a_checkpoint_of_another_part_is_resumed_with_a_line(tmp_path: Path) -> None:
    plain, averaged = local_engine(WeightsOverTime.NONE), local_engine(WeightsOverTime.Q_EMA)
    train(plain, range(2))
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(2, plain, {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    (line,) = checkpoint.load(averaged)
    assert "rounding_average" in line
    # the average starts at the weights that were loaded
    for name in NAMES:
        assert torch.equal(averaged.whole(name, "rounding_average"), plain.named[name])


@pytest.mark.parametrize("part", PARTS)
def test_the_states_take_the_memory_of_the_estimate(part: WeightsOverTime) -> None:
    engine = local_engine(part)
    train(engine, range(1))
    states = set(engine.more_shapes())
    num_bytes = sum(engine.whole(*name.rsplit("/", 1)).nbytes for name in states)
    recipe = TrainingRecipe(weights_over_time=part, measure_oscillation=True)
    assert num_bytes == state_bytes(recipe, 2 * WIDTH * WIDTH, ranks=1)


def sharded(part: WeightsOverTime, cases: list[tuple[int, str]], folder: str) -> list[tuple[Any, dict[str, Tensor]]]:
    """Train at each stage and precision, in the middle from a checkpoint; return metrics and tensors."""
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    mesh, results = build_mesh(1), []

    def new_engine(stage: int, precision: Literal["bf16", "fp32"]) -> DeepSpeedEngine:
        objective = FourBits(part, mesh)
        return DeepSpeedEngine(
            objective, OPTIMIZER, mesh=mesh, zero_stage=stage, precision=precision, passes=1, ema_decay=0.9
        )

    for stage, precision in cases:
        engine = new_engine(stage, precision)  # type: ignore[arg-type]
        metrics = train(engine, range(STOP))
        place = CheckpointFolder(Path(folder) / f"{stage}{precision}", keep=1, mesh=mesh)
        place.save(STOP, engine, {})
        engine = new_engine(stage, precision)  # type: ignore[arg-type]
        checkpoint = place.newest()
        assert checkpoint is not None
        assert checkpoint.load(engine) == []
        metrics += train(engine, range(STOP, STEPS))
        summed = [mesh.sum(torch.tensor(row)).tolist() for row in metrics]
        results.append((summed, tensors(engine)))
    return results


@pytest.mark.parametrize(
    ("part", "stages"),
    [(WeightsOverTime.RESET, (0, 1, 2)), (WeightsOverTime.Q_EMA, (0, 1)), (WeightsOverTime.Q_RAMPING, (0,))],
)
def test_two_ranks_follow_weights_as_one_process_does(
    tmp_path: Path, part: WeightsOverTime, stages: tuple[int, ...]
) -> None:
    pytest.importorskip("deepspeed")
    engine = local_engine(part)
    metrics, expected = train(engine, range(STEPS)), tensors(engine)
    cases = [(stage, "fp32") for stage in stages]
    for of_rank in run_in_processes(2, sharded, part, cases, str(tmp_path)):
        for case, (got, states) in zip(cases, of_rank, strict=True):
            assert got == metrics, case
            for name, value in expected.items():
                assert torch.allclose(states[name], value, rtol=1e-4, atol=1e-6), (case, name)


def test_a_reset_under_bf16_sets_weights_and_masters(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    first, second = run_in_processes(2, sharded, WeightsOverTime.RESET, [(1, "bf16")], str(tmp_path))
    ((metrics, states),) = first
    assert all(states[name].equal(second[0][1][name]) for name in states)
    assert sum(oscillating for oscillating, _ in metrics) > 0


@pytest.mark.parametrize(
    ("part", "stage", "message"),
    [
        (WeightsOverTime.RESET, 3, "weights_over_time=reset needs whole weights, which parallel.zero_stage=3 divides"),
        (WeightsOverTime.Q_RAMPING, 1, "weights_over_time=q-ramping needs whole moments, which parallel.zero_stage=1"),
    ],
)
def test_shards_that_make_it_impossible_are_refused(part: WeightsOverTime, stage: int, message: str) -> None:
    pytest.importorskip("deepspeed")
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    with pytest.raises(ConfigError, match=message):
        DeepSpeedEngine(
            FourBits(part, Mesh()),
            OPTIMIZER,
            mesh=Mesh(),
            zero_stage=stage,
            precision="fp32",
            passes=1,
            ema_decay=0.9,
        )


def test_ramping_is_refused_with_another_optimizer() -> None:
    spam = OptimizerConfig(name="spam")
    with pytest.raises(ConfigError, match="q-ramping changes adamw, but optimizer.name is spam"):
        LocalEngine(FourBits(WeightsOverTime.Q_RAMPING, Mesh()), spam, precision="fp32", device=CPU)
