"""Memory and time of a step on a number of GPUs, computed from a configuration without any GPU.

The time is arithmetic: operations at a rate that was measured elsewhere, and bytes at stated bandwidths, one after the
other. It is an estimate, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import OnMeta
from longvideo.checkpoint.settings import chunk_spec
from longvideo.distributed import Mesh, check_sequence, divide_batch
from longvideo.errors import ConfigError
from longvideo.model.config import PRESETS
from longvideo.model.transformer import CausalTransformer
from longvideo.train.clips.memory import clip_memory
from longvideo.train.cost import clip_flops, seen_chunks
from longvideo.training.memory import MemoryEstimate

if TYPE_CHECKING:
    from longvideo.train.batch import ViewStage
    from longvideo.train.clips.config import ClipTraining

EXCHANGED = 4
"""Tensors of a layer that ranks exchange in a pass: queries, keys, values and the result of attention."""
BF16 = 2


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    operations: of training, nothing computed twice or masked away, as a dry run prints. sequence_bytes: bytes that a
    GPU sends to the others that share its clip. network_bytes: bytes that it sends to all others.
    """

    operations: float
    sequence_bytes: float
    network_bytes: float


@dataclass(frozen=True)
class StepPlan:
    """A step of one stage on a number of GPUs.

    passes: passes of a step. operations: of a GPU. sequence_bytes, network_bytes: bytes that a GPU sends to those that
    share its clip, and gradients and weights that it sends to all.
    """

    gpus: int
    sequence: int
    passes: int
    memory: MemoryEstimate
    operations: float
    sequence_bytes: float
    network_bytes: float

    def seconds(self, rates: Rates) -> tuple[float, float, float]:
        """Return the times of arithmetic, of the exchange in a clip, and of gradients and weights."""
        return (
            self.operations / rates.operations,
            self.sequence_bytes / rates.sequence_bytes,
            self.network_bytes / rates.network_bytes,
        )


def plan_step(config: ClipTraining, stage: ViewStage, gpus: int) -> StepPlan:
    """Return the plan of a step of a stage. Raises ConfigError where the GPUs cannot divide its work."""
    parallel, shape, settings = config.parallel, PRESETS[config.preset], config.settings
    if config.initialize is not None:
        folder = ModelFolder.open(config.initialize)
        shape, settings = folder.transformer_config, folder.settings
    spec = chunk_spec(settings)
    check_sequence(parallel.sequence, heads=shape.num_attention_heads, chunk_counts=[stage.chunks])
    if gpus % parallel.sequence:
        raise ConfigError(f"{gpus} GPUs do not divide into groups of parallel.sequence={parallel.sequence}")
    mesh = Mesh(world=gpus, sequence=parallel.sequence)
    clips, passes = divide_batch(stage.batch, mesh, parallel.micro_batch)
    with OnMeta():
        model = CausalTransformer(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seen = seen_chunks(spec, stage.chunks, config.objective.context)
    tokens = 2 * clips * stage.chunks * spec.tokens_per_chunk / parallel.sequence
    runs = passes * (3 if config.objective.checkpoint else 2)  # forward, perhaps once more, and backward
    exchanged = runs * shape.num_layers * EXCHANGED * tokens * shape.dim * BF16
    return StepPlan(
        gpus=gpus,
        sequence=parallel.sequence,
        passes=passes,
        memory=clip_memory(config, stage, model, spec, torch.device("cuda"), mesh),
        operations=stage.batch * clip_flops(shape, spec, stage.chunks, seen) / gpus,
        sequence_bytes=exchanged * _share_of_others(parallel.sequence),
        network_bytes=parameters * BF16 * _transfers(parallel.zero_stage, passes) * _share_of_others(gpus),
    )


def _share_of_others(ranks: int) -> float:
    """Return the share of a tensor divided over ranks that goes to another rank."""
    return (ranks - 1) / ranks


def _transfers(zero_stage: int, passes: int) -> int:
    """Return how often a rank sends a number for each weight in a step.

    An all-reduce sends it twice. Stage 1 reduces gradients once a step and gathers new weights, stage 2 reduces them in
    every pass, and stage 3 also gathers weights in every pass, forward and backward.
    """
    return {0: 2, 1: 2, 2: passes + 1, 3: 3 * passes}[zero_stage]
