"""Small ShapeWorld parts, and settings that make the packaged configurations run in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longvideo.shapeworld.world import recolor, sample_scenes
from longvideo.train.shapeworld.scenes import ScenePool
from longvideo.train.vae.recipe import AutoencoderShape, build_autoencoder
from longvideo.vae.autoencoder import Autoencoder

CPU = torch.device("cpu")


def small_pool(count: int = 12, *, height: int = 32, width: int = 64, recolored: bool = False) -> ScenePool:
    scenes = sample_scenes(count, seed=0, split="train", pair_fraction=0.5)
    others = [recolor(scene) for scene in scenes] if recolored else []
    return ScenePool(scenes, height=height, width=width, device=CPU, recolored=others)


def small_autoencoder() -> Autoencoder:
    shape = AutoencoderShape(base_dim=8, decoder_base_dim=8, z_dim=4)
    return build_autoencoder(shape.build(), seed=0, device=CPU)


@dataclass(frozen=True)
class Toy:
    """Overrides that make the packaged configurations run in seconds."""

    vae: tuple[str, ...] = (
        "stages=[{frames: 5, height: 32, width: 32, batch: 2, steps: 4}]",
        "model.base_dim=8",
        "model.decoder_base_dim=8",
        "model.z_dim=4",
        "scenes.count=12",
        "scenes.height=32",
        "scenes.width=64",
        "validation.clips=2",
        "validation.shown=1",
        "validation.batch=2",
        "validation.statistics_clips=2",
        "trainer.precision=fp32",
        "trainer.log_every=2",
        "trainer.sample_every=0",
    )
    ar: tuple[str, ...] = (
        "stages=[{steps: 2, chunks: 1, batch: 3}, {steps: 2, chunks: 3, batch: 2}]",
        "model.num_attention_heads=2",
        "model.attention_head_dim=12",
        "model.ffn_dim=32",
        "model.num_layers=2",
        "model.text_len=48",
        "scenes.count=12",
        "scenes.height=32",
        "scenes.width=64",
        "settings.height=32",
        "settings.width=64",
        "settings.steps=2",
        "bank.clips=8",
        "bank.chunks=4",
        "bank.late_fraction=0.4",
        "bank.initial_clips=4",
        "bank.group=2",
        "bank.refresh_every=2",
        "rollout.prompts=2",
        "rollout.shown=1",
        "rollout.chunks=2",
        "trainer.precision=fp32",
        "trainer.log_every=2",
        "trainer.sample_every=0",
    )
    decoder: tuple[str, ...] = (
        "stages=[{steps: 4, batch: 2, frames: 2}]",
        "widths=[8,6,4,4]",
        "export_dtype=fp32",
        "scenes.count=12",
        "scenes.height=32",
        "scenes.width=64",
        "bank.clips=4",
        "bank.initial_clips=2",
        "bank.group=2",
        "bank.refresh_every=2",
        "bank.chunks=1",
        "windows.warmup=2",
        "validation.clips=3",
        "validation.shown=1",
        "trainer.precision=fp32",
        "trainer.log_every=2",
        "trainer.sample_every=0",
    )
