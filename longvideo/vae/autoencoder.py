"""Causal video autoencoder of the Wan2.2 form; parameters are named as in diffusers' AutoencoderKLWan.

A call takes any number of frames and the State that the previous call returned; None starts a video. Several calls give
the result of one, because every causal convolution keeps its last frames, and nothing else depends on other frames. A
State is never changed: use one per stream, or use the same one twice to continue a video in two ways.
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
    """Encode video to latents and decode latents to video.

    In a first call 1 + 4k frames correspond to 1 + k latent frames, in a later call 4k to k. Build the module on the
    meta device and load it with `assign=True`, or build it on the target device; `to_empty` would lose the latent
    statistics.
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
            # no weight file has these values, so they must not be on the meta device
            values = torch.tensor(
                getattr(config, name), dtype=torch.float32, device="cpu" if device.type == "meta" else device
            )
            values = values.view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, video_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the mean and log variance, joined to [B, 2 z_dim, T', H/16, W/16], of video in [-1, 1].

        Raises UserError for other numbers of frames, for sizes that are not multiples of 16, and for a wrong state.
        """
        self._check_video(video_BCTHW, state)
        memory = Memory(state)
        h_BCTHW = self.encoder(patchify(video_BCTHW, self.config.patch_size), memory)
        return self.quant_conv(h_BCTHW), memory.state()

    def decode(self, latents_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return video, about [-1, 1] and not clamped, of latents in the encoder's own scale (see `denormalize`).

        Raises UserError for no latents and for a wrong state.
        """
        self._check_latents(latents_BCTHW, state)
        memory = Memory(state)
        latents_BCTHW = latents_BCTHW.contiguous(memory_format=torch.channels_last_3d)
        h_BCTHW = self.decoder(self.post_quant_conv(latents_BCTHW), memory)
        return unpatchify(h_BCTHW, self.config.patch_size), memory.state()

    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Return latents with zero mean and unit deviation in every channel."""
        return (latents_BCTHW - self.latents_mean) / self.latents_std

    def denormalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Return latents in the encoder's own scale, the inverse of `normalize`."""
        return latents_BCTHW * self.latents_std + self.latents_mean

    def _check_video(self, video_BCTHW: Tensor, state: State | None) -> None:
        config = self.config
        _check_frames(video_BCTHW, "video", config.in_channels // config.patch_size**2)
        num_frames, (height, width) = video_BCTHW.shape[2], video_BCTHW.shape[3:]
        step = config.scale_factor_temporal
        if num_frames % step != (1 if state is None else 0) or num_frames == 0:
            expected = f"1 + {step}k frames in a first call" if state is None else f"{step}k frames in a later call"
            raise UserError(f"video has {num_frames} frames; expected {expected}")
        if height % config.scale_factor_spatial or width % config.scale_factor_spatial or height * width == 0:
            raise UserError(
                f"video is {height} x {width} pixels; expected multiples of {config.scale_factor_spatial}; crop or"
                " resize it"
            )
        patch = config.patch_size
        _check_state(state, self.encoder, (config.in_channels, height // patch, width // patch), video_BCTHW)

    def _check_latents(self, latents_BCTHW: Tensor, state: State | None) -> None:
        _check_frames(latents_BCTHW, "latents", self.config.z_dim)
        if latents_BCTHW.shape[2] == 0:
            raise UserError("latents have 0 frames; expected 1 or more")
        _check_state(state, self.decoder, (self.config.z_dim, *latents_BCTHW.shape[3:]), latents_BCTHW)


class DecodingAutoencoder(Autoencoder):
    """An autoencoder without its encoder, for weights that are used only to decode."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        del self.encoder, self.quant_conv

    def encode(self, video_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Raise UserError."""
        del state
        raise UserError(
            f"video of {video_BCTHW.shape[2]} frames cannot be encoded: only the decoder of this autoencoder is loaded;"
            " use the autoencoder of the model"
        )


class Encoder(nn.Module):
    """Patches of pixels to moments of latents."""

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
    """Latents to patches of pixels."""

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
    """Move each patch x patch square of pixels into channels: color, then column, then row. The memory is BTHWC."""
    x = video_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4).permute(0, 4, 1, 2, 3)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Return pixels, the inverse of `patchify`."""
    x = x_BCTHW.unflatten(1, (-1, patch, patch))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _check_frames(x: Tensor, name: str, channels: int) -> None:
    if x.dim() != 5 or x.shape[1] != channels:
        raise UserError(f"{name} has shape {list(x.shape)}; expected [batch, {channels}, frames, height, width]")


def _check_state(state: State | None, coder: nn.Module, grid: tuple[int, ...], x: Tensor) -> None:
    if state is None:
        return
    if len(state) != num_remembering(coder):
        raise UserError(
            f"state holds {len(state)} tensors; expected {num_remembering(coder)}; pass the state that the previous"
            f" call of the same {type(coder).__name__.lower()} returned"
        )
    sizes, expected = (state[0].shape[0], state[0].shape[1], *state[0].shape[3:]), (x.shape[0], *grid)
    if sizes != expected:
        raise UserError(
            f"state has batch, channels, height, width {sizes}; expected {expected}; all calls of a stream have one"
            " size"
        )
    if state[0].device != x.device:
        raise UserError(f"state is on {state[0].device}; expected {x.device} like the frames; move it there")
