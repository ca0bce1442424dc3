"""Encode some latent frames of a video, and read only the frames that they depend on.

Latent frame 0 stands for frame 0, latent frame j >= 1 for the S frames S(j - 1) + 1 .. Sj, where S = 4 is the temporal
scale. Every layer of the encoder depends on earlier frames only, so latent frames [first, last) need no frame after
theirs, and a bounded number of frames before them, the halo. A process with a part of the latent frames of a long clip
reads and encodes that window alone.
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
"""Number of earlier frames that a temporal convolution depends on; all kernels have length 3."""
CONVOLUTIONS_PER_BLOCK = 2
MIDDLE_BLOCKS = 2


@dataclass(frozen=True)
class EncodeWindow:
    """Frames of a video that are encoded as a video of their own, of which the first frame is the opening frame.

    first_frame: number of the first frame. num_frames: number of frames. drop: number of leading latent frames of the
    result that are left out.
    """

    first_frame: int
    num_frames: int
    drop: int

    @property
    def end_frame(self) -> int:
        """Number of the frame after the last one."""
        return self.first_frame + self.num_frames


def lookback_frames(config: AutoencoderConfig) -> int:
    """Return the number of frames before its last one that a latent frame depends on: 112 for Wan2.2's autoencoder.

    A causal convolution at a rate of one frame in `stride` depends on HISTORY * stride earlier frames; the numbers of
    all layers of the encoder add up.
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
    """Return the halo with which a window is encoded exactly, in latent frames: 28 for Wan2.2's autoencoder."""
    return -(-lookback_frames(config) // config.scale_factor_temporal)


def decode_lookback(config: AutoencoderConfig) -> int:
    """Return the largest number of earlier latent frames that a frame depends on: 38 for Wan2.2's autoencoder.

    A causal convolution at a rate of `rate` frames per latent frame depends on HISTORY / rate earlier latent frames.
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
    """Return the frames to read for the latent frames [first, last) of a video.

    lookback: number of latent frames of the halo. `temporal_lookback` gives exact latents; a shorter halo reads less
        and gives approximate ones.
    Where the halo does not reach the start of the video, one more frame is read before it: the opening frame is a
        latent frame by itself, so it takes the place of the latent frame before the halo, and the other frames stay in
        groups.
    Raises UserError for an empty range and a negative lookback.
    """
    if not 0 <= first < last:
        raise UserError(f"the range of latents is [{first}, {last}); expected 0 <= first < last")
    if lookback < 0:
        raise UserError(f"lookback is {lookback} latents; expected 0 or more")
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
    """Return the normalized mean latents [B, z_dim, last - first, H/16, W/16] of a window, in float32.

    frames_BCTHW: frames of the window in [-1, 1], of any dtype, on any device.
    latents_per_piece: number of latent frames that are encoded at once, which bounds the memory of activations.
    Raises UserError for frames that do not fit the window, and for a window that does not fit the autoencoder.
    """
    scale = autoencoder.config.scale_factor_temporal
    if frames_BCTHW.dim() != 5 or frames_BCTHW.shape[2] != window.num_frames:
        raise UserError(
            f"frames have shape {list(frames_BCTHW.shape)}; expected [batch, 3, {window.num_frames}, height, width],"
            f" the frames [{window.first_frame}, {window.end_frame}) of the video"
        )
    if window.num_frames % scale != 1 or not 0 <= window.drop <= window.num_frames // scale:
        raise UserError(
            f"{window} has no whole latent frames of {scale} frames; make it with encode_window(...,"
            f" temporal_scale={scale})"
        )
    if latents_per_piece < 1:
        raise UserError(f"latents_per_piece is {latents_per_piece}; expected 1 or more")
    weight = autoencoder.quant_conv.weight
    ends = range(1 + scale * (latents_per_piece - 1), window.num_frames, scale * latents_per_piece)
    state, means = None, []
    for piece in frames_BCTHW.tensor_split(list(ends), dim=2):
        moments, state = autoencoder.encode(piece.to(weight.device, weight.dtype), state)
        means.append(moments.float().chunk(2, dim=1)[0])
    return autoencoder.normalize(torch.cat(means, dim=2)[:, :, window.drop :])
