"""The streaming decoder as a list of stages: the way in, residual blocks, attention, upsamplings, the way out.

A stage lives on one device. Its causal convolutions own buffers of the frames they are given, and what comes before one
writes there: a stage leaves its result where the next stage wants it.

Shapes: B batch, T frames, H W grid, C channels, z latent channels; activations lie in memory as BTHWC.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.backends import DecoderOperations, decoder_operations

if TYPE_CHECKING:
    from longvideo.vae.autoencoder import Autoencoder
    from longvideo.vae.layers import CausalConv3d, FrameAttention, ResidualBlock, UpBlock

HISTORY = 2
"""Frames that a causal convolution remembers."""


def fold_upsampling(weight_OI33: Tensor) -> Tensor:
    """Return [4 O, I, 2, 2]: a 2x nearest upsampling and a 3x3 convolution, as one 2x2 convolution with padding 1.

    Phase (a, b) of pixel (i, j) is output 2 a + b at (i + a, j + b). In phase 0 the upper tap sees the pixel before and
    the other two this one; in phase 1 the lower tap sees the pixel after.
    """
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    weight = weight_OI33.double().cpu()
    folded = torch.einsum("apy,bqx,oiyx->aboipq", taps, taps, weight).flatten(0, 2)
    return folded.to(weight_OI33)


@dataclass(frozen=True)
class Activations:
    """What one stage hands to the next: its result, and what goes around the level that it is inside."""

    x: Tensor
    around: Tensor | None = None

    def to(self, device: torch.device) -> Activations:
        around = None if self.around is None else self.around.to(device, non_blocking=True)
        return Activations(self.x.to(device, non_blocking=True), around)

    def room(self, device: torch.device) -> Activations:
        """Return memory for another such."""
        around = None if self.around is None else torch.empty_like(self.around, device=device)
        return Activations(torch.empty_like(self.x, device=device), around)

    def copy_(self, other: Activations) -> None:
        self.x.copy_(other.x, non_blocking=True)
        if self.around is not None:
            assert other.around is not None
            self.around.copy_(other.around, non_blocking=True)


@dataclass(frozen=True)
class Target:
    """Where the next stage wants a result: in `plain` as it is, or in `normalised`, as SiLU of its norm with `gamma`.

    is_kept: whether that stage reads the result itself too.
    """

    plain: Tensor | None = None
    gamma: Tensor | None = None
    normalised: Tensor | None = None
    is_kept: bool = True


class DecoderStage(Protocol):
    """A step of the decoder on one device; a later frame given to it becomes `times`."""

    times: int

    @property
    def convolutions(self) -> tuple[_Convolution, ...]: ...

    def target(self, frames: int, *, opening: bool) -> Target: ...

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations: ...


@dataclass(frozen=True)
class Grid:
    """The most frames of a step, and how large they are, where a stage is."""

    batch: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width


def hand_over(operations: DecoderOperations, x: Tensor, target: Target) -> None:
    """Leave x, which nothing is to be added to, where the next stage wants it."""
    if target.normalised is not None:
        operations.add_norm_silu(x, None, None, None, target.gamma, target.normalised)
    elif target.plain is not None:
        target.plain.copy_(x)


class _Convolution:
    """A causal convolution with the frames it is given: those it remembers, then those of this call."""

    def __init__(self, conv: CausalConv3d, grid: Grid, device: torch.device):
        self.weight = conv.weight.detach().to(device).contiguous(memory_format=torch.channels_last_3d)
        _, height_taps, width_taps = conv.kernel_size
        self.padding = (0, height_taps // 2, width_taps // 2)
        assert conv.bias is not None
        # cuDNN leaves the bias to a pass of its own; what follows the convolution adds it in passing
        bias = conv.bias.detach().to(device)
        self.own_bias, self.bias = (None, bias) if bias.is_cuda else (bias, None)
        self.buffer = self.weight.new_zeros(
            grid.batch, HISTORY + grid.frames, grid.height, grid.width, conv.in_channels
        )

    def inputs(self, frames: int) -> Tensor:
        return self.buffer[:, HISTORY : HISTORY + frames]

    def __call__(self, frames: int) -> Tensor:
        """Convolve what is in the buffer, but for `bias`, and remember its last frames."""
        x = self.buffer[:, : HISTORY + frames]
        y = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.own_bias, padding=self.padding).permute(0, 2, 3, 4, 1)
        for index in range(HISTORY):  # one after the other: with one new frame they overlap
            self.buffer[:, index] = self.buffer[:, frames + index]
        return y


class EntryStage:
    """Latents to the first activations."""

    times = 1

    def __init__(self, autoencoder: Autoencoder, grid: Grid, device: torch.device):
        conv = autoencoder.post_quant_conv
        assert conv.bias is not None
        # to undo the latents' normalisation and to convolve with 1x1x1 is one matrix
        matrix = conv.weight.detach().flatten(1).float()
        mean, std = (values.flatten().to(matrix) for values in (autoencoder.latents_mean, autoencoder.latents_std))
        self._matrix = (matrix * std).to(device, conv.weight.dtype)
        self._offset = (matrix @ mean + conv.bias.detach().float()).to(device, conv.weight.dtype)
        self._conv = _Convolution(autoencoder.decoder.conv_in, grid, device)
        self._operations = decoder_operations(device)
        self.convolutions = (self._conv,)

    def target(self, frames: int, *, opening: bool) -> Target:
        return Target()

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations:
        frames = given.x.shape[1]
        self._conv.inputs(frames).copy_(F.linear(given.x, self._matrix, self._offset))
        x = self._conv(frames)
        self._operations.add_norm_silu(x, self._conv.bias, None, x, target.gamma, target.normalised)
        return Activations(x)


class ResidualStage:
    """A residual block whose input waits, normalised, in the buffer of its first convolution.

    opens_level: what it is given goes around the level.
    """

    times = 1

    def __init__(self, block: ResidualBlock, grid: Grid, device: torch.device, *, opens_level: bool):
        self._first, self._second = (_Convolution(conv, grid, device) for conv in (block.conv1, block.conv2))
        self._gamma_in, self._gamma = (norm.gamma.detach().flatten().to(device) for norm in (block.norm1, block.norm2))
        shortcut = block.conv_shortcut
        self._shortcut: tuple[Tensor, Tensor] | None = None
        if isinstance(shortcut, nn.Conv3d):
            assert shortcut.bias is not None
            self._shortcut = shortcut.weight.detach().flatten(1).to(device), shortcut.bias.detach().to(device)
        self._opens_level = opens_level
        self._operations = decoder_operations(device)
        self.convolutions = (self._first, self._second)

    def target(self, frames: int, *, opening: bool) -> Target:
        return Target(gamma=self._gamma_in, normalised=self._first.inputs(frames))

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations:
        x, frames = given.x, given.x.shape[1]
        h = self._first(frames)
        self._operations.add_norm_silu(h, self._first.bias, None, None, self._gamma, self._second.inputs(frames))
        h = self._second(frames)
        total = h if target.plain is None else target.plain
        narrow = x if self._shortcut is None else F.linear(x, *self._shortcut)
        self._operations.add_norm_silu(
            h, self._second.bias, narrow, total if target.is_kept else None, target.gamma, target.normalised
        )
        return Activations(total, x if self._opens_level else given.around)


class AttentionStage:
    """Attention among the pixels of each frame."""

    times = 1
    convolutions = ()

    def __init__(self, attention: FrameAttention, device: torch.device):
        is_there = attention.proj.weight.device == device
        self._attention = attention if is_there else deepcopy(attention).to(device)
        self._operations = decoder_operations(device)

    def target(self, frames: int, *, opening: bool) -> Target:
        return Target()

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations:
        x = self._attention(given.x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).contiguous()
        hand_over(self._operations, x, target)
        return Activations(x)


class UpsamplingStage:
    """The way up from a level, with the shortcut around it."""

    def __init__(self, level: UpBlock, grid: Grid, device: torch.device):
        assert level.upsampler is not None
        time, conv = level.upsampler.time_conv, cast("nn.Conv2d", level.upsampler.resample[1])
        assert conv.bias is not None
        first = cast("ResidualBlock", level.resnets[0])
        self.times, _, _ = level.factors
        self._time = None if time is None else _Convolution(time, grid, device)
        folded = fold_upsampling(conv.weight.detach()).to(device)
        self._weight, self._bias = folded.contiguous(memory_format=torch.channels_last), conv.bias.detach().to(device)
        self._offsets = _offsets(first.conv1.in_channels // level.out_channels, level.factors)
        self._operations = decoder_operations(device)
        self.convolutions = () if self._time is None else (self._time,)

    def target(self, frames: int, *, opening: bool) -> Target:
        return Target() if self._time is None or opening else Target(plain=self._time.inputs(frames))

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations:
        assert given.around is not None
        x = given.x if self._time is None or opening else self._double_time(self._time, given.x.shape[1])
        folded = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self._weight, padding=1).permute(0, 2, 3, 1)
        batch, frames, height, width, _ = x.shape
        folded = folded.unflatten(0, (batch, frames))
        total = folded.new_empty(batch, frames, 2 * height, 2 * width, self._bias.shape[0])
        gamma, normalised = target.gamma, target.normalised
        if gamma is None or normalised is None:
            # the last of a device: what it normalises is not read, and any gain will do
            gamma, normalised = self._bias, torch.empty_like(total)
        self._operations.upsample_add_norm_silu(
            folded, self._bias, given.around, self._offsets, self.times, total, gamma, normalised
        )
        return Activations(total)

    @staticmethod
    def _double_time(time: _Convolution, frames: int) -> Tensor:
        pairs = time(frames)
        batch, _, height, width, channels = pairs.shape
        x = pairs.new_empty(batch, frames, 2, height, width, channels // 2)
        pairs = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
        if time.bias is None:
            x.copy_(pairs)
        else:
            torch.add(pairs, time.bias.view(2, 1, 1, -1), out=x)
        return x.flatten(1, 2)


class ExitStage:
    """The last activations to pixels, uint8 [B, T, H, W, 3]."""

    times = 1

    def __init__(self, autoencoder: Autoencoder, grid: Grid, device: torch.device):
        self._gamma = autoencoder.decoder.norm_out.gamma.detach().flatten().to(device)
        self._conv = _Convolution(autoencoder.decoder.conv_out, grid, device)
        self._patch = autoencoder.config.patch_size
        self._operations = decoder_operations(device)
        self.convolutions = (self._conv,)

    def target(self, frames: int, *, opening: bool) -> Target:
        return Target(gamma=self._gamma, normalised=self._conv.inputs(frames), is_kept=False)

    def __call__(self, given: Activations, target: Target, *, opening: bool) -> Activations:
        packed = self._conv(given.x.shape[1])
        batch, frames, height, width, _ = packed.shape
        shape = (batch, frames, self._patch * height, self._patch * width, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, device=packed.device)
        self._operations.to_pixels(packed, self._conv.bias, self._patch, pixels)
        return Activations(pixels)


def _offsets(surplus: int, factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Say along which axes surplus channels of the shortcut become pixels: see `layers.unfold_from_channels`."""
    offsets = []
    for factor in factors:
        offsets.append(factor if surplus > 1 else 1)
        surplus //= offsets[-1]
    return offsets[0], offsets[1], offsets[2]
