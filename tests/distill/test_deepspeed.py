"""Two ranks under DeepSpeed compute what one process does, at every ZeRO stage that a distillation may have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("deepspeed")

from longvideo.distill.engine import PairedEngine
from longvideo.distill.objectives import CriticObjective, RoleObjective, StudentObjective
from longvideo.distill.qad import ComparedChunk, QadObjective
from longvideo.distill.roles import Role
from longvideo.distill.walk import VideoRequest
from longvideo.distributed import Mesh, build_mesh
from longvideo.model.cache import NVFP4KVCache
from longvideo.training.checkpoint import CheckpointFolder
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.distill import quantized, videos
from tests.golden import relative_error
from tests.model import small
from tests.training.processes import run_in_processes
from tests.training.toy import CPU

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, gradient_clip=0.5)
SAMPLES = 2
STAGES = (0, 1, 2)


def build(mesh: Mesh, stage: int | None) -> tuple[PairedEngine, videos.LoraRoles]:
    """stage: of ZeRO; None is the engine of one process."""
    roles = videos.roles(small.model(), stirred=0.2)
    rollouts, copies = videos.parts(roles)

    def engine(objective: RoleObjective, decay: float) -> Engine:
        roles.switch(objective.role)
        if stage is None:
            return LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=decay)
        from longvideo.training.deepspeed_engine import DeepSpeedEngine

        passes = len(videos.clip().cuts) * SAMPLES // mesh.replicas
        return DeepSpeedEngine(
            objective, OPTIMIZER, mesh=mesh, zero_stage=stage, precision="fp32", passes=passes, ema_decay=decay
        )

    student, critic = StudentObjective(rollouts, copies), CriticObjective(rollouts, copies)
    both = (student, engine(student, 0.7)), (critic, engine(critic, 0.0))
    return PairedEngine(*both, critic_rate=lambda _step: 1e-3, student_every=2), roles


def shares(mesh: Mesh, step: int) -> list[VideoRequest]:
    """One sample a pass."""
    whole, own = videos.clip(samples=SAMPLES), []
    for sample in range(mesh.replica, SAMPLES, mesh.replicas):
        rows = whole.prompt_NB[:, sample : sample + 1]
        own.append(replace(whole, samples=(sample,), prompt_NB=rows, step=step))
    return own


def train(engine: PairedEngine, roles: videos.LoraRoles, mesh: Mesh, steps: range) -> dict[str, Tensor]:
    """Return all adapter weights, the student's averaged."""
    for step in steps:
        engine.train_step(shares(mesh, step), step, 1e-3)
    with engine.averaged():
        results = (Role.STUDENT, Role.CRITIC)
        return {f"{role}/{name}": w.detach().clone() for role in results for name, w in roles.trained(role).items()}


def by_every_stage(folder: str) -> list[dict[str, Tensor]]:
    mesh, results = build_mesh(1), []
    for stage in STAGES:
        engine, roles = build(mesh, stage)
        train(engine, roles, mesh, range(2))
        CheckpointFolder(Path(folder) / str(stage), keep=1, mesh=mesh).save(2, engine, {})
        results.append(train(engine, roles, mesh, range(2, 4)))
    # and on from the checkpoint of one stage at another
    engine, roles = build(mesh, 2)
    checkpoint = CheckpointFolder(Path(folder) / "1", keep=1, mesh=mesh).newest()
    assert checkpoint is not None
    checkpoint.load(engine)
    return [*results, train(engine, roles, mesh, range(2, 4))]


@pytest.mark.slow
def test_two_ranks_at_every_stage_distil_as_one_process(tmp_path: Path) -> None:
    engine, roles = build(Mesh(), None)
    before = {name: weight.detach().clone() for name, weight in roles.trained(Role.STUDENT).items()}
    expected = train(engine, roles, Mesh(), range(4))
    assert all(relative_error(before[name], expected[f"{Role.STUDENT}/{name}"]) > 1e-3 for name in before)
    first, second = run_in_processes(2, by_every_stage, str(tmp_path))
    assert len(first) == len(second) == 4
    for results in (*first, *second):
        for name, weight in expected.items():
            assert relative_error(results[name], weight) < 2e-4, name


def engine_of_qad(mesh: Mesh, stage: int | None) -> tuple[Engine, QadObjective]:
    """stage: of ZeRO; None is the engine of one process."""
    objective = quantized.objective(quantized.networks(cache_type=NVFP4KVCache), guidance=2.0)
    if stage is None:
        return LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=0.7), objective
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    passes = 2 * len(videos.clip().cuts) * SAMPLES // mesh.replicas
    engine = DeepSpeedEngine(
        objective, OPTIMIZER, mesh=mesh, zero_stage=stage, precision="fp32", passes=passes, ema_decay=0.7
    )
    return engine, objective


def train_qad(mesh: Mesh, stage: int | None) -> dict[str, Tensor]:
    """Return all trained weights, averaged."""
    engine, objective = engine_of_qad(mesh, stage)
    for step in range(3):
        clips = shares(mesh, step)
        parts = [
            ComparedChunk(clip, index, negative)
            for clip in clips
            for negative in (False, True)
            for index in range(clip.num_chunks)
        ]
        engine.train_step(parts, step, 1e-3)
    with engine.averaged():
        return {name: weight.detach().clone() for name, weight in objective.named_parameters()}


def qad_at_every_stage(_folder: str) -> list[dict[str, Tensor]]:
    mesh = build_mesh(1)
    return [train_qad(mesh, stage) for stage in STAGES]


@pytest.mark.slow
def test_two_ranks_at_every_stage_train_a_quantized_student_as_one_process(tmp_path: Path) -> None:
    before = {name: weight.detach().clone() for name, weight in engine_of_qad(Mesh(), None)[1].named_parameters()}
    expected = train_qad(Mesh(), None)
    for results in run_in_processes(2, qad_at_every_stage, str(tmp_path)):
        assert len(results) == len(STAGES)
        for weights in results:
            for name, weight in expected.items():
                update = relative_error(weights[name] - before[name], weight - before[name])
                assert update < 2e-2, (name, update)
