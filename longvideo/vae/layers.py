"""Layers of the causal video autoencoder: each takes any number of frames, and keeps the few that later calls need.

A first call holds the opening frame of the video, which the layers that change the frame rate treat differently: it is
alone, whereas later frames form pairs.
Activations are stored as BTHWC (torch.channels_last_3d): bf16 convolutions and norms are several times faster in this
layout, and folding frames into the batch needs no copy. Wherever values are reordered, the result has this layout.

Shapes: B batch, C channels, T frames, H W grid.
"""

from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State: TypeAlias = tuple[Tensor, ...]


# the lower bound of F.normalize, which the published autoencoder uses
SMALLEST_LENGTH = 1e-12


class Memory:
    """The frames that causal layers keep from one call to the next, in the order of the modules."""

    def __init__(self, state: State | None) -> None:
        self.is_first = state is None
        self._past = state or ()
        self._kept: list[Tensor] = []

    def recall(self) -> Tensor | None:
        """Return the frames that the current layer kept in the previous call, None in a first call."""
        return None if self.is_first else self._past[len(self._kept)]

    def keep(self, frames_BCTHW: Tensor) -> None:
        """Store a copy of the frames for the next call, so that no activation or gradient stays in memory."""
        self._kept.append(frames_BCTHW.detach().clone(memory_format=torch.channels_last_3d))

    def state(self) -> State:
        """Return the frames that all layers kept in this call."""
        return tuple(self._kept)


class CausalConv3d(nn.Conv3d):
    """Convolution in space and time, of which a frame depends on itself and earlier frames only."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, kernel_size[1] // 2, kernel_size[2] // 2))
        self.history = kernel_size[0] - 1

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        past = memory.recall()
        if past is None:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, self.history, 0))
        else:
            x_BCTHW = torch.cat([past.to(x_BCTHW.dtype), x_BCTHW], dim=2)
        memory.keep(x_BCTHW[:, :, -self.history :])
        return super().forward(x_BCTHW)


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of every pixel, times a learned gain."""

    def __init__(self, channels: int, num_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(SMALLEST_LENGTH)
        # under autocast the gain is float32; the cast keeps what the backward pass stores in the dtype of the input
        return (x * (self.gamma.shape[0] ** 0.5 / length) * self.gamma).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal convolutions after norm and SiLU, with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels, num_axes=3)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelRMSNorm(out_channels, num_axes=3)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)), memory)
        h_BCTHW = self.conv2(F.silu(self.norm2(h_BCTHW)), memory)
        return self.conv_shortcut(x_BCTHW) + h_BCTHW


class FrameAttention(nn.Module):
    """Attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, num_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        _, _, num_frames, height, _ = x_BCTHW.shape
        x_NCHW = x_BCTHW.transpose(1, 2).flatten(0, 1)
        qkv_N1LC = self.to_qkv(self.norm(x_NCHW)).flatten(2).transpose(1, 2).unsqueeze(1)
        h_N1LC = F.scaled_dot_product_attention(*qkv_N1LC.chunk(3, dim=-1))
        h_NCHW = self.proj(h_N1LC.squeeze(1).transpose(1, 2).unflatten(2, (height, -1)))
        return x_BCTHW + h_NCHW.unflatten(0, (-1, num_frames)).transpose(1, 2)


class MidBlock(nn.Module):
    """The blocks at the lowest resolution: residual, attention, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = self.resnets[0](x_BCTHW, memory)
        return self.resnets[1](self.attentions[0](x_BCTHW), memory)


class Downsample(nn.Module):
    """Halve the grid, and the frame rate if halves_time; the opening frame remains a frame of its own."""

    def __init__(self, channels: int, halves_time: bool) -> None:
        super().__init__()
        # the published weights have this convolution at index 1 of a Sequential
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if halves_time else None

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = per_frame(self.resample, x_BCTHW)
        if self.time_conv is None:
            return x_BCTHW
        past = memory.recall()
        memory.keep(x_BCTHW[:, :, -1:])
        if past is not None:
            return self.time_conv(torch.cat([past.to(x_BCTHW.dtype), x_BCTHW], dim=2))
        if x_BCTHW.shape[2] == 1:
            return x_BCTHW
        return torch.cat([x_BCTHW[:, :, :1], self.time_conv(x_BCTHW)], dim=2)


class Upsample(nn.Module):
    """Double the grid, and the frame rate if doubles_time; the opening frame of the video stays one frame."""

    def __init__(self, channels: int, doubles_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if doubles_time else None

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_time(self.time_conv, x_BCTHW, memory)
        return per_frame(self.resample, x_BCTHW)

    @staticmethod
    def _double_time(time_conv: CausalConv3d, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        opening, later = x_BCTHW.split([1, x_BCTHW.shape[2] - 1], dim=2) if memory.is_first else (None, x_BCTHW)
        if later.shape[2] == 0:
            # the second frame sees zeros in place of the opening one, which is never part of the history
            memory.keep(torch.zeros_like(x_BCTHW).expand(-1, -1, time_conv.history, -1, -1))
            return x_BCTHW
        pairs_BTHWC = time_conv(later, memory).permute(0, 2, 3, 4, 1)
        pairs_BTHWC = pairs_BTHWC.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        pairs_BCTHW = pairs_BTHWC.permute(0, 4, 1, 2, 3)
        return pairs_BCTHW if opening is None else torch.cat([opening, pairs_BCTHW], dim=2)


class DownBlock(nn.Module):
    """A level of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, halves_time: bool | None) -> None:
        """halves_time: whether the level halves the frame rate; None for the last level, which changes no size."""
        super().__init__()
        channels = [in_channels] + [out_channels] * num_res_blocks
        self.out_channels = out_channels
        self.factors = (1, 1, 1) if halves_time is None else (2 if halves_time else 1, 2, 2)
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(channels)])
        self.downsampler = None if halves_time is None else Downsample(out_channels, halves_time)

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        shortcut = fold_into_channels(x_BCTHW, self.out_channels, self.factors)
        for resnet in self.resnets:
            x_BCTHW = resnet(x_BCTHW, memory)
        if self.downsampler is not None:
            x_BCTHW = self.downsampler(x_BCTHW, memory)
        return x_BCTHW + shortcut


class UpBlock(nn.Module):
    """A level of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, doubles_time: bool | None) -> None:
        """doubles_time: whether the level doubles the frame rate; None for the last level, which changes no size.

        The last level has no outer shortcut.
        """
        super().__init__()
        channels = [in_channels] + [out_channels] * (num_res_blocks + 1)
        self.out_channels = out_channels
        self.factors = (2 if doubles_time else 1, 2, 2)
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(channels)])
        self.upsampler = None if doubles_time is None else Upsample(out_channels, doubles_time)

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        h_BCTHW = x_BCTHW
        for resnet in self.resnets:
            h_BCTHW = resnet(h_BCTHW, memory)
        if self.upsampler is None:
            return h_BCTHW
        shortcut = unfold_from_channels(x_BCTHW, self.out_channels, self.factors)
        if memory.is_first:
            shortcut = shortcut[:, :, self.factors[0] - 1 :]
        return self.upsampler(h_BCTHW, memory) + shortcut


def num_remembering(module: nn.Module) -> int:
    """Return the number of layers that keep frames from one call to the next, which is the length of a State."""
    layers = list(module.modules())
    causal = sum(isinstance(layer, CausalConv3d) for layer in layers)
    return causal + sum(isinstance(layer, Downsample) and layer.time_conv is not None for layer in layers)


def per_frame(layer: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """Apply a layer for images to every frame."""
    x_NCHW = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return x_NCHW.unflatten(0, (-1, x_BCTHW.shape[2])).transpose(1, 2)


def fold_into_channels(x_BCTHW: Tensor, out_channels: int, factors: tuple[int, int, int]) -> Tensor:
    """Divide time, height and width by the factors; pixel offsets become channels, averaged to `out_channels`.

    Zeros are added in front to a multiple of the time factor, which only an opening frame needs.
    """
    time, height, width = factors
    if missing := -x_BCTHW.shape[2] % time:
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, missing, 0))
    x = x_BCTHW.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, time))
    x_BTHWF = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    return x_BTHWF.unflatten(4, (out_channels, -1)).mean(-1).permute(0, 4, 1, 2, 3)


def unfold_from_channels(x_BCTHW: Tensor, out_channels: int, factors: tuple[int, int, int]) -> Tensor:
    """Multiply time, height and width by the factors: surplus channels become pixel offsets, the rest is repeated."""
    surplus = x_BCTHW.shape[1] // out_channels
    offsets = []
    for factor in factors:
        offsets.append(factor if surplus > 1 else 1)
        surplus //= offsets[-1]
    x = x_BCTHW.unflatten(1, (out_channels, *offsets)).permute(0, 5, 2, 6, 3, 7, 4, 1)
    batch, num_frames, _, height, _, width, _, _ = x.shape
    x = x.expand(batch, num_frames, factors[0], height, factors[1], width, factors[2], out_channels)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)
