"""A small model whose autoencoder has Wan's 48 channels, so that every format can store it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.model.config import TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD
from tests.checkpoint import small

TRANSFORMER = TransformerConfig(
    num_attention_heads=1,
    attention_head_dim=128,
    in_channels=48,
    out_channels=48,
    text_dim=128,
    text_len=32,
    ffn_dim=64,
    num_layers=2,
    freq_dim=16,
)
VAE = replace(small.VAE, z_dim=48, latents_mean=WAN22_LATENTS_MEAN, latents_std=WAN22_LATENTS_STD)


def transformer(seed: int = 0) -> CausalTransformer:
    torch.manual_seed(seed)
    module = CausalTransformer(TRANSFORMER)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def vae(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(VAE).eval()


def save(folder: Path) -> ModelFolder:
    return ModelFolder.save(
        folder, settings=small.SETTINGS, transformer=transformer(), vae=vae(), text_encoder=small.text_encoder()
    )
