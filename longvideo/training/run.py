"""Start a training: join the other processes, build the recipe and its engine, and train."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist

from longvideo.config.loading import to_yaml
from longvideo.distributed import Mesh, ParallelConfig, build_mesh, start_processes
from longvideo.kernels.attention.sdpa import preferred_attention
from longvideo.machine.devices import pick_device
from longvideo.machine.launcher import launched, process_rank
from longvideo.machine.packages import require
from longvideo.training.engine import Engine, LocalEngine
from longvideo.training.lost_ranks import naming_lost_ranks
from longvideo.training.precision import resolve
from longvideo.training.profile import profile
from longvideo.training.run_folder import claimed
from longvideo.training.run_log import check_reporting
from longvideo.training.stopping import RunStopped
from longvideo.training.trainer import Trainer, TrainerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.training.objective import Objective
    from longvideo.training.optimizer import OptimizerConfig
    from longvideo.training.options import RunOptions
    from longvideo.training.recipe import Recipe

BuildRecipe: TypeAlias = "Callable[[Any, torch.device, Mesh], Recipe[Any, Any]]"
"""Build a recipe from its configuration, the device of this process and the mesh of all processes."""
BuildEngine: TypeAlias = "Callable[[Any, Any, Mesh, torch.device], Engine]"
"""Build an engine from a configuration, its recipe, the mesh and the device."""


def run(config: Any, options: RunOptions, build: BuildRecipe, *, build_engine: BuildEngine | None = None) -> None:
    """Train as a configuration describes, in this process or in all processes of a launcher.

    config: configuration of a recipe, with `trainer`, `optimizer` and, where several processes can share the work,
    `parallel`. build_engine: by default one engine for the recipe's objective. Raises RunStopped after SIGTERM, SIGINT
    or SIGHUP, once the state is saved.
    """
    device = choose_device(options.device)
    check_reporting(config.trainer.tensorboard, config.trainer.wandb)
    parallel = _parallel(config)
    store = start_processes(parallel, device) if launched() else None

    def new_trainer() -> Trainer:
        recipe = build(config, device, mesh)
        return Trainer(
            recipe,
            (build_engine or objective_engine)(config, recipe, mesh, device),
            options.folder,
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
            _print(mesh, _start_line(trainer, config))
            for text in profile(trainer, options.dry_run, trace=options.trace):
                _print(mesh, text)
        else:
            with claimed(options.folder, mesh, resume=options.resume):
                trainer = new_trainer()
                _print(mesh, _start_line(trainer, config))
                _train(trainer, options, config_text=to_yaml(config))
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """Return the device of this process and set it up in torch.

    name: a torch device; by default the GPU of this process if there is one. Raises UserError for a device that does
    not exist.
    """
    own = f"cuda:{process_rank().local_rank}" if torch.cuda.is_available() else "cpu"
    device = pick_device(name or own)
    if device.type == "cuda":
        if launched():
            # the optimizer needs one piece of memory as large as all weights, which a fragmented heap does not have
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def _train(trainer: Trainer, options: RunOptions, *, config_text: str) -> None:
    is_done = False
    try:
        is_done = trainer.run(resume=options.resume, deadline=options.deadline, config_text=config_text)
    except RunStopped:
        _print(trainer.mesh, f"resume with: {options.resume_command}")
        raise
    if is_done:
        _print(trainer.mesh, *trainer.recipe.next_steps(trainer.folder))
    else:
        _print(trainer.mesh, f"resume with: {options.resume_command}")


def _start_line(trainer: Trainer, config: Any) -> str:
    """Describe in one line what runs, and why where that differs from the default."""
    device, precision = trainer.device, config.trainer.precision
    resolved = resolve(precision, device)
    engine = "one process"
    if launched():
        parallel = _parallel(config)
        ranks = f"{trainer.mesh.world} ranks, {parallel.sequence} for each video"
        engine = f"DeepSpeed ZeRO {parallel.zero_stage}, {ranks}"
    parts = [
        f"training on {device} in {resolved}{' (trainer.precision=auto)' if precision == 'auto' else ''}",
        f"engine: {engine}",
        *trainer.recipe.facts(),
    ]
    warmup = config.optimizer.warmup_steps
    if warmup > trainer.total_steps > 0:
        parts.append(f"the warm-up of {warmup} steps is longer than the run: the learning rate stays below its peak")
    return " | ".join(parts)


def _print(mesh: Mesh, *lines: str) -> None:
    for line in lines if mesh.is_main else ():
        print(line, flush=True)


def _parallel(config: Any) -> ParallelConfig:
    """Return how a run is spread over processes; the autoencoder, which is trained in one, has no such settings."""
    return getattr(config, "parallel", ParallelConfig())


def objective_engine(config: Any, recipe: Recipe[Any, Any], mesh: Mesh, device: torch.device) -> Engine:
    """Return an engine for the one objective of a recipe."""
    parallel = _parallel(config)
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
    """Return DeepSpeed's engine if a launcher started the processes, and a plain one otherwise.

    passes: number of backward passes of a step.
    """
    if not launched():
        return LocalEngine(
            objective,
            optimizer,
            precision=trainer.precision,
            device=device,
            ema_decay=trainer.ema_decay,
            ema_start=trainer.ema_start,
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
        ema_start=trainer.ema_start,
        spike_factor=trainer.spike_factor,
    )
