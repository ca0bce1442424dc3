"""DeepSpeed at every ZeRO stage makes the steps of a single process, and its checkpoints fit any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("deepspeed")

from longvideo.flow.schedule import FlowSchedule
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longvideo.training.checkpoint import CheckpointFolder
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.mesh import Mesh, build_mesh
from longvideo.training.optimizer import OptimizerConfig
from tests.train.test_sequence_parallel import CPU, SPEC, small_transformer, whole_batch
from tests.training.processes import run_in_processes

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, gradient_clip=0.5)
DECAY = 0.7
STAGES = (0, 1, 2, 3)


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


def build(mesh: Mesh, stage: int, precision: str = "fp32") -> tuple[TeacherForcing, Engine]:
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
    found = []
    for step in steps:
        metrics = engine.train_step(whole_batch().shares(mesh, 1, SPEC.chunk_frames), step, 1e-2)
        sums = {name: mesh.sum(value.clone()) for name, value in metrics.items()}
        found.append({name: float(value[0] / value[1]) for name, value in sums.items()})
    return found


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
        metrics += train(engine, mesh, range(2, 3))
        results[f"{sequence}, ZeRO {stage}"] = (metrics, averaged(objective, engine))
    return results


def resumed(stage: int, folder: str) -> dict[str, Tensor]:
    mesh = build_mesh(1)
    objective, engine = build(mesh, stage)
    found = CheckpointFolder(Path(folder), keep=1, mesh=mesh).newest()
    assert found is not None
    found.load(engine)
    train(engine, mesh, range(2, 3))
    return averaged(objective, engine)


@pytest.fixture(scope="module")
def alone() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    objective = small_objective(Mesh())
    engine = LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=DECAY)
    metrics = train(engine, Mesh(), range(3))
    return metrics, averaged(objective, engine)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("checkpoints")
    rows = [(1, stage) for stage in STAGES] + [(2, 1), (2, 3)]
    return folder, run_in_processes(2, trajectory, rows, str(folder))[0]


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 2e-4) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((got[name] - value).norm()) <= bound * float(value.norm()) + 1e-6, name


def test_every_stage_makes_the_steps_of_one_process(alone, two_ranks) -> None:
    (metrics, average), (_, found) = alone, two_ranks
    assert len(found) == 6
    for name, (got, got_average) in found.items():
        for mine, theirs in zip(got, metrics, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), name
            assert mine["grad"] == pytest.approx(theirs["grad"], rel=1e-4), name
            assert mine["mse"] == pytest.approx(theirs["mse"], rel=1e-4), name
        assert_close(got_average, average)


@pytest.mark.parametrize(("written", "stage", "world"), [("2_1_2", 2, 2), ("2_2_3", 1, 1), ("2_1_0", 3, 2)])
def test_any_ranks_and_stage_go_on_from_a_checkpoint(alone, two_ranks, written: str, stage: int, world: int) -> None:
    folder, _ = two_ranks
    for got in run_in_processes(world, resumed, stage, str(folder / written)):
        assert_close(got, alone[1])
