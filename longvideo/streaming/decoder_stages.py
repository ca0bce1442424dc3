"""Stages of the streaming decoder: entry, residual blocks, attention, upsamplings and exit.

A stage is on one device. Its causal convolutions have buffers for their input frames. A stage writes its result to the
buffer from which the next stage reads.

Shapes: B batch, T frames, H W grid, C channels, z latent channels; activations are stored as BTHWC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.nvfp4.format import E4M3_MAX
from longvideo.kernels.vae.format import FP8Kernel
from longvideo.kernels.vae.reference import SMALLEST_LENGTH
from longvideo.streaming.decoder_convolutions import E4M3

if TYPE_CHECKING:
    from longvideo.kernels.backends import DecoderOperations
    from longvideo.streaming.decoder_convolutions import Convolution, StageBuilder
    from longvideo.vae.autoencoder import Autoencoder
    from longvideo.vae.layers import FrameAttention, ResidualBlock, UpBlock


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

    plain: buffer for the result itself. normalized: buffer for SiLU of the norm of the result, with weight `gamma`,
    times `inverse_scale`. is_kept: whether the next stage also reads the result itself.
    """

    plain: Tensor | None = None
    gamma: Tensor | None = None
    normalized: Tensor | None = None
    inverse_scale: float = 1.0
    is_kept: bool = True


class DecoderStage(Protocol):
    """A stage of the decoder on one device.

    times: number of frames of the result for each later frame of the input.
    """

    times: int

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """Causal convolutions of the stage, in order."""
        ...

    def target(self, frames: int, opening: bool, /) -> Target:
        """Return the buffers for an input of `frames` frames. opening: whether it is the opening frame."""
        ...

    def __call__(self, inputs: Activations, target: Target, opening: bool, /) -> Activations:
        """Return the result, which is also written to a target of the next stage."""
        ...


def hand_over(operations: DecoderOperations, x: Tensor, target: Target) -> None:
    """Write x to the buffers of the next stage."""
    if target.normalized is not None:
        operations.add_norm_silu(x, None, None, None, target.gamma, target.normalized, target.inverse_scale)
    elif target.plain is not None:
        target.plain.copy_(x)


class EntryStage:
    """Stage from latents to the first activations."""

    times = 1

    def __init__(self, autoencoder: Autoencoder, builder: StageBuilder) -> None:
        conv = autoencoder.post_quant_conv
        assert conv.bias is not None
        # denormalization and the 1x1x1 convolution are one matrix
        matrix = conv.weight.detach().flatten(1).float()
        mean, std = (values.flatten().to(matrix) for values in (autoencoder.latents_mean, autoencoder.latents_std))
        self._matrix = builder.weight((matrix * std).to(conv.weight.dtype))
        self._offset = builder.weight((matrix @ mean + conv.bias.detach().float()).to(conv.weight.dtype))
        self._conv = builder.product(autoencoder.decoder.conv_in)
        self._operations = builder.operations
        self.convolutions = (self._conv,)

    def target(self, _frames: int, _opening: bool, /) -> Target:
        return Target()

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        frames = inputs.x.shape[1]
        self._conv.inputs(frames).copy_(F.linear(inputs.x, self._matrix, self._offset))
        x = self._conv(frames)
        self._operations.add_norm_silu(
            x, self._conv.bias, None, x, target.gamma, target.normalized, target.inverse_scale
        )
        return Activations(x)


class ResidualStage:
    """A residual block, which reads its normalized input from the buffer of its first convolution.

    opens_level: whether its input is also the input of the level.
    """

    times = 1

    def __init__(self, block: ResidualBlock, builder: StageBuilder, *, opens_level: bool) -> None:
        self._gamma_in, self._gamma = (builder.weight(norm.gamma).flatten() for norm in (block.norm1, block.norm2))
        self._first = builder.convolution_after_norm(block.conv1, self._gamma_in)
        self._second = builder.convolution_after_norm(block.conv2, self._gamma)
        shortcut = block.conv_shortcut
        self._shortcut = builder.matrix_and_bias(shortcut) if isinstance(shortcut, nn.Conv3d) else None
        self._opens_level = opens_level
        self._operations = builder.operations
        self.convolutions = (self._first, self._second)

    def target(self, frames: int, _opening: bool, /) -> Target:
        first = self._first
        return Target(gamma=self._gamma_in, normalized=first.inputs(frames), inverse_scale=first.inverse_scale)

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        x, frames = inputs.x, inputs.x.shape[1]
        h, second = self._first(frames), self._second
        self._operations.add_norm_silu(
            h, self._first.bias, None, None, self._gamma, second.inputs(frames), second.inverse_scale
        )
        h = second(frames)
        total = h if target.plain is None else target.plain
        narrow = x if self._shortcut is None else F.linear(x, *self._shortcut)
        self._operations.add_norm_silu(
            h,
            second.bias,
            narrow,
            total if target.is_kept else None,
            target.gamma,
            target.normalized,
            target.inverse_scale,
        )
        return Activations(total, x if self._opens_level else inputs.around)


class AttentionStage:
    """Attention among the pixels of each frame. Its head has all channels, for which no fused kernel is fast."""

    times = 1
    convolutions = ()

    def __init__(self, attention: FrameAttention, builder: StageBuilder) -> None:
        self._gamma = builder.weight(attention.norm.gamma).flatten()
        self._to_qkv, self._proj = (builder.matrix_and_bias(conv) for conv in (attention.to_qkv, attention.proj))
        self._operations = builder.operations

    def target(self, _frames: int, _opening: bool, /) -> Target:
        return Target()

    def __call__(self, inputs: Activations, target: Target, _opening: bool, /) -> Activations:
        x_NLC = inputs.x.flatten(0, 1).flatten(1, 2)
        length = torch.linalg.vector_norm(x_NLC, dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)
        normed_NLC = (x_NLC * (math.sqrt(x_NLC.shape[-1]) / length) * self._gamma).to(x_NLC.dtype)
        q_NLC, k_NLC, v_NLC = F.linear(normed_NLC, *self._to_qkv).chunk(3, dim=-1)
        h_NLC = F.linear(_attend(q_NLC, k_NLC, v_NLC), *self._proj)
        x = (x_NLC + h_NLC).view(inputs.x.shape)
        hand_over(self._operations, x, target)
        return Activations(x)


class UpsamplingStage:
    """The upsampling at the end of a level, with the shortcut around the level.

    kernel, buffer: weights in E4M3 and the buffer of its inputs, if the convolution at the low resolution computes in
    E4M3. The scale of the inputs is then measured in every call.
    """

    def __init__(self, level: UpBlock, builder: StageBuilder) -> None:
        assert level.upsampler is not None
        time, conv, grid = level.upsampler.time_conv, cast("nn.Conv2d", level.upsampler.resample[1]), builder.grid
        assert conv.bias is not None
        first = cast("ResidualBlock", level.resnets[0])
        self.times, _, _ = level.factors
        self._time = None if time is None else builder.convolution(time)
        folded = builder.weight(fold_upsampling(conv.weight.detach()))
        self._bias = builder.weight(conv.bias)
        self._weight = folded.contiguous(memory_format=torch.channels_last)
        self.kernel: FP8Kernel | None = None
        if grid.fp8:
            self.kernel = FP8Kernel.quantize(folded.unsqueeze(2), bound=E4M3_MAX)
            self._weight = folded.new_empty(0)
            self.buffer = folded.new_zeros(
                grid.batch, self.times * grid.frames, grid.height + 2, grid.width + 2, conv.in_channels, dtype=E4M3
            )
        self._offsets = _offsets(first.conv1.in_channels // level.out_channels, level.factors)
        self._operations = builder.operations
        self.convolutions = () if self._time is None else (self._time,)

    def target(self, frames: int, opening: bool, /) -> Target:
        return Target() if self._time is None or opening else Target(plain=self._time.inputs(frames))

    def __call__(self, inputs: Activations, target: Target, opening: bool, /) -> Activations:
        assert inputs.around is not None
        x = inputs.x if self._time is None or opening else self._double_time(self._time, inputs.x.shape[1])
        batch, frames, height, width, _ = x.shape
        folded = self._convolve(x) if self.kernel is None else self._convolve_fp8(x, self.kernel)
        total = folded.new_empty(batch, frames, 2 * height, 2 * width, self._bias.shape[0])
        gamma, normalized = target.gamma, target.normalized
        if gamma is None or normalized is None:
            # the last stage of a device: the normalized result is not read, and any gain will do
            gamma, normalized = self._bias, torch.empty_like(total)
        self._operations.upsample_add_norm_silu(
            folded, self._bias, inputs.around, self._offsets, self.times, total, gamma, normalized, target.inverse_scale
        )
        return Activations(total)

    def _convolve(self, x: Tensor) -> Tensor:
        folded = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self._weight, padding=1).permute(0, 2, 3, 1)
        return folded.unflatten(0, x.shape[:2])

    def _convolve_fp8(self, x: Tensor, kernel: FP8Kernel) -> Tensor:
        batch, frames, height, width, _ = x.shape
        scale = self._operations.quantize(x, self.buffer[:, :frames, 1:-1, 1:-1])
        folded = x.new_empty(batch, frames, height + 1, width + 1, len(kernel.values))
        self._operations.convolve(self.buffer, frames, replace(kernel, scales=kernel.scales * scale), folded)
        return folded

    @staticmethod
    def _double_time(time: Convolution, frames: int) -> Tensor:
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

    def __init__(self, autoencoder: Autoencoder, builder: StageBuilder) -> None:
        self._gamma = builder.weight(autoencoder.decoder.norm_out.gamma).flatten()
        self._conv = builder.convolution(autoencoder.decoder.conv_out)
        self._patch = autoencoder.config.patch_size
        self._operations = builder.operations
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


def _attend(q_NLC: Tensor, k_NLC: Tensor, v_NLC: Tensor) -> Tensor:
    """Return attention with one head; on CUDA as three operations, with logits in float32.

    There torch's attention would compute a head of more than 256 channels in float32 without tensor cores.
    """
    if not q_NLC.is_cuda or q_NLC.dtype == torch.float32:
        return F.scaled_dot_product_attention(q_NLC, k_NLC, v_NLC)
    logits_NLL = torch.bmm(q_NLC, k_NLC.transpose(1, 2), out_dtype=torch.float32)
    logits_NLL *= q_NLC.shape[-1] ** -0.5
    return torch.bmm(logits_NLL.softmax(-1).to(v_NLC.dtype), v_NLC)


def _offsets(surplus: int, factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return along which axes surplus channels of the shortcut become pixels; see `layers.unfold_from_channels`."""
    offsets = []
    for factor in factors:
        offsets.append(factor if surplus > 1 else 1)
        surplus //= offsets[-1]
    return offsets[0], offsets[1], offsets[2]
