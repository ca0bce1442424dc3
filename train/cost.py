"""What a teacher-forcing step costs: arithmetic that it cannot do without, and memory that it will take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec

GIB = 2**30
BACKWARD = 3  # times the arithmetic of a forward pass, its own included


def clip_flops(config: TransformerConfig, spec: ChunkSpec, chunks: int, visible: Tensor | None = None) -> float:
    """Return the operations of training on one clip: forward and backward, nothing computed twice or masked away.

    visible: bool [chunks, chunks], which chunks a chunk sees, itself included; by default all earlier ones. Both copies
    of every chunk count. A multiplication and an addition are two operations.
    """
    if visible is None:
        visible = torch.ones(chunks, chunks, dtype=torch.bool).tril()
    dim, tokens = config.dim, spec.tokens_per_chunk
    per_token = 2 * (6 * dim * dim + 2 * dim * config.ffn_dim)  # q k v o, cross q o, feed-forward
    text = 2 * 2 * dim * dim * config.text_len  # cross k v of a prompt, made once for each chunk
    cross = 4 * dim * config.text_len  # a token's attention to its prompt
    attention = 4 * dim * tokens * tokens * 2 * int(visible.sum())  # clean and noisy rows see as many chunks
    block = 2 * chunks * tokens * (per_token + cross) + chunks * text + attention
    patch = config.patch_size[1] * config.patch_size[2] * (config.in_channels + config.out_channels)
    return BACKWARD * (config.num_layers * block + 2 * 2 * chunks * tokens * dim * patch)


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one rank: weights and gradients in the training dtype, optimiser (masters, moments, averages), kept
    activations, what one block needs while it runs, and what the optimiser does when activations are gone."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    block: float
    step: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.block, self.step)

    def line(self) -> str:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in vars(self).items() if name != "step")
        return f"about {self.total:.1f} GiB a device: {parts}; afterwards, for a step of the optimiser, {self.step:.1f}"


def estimate_memory(
    config: TransformerConfig,
    spec: ChunkSpec,
    *,
    num_parameters: int,
    chunks: int,
    clips: int,
    passes: int,
    ranks: int,
    sequence: int,
    zero_stage: int,
    bf16: bool,
    checkpoint: bool,
    blockwise: bool,
) -> MemoryEstimate:
    """Estimate what training takes on each rank. clips: of one pass. A rule of thumb, within a tenth of what was seen.

    With ZeRO the optimiser is shared out from stage 1 on, gradients from 2, weights from 3; gradients of several passes
    are added up in fp32, and the optimiser takes a flat copy of its own, and one in fp32. Without recomputation a block
    keeps about 34 numbers a token and width (arXiv 2205.05198), with it its input alone. Attention run by run keeps
    copies of the keys and values that each run sees, and of their gradients.
    """
    size = 2 if bf16 else 4
    tokens = 2 * clips * chunks * spec.tokens_per_chunk // sequence
    row = tokens * config.dim * size / GIB
    wide = 2 * config.ffn_dim / config.dim
    within = 34 + wide
    copies = (chunks + 1) / 2 if blockwise else 0  # of all keys: a run sees so many chunks in the mean
    shared = [1 if zero_stage < stage else ranks for stage in (1, 2, 3)]
    masters = 4 if bf16 else 0  # fp32 weights are their own masters
    added_up = size if passes == 1 else 4
    return MemoryEstimate(
        weights=num_parameters * size / shared[2] / GIB,
        gradients=num_parameters * added_up / shared[1] / GIB,
        optimizer=num_parameters * (masters + 8 + 4) / shared[0] / GIB,
        activations=row * config.num_layers * (1 if checkpoint else within),
        block=row * (within + wide + 2 * 2 * copies),
        step=num_parameters * (added_up + 4) / shared[0] / GIB if bf16 else 0.0,
    )
