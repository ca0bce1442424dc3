"""Clips for the small decoder that the model itself generates from captions of ShapeWorld.

The latents of generated videos differ from those of encoded ones, so a decoder learns both.

Shapes: N clips, C channels, T latent frames, H W latent grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.settings import chunk_spec
from longvideo.model.conditioning import batch_texts
from longvideo.shapeworld.captions import caption
from longvideo.training.precision import TrainingPrecision, autocast
from longvideo.training.sampling import sample_latents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.shapeworld.world import Scene
    from longvideo.train.decoder.pairs import LatentFootage


class GeneratedFootage:
    """Clips that a model generates from captions, one shot each; all of them begin a video."""

    def __init__(
        self,
        folder: ModelFolder,
        scenes: Sequence[Scene],
        *,
        chunks: int,
        group: int,
        seed: int,
        device: torch.device,
        precision: TrainingPrecision,
    ) -> None:
        self.settings = folder.settings
        scale = folder.vae_config.scale_factor_spatial
        self.spec = chunk_spec(self.settings, scale)
        self.num_frames = chunks * self.settings.chunk_frames
        self.latent_size = (self.settings.height // scale, self.settings.width // scale)
        self.transformer = folder.load_transformer(device=device, dtype=torch.float32).requires_grad_(False)
        self.text_encoder = folder.load_text_encoder(device=device, dtype=torch.float32)
        self.scenes = scenes
        self.chunks = chunks
        self.group = group
        self.seed = seed
        self.precision: TrainingPrecision = precision

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        """Return latents [N, C, T, H, W], normalized, and that each clip begins a video, [N]. content: number."""
        device = self.text_encoder.device
        numbers = range(content * self.group, (content + 1) * self.group)
        prompts = [caption(self.scenes[number % len(self.scenes)], number) for number in numbers]
        cuts = (False,) * self.chunks
        texts = batch_texts([[prompt] * self.chunks for prompt in prompts], cuts, cut_prefix=self.settings.cut_prefix)
        with autocast(self.precision, device):
            features, rows = self.text_encoder.encode(texts.texts)
            chunks = sample_latents(
                self.transformer,
                self.settings,
                self.spec,
                features_PJD=features[rows],
                rows_NB=texts.rows_NB.to(device),
                cuts=cuts,
                seeds=[self.seed + number for number in numbers],
            )
            latents = torch.cat([chunk.float() for chunk in chunks], dim=2)
        return latents, torch.ones(len(prompts), dtype=torch.bool, device=device)


class MixedFootage:
    """Groups of encoded and of generated clips, spread evenly."""

    def __init__(self, encoded: LatentFootage, generated: GeneratedFootage, *, generated_fraction: float) -> None:
        self.encoded, self.generated = encoded, generated
        self.generated_fraction = generated_fraction
        self.num_frames, self.latent_size = encoded.num_frames, encoded.latent_size

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        """Return latents [N, C, T, H, W], normalized, and whether each clip begins a video, [N]. content: number."""
        generated = int((content + 1) * self.generated_fraction) > int(content * self.generated_fraction)
        return (self.generated if generated else self.encoded).draw(content)
