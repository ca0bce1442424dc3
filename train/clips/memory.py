"""Estimate the memory of training on encoded clips from its configuration, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.checkpoint.modules import OnMeta
from longvideo.distributed import divide_batch
from longvideo.machine.launcher import launched
from longvideo.model.transformer import CausalTransformer
from longvideo.train.cost import copied_rows, estimate_memory
from longvideo.train.products import weight_state_bytes
from longvideo.train.teacher_forcing import runnable
from longvideo.training.memory import (
    FP32,
    ROWS_MASKED,
    BlockMemory,
    MemoryEstimate,
    engine_memory,
    report_estimate,
)

if TYPE_CHECKING:
    import torch

    from longvideo.distributed import Mesh
    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec
    from longvideo.train.batch import ViewStage
    from longvideo.train.clips.config import ClipTraining


def check_memory(
    config: ClipTraining, shape: TransformerConfig, spec: ChunkSpec, device: torch.device, mesh: Mesh
) -> None:
    """Print the memory of a step; raise ConfigError if it cannot fit."""
    with OnMeta():
        model = CausalTransformer(shape)
    estimates = [clip_memory(config, stage, model, spec, device, mesh) for stage in config.stages]
    report_estimate(
        max(estimates, key=lambda estimate: estimate.total),
        device,
        mesh,
        "use more ranks, a higher parallel.sequence or parallel.zero_stage, fewer chunks, or objective.checkpoint=true",
    )


def clip_memory(
    config: ClipTraining,
    stage: ViewStage,
    model: CausalTransformer,
    spec: ChunkSpec,
    device: torch.device,
    mesh: Mesh,
) -> MemoryEstimate:
    """Estimate the peak memory of a step of a stage. model: transformer of the shape that trains, on any device."""
    clips, passes = divide_batch(stage.batch, mesh, config.parallel.micro_batch)
    bf16 = config.trainer.precision != "fp32" and device.type == "cuda"
    objective = runnable(config.objective, config.parallel, ranks=mesh.world)
    engine = engine_memory(
        sum(parameter.numel() for parameter in model.parameters()),
        config.parallel,
        ranks=mesh.world,
        bf16=bf16,
        passes=passes,
        averaged=config.trainer.ema_decay > 0,
        states=weight_state_bytes(config.products, model, ranks=mesh.world),
    )
    blockwise = objective.attention == "blockwise"
    blocks = BlockMemory(
        size=2 if bf16 else FP32,
        checkpoint=objective.checkpoint,
        compiled=objective.compile and not config.trainer.layers_every,  # a step that is recorded is not compiled
        nvfp4=config.products.format == "nvfp4",
        outliers=config.products.keeps_outliers,
        copies=copied_rows(stage.chunks, mesh.sequence) if blockwise else ROWS_MASKED / 2,
    )
    return estimate_memory(
        model.config,
        spec,
        engine,
        blocks,
        chunks=stage.chunks,
        clips=clips,
        sequence=mesh.sequence,
        autocast=bf16 and not (launched() or mesh.world > 1),
    )
