"""The record of every layer in 4 bits holds the numbers that its tensors give, in the steps that are recorded alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.kernels.nvfp4.reference import dequantize, quantize
from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.layer_watch import LayerWatch
from longvideo.training.objective import Objective, seeded
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.trainer import Trainer, TrainerConfig
from tests.training.processes import run_in_processes
from tests.training.toy import CPU, Numbers, ToyRecipe, toy_trainer

WIDTH = 32
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, gradient_clip=0.1)
KINDS = {"gradient_norm", "input_amax", "weight_amax", "gradient_amax", "input_underflow", "gradient_underflow"}


class FourBits(Objective):
    """Learn a fixed map with a plain layer and one in 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        recipe = TrainingRecipe(gradients=GradientRounding.NEAREST)
        self.plain = nn.Linear(8, WIDTH)
        self.rounded = NVFP4TrainingLinear(WIDTH, WIDTH, recipe=recipe, seeds=torch.tensor([1, 2]))
        self.target = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
        self.layer_watch = LayerWatch({"rounded.weight": self.rounded})

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.rounded(self.plain(batch).pow(3)) - batch @ self.target
        return error.square().mean(), {}


def batch_of(step: int) -> Tensor:
    return torch.randn(16, 8, generator=seeded(torch.Generator(), 0, step))


def watched(engine: Engine, objective: FourBits, shares: list[Tensor], mesh: Mesh) -> dict[str, float]:
    assert objective.layer_watch is not None
    with objective.layer_watch.watching():
        engine.train_step(shares, 0, 0.01)
    return objective.layer_watch.values(mesh)


def test_the_numbers_are_those_of_the_tensors() -> None:
    objective = FourBits()
    shares = [batch_of(0), 3.0 * batch_of(1)]
    inputs, gradients, total = [], [], torch.zeros(WIDTH, WIDTH)
    for share in shares:
        x = objective.plain(share).pow(3).detach()
        output = objective.rounded(x)
        loss = (output - share @ objective.target).square().mean() / len(shares)
        gradient, of_weight = torch.autograd.grad(loss, (output, objective.rounded.weight))
        inputs.append(x)
        gradients.append(gradient)
        total += of_weight
    weight = float(objective.rounded.weight.detach().abs().max())
    engine = LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU)
    got = watched(engine, objective, shares, Mesh())

    def underflow(rows: list[Tensor], rule: Rule) -> float:
        rounded = [dequantize(quantize(x, rule), torch.float32) for x in rows]
        lost = sum(int(((r == 0) & (x != 0)).sum()) for r, x in zip(rounded, rows, strict=True))
        return lost / sum(x.numel() for x in rows)

    expected = {
        "gradient_norm": float(total.norm()),
        "input_amax": max(float(x.abs().max()) for x in inputs),
        "weight_amax": weight,
        "gradient_amax": max(float(x.abs().max()) for x in gradients),
        "input_underflow": underflow(inputs, Rule.ADAPTIVE),
        "gradient_underflow": underflow(gradients, Rule.STATIC6),
    }
    assert expected["input_underflow"] > 0.05 and expected["gradient_underflow"] > 0.01
    assert got == pytest.approx({f"layers/rounded/{kind}": value for kind, value in expected.items()}, rel=1e-5)


def run(folder: Path, every: int) -> list[dict[str, float]]:
    folder.mkdir()
    recipe = ToyRecipe([RateSegment(7)], Numbers())
    recipe.objective = FourBits()  # type: ignore[assignment]
    config = TrainerConfig(precision="fp32", log_every=1, layers_every=every, save_every=0)
    engine = LocalEngine(recipe.objective, OPTIMIZER, precision="fp32", device=CPU, ema_decay=config.ema_decay)
    Trainer(recipe, engine, folder, config=config, optimizer=OPTIMIZER, device=CPU).run()
    for layer in (recipe.objective.get_submodule("rounded"), recipe.objective.get_submodule("plain")):
        assert not layer._forward_hooks
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_hold_the_layers_every_few_steps_and_training_is_the_same(tmp_path: Path) -> None:
    records = run(tmp_path / "watched", 3)
    layers = {
        record["step"]: {name.removeprefix("layers/rounded/") for name in record if name != "step"}
        for record in records
        if any(name.startswith("layers/") for name in record)
    }
    assert layers == {3: KINDS, 6: KINDS}
    losses = [[record["loss"] for record in rows if "loss" in record] for rows in (records, run(tmp_path / "not", 0))]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_a_run_without_layers_in_4_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer.layers_every is 5, but no layer trains in emulated 4 bits"):
        toy_trainer(tmp_path, 3, layers_every=5)


def sharded(stages: tuple[int, ...]) -> list[dict[str, float]]:
    """Watch a step of two ranks with different batches at each stage."""
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    mesh, results = build_mesh(1), []
    for stage in stages:
        objective = FourBits()
        engine = DeepSpeedEngine(
            objective, OPTIMIZER, mesh=mesh, zero_stage=stage, precision="fp32", passes=1, ema_decay=0.9
        )
        results.append(watched(engine, objective, [batch_of(mesh.rank)], mesh))
    return results


def test_two_ranks_record_the_numbers_of_one_process() -> None:
    pytest.importorskip("deepspeed")
    objective = FourBits()
    engine = LocalEngine(objective, OPTIMIZER, precision="fp32", device=CPU)
    expected = watched(engine, objective, [batch_of(0), batch_of(1)], Mesh())
    # the gradient of a rank's own loss is not divided by the number of ranks
    expected["layers/rounded/gradient_amax"] *= 2
    stages = (0, 1, 2, 3)
    for of_rank in run_in_processes(2, sharded, stages):
        for stage, got in zip(stages, of_rank, strict=True):
            assert got == pytest.approx(expected, rel=1e-4), stage
