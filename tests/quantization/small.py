"""A small transformer with sizes that are multiples of 16."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longvideo.model.attention import Full
from longvideo.model.layout import TokenLayout
from longvideo.model.transformer import CausalTransformer
from tests.model import small
from tests.model.small import SPEC, features, latents

CONFIG = dataclasses.replace(small.CONFIG, attention_head_dim=16, ffn_dim=48)

__all__ = ["CONFIG", "SPEC", "features", "latents", "model", "trained_velocity", "velocity"]


def model(seed: int = 0) -> CausalTransformer:
    torch.manual_seed(seed)
    return CausalTransformer(CONFIG).eval()


@torch.no_grad()
def velocity(transformer: CausalTransformer) -> Tensor:
    return trained_velocity(transformer)


def trained_velocity(transformer: CausalTransformer) -> Tensor:
    """Return a velocity through which gradients reach the model."""
    layout = TokenLayout.block_causal(SPEC, 1)
    device = transformer.patch_embedding.weight.device
    text = transformer.encode_text(features(1).to(device))
    sigma = torch.full((1, SPEC.chunk_frames), 0.5, device=device)
    rope = transformer.rope(layout.to(device))
    return transformer(latents(1).to(device), sigma, text, rope=rope, attention=Full())
