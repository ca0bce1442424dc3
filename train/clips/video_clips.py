"""Clips that are encoded during training, from a manifest of videos: no copy on disk, but an encoding in every epoch.

A rank reads and encodes its own latent frames and the raw frames that they depend on (`longvideo.vae.halo`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.data.clips import ClipSpec, plan_clips, read_frames
from longvideo.data.manifest import read_manifest
from longvideo.errors import ConfigError
from longvideo.pixels import from_uint8
from longvideo.training.precision import TrainingPrecision, autocast
from longvideo.vae.halo import encode_latents, encode_window, temporal_lookback

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.checkpoint.folder import ModelFolder


KEPT_TEXTS = 512
"""Number of captions that keep their features in host memory; those of UMT5 have 8 MiB for each."""


class VideoClips:
    """The clips of a manifest, as `longvideo.train.clips.views.Clips`. Encoders run on `device`."""

    def __init__(
        self, manifest: Path, folder: ModelFolder, *, chunks: int, device: torch.device, precision: TrainingPrecision
    ) -> None:
        missing = [part for part in ("vae", "text_encoder") if part not in folder.parts]
        if missing:
            raise ConfigError(
                f"{folder.path} has no {' and no '.join(missing)}; training from videos needs both; use a whole model"
                " folder, or encode the videos first"
            )
        settings = folder.settings
        self.size = (settings.height, settings.width)
        self.num_chunks, self.chunk_frames = chunks, settings.chunk_frames
        self.scale = folder.vae_config.scale_factor_temporal
        self.clips = plan_clips(read_manifest(manifest), ClipSpec.of_model(chunks, settings, self.scale))
        self.autoencoder = folder.load_vae(device=device, dtype=torch.float32).requires_grad_(False)
        self.text_encoder = folder.load_text_encoder(device=device).requires_grad_(False)
        self.lookback = temporal_lookback(folder.vae_config)
        self.device = device
        self.precision: TrainingPrecision = precision
        # a thread reads ahead while the main thread may draw samples; this cache serves both
        self._features = lru_cache(KEPT_TEXTS)(self._encode)

    @torch.no_grad()
    def latents(self, index: int, first: int, last: int) -> Tensor:
        """Read and encode latent frames [first, last): float32 [C, t, H, W], on the CPU."""
        window = encode_window(first, last, self.lookback, temporal_scale=self.scale)
        frames_THWC = read_frames(self.clips[index], window.first_frame, window.end_frame, size=self.size)
        video = from_uint8(frames_THWC.to(self.device)).permute(3, 0, 1, 2).unsqueeze(0)
        with autocast(self.precision, self.device):
            return encode_latents(self.autoencoder, video, window)[0].cpu()

    def text(self, caption: str) -> Tensor:
        """Return features [J, D] of a caption, float32, on the CPU; those of the latest captions are kept."""
        return self._features(caption)

    @torch.no_grad()
    def _encode(self, caption: str) -> Tensor:
        features, rows = self.text_encoder.encode([caption])
        return features[rows[0]].float().cpu()
