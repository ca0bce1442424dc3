"""Causal video autoencoder of the Wan2.2 form; parameters are named as in diffusers' AutoencoderKLWan.

A call takes any number of frames and the State that the call before gave; None starts a video. A video cut into calls
gives what one call gives, because every causal convolution remembers the last frames it saw and nothing else looks
across frames. States are never changed: keep one per stream, or go on from the same one twice.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvideo.errors import UserError
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.layers import (
    CausalConv3d,
    ChannelRMSNorm,
    DownBlock,
    Memory,
    MidBlock,
    State,
    UpBlock,
    num_remembering,
)


class Autoencoder(nn.Module):
    """Turn video into latents and back.

    Frames and latents come as first 1 + 4k pixel frames with 1 + k latent frames, later 4k with k. Build on the meta
    device and load with `assign=True`, or on the target device; `to_empty` would lose the latent statistics.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        device = self.post_quant_conv.weight.device
        for name in ("latents_mean", "latents_std"):
            # no weight file has them, so they must not be on the meta device
            values = torch.tensor(
                getattr(config, name), dtype=torch.float32, device="cpu" if device.type == "meta" else device
            )
            values = values.view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, video_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the moments [B, 2 z_dim, T', H/16, W/16], mean before log variance, of video in [-1, 1]."""
        self._check_video(video_BCTHW, state)
        memory = Memory(state)
        h_BCTHW = self.encoder(patchify(video_BCTHW, self.config.patch_size), memory)
        return self.quant_conv(h_BCTHW), memory.state()

    def decode(self, latents_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return video around [-1, 1], not clamped, of latents in the encoder's own scale (see `denormalize`)."""
        self._check_latents(latents_BCTHW, state)
        memory = Memory(state)
        latents_BCTHW = latents_BCTHW.contiguous(memory_format=torch.channels_last_3d)
        h_BCTHW = self.decoder(self.post_quant_conv(latents_BCTHW), memory)
        return unpatchify(h_BCTHW, self.config.patch_size), memory.state()

    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Bring latents to zero mean and unit deviation in every channel."""
        return (latents_BCTHW - self.latents_mean) / self.latents_std

    def denormalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Undo `normalize`."""
        return latents_BCTHW * self.latents_std + self.latents_mean

    def _check_video(self, video_BCTHW: Tensor, state: State | None) -> None:
        config = self.config
        _check_frames(video_BCTHW, "video", config.in_channels // config.patch_size**2)
        num_frames, (height, width) = video_BCTHW.shape[2], video_BCTHW.shape[3:]
        step = config.scale_factor_temporal
        if num_frames % step != (1 if state is None else 0) or num_frames == 0:
            wanted = f"1 + {step}k frames in a first call" if state is None else f"{step}k frames in a later call"
            raise UserError(f"video has {num_frames} frames, wanted {wanted}")
        if height % config.scale_factor_spatial or width % config.scale_factor_spatial or height * width == 0:
            raise UserError(
                f"video is {height} x {width} pixels, wanted multiples of {config.scale_factor_spatial}: crop or resize"
            )
        patch = config.patch_size
        _check_state(state, self.encoder, (config.in_channels, height // patch, width // patch), video_BCTHW)

    def _check_latents(self, latents_BCTHW: Tensor, state: State | None) -> None:
        _check_frames(latents_BCTHW, "latents", self.config.z_dim)
        if latents_BCTHW.shape[2] == 0:
            raise UserError("latents have 0 frames, wanted 1 or more")
        _check_state(state, self.decoder, (self.config.z_dim, *latents_BCTHW.shape[3:]), latents_BCTHW)


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, channels[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[i], channels[i + 1], config.num_res_blocks, halves_time)
            for i, halves_time in enumerate((*config.temperal_downsample, None))
        )
        self.mid_block = MidBlock(channels[-1])
        self.norm_out = ChannelRMSNorm(channels[-1], num_axes=3)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = self.conv_in(x_BCTHW, memory)
        for block in self.down_blocks:
            x_BCTHW = block(x_BCTHW, memory)
        x_BCTHW = self.mid_block(x_BCTHW, memory)
        return self.conv_out(F.silu(self.norm_out(x_BCTHW)), memory)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        factors = config.dim_mult[::-1]
        channels = [config.decoder_base_dim * factor for factor in (factors[0], *factors)]
        self.conv_in = CausalConv3d(config.z_dim, channels[0], (3, 3, 3))
        self.mid_block = MidBlock(channels[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(channels[i], channels[i + 1], config.num_res_blocks, doubles_time)
            for i, doubles_time in enumerate((*config.temperal_downsample[::-1], None))
        )
        self.norm_out = ChannelRMSNorm(channels[-1], num_axes=3)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = self.mid_block(self.conv_in(x_BCTHW, memory), memory)
        for block in self.up_blocks:
            x_BCTHW = block(x_BCTHW, memory)
        return self.conv_out(F.silu(self.norm_out(x_BCTHW)), memory)


def patchify(video_BCTHW: Tensor, patch: int) -> Tensor:
    """Move each patch x patch square of pixels into channels: colour, then column, then row. Gives BTHWC memory."""
    x = video_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4).permute(0, 4, 1, 2, 3)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Undo `patchify`."""
    x = x_BCTHW.unflatten(1, (-1, patch, patch))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _check_frames(x: Tensor, name: str, channels: int) -> None:
    if x.dim() != 5 or x.shape[1] != channels:
        raise UserError(f"{name} has shape {list(x.shape)}, wanted [batch, {channels}, frames, height, width]")


def _check_state(state: State | None, coder: nn.Module, grid: tuple[int, ...], x: Tensor) -> None:
    if state is None:
        return
    if len(state) != num_remembering(coder):
        raise UserError(
            f"state holds {len(state)} tensors, wanted {num_remembering(coder)}: pass what the call before this one "
            f"of the same {type(coder).__name__.lower()} gave"
        )
    got, wanted = (state[0].shape[0], state[0].shape[1], *state[0].shape[3:]), (x.shape[0], *grid)
    if got != wanted:
        raise UserError(
            f"state is of a stream with batch, channels, height, width {got}, wanted {wanted}: a stream keeps its size"
        )
    if state[0].device != x.device:
        raise UserError(f"state is on {state[0].device}, wanted {x.device} like the frames")
