"""Run a training: join the other processes, build the recipe and its engine, train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longvideo.model.attention import preferred_attention
from longvideo.training.config_changes import changes_line
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.mesh import Mesh, ParallelConfig, build_mesh, launched, start_processes
from longvideo.training.objective import Objective
from longvideo.training.optimizer import OptimizerConfig
from longvideo.training.profile import profile
from longvideo.training.trainer import Recipe, Trainer, TrainerConfig


def run(
    config: Any,
    build: Callable[[Any, torch.device, Mesh], Recipe],
    device: torch.device,
    folder: Path,
    *,
    config_text: str,
    resume: str = "auto",
    deadline: float = math.inf,
    dry_run: int = 0,
    trace: bool = False,
    build_engine: Callable[[Any, Any, Mesh, torch.device], Engine] | None = None,
) -> None:
    """Train what a configuration says, in this process or in all that a launcher started.

    config: of a recipe, with `trainer`, `optimizer` and, where several processes can work on it, `parallel`.
    build_engine: from config, recipe, mesh and device; by default one for the recipe's objective.
    """
    parallel: ParallelConfig = getattr(config, "parallel", ParallelConfig())
    if launched():
        start_processes(parallel, device)
    try:
        mesh = build_mesh(parallel.sequence)
        recipe = build(config, device, mesh)
        engine = (build_engine or of_objective)(config, recipe, mesh, device)
        trainer = Trainer(
            recipe,
            engine,
            folder,
            config=config.trainer,
            optimizer=config.optimizer,
            device=device,
            mesh=mesh,
            micro_batch=parallel.micro_batch,
        )
        with preferred_attention(device):
            if dry_run:
                for text in profile(trainer, dry_run, trace=trace):
                    if mesh.is_main:
                        print(text, flush=True)
                return
            if mesh.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                if line := changes_line(folder / "config.yaml", config_text):
                    print(line, flush=True)
                (folder / "config.yaml").write_text(config_text)
            trainer.run(resume=resume, deadline=deadline)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def of_objective(config: Any, recipe: Recipe, mesh: Mesh, device: torch.device) -> Engine:
    """Return an engine for the one objective of a recipe."""
    parallel: ParallelConfig = getattr(config, "parallel", ParallelConfig())
    passes = recipe.source.passes(mesh, parallel.micro_batch) if launched() else 1
    return new_engine(
        recipe.objective, config.optimizer, config.trainer, parallel, mesh=mesh, device=device, passes=passes
    )


def new_engine(
    objective: Objective,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    parallel: ParallelConfig,
    *,
    mesh: Mesh,
    device: torch.device,
    passes: int,
) -> Engine:
    """Return DeepSpeed's engine where a launcher started the processes, and a plain one otherwise.

    passes: backward passes of a step.
    """
    if not launched():
        return LocalEngine(
            objective,
            optimizer,
            precision=trainer.precision,
            device=device,
            ema_decay=trainer.ema_decay,
            spike_factor=trainer.spike_factor,
        )
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    precision = trainer.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return DeepSpeedEngine(
        objective,
        optimizer,
        mesh=mesh,
        zero_stage=parallel.zero_stage,
        precision=precision,
        passes=passes,
        ema_decay=trainer.ema_decay,
        spike_factor=trainer.spike_factor,
    )
