"""Estimate the memory of each GPU in a distillation from shapes and settings, before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.checkpoint.adapters import layer_sizes
from longvideo.checkpoint.modules import OnMeta
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import PACKED_CACHES
from longvideo.training.memory import (
    BlockMemory,
    EngineMemory,
    MemoryEstimate,
    head_bytes,
    row_bytes,
    text_bytes,
)

if TYPE_CHECKING:
    from longvideo.distill.roles import LoraSettings
    from longvideo.model.cache import CachePrecision
    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec

PACKED_BYTES = 1 / 2 + 1 / GROUP
"""Bytes of a number in NVFP4: its code and its part of a group's scale."""


def adapter_parameters(config: TransformerConfig, lora: LoraSettings) -> int:
    """Count the parameters of one adapter."""
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(config))
    return lora.rank * sum(sum(sizes[name]) for name in lora.layers(sizes))


def block_parameters(config: TransformerConfig) -> int:
    """Count the parameters of all blocks."""
    with OnMeta():
        return sum(parameter.numel() for parameter in CausalTransformer(config).blocks.parameters())


def estimate_memory(
    config: TransformerConfig,
    spec: ChunkSpec,
    engines: EngineMemory,
    blocks: BlockMemory,
    *,
    frozen: float,
    kv_cache: CachePrecision,
    clips: int,
    chunks: int,
) -> MemoryEstimate:
    """Estimate the peak memory of a step on one rank: one chunk with a gradient, and the cache of a clip.

    engines: memory of the engines of everything that is trained. frozen: bytes of the weights that are not. kv_cache:
    number format of the cache. clips: number of clips of one pass. chunks: number of chunks of a clip.
    """
    tokens = clips * spec.tokens_per_chunk
    row = row_bytes(config, tokens, blocks.size)
    slots = min(spec.window_chunks, chunks)
    prompts = clips + 1  # one of them is the negative prompt
    contexts = 2 * config.num_layers * prompts * config.text_len * config.dim * blocks.size
    value = PACKED_BYTES if kv_cache in PACKED_CACHES else blocks.size
    exact_chunks = spec.exact_chunks if kv_cache == "nvfp4-mixed" else 0
    return MemoryEstimate(
        engine=engines,
        frozen=frozen,
        text=contexts + text_bytes(config, prompts=clips, uses=clips, size=blocks.size),
        activations=row * config.num_layers * blocks.kept(config) + head_bytes(config, tokens, blocks.size),
        block=row * (blocks.running(config) + 2 * slots),
        cache=2 * config.num_layers * tokens * config.dim * (spec.window_chunks * value + exact_chunks * blocks.size),
    )


def backbone_bytes(config: TransformerConfig, size: int, *, packed: bool) -> float:
    """Return the bytes of a frozen transformer. size: of a number. packed: whether its blocks have 4-bit weights."""
    with OnMeta():
        model = CausalTransformer(config)
    in_blocks = sum(outputs * inputs for outputs, inputs in layer_sizes(model).values())
    others = sum(parameter.numel() for parameter in model.parameters()) - in_blocks
    return others * size + in_blocks * (PACKED_BYTES if packed else size)
