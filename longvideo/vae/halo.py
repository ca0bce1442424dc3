"""Encode some latent frames of a video, reading only the pixel frames that they depend on.

Latent 0 holds pixel frame 0, latent j >= 1 the S frames S(j - 1) + 1 .. Sj, where S = 4 is the temporal scale. Every
layer of the encoder looks back only, so latents [first, last) need no frame behind theirs, and a bounded halo of frames
before them. A process that owns a part of a long clip's latents reads and encodes that window alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from longvideo.vae.autoencoder import Autoencoder

HISTORY = 2
"""Frames that a temporal convolution sees before the newest: all kernels have length 3."""
CONVOLUTIONS_PER_BLOCK = 2
MIDDLE_BLOCKS = 2


@dataclass(frozen=True)
class EncodeWindow:
    """The pixel frames [first_frame, first_frame + num_frames) of a video, and how to encode them as one of their own.

    Their first frame opens that video, whether it opens the real one or not; their first `drop` latents are left out.
    """

    first_frame: int
    num_frames: int
    drop: int

    @property
    def end_frame(self) -> int:
        """The pixel frame behind the last one."""
        return self.first_frame + self.num_frames


def lookback_frames(config: AutoencoderConfig) -> int:
    """Return how many pixel frames before its own last one a latent depends on: 112 for Wan2.2's autoencoder.

    A causal convolution at a rate of one frame in `stride` looks back HISTORY * stride pixel frames; along the path of
    the encoder these add up.
    """
    block = CONVOLUTIONS_PER_BLOCK * HISTORY
    frames, stride = HISTORY, 1
    for halves_time in (*config.temperal_downsample, False):
        frames += config.num_res_blocks * block * stride
        if halves_time:
            frames += HISTORY * stride
            stride *= 2
    return frames + (MIDDLE_BLOCKS * block + HISTORY) * stride


def temporal_lookback(config: AutoencoderConfig) -> int:
    """Return the halo, in latents, with which a window equals the whole video: 28 for Wan2.2's autoencoder."""
    return -(-lookback_frames(config) // config.scale_factor_temporal)


def decode_lookback(config: AutoencoderConfig) -> int:
    """Return how many latents before its own a decoded frame depends on at most: 38 for Wan2.2's autoencoder.

    In units of latents, a causal convolution at a rate of `rate` frames a latent looks back HISTORY / rate.
    """
    block = CONVOLUTIONS_PER_BLOCK * HISTORY
    latents, rate = Fraction(HISTORY + MIDDLE_BLOCKS * block), 1
    for doubles_time in (*config.temperal_downsample[::-1], False):
        latents += Fraction((config.num_res_blocks + 1) * block, rate)
        if doubles_time:
            latents += Fraction(HISTORY, rate)
            rate *= 2
    return math.ceil(latents + Fraction(HISTORY, rate))


def encode_window(
    first: int, last: int, lookback: int, *, temporal_scale: int = AutoencoderConfig.scale_factor_temporal
) -> EncodeWindow:
    """Return what to read for the latents [first, last) of a video, with a halo of `lookback` latents before them.

    Where the halo does not reach the start of the video, one more pixel frame is read before it: an opening frame is a
    latent by itself, so it stands in for the latent before the halo and the frames of the others stay together.
    `temporal_lookback` gives the halo for exact latents; a shorter one reads less and gives them nearly.
    """
    if not 0 <= first < last:
        raise UserError(f"latents [{first}, {last}) are no range of a video, wanted 0 <= first < last")
    if lookback < 0:
        raise UserError(f"lookback={lookback} latents, wanted 0 or more")
    halo_start = max(0, first - lookback)
    num_openings = int(halo_start > 0)
    first_frame = temporal_scale * (halo_start - num_openings)
    return EncodeWindow(
        first_frame=first_frame,
        num_frames=temporal_scale * (last - 1) + 1 - first_frame,
        drop=first - halo_start + num_openings,
    )


@torch.no_grad()
def encode_latents(
    autoencoder: Autoencoder, frames_BCTHW: Tensor, window: EncodeWindow, *, latents_per_piece: int = 4
) -> Tensor:
    """Return the normalised mean latents [B, z_dim, last - first, H/16, W/16] of a window, in float32.

    frames_BCTHW: the window's frames in [-1, 1], of any dtype, on any device. They go to the autoencoder in pieces of
    `latents_per_piece` latents, so activations take the memory of one piece however long the window is.
    """
    scale = autoencoder.config.scale_factor_temporal
    if frames_BCTHW.dim() != 5 or frames_BCTHW.shape[2] != window.num_frames:
        raise UserError(
            f"frames have shape {list(frames_BCTHW.shape)}, wanted [batch, 3, {window.num_frames}, height, width]: the"
            f" frames [{window.first_frame}, {window.end_frame}) of the video"
        )
    if window.num_frames % scale != 1 or not 0 <= window.drop <= window.num_frames // scale:
        raise UserError(
            f"{window} holds no whole latents at {scale} frames a latent; make it with encode_window(...,"
            f" temporal_scale={scale})"
        )
    if latents_per_piece < 1:
        raise UserError(f"latents_per_piece={latents_per_piece}, wanted 1 or more")
    weight = autoencoder.quant_conv.weight
    ends = range(1 + scale * (latents_per_piece - 1), window.num_frames, scale * latents_per_piece)
    state, means = None, []
    for piece in frames_BCTHW.tensor_split(list(ends), dim=2):
        moments, state = autoencoder.encode(piece.to(weight.device, weight.dtype), state)
        means.append(moments.float().chunk(2, dim=1)[0])
    return autoencoder.normalize(torch.cat(means, dim=2)[:, :, window.drop :])
