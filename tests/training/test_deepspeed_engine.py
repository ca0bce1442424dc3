"""DeepSpeed at every ZeRO stage makes the steps of a single process, and its checkpoints fit any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("deepspeed")

from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longvideo.training.checkpoint import CheckpointFolder, layout
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.train.test_sequence_parallel import CPU, SPEC, small_transformer, whole_batch
from tests.training.processes import run_in_processes
from tests.training.toy import Numbers, Regression

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, gradient_clip=0.5)
DECAY = 0.7
STAGES = (0, 1, 2, 3)
EnginePrecision = Literal["bf16", "fp32"]
Steps = tuple[list[dict[str, float]], dict[str, Tensor]]
"""Metrics of every step, and the averaged weights after them."""


def small_objective(mesh: Mesh) -> TeacherForcing:
    return TeacherForcing(
        small_transformer(),
        None,
        TeacherForcingConfig(checkpoint=True),
        spec=SPEC,
        schedule=FlowSchedule(5.0),
        device=CPU,
        mesh=mesh,
    )


def build(mesh: Mesh, stage: int, precision: EnginePrecision = "fp32") -> tuple[TeacherForcing, Engine]:
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    objective = small_objective(mesh)
    engine = DeepSpeedEngine(
        objective,
        OPTIMIZER,
        mesh=mesh,
        zero_stage=stage,
        precision=precision,
        passes=whole_batch().sigma.shape[0] // mesh.replicas,
        ema_decay=DECAY,
    )
    return objective, engine


def train(engine: Engine, mesh: Mesh, steps: range) -> list[dict[str, float]]:
    results = []
    for step in steps:
        metrics = engine.train_step(whole_batch().shares(mesh, 1, SPEC.chunk_frames), step, 1e-2)
        sums = {name: mesh.sum(value.clone()) for name, value in metrics.items()}
        results.append({name: float(value[0] / value[1]) for name, value in sums.items()})
    return results


def whole_tensors(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.whole(*name.rsplit("/", 1)).detach().clone() for name in layout(engine.shapes())}


def averaged(objective: TeacherForcing, engine: Engine) -> dict[str, Tensor]:
    with engine.averaged():
        return {name: p.detach().clone() for name, p in objective.named_parameters()}


def trajectory(world_rows: list[tuple[int, int]], folder: str) -> dict[str, tuple[list[dict[str, float]], dict]]:
    """Train by every (sequence, stage); write checkpoints after two steps; return metrics and averages."""
    results = {}
    for sequence, stage in world_rows:
        mesh = build_mesh(sequence)
        objective, engine = build(mesh, stage)
        metrics = train(engine, mesh, range(2))
        place = Path(folder) / f"{mesh.world}_{sequence}_{stage}"
        CheckpointFolder(place, keep=1, mesh=mesh).save(2, engine, {})
        with engine.averaged(), torch.no_grad():
            if sequence == 1 and mesh.is_main:
                # as samples are drawn: on one rank alone
                objective(whole_batch().shares(mesh, 1, SPEC.chunk_frames)[0])
            mesh.barrier()
        metrics += train(engine, mesh, range(2, 3))
        results[f"{sequence}, ZeRO {stage}"] = (metrics, averaged(objective, engine))
    return results


def load(engine: Engine, mesh: Mesh, folder: Path) -> None:
    results = CheckpointFolder(folder, keep=1, mesh=mesh).newest()
    assert results is not None
    results.load(engine)


def resumed(cases: list[tuple[str, int, int]], folder: str) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """Take the third step after each checkpoint, with each sequence and stage."""
    results = []
    for written, sequence, stage in cases:
        mesh = build_mesh(sequence)
        objective, engine = build(mesh, stage)
        load(engine, mesh, Path(folder) / written)
        (metrics,) = train(engine, mesh, range(2, 3))
        results.append((metrics, averaged(objective, engine)))
    return results


def carried(folder: str) -> list[str]:
    """Train at every stage, resume at the next one; return what is not the same there, to the last bit."""
    mesh, wrong = build_mesh(1), []
    cases: list[tuple[EnginePrecision, tuple[int, ...]]] = [("bf16", STAGES[1:]), ("fp32", STAGES)]
    for precision, stages in cases:
        for stage, following in zip(stages, stages[1:] + stages[:1], strict=True):
            _, engine = build(mesh, stage, precision)
            train(engine, mesh, range(2))
            place = Path(folder) / f"{precision}_{stage}"
            CheckpointFolder(place, keep=1, mesh=mesh).save(2, engine, {})
            _, other = build(mesh, following, precision)
            load(other, mesh, place)
            before, after = whole_tensors(engine), whole_tensors(other)
            assert before.keys() == after.keys()
            wrong += [f"{precision}, ZeRO {stage}: {name}" for name in before if not before[name].equal(after[name])]
            losses = [train(each, mesh, range(2, 3))[0]["loss"] for each in (engine, other)]
            if losses[0] != pytest.approx(losses[1], rel=1e-6):
                wrong.append(f"{precision}, ZeRO {stage}: losses {losses}")
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Steps:
    objective = small_objective(Mesh())
    engine = LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=DECAY)
    metrics = train(engine, Mesh(), range(2))
    CheckpointFolder(folder / "alone", keep=1).save(2, engine, {})
    metrics += train(engine, Mesh(), range(2, 3))
    return metrics, averaged(objective, engine)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Steps]:
    rows = [(1, stage) for stage in STAGES] + [(2, 1), (2, 3)]
    return run_in_processes(2, trajectory, rows, str(folder))[0]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 2e-4) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).norm()) <= bound * float(value.norm()) + 1e-6, name


def test_every_stage_makes_the_steps_of_one_process(alone: Steps, two_ranks: dict[str, Steps]) -> None:
    metrics, average = alone
    assert len(two_ranks) == 6
    for name, (got, got_average) in two_ranks.items():
        for mine, theirs in zip(got, metrics, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), name
            assert mine["grad"] == pytest.approx(theirs["grad"], rel=1e-4), name
            assert mine["mse"] == pytest.approx(theirs["mse"], rel=1e-4), name
        assert_close(got_average, average)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [("2_1_2", 1, 0), ("2_2_3", 1, 1), ("alone", 1, 3)]),
        (2, [("alone", 1, 0), ("alone", 2, 1), ("alone", 1, 2), ("alone", 2, 3), ("2_1_0", 1, 3), ("2_2_3", 1, 2)]),
    ],
)
@pytest.mark.usefixtures("two_ranks")
def test_any_ranks_and_stage_resume_from_a_checkpoint(
    alone: Steps, folder: Path, world: int, cases: list[tuple[str, int, int]]
) -> None:
    for of_rank in run_in_processes(world, resumed, cases, str(folder)):
        for case, (metrics, average) in zip(cases, of_rank, strict=True):
            assert metrics["loss"] == pytest.approx(alone[0][2]["loss"], rel=1e-5), case
            assert_close(average, alone[1])


@pytest.mark.usefixtures("two_ranks")
def test_one_plain_process_resumes_from_a_checkpoint_of_any_ranks_and_stage(alone: Steps, folder: Path) -> None:
    for written in ("2_1_0", "2_1_1", "2_1_2", "2_1_3", "2_2_1", "2_2_3"):
        objective = small_objective(Mesh())
        engine = LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=DECAY)
        load(engine, Mesh(), folder / written)
        (metrics,) = train(engine, Mesh(), range(2, 3))
        assert metrics["loss"] == pytest.approx(alone[0][2]["loss"], rel=1e-5), written
        assert_close(averaged(objective, engine), alone[1])


@pytest.mark.slow
def test_a_checkpoint_carries_every_tensor_to_another_stage_bit_for_bit(tmp_path: Path) -> None:
    assert run_in_processes(2, carried, str(tmp_path)) == [[], []]


def test_bf16_weights_without_masters_are_refused() -> None:
    with pytest.raises(ConfigError, match="parallel.zero_stage=0 keeps no fp32 masters of bf16 weights"):
        build(Mesh(), 0, "bf16")


class SteepAtZero(Regression):
    """A loss that is finite for inputs of zero, where its gradient is not."""

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(batch)
        return loss + (batch @ self.linear.weight.T).square().sum().sqrt(), metrics


def skipping(stages: tuple[int, ...], factor: float) -> list[tuple[int, float, bool]]:
    """Train with a batch times `factor` on the second rank alone; return skipped steps, moves and finiteness."""
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    mesh, results = build_mesh(1), []
    for stage in stages:
        engine = DeepSpeedEngine(
            SteepAtZero(), OPTIMIZER, mesh=mesh, zero_stage=stage, precision="fp32", passes=1, ema_decay=DECAY
        )
        numbers = Numbers(frozenset({1} if mesh.rank == 1 else ()), factor)
        engine.train_step(numbers.shares(0, mesh, None), 0, 1e-2)
        before = engine.whole("linear.weight", "weight").clone()
        engine.train_step(numbers.shares(1, mesh, None), 1, 1e-2)
        moved = float((engine.whole("linear.weight", "weight") - before).abs().max())
        engine.train_step(numbers.shares(2, mesh, None), 2, 1e-2)
        results.append((engine.num_skipped(), moved, engine.is_finite()))
    return results


@pytest.mark.parametrize("factor", [float("nan"), 0.0])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(factor: float) -> None:
    for results in run_in_processes(2, skipping, STAGES, factor):
        assert results == [(1, 0.0, True)] * len(STAGES)
