"""A small random model folder, which is written and read quickly."""

from __future__ import annotations

from pathlib import Path

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.model.config import TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.text.encoder import TextEncoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=128,
    text_len=32,
    ffn_dim=32,
    num_layers=2,
    freq_dim=16,
)
VAE = AutoencoderConfig(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=4,
    dim_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(False, True, True),
    latents_mean=(0.1, 0.2, 0.3, 0.4),
    latents_std=(1.0, 2.0, 3.0, 4.0),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)
SETTINGS = ModelSettings(
    window_frames=24, sink_frames=0, height=64, width=96, text_len=32, steps=8, guidance=1.0, shift=3.0
)
WORDS = ("a", "red", "blue", "ball", "moves", "left")


def transformer(seed: int = 0) -> CausalTransformer:
    torch.manual_seed(seed)
    module = CausalTransformer(TRANSFORMER)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def vae(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(VAE).eval()


def text_encoder() -> TextEncoder:
    return TextEncoder.build_tiny(WORDS, text_len=SETTINGS.text_len).eval()


def save(folder: Path, settings: ModelSettings = SETTINGS) -> ModelFolder:
    return ModelFolder.save(
        folder, settings=settings, transformer=transformer(), vae=vae(), text_encoder=text_encoder()
    )
