"""Run a training: join the other processes, build the recipe and its engine, train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longvideo.model.attention import preferred_attention
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.mesh import Mesh, ParallelConfig, build_mesh, launched, start_processes
from longvideo.training.profile import profile
from longvideo.training.trainer import Recipe, Trainer


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
) -> None:
    """Train what a configuration says, in this process or in all that a launcher started.

    config: of a recipe, with `trainer`, `optimizer` and, where several processes can work on it, `parallel`.
    """
    parallel: ParallelConfig = getattr(config, "parallel", ParallelConfig())
    if launched():
        start_processes(parallel, device)
    try:
        mesh = build_mesh(parallel.sequence)
        recipe = build(config, device, mesh)
        engine = build_engine(config, recipe, parallel, mesh, device)
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
                (folder / "config.yaml").write_text(config_text)
            trainer.run(resume=resume, deadline=deadline)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build_engine(config: Any, recipe: Recipe, parallel: ParallelConfig, mesh: Mesh, device: torch.device) -> Engine:
    """Return DeepSpeed's engine where a launcher started the processes, and a plain one otherwise."""
    trainer = config.trainer
    if not launched():
        return LocalEngine(
            recipe.objective,
            config.optimizer,
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
        recipe.objective,
        config.optimizer,
        mesh=mesh,
        zero_stage=parallel.zero_stage,
        precision=precision,
        passes=recipe.source.passes(mesh, parallel.micro_batch),
        ema_decay=trainer.ema_decay,
        spike_factor=trainer.spike_factor,
    )
