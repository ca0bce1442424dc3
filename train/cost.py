"""Cost of a teacher-forcing step: its arithmetic and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from longvideo.model.cache import visible_chunks
from longvideo.quantization.selection import linear_layers
from longvideo.training.memory import (
    BlockMemory,
    EngineMemory,
    MemoryEstimate,
    head_bytes,
    row_bytes,
    text_bytes,
)

if TYPE_CHECKING:
    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer

BACKWARD = 3
"""Arithmetic of a forward and a backward pass, in multiples of a forward pass."""


def clip_flops(config: TransformerConfig, spec: ChunkSpec, chunks: int, visible: Tensor | None = None) -> float:
    """Return the operations of training on one clip: forward and backward, nothing computed twice or masked away.

    visible: bool [chunks, chunks], the chunks that a chunk sees, itself included; by default all earlier ones. Both
    copies of every chunk count. A multiplication and an addition are two operations.
    """
    if visible is None:
        visible = torch.ones(chunks, chunks, dtype=torch.bool).tril()
    dim, tokens = config.dim, spec.tokens_per_chunk
    per_token = 2 * (6 * dim * dim + 2 * dim * config.ffn_dim)  # q k v o, cross q o, feed-forward
    text = 2 * 2 * dim * dim * config.text_len  # cross k v of a prompt, computed once for each chunk
    cross = 4 * dim * config.text_len  # attention of a token to its prompt
    attention = 4 * dim * tokens * tokens * 2 * int(visible.sum())  # clean and noisy rows see the same chunks
    block = 2 * chunks * tokens * (per_token + cross) + chunks * text + attention
    patch = config.patch_size[1] * config.patch_size[2] * (config.in_channels + config.out_channels)
    return BACKWARD * (config.num_layers * block + 2 * 2 * chunks * tokens * dim * patch)


def seen_chunks(spec: ChunkSpec, chunks: int, context: Literal["all", "window"]) -> Tensor | None:
    """Return the chunks that a chunk sees in training, bool [chunks, chunks]; None for all earlier ones."""
    return visible_chunks(spec, [False] * chunks) if context == "window" else None


def linear_multiply_adds(model: CausalTransformer, spec: ChunkSpec) -> dict[str, int]:
    """Return the multiply-adds of each linear layer of the blocks for one chunk, in a forward pass of training.

    Each of the two products of a backward pass has as many. Layers see both copies of a chunk, cross-attention's k and
    v see its prompt.
    """
    work: dict[str, int] = {}
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        is_of_prompt = name.endswith((".cross_attn.k", ".cross_attn.v"))
        rows = model.config.text_len if is_of_prompt else 2 * spec.tokens_per_chunk
        work[name] = rows * layer.in_features * layer.out_features
    return work


def estimate_memory(
    config: TransformerConfig,
    spec: ChunkSpec,
    engine: EngineMemory,
    blocks: BlockMemory,
    *,
    chunks: int,
    clips: int,
    sequence: int,
    autocast: bool,
) -> MemoryEstimate:
    """Estimate the peak memory of a teacher-forcing step on one rank.

    chunks: number of chunks of the longest clip. clips: number of clips of one pass. sequence: number of ranks that
    share a clip. autocast: whether fp32 weights are cast when they are used; the casts of weights that no block
    recomputes are kept.
    """
    runs = clips * (2 * chunks - 1 if sequence == 1 else 2 * chunks / sequence)
    tokens = runs * spec.tokens_per_chunk
    row = row_bytes(config, tokens, blocks.size)
    cast = 2 * 2 * config.num_layers * config.dim**2 if autocast and not blocks.nvfp4 else 0
    return MemoryEstimate(
        engine=engine,
        frozen=0.0,
        text=text_bytes(config, prompts=clips * chunks / sequence, uses=runs, size=blocks.size) + cast,
        activations=row * config.num_layers * blocks.kept(config) + head_bytes(config, tokens, blocks.size),
        block=row * blocks.running(config),
    )


def copied_rows(chunks: int, sequence: int) -> float:
    """Return the rows of keys and values that block-wise attention copies, for all runs of tokens together."""
    clean = chunks - 1 if sequence == 1 else chunks
    seen = sum(range(1, chunks + 1)) + sum(range(1, clean + 1))  # every run sees earlier clean ones and itself
    return 2 * seen / (chunks + clean)
