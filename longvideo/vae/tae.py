"""Tiny autoencoder of Wan2.2 latents: images convolved one by one, with memory of one frame; the form of TAEHV.

Such a decoder is an approximation of the decoder of `Autoencoder`, at a small part of its products. Only the memory
blocks connect frames: each also sees the frame before at its own input, so that frames are folded into the batch of
2-D convolutions, and a call takes any number of them. A State has the last input frame of every memory block; None
starts a video. Several calls give the result of one.

Two forms of decoder exist. `base` has 3x3 convolutions and nearest upsampling; `super` has 7x7 depthwise and 1x1
convolutions and pixel shuffle. Activations are stored as NHWC (torch.channels_last).

Shapes: B batch, C channels, T frames, H W grid, N = B x T frames folded into the batch, z latent channels.
Source: github.com/madebyollin/taehv defines the graph, the names of its weights, and the range [0, 1] of its pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from longvideo.config.bounds import check_numbers, check_whole
from longvideo.errors import ConfigError, UserError
from longvideo.vae.config import MAX_STATISTIC
from longvideo.vae.layers import Memory, State
from longvideo.vae.tae_layers import (
    BLOCKS_PER_STAGE,
    NearestUpStage,
    PoolStage,
    ShuffleUpStage,
    TanhBound,
    fold_frames,
    shuffle_pixels,
    unshuffle_pixels,
)

TinyForm: TypeAlias = Literal["base", "super"]
COLORS = 3
DECODER_STRIDES = (1, 2, 2)
"""Factor by which each stage of the decoder raises the frame rate."""
ENCODER_STRIDES = (2, 2, 1)
"""Factor by which each stage of the encoder lowers the frame rate."""
LATENT_BOUND = 3
"""The base decoder bounds latents to this range through tanh."""
MOST_CHANNELS, MOST_PATCH = 4096, 16


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Configuration of a tiny autoencoder of Wan2.2 latents: 16 x 16 x 4 compression with patches of 2 x 2 pixels.

    z_dim: number of latent channels. decoder_widths: channels at the input of each of the three stages, and at the
    output of the last. encoder_width: channels of the encoder.
    latents_mean, latents_std: statistics for networks that were trained on latents in the scale of Wan's autoencoder;
    empty for networks of normalized latents. `TinyDecoder.decode` takes and `TinyEncoder.encode` returns normalized
    latents either way.
    Raises ConfigError for values that fit no such autoencoder.
    """

    form: TinyForm
    z_dim: int
    decoder_widths: tuple[int, int, int, int]
    encoder_width: int = 64
    patch_size: int = 2
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in ("base", "super"):
            raise ConfigError(f"form is {self.form!r}; expected base or super")
        for name in ("z_dim", "encoder_width"):
            check_whole(name, getattr(self, name), 1, MOST_CHANNELS)
        check_whole("patch_size", self.patch_size, 1, MOST_PATCH)
        num_widths = len(DECODER_STRIDES) + 1
        if not isinstance(self.decoder_widths, tuple) or len(self.decoder_widths) != num_widths:
            raise ConfigError(f"decoder_widths is {self.decoder_widths!r}; expected {num_widths} numbers of channels")
        for width in self.decoder_widths:
            check_whole("decoder_widths", width, 1, MOST_CHANNELS)
        if self.latents_mean or self.latents_std:
            check_numbers("latents_mean", self.latents_mean, self.z_dim, -MAX_STATISTIC, MAX_STATISTIC)
            check_numbers("latents_std", self.latents_std, self.z_dim, 1 / MAX_STATISTIC, MAX_STATISTIC)

    @property
    def takes_normalized(self) -> bool:
        """Whether the networks themselves compute with normalized latents."""
        return not self.latents_mean

    @property
    def scale_factor_temporal(self) -> int:
        """Number of frames for each latent frame after the first."""
        return 4

    @property
    def scale_factor_spatial(self) -> int:
        """Number of pixels along the side of a latent pixel."""
        return self.patch_size * 2 ** len(DECODER_STRIDES)


class TinyDecoder(nn.Module):
    """Decode normalized latents to video. Build it on the meta device and load it with `assign=True`, or on a device.

    A first call returns 1 + 4k frames for 1 + k latent frames, a later call 4k for k.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, pixels = config.decoder_widths, COLORS * config.patch_size**2
        self.stages = nn.ModuleList()
        conv_out = nn.Conv2d(widths[-1], pixels, 3, padding=1)
        if config.form == "base":
            conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
            self.stem = nn.Sequential(TanhBound(LATENT_BOUND), conv_in, nn.ReLU(inplace=True))
            self.head = nn.Sequential(nn.ReLU(inplace=True), conv_out)
        else:
            self.stem = nn.Sequential(nn.Conv2d(config.z_dim, widths[0], 1, bias=False))
            self.head = nn.Sequential(conv_out)
        stage = NearestUpStage if config.form == "base" else ShuffleUpStage
        for index, stride in enumerate(DECODER_STRIDES):
            self.stages.append(stage(widths[index], widths[index + 1], stride))
        _add_statistics(self, config, conv_out.weight.device)

    @property
    def lookback(self) -> int:
        """Largest number of earlier latent frames that a frame depends on."""
        latents, rate = 0.0, 1
        for stride in DECODER_STRIDES:
            latents += BLOCKS_PER_STAGE / rate
            rate *= stride
        return math.ceil(latents)

    def blank_state(self, batch: int, height: int, width: int) -> State:
        """Return the frames of zeros before a video. height, width: size of the latents."""
        weight = next(self.parameters())
        return tuple(
            weight.new_zeros(batch, channels, 1, height * 2**index, width * 2**index)
            for index, channels in enumerate(self.config.decoder_widths[:-1])
            for _ in range(BLOCKS_PER_STAGE)
        )

    def decode(self, latents_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return video, about [-1, 1] and not clamped, of normalized latents; its memory layout is BTHWC.

        Raises UserError for no latents and for a wrong state.
        """
        batch, _, num_frames, height, width = _shape(latents_BCTHW, "latents", self.config.z_dim)
        if num_frames == 0:
            raise UserError("latents have 0 frames; expected 1 or more")
        num_kept = len(DECODER_STRIDES) * BLOCKS_PER_STAGE
        _check_memory(state, num_kept, (batch, self.config.decoder_widths[0], 1, height, width), latents_BCTHW)
        memory = Memory(state)
        if not self.config.takes_normalized:
            latents_BCTHW = (latents_BCTHW * _per_channel(self.latents_std) + _per_channel(self.latents_mean)).to(
                latents_BCTHW.dtype
            )
        x_NCHW = self.stem(fold_frames(latents_BCTHW))
        for stage in self.stages:
            x_NCHW = stage(x_NCHW, batch, memory)
        x_NCHW = shuffle_pixels(self.head(x_NCHW), self.config.patch_size)
        video_BCTHW = x_NCHW.unflatten(0, (batch, -1)).transpose(1, 2)
        if state is None:
            # the first latent frame gives four frames, of which the last is the first of the video
            video_BCTHW = video_BCTHW[:, :, self.config.scale_factor_temporal - 1 :]
        return 2 * video_BCTHW - 1, memory.state()


class TinyEncoder(nn.Module):
    """Encode video to normalized latents.

    Each latent frame is that of four frames, the first one included, so `encode` keeps up to three frames for the next
    call, and `finish` repeats the last frame of the video until four are complete. Build it as a `TinyDecoder`.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        conv_in = nn.Conv2d(COLORS * config.patch_size**2, width, 3, padding=1)
        self.stem = nn.Sequential(conv_in, nn.ReLU(inplace=True))
        self.stages = nn.ModuleList(PoolStage(width, stride) for stride in ENCODER_STRIDES)
        self.head = nn.Conv2d(width, config.z_dim, 3, padding=1)
        _add_statistics(self, config, conv_in.weight.device)

    def encode_video(self, video_BCTHW: Tensor) -> Tensor:
        """Return the 1 + k normalized latent frames of a whole video of 1 + 4k frames in [-1, 1].

        Raises UserError for other numbers of frames, and for sizes that are not multiples of 16.
        """
        step = self.config.scale_factor_temporal
        if _shape(video_BCTHW, "video", COLORS)[2] % step != 1:
            raise UserError(f"video has {video_BCTHW.shape[2]} frames; expected 1 + {step}k")
        latents_BzTHW, state = self.encode(video_BCTHW)
        return torch.cat([latents_BzTHW, self.finish(state)], dim=2)

    def encode(self, video_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the normalized latents, possibly none, of the next frames in [-1, 1] that complete groups of four.

        Raises UserError for sizes that are not multiples of 16, and for a wrong state.
        """
        batch, _, _, height, width = _shape(video_BCTHW, "video", COLORS)
        scale = self.config.scale_factor_spatial
        if height % scale or width % scale or height * width == 0:
            raise UserError(
                f"video is {height} x {width} pixels; expected multiples of {scale}; crop or resize the frames"
            )
        past: State | None = None
        if state is not None:
            past = self._past(state)
            num_pending = state[0].shape[2]
            _check_memory(state[:1], 1, (batch, COLORS, num_pending, height, width), video_BCTHW)
            video_BCTHW = torch.cat([state[0].to(video_BCTHW.dtype), video_BCTHW], dim=2)
        num_pending = video_BCTHW.shape[2] % self.config.scale_factor_temporal
        whole, pending = video_BCTHW.split([video_BCTHW.shape[2] - num_pending, num_pending], dim=2)
        pending = pending.detach().clone()
        if whole.shape[2] == 0:
            latents = video_BCTHW.new_empty(batch, self.config.z_dim, 0, height // scale, width // scale)
            return latents, (pending, *(past or ()))
        latents, past = self._encode_groups(whole, past)
        return latents, (pending, *past)

    def finish(self, state: State) -> Tensor:
        """Return the normalized latent of the frames that `encode` kept, none if it kept none."""
        pending, past = state[0], self._past(state)
        missing = -pending.shape[2] % self.config.scale_factor_temporal
        if pending.shape[2] == 0:
            return self.encode(pending, state)[0]
        return self._encode_groups(torch.cat([pending, pending[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2), past)[0]

    def _encode_groups(self, video_BCTHW: Tensor, past: State | None) -> tuple[Tensor, State]:
        memory = Memory(past)
        batch = video_BCTHW.shape[0]
        x_NCHW = self.stem(unshuffle_pixels(fold_frames((video_BCTHW + 1) / 2), self.config.patch_size))
        for stage in self.stages:
            x_NCHW = stage(x_NCHW, batch, memory)
        latents_BzTHW = self.head(x_NCHW).unflatten(0, (batch, -1)).transpose(1, 2)
        if not self.config.takes_normalized:
            latents_BzTHW = ((latents_BzTHW - _per_channel(self.latents_mean)) / _per_channel(self.latents_std)).to(
                latents_BzTHW.dtype
            )
        return latents_BzTHW, memory.state()

    @staticmethod
    def _past(state: State) -> State | None:
        """Return the frames of the memory blocks, None if no group of four frames has been encoded."""
        num_kept = len(ENCODER_STRIDES) * BLOCKS_PER_STAGE
        if len(state) not in (1, 1 + num_kept):
            raise UserError(
                f"state holds {len(state)} tensors; expected 1 or {1 + num_kept}; pass the state that the previous call"
                " of the same encoder returned"
            )
        return state[1:] or None


def _add_statistics(module: nn.Module, config: TinyAutoencoderConfig, device: torch.device) -> None:
    """Add the buffers latents_mean and latents_std, which no weight file has, so they are never on the meta device."""
    for name in ("latents_mean", "latents_std"):
        values = torch.tensor(
            getattr(config, name), dtype=torch.float32, device="cpu" if device.type == "meta" else device
        )
        module.register_buffer(name, values, persistent=False)


def _per_channel(values_z: Tensor) -> Tensor:
    return values_z.view(-1, 1, 1, 1)


def _shape(x: Tensor, name: str, channels: int) -> tuple[int, int, int, int, int]:
    if x.dim() != 5 or x.shape[1] != channels:
        raise UserError(f"{name} has shape {list(x.shape)}; expected [batch, {channels}, frames, height, width]")
    batch, _, num_frames, height, width = x.shape
    return batch, channels, num_frames, height, width


def _check_memory(state: State | None, length: int, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise UserError unless a state has `length` tensors, the first of a shape, on the device of the frames."""
    if state is None:
        return
    if len(state) != length:
        raise UserError(
            f"state holds {len(state)} tensors; expected {length}; pass the state that the previous call of the same"
            " network returned"
        )
    if state[0].shape != shape:
        raise UserError(
            f"state has batch, channels, frames, height, width {list(state[0].shape)}; expected {list(shape)}; all"
            " calls of a stream have one size"
        )
    if state[0].device != x.device:
        raise UserError(f"state is on {state[0].device}; expected {x.device} like the frames; move it there")
