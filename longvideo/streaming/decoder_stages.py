"""Stages of the streaming decoder: entry, residual blocks, attention, upsamplings and exit.

A stage is on one device. Its causal convolutions have buffers for their input frames. A stage writes its result to the
buffer from which the next stage reads.

Shapes: B batch, T frames, H W grid, C channels, z latent channels; activations are stored as BTHWC.
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
"""Number of frames that a causal convolution keeps from one call to the next."""


def fold_upsampling(weight_OI33: Tensor) -> Tensor:
    """Return one 2x2 convolution with padding 1 for a 2x nearest upsampling and a 3x3 convolution, [4 O, I, 2, 2].

    Phase (a, b) of pixel (i, j) is output 2 a + b at (i + a, j + b). In phase 0 the upper tap reads the previous pixel
    and the other two taps this one; in phase 1 the lower tap reads the next pixel.
    """
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    weight = weight_OI33.double().cpu()
    folded = torch.einsum("apy,bqx,oiyx->aboipq", taps, taps, weight).flatten(0, 2)
    return folded.to(weight_OI33)


@dataclass(frozen=True)
class Activations:
    """Result of a stage. around: input of the level that the shortcut around the level needs."""

    x: Tensor
    around: Tensor | None = None

    def to(self, device: torch.device) -> Activations:
        """Return the activations on a device; the host does not wait."""
        around = None if self.around is None else self.around.to(device, non_blocking=True)
        return Activations(self.x.to(device, non_blocking=True), around)

    def empty_like(self, device: torch.device) -> Activations:
        """Return uninitialized activations of the same shapes on a device."""
        around = None if self.around is None else torch.empty_like(self.around, device=device)
        return Activations(torch.empty_like(self.x, device=device), around)

    def copy_(self, other: Activations) -> None:
        """Copy other activations into these; the host does not wait."""
        self.x.copy_(other.x, non_blocking=True)
        if self.around is not None:
            assert other.around is not None
            self.around.copy_(other.around, non_blocking=True)


@dataclass(frozen=True)
class Target:
    """Buffers of the next stage for a result.

    plain: buffer for the result itself. normalized: buffer for SiLU of the norm of the result, with weight `gamma`.
    is_kept: whether the next stage also reads the result itself.
    """

    plain: Tensor | None = None
    gamma: Tensor | None = None
    normalized: Tensor | None = None
    is_kept: bool = True


class DecoderStage(Protocol):
    """A stage of the decoder on one device.

    times: number of frames of the result for each later frame of the input.
    """

    times: int

    @property
    def convolutions(self) -> tuple[_Convolution, ...]:
        """Causal convolutions of the stage, in order."""
        ...

    def target(self, frames: int, opening: bool, /) -> Target:
        """Return the buffers for an input of `frames` frames. opening: whether it is the opening frame."""
        ...

    def __call__(self, inputs: Activations, target: Target, opening: bool, /) -> Activations:
        """Return the result, which is also written to a target of the next stage."""
        ...


@dataclass(frozen=True)
class Grid:
    """Sizes at a stage. frames: largest number of frames in a step. height, width: size of a frame."""

    batch: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width


def hand_over(operations: DecoderOperations, x: Tensor, target: Target) -> None:
    """Write x to the buffers of the next stage."""
    if target.normalized is not None:
        operations.add_norm_silu(x, None, None, None, target.gamma, target.normalized)
    elif target.plain is not None:
        target.plain.copy_(x)


class _Convolution:
    """A causal convolution with a buffer for the frames that it keeps, followed by those of a call."""

    def __init__(self, conv: CausalConv3d, grid: Grid, device: torch.device) -> None:
        self.weight = conv.weight.detach().to(device).contiguous(memory_format=torch.channels_last_3d)
        _, height_taps, width_taps = conv.kernel_size
        self.padding = (0, height_taps // 2, width_taps // 2)
        assert conv.bias is not None
        # cuDNN adds a bias in a pass of its own, so the operation after the convolution adds it
        bias = conv.bias.detach().to(device)
        self.own_bias, self.bias = (None, bias) if bias.is_cuda else (bias, None)
        self.buffer = self.weight.new_zeros(
            grid.batch, HISTORY + grid.frames, grid.height, grid.width, conv.in_channels
        )

    def inputs(self, frames: int) -> Tensor:
        """Return the part of the buffer for the input frames of a call."""
        return self.buffer[:, HISTORY : HISTORY + frames]

    def __call__(self, frames: int) -> Tensor:
        """Return the convolution of the buffer, without `bias`, and keep the last frames."""
        x = self.buffer[:, : HISTORY + frames]
        y = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.own_bias, padding=self.padding).permute(0, 2, 3, 4, 1)
        for index in range(HISTORY):  # one after the other, since they overlap if there is one new frame
            self.buffer[:, index] = self.buffer[:, frames + index]
        return y


class EntryStage:
    """Stage from latents to the first activations."""

    times = 1

    def __init__(self, autoencoder: Autoencoder, grid: Grid, device: torch.device) -> None:
        conv = autoencoder.post_quant_conv
        assert conv.bias is not None
        # denormalization and the 1x1x1 convolution are one matrix
        matrix = conv.weight.detach().flatten(1).float()
        mean, std = (values.flatten().to(matrix) for values in (autoencoder.latents_mean, autoencoder.latents_std))
        self._matrix = (matrix * std).to(device, conv.weight.dtype)
        self._offset = (matrix @ mean + conv.bias.detach().float()).to(device, conv.weight.dtype)
        self._conv = _Convolution(autoencoder.decoder.conv_in, grid, device)
        self._operations = decoder_operations(device)
        self.convolutions = (self._conv,)

    def target(self, _frames: int, _opening: bool, /) -> Target:
        return Target()

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        frames = inputs.x.shape[1]
        self._conv.inputs(frames).copy_(F.linear(inputs.x, self._matrix, self._offset))
        x = self._conv(frames)
        self._operations.add_norm_silu(x, self._conv.bias, None, x, target.gamma, target.normalized)
        return Activations(x)


class ResidualStage:
    """A residual block, which reads its normalized input from the buffer of its first convolution.

    opens_level: whether its input is also the input of the level.
    """

    times = 1

    def __init__(self, block: ResidualBlock, grid: Grid, device: torch.device, *, opens_level: bool) -> None:
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

    def target(self, frames: int, _opening: bool, /) -> Target:
        return Target(gamma=self._gamma_in, normalized=self._first.inputs(frames))

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        x, frames = inputs.x, inputs.x.shape[1]
        h = self._first(frames)
        self._operations.add_norm_silu(h, self._first.bias, None, None, self._gamma, self._second.inputs(frames))
        h = self._second(frames)
        total = h if target.plain is None else target.plain
        narrow = x if self._shortcut is None else F.linear(x, *self._shortcut)
        self._operations.add_norm_silu(
            h, self._second.bias, narrow, total if target.is_kept else None, target.gamma, target.normalized
        )
        return Activations(total, x if self._opens_level else inputs.around)


class AttentionStage:
    """Attention among the pixels of each frame."""

    times = 1
    convolutions = ()

    def __init__(self, attention: FrameAttention, device: torch.device) -> None:
        is_on_device = attention.proj.weight.device == device
        self._attention = attention if is_on_device else deepcopy(attention).to(device)
        self._operations = decoder_operations(device)

    def target(self, _frames: int, _opening: bool, /) -> Target:
        return Target()

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        x = self._attention(inputs.x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).contiguous()
        hand_over(self._operations, x, target)
        return Activations(x)


class UpsamplingStage:
    """The upsampling at the end of a level, with the shortcut around the level."""

    def __init__(self, level: UpBlock, grid: Grid, device: torch.device) -> None:
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

    def target(self, frames: int, opening: bool, /) -> Target:
        return Target() if self._time is None or opening else Target(plain=self._time.inputs(frames))

    def __call__(self, inputs: Activations, target: Target, opening: bool, /) -> Activations:
        assert inputs.around is not None
        x = inputs.x if self._time is None or opening else self._double_time(self._time, inputs.x.shape[1])
        folded = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self._weight, padding=1).permute(0, 2, 3, 1)
        batch, frames, height, width, _ = x.shape
        folded = folded.unflatten(0, (batch, frames))
        total = folded.new_empty(batch, frames, 2 * height, 2 * width, self._bias.shape[0])
        gamma, normalized = target.gamma, target.normalized
        if gamma is None or normalized is None:
            # the last stage of a device: the normalized result is not read, and any gain will do
            gamma, normalized = self._bias, torch.empty_like(total)
        self._operations.upsample_add_norm_silu(
            folded, self._bias, inputs.around, self._offsets, self.times, total, gamma, normalized
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
    """Stage from the last activations to pixels, uint8 [B, T, H, W, 3]."""

    times = 1

    def __init__(self, autoencoder: Autoencoder, grid: Grid, device: torch.device) -> None:
        self._gamma = autoencoder.decoder.norm_out.gamma.detach().flatten().to(device)
        self._conv = _Convolution(autoencoder.decoder.conv_out, grid, device)
        self._patch = autoencoder.config.patch_size
        self._operations = decoder_operations(device)
        self.convolutions = (self._conv,)

    def target(self, frames: int, _opening: bool, /) -> Target:
        return Target(gamma=self._gamma, normalized=self._conv.inputs(frames), is_kept=False)

    def __call__(self, inputs: Activations, _target: Target, _opening: bool, /) -> Activations:
        packed = self._conv(inputs.x.shape[1])
        batch, frames, height, width, _ = packed.shape
        shape = (batch, frames, self._patch * height, self._patch * width, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, device=packed.device)
        self._operations.to_pixels(packed, self._conv.bias, self._patch, pixels)
        return Activations(pixels)


def _offsets(surplus: int, factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return along which axes surplus channels of the shortcut become pixels; see `layers.unfold_from_channels`."""
    offsets = []
    for factor in factors:
        offsets.append(factor if surplus > 1 else 1)
        surplus //= offsets[-1]
    return offsets[0], offsets[1], offsets[2]
