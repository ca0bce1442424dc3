"""A small random transformer and inputs for property tests."""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    text_len=6,
    ffn_dim=32,
    num_layers=3,
    freq_dim=16,
)
SPEC = ChunkSpec(grid_height=2, grid_width=3, chunk_frames=2, window_frames=8, sink_frames=2, pin_shots=False)


def model(seed: int = 0) -> CausalTransformer:
    torch.manual_seed(seed)
    transformer = CausalTransformer(CONFIG)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return transformer.eval()


def latents(num_chunks: int, *, spec: ChunkSpec = SPEC, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, CONFIG.in_channels, num_chunks * spec.chunk_frames, spec.grid_height * 2, spec.grid_width * 2)
    return torch.randn(shape, generator=generator)


def features(num_prompts: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_prompts, CONFIG.text_len, CONFIG.text_dim, generator=generator)
