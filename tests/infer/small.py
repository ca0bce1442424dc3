"""A model folder with random weights, so small that a chunk takes milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.model.config import TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.text.encoder import TextEncoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

HEIGHT, WIDTH = 32, 64
WORDS = "a red blue ball square bounces spins at night on grass".split()


def save(folder: Path, *, latent_channels: int = 8, has_vae: bool = True) -> None:
    """Write the folder. has_vae: whether it has an autoencoder."""
    torch.manual_seed(0)
    transformer = CausalTransformer(
        TransformerConfig(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=latent_channels,
            out_channels=latent_channels,
            text_dim=128,
            ffn_dim=48,
            num_layers=2,
            text_len=32,
        )
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.2)
    autoencoder = Autoencoder(
        dataclasses.replace(
            AutoencoderConfig.tiny(),
            base_dim=8,
            decoder_base_dim=8,
            z_dim=latent_channels,
            latents_mean=(0.1,) * latent_channels,
            latents_std=(0.7,) * latent_channels,
        )
    )
    settings = ModelSettings(
        window_frames=24,
        sink_frames=0,
        pin_shots=False,
        height=HEIGHT,
        width=WIDTH,
        text_len=32,
        steps=2,
        guidance=1.0,
    )
    ModelFolder.save(
        folder,
        settings=settings,
        transformer=transformer,
        vae=autoencoder if has_vae else None,
        text_encoder=TextEncoder.build_tiny(WORDS, text_len=32),
    )
