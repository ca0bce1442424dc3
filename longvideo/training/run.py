"""Run a training: join the other processes, build the recipe and its engine, train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longvideo.distributed import Mesh, ParallelConfig, build_mesh, launched, start_processes
from longvideo.machine.packages import require
from longvideo.model.attention import preferred_attention
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.lost_ranks import naming_lost_ranks
from longvideo.training.precision import resolve
from longvideo.training.profile import profile
from longvideo.training.run_folder import claimed
from longvideo.training.run_log import check_reporting
from longvideo.training.stopping import RunStopped
from longvideo.training.trainer import Recipe, Trainer, TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longvideo.training.objective import Objective
    from longvideo.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class RunOptions:
    """What a command says of a run beside its configuration.

    resume_command: what starts it again. config_text: the configuration as YAML. resume: "auto" or "never". deadline:
    on the clock of `time.monotonic`. dry_run: steps of each stage to time instead of training.
    """

    resume_command: str
    config_text: str = ""
    resume: str = "auto"
    deadline: float = math.inf
    dry_run: int = 0
    trace: bool = False


def run(
    config: Any,
    build: Callable[[Any, torch.device, Mesh], Recipe],
    device: torch.device,
    folder: Path,
    options: RunOptions,
    *,
    build_engine: Callable[[Any, Any, Mesh, torch.device], Engine] | None = None,
) -> None:
    """Train what a configuration says, in this process or in all that a launcher started.

    config: of a recipe, with `trainer`, `optimizer` and, where several processes can work on it, `parallel`.
    build_engine: from config, recipe, mesh and device; by default one for the recipe's objective.
    Raises RunStopped after SIGTERM or SIGINT, once the state is saved.
    """
    check_reporting(config.trainer.tensorboard, config.trainer.wandb)
    parallel: ParallelConfig = getattr(config, "parallel", ParallelConfig())
    store = start_processes(parallel, device) if launched() else None

    def new_trainer() -> Trainer:
        recipe = build(config, device, mesh)
        return Trainer(
            recipe,
            (build_engine or of_objective)(config, recipe, mesh, device),
            folder,
            config=config.trainer,
            optimizer=config.optimizer,
            device=device,
            mesh=mesh,
            micro_batch=parallel.micro_batch,
        )

    mesh = build_mesh(parallel.sequence, timeout_minutes=parallel.timeout_minutes, store=store)
    with naming_lost_ranks(mesh), preferred_attention(device):
        if options.dry_run:
            trainer = new_trainer()
            _say(mesh, _describe(trainer, config))
            for text in profile(trainer, options.dry_run, trace=options.trace):
                if mesh.is_main:
                    print(text, flush=True)
        else:
            with claimed(folder, mesh, resume=options.resume):
                trainer = new_trainer()
                _say(mesh, _describe(trainer, config))
                _train(trainer, options)
    if dist.is_initialized():
        dist.destroy_process_group()


def _train(trainer: Trainer, options: RunOptions) -> None:
    is_done = False
    try:
        is_done = trainer.run(resume=options.resume, deadline=options.deadline, config_text=options.config_text)
    except RunStopped:
        _say(trainer.mesh, f"resume with: {options.resume_command}")
        raise
    if is_done:
        _say(trainer.mesh, *trainer.recipe.next_steps(trainer.folder))
    else:
        _say(trainer.mesh, f"resume with: {options.resume_command}")


def _describe(trainer: Trainer, config: Any) -> str:
    """Say in one line what runs, and what of it is not as one would expect, and why."""
    device, precision = trainer.device, config.trainer.precision
    resolved = resolve(precision, device)
    parallel: ParallelConfig = getattr(config, "parallel", ParallelConfig())
    engine = "one process"
    if launched():
        engine = f"DeepSpeed ZeRO {parallel.zero_stage}, {trainer.mesh.world} ranks, {parallel.sequence} to a video"
    parts = [
        f"training on {device} in {resolved}{' (trainer.precision=auto)' if precision == 'auto' else ''}",
        f"engine: {engine}",
        *trainer.recipe.facts(),
    ]
    warmup = config.optimizer.warmup_steps
    if warmup > trainer.total_steps > 0:
        parts.append(f"warm-up of {warmup} steps is longer than the run: the learning rate stays below its peak")
    return " | ".join(parts)


def _say(mesh: Mesh, *lines: str) -> None:
    for line in lines if mesh.is_main else ():
        print(line, flush=True)


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
    require("deepspeed", extra="train", purpose="training in several processes")
    from longvideo.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        objective,
        optimizer,
        mesh=mesh,
        zero_stage=parallel.zero_stage,
        precision=resolve(trainer.precision, device),
        passes=passes,
        ema_decay=trainer.ema_decay,
        spike_factor=trainer.spike_factor,
    )
