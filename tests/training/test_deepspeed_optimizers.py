"""SPAM and Stable-SPAM under DeepSpeed make the steps of a single process, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("deepspeed")

from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError
from longvideo.training.checkpoint import CheckpointFolder, layout
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.training.processes import run_in_processes
from tests.training.toy import CPU, Numbers, Regression

STEPS = 6
SPAM = OptimizerConfig(
    name="spam", learning_rate=0.03, reset_every=3, reset_warmup=2, spike_after=1, spike_ratio=2.0, weight_decay=0.1
)
STABLE_SPAM = OptimizerConfig(name="stable-spam", learning_rate=0.03, reset_every=3, weight_decay=0.1)


def local_weights(config: OptimizerConfig) -> dict[str, Tensor]:
    engine = LocalEngine(Regression(), config, precision="fp32", device=CPU)
    for step in range(STEPS):
        engine.train_step(Numbers().shares(step, Mesh(), None), step, 0.03)
    return {name: parameter.detach().clone() for name, parameter in engine.named.items()}


def sharded(config: OptimizerConfig, stages: tuple[int, ...], folder: str) -> list[dict[str, Tensor]]:
    """Train at each stage, in the middle from a checkpoint; return the weights."""
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    mesh, results = build_mesh(1), []

    def new_engine(stage: int) -> DeepSpeedEngine:
        return DeepSpeedEngine(
            Regression(), config, mesh=mesh, zero_stage=stage, precision="fp32", passes=1, ema_decay=0.9
        )

    for stage in stages:
        engine = new_engine(stage)
        for step in range(STEPS):
            if step == STEPS // 2 - 1:
                place = CheckpointFolder(Path(folder) / str(stage), keep=1, mesh=mesh)
                place.save(step, engine, {})
                before = {name: engine.whole(*name.rsplit("/", 1)).clone() for name in every_tensor(engine)}
                engine = new_engine(stage)
                checkpoint = place.newest()
                assert checkpoint is not None
                assert checkpoint.load(engine) == []
                assert all(before[name].equal(engine.whole(*name.rsplit("/", 1))) for name in every_tensor(engine))
            engine.train_step(Numbers().shares(step, mesh, None), step, 0.03)
        results.append({name: engine.whole(name, "weight").detach().clone() for name in engine.shapes()})
    return results


def every_tensor(engine: Engine) -> list[str]:
    return list(layout(engine.shapes(), engine.more_shapes()))


@pytest.mark.parametrize(("config", "stages"), [(SPAM, (0, 1, 2, 3)), (STABLE_SPAM, (0,))])
def test_two_ranks_make_the_steps_of_one_process(
    tmp_path: Path, config: OptimizerConfig, stages: tuple[int, ...]
) -> None:
    expected = local_weights(config)
    for of_rank in run_in_processes(2, sharded, config, stages, str(tmp_path)):
        for stage, weights in zip(stages, of_rank, strict=True):
            for name, value in expected.items():
                assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), (stage, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stable_spam_on_shards_is_refused_with_what_works(stage: int) -> None:
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    with pytest.raises(ConfigError, match=f"stable-spam needs whole gradients, which parallel.zero_stage={stage}"):
        DeepSpeedEngine(
            Regression(), STABLE_SPAM, mesh=Mesh(), zero_stage=stage, precision="fp32", passes=1, ema_decay=0.9
        )
