"""Convolutions of the streaming decoder, with buffers at fixed addresses for the frames that they read.

Shapes: B batch, T frames, H W grid, C channels; buffers are stored as BTHWC.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.vae.format import FP8Kernel

if TYPE_CHECKING:
    from torch import nn

    from longvideo.kernels.backends import DecoderOperations

E4M3 = torch.float8_e4m3fn
HISTORY = 2
"""Number of frames that a causal convolution keeps from one call to the next."""
LARGEST_OWN_CONV3D = 20480
"""Largest channels x frames x height of one video whose float32 convolution torch computes itself on a CPU."""


@dataclass(frozen=True)
class Grid:
    """Sizes of latents, or of the activations at a stage, and how the large convolutions compute.

    batch: number of videos. frames: largest number of frames in a step. height, width: size of a frame. fp8: whether
    the 3x3x3 convolutions of residual blocks and the convolutions of upsamplings compute in E4M3. shares_buffer:
    whether the causal convolutions of a device use one buffer in turn, so that each keeps only its last frames.
    """

    batch: int
    frames: int
    height: int
    width: int
    fp8: bool = False
    shares_buffer: bool = False

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width

    @property
    def framed_pixels(self) -> int:
        """Number of pixels of a frame with the zeros around it."""
        return (self.height + 2) * (self.width + 2)


class Convolution(ABC):
    """A causal convolution with a buffer [B, T, H, W, C] for the frames that it keeps, followed by those of a call.

    history: the frames that it keeps from one call to the next; a part of the buffer, unless other convolutions use the
    buffer in turn. bias: the bias, where the operation after the convolution adds it. inverse_scale: factor of the
    inputs in the buffer. kernel: weights in E4M3, if it computes in them. border: number of zeros on each side of each
    frame in the buffer.
    """

    buffer: Tensor
    history: Tensor
    bias: Tensor | None
    inverse_scale: float
    kernel: FP8Kernel | None = None
    border: int = 0
    _shape: torch.Size

    def allocate(self, grid: Grid, weight: Tensor, dtype: torch.dtype) -> None:
        """Allocate the buffer of inputs of a dtype, or the kept frames alone if the buffer is shared.

        `share` sets a shared buffer. weight: [O, C, ...], on the device of the buffer.
        """
        channels = weight.shape[1]
        height, width = (size + 2 * self.border for size in (grid.height, grid.width))
        frames = HISTORY if grid.shares_buffer else HISTORY + grid.frames
        stored = torch.zeros(grid.batch, frames, height, width, channels, dtype=dtype, device=weight.device)
        self.history = stored[:, :HISTORY]
        self.buffer = stored.new_empty(0) if grid.shares_buffer else stored
        self._shape = torch.Size((grid.batch, HISTORY + grid.frames, height, width, channels))

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer, its own or a shared one."""
        return self._shape.numel() * self.history.element_size()

    def share(self, memory: Tensor) -> None:
        """Use memory as the buffer, in turn with other convolutions. memory: `buffer_bytes` bytes or more, uint8."""
        self.buffer = memory[: self.buffer_bytes].view(self.history.dtype).view(self._shape)

    def inputs(self, frames: int) -> Tensor:
        """Return the part of the buffer for the input frames of a call."""
        rows, columns = (slice(self.border, size - self.border) for size in self._shape[2:4])
        return self.buffer[:, HISTORY : HISTORY + frames, rows, columns]

    def clear(self) -> None:
        """Make zeros of the frames that it keeps, as before a video."""
        _zero(self.history)

    def recall(self, frames: int) -> None:
        """Restore a shared buffer before a call: the frames that it keeps, and the zeros around the new ones."""
        if self.history.data_ptr() == self.buffer.data_ptr():
            return
        self.buffer[:, :HISTORY].copy_(self.history)
        if self.border:
            new = self.buffer[:, HISTORY : HISTORY + frames]
            for edge in (slice(None, self.border), slice(-self.border, None)):
                _zero(new[:, :, edge])
                _zero(new[:, :, :, edge])

    def keep_last(self, frames: int) -> None:
        """Keep the last frames of a call."""
        for index in range(HISTORY):  # one after the other, since they overlap if there is one new frame
            self.history[:, index].copy_(self.buffer[:, frames + index])

    @abstractmethod
    def __call__(self, frames: int) -> Tensor:
        """Return the convolution of the buffer, without `bias`, and keep the last frames."""


class PlainConvolution(Convolution):
    """A convolution in the data type of its weights, by cuDNN or oneDNN.

    One that is small in a whole step is a sum of 2-D convolutions in float32 on a CPU, one for each tap along time:
    torch does not give small 3-D convolutions to oneDNN, and computes them at a quarter to a half of its speed.
    """

    inverse_scale = 1.0

    def __init__(self, weight: Tensor, bias: Tensor, grid: Grid) -> None:
        _, in_channels, _, height_taps, width_taps = weight.shape
        self.padding = (0, height_taps // 2, width_taps // 2)
        # cuDNN adds a bias in a pass of its own, so the operation after the convolution adds it
        self.own_bias, self.bias = (None, bias) if bias.is_cuda else (bias, None)
        self.allocate(grid, weight, weight.dtype)
        is_small = in_channels * (HISTORY + grid.frames) * grid.height <= LARGEST_OWN_CONV3D
        self._weights: tuple[Tensor, ...]
        if is_small and weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._weights = tuple(tap.contiguous(memory_format=torch.channels_last) for tap in weight.unbind(2))
        else:
            self._weights = (weight.contiguous(memory_format=torch.channels_last_3d),)

    def __call__(self, frames: int) -> Tensor:
        self.recall(frames)
        if len(self._weights) == 1:
            x = self.buffer[:, : HISTORY + frames].permute(0, 4, 1, 2, 3)
            y = F.conv3d(x, self._weights[0], self.own_bias, padding=self.padding).permute(0, 2, 3, 4, 1)
        else:
            y = self._sum_of_taps(frames)
        self.keep_last(frames)
        return y

    def _sum_of_taps(self, frames: int) -> Tensor:
        total: Tensor | None = None
        for index, weight in enumerate(self._weights):
            x = self.buffer[:, index : index + frames].flatten(0, 1).permute(0, 3, 1, 2)
            bias = self.own_bias if total is None else None
            y = F.conv2d(x, weight, bias, padding=self.padding[1:])
            total = y if total is None else total.add_(y)
        assert total is not None
        return total.permute(0, 2, 3, 1).unflatten(0, (-1, frames))


class ProductConvolution(Convolution):
    """A 3x3x3 convolution of few input channels, as one matrix product, which is faster than cuDNN's kernels for it."""

    bias = None
    inverse_scale = 1.0
    border = 1

    def __init__(self, weight: Tensor, bias: Tensor, grid: Grid) -> None:
        self._matrix, self._bias = weight.flatten(1), bias
        self.allocate(grid, weight, weight.dtype)

    def __call__(self, frames: int) -> Tensor:
        self.recall(frames)
        taps = self.buffer[:, : HISTORY + frames].unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)
        y = F.linear(taps.flatten(4), self._matrix, self._bias)
        self.keep_last(frames)
        return y


class FP8Convolution(Convolution):
    """A 3x3x3 convolution of E4M3, whose inputs are SiLU of an RMS norm. Its buffer has zeros around each frame.

    A pixel of the norm's result is at most sqrt(C) long before it is multiplied by gamma, and SiLU makes nothing
    larger. This bound sets the scale of the input: no value saturates, and no step measures anything.
    """

    border = 1

    def __init__(
        self, weight: Tensor, bias: Tensor, grid: Grid, *, gamma: Tensor, operations: DecoderOperations
    ) -> None:
        """gamma: weight of the norm before the convolution, [C]."""
        bound = math.sqrt(weight.shape[1]) * float(gamma.abs().max())
        self.bias = bias
        self.kernel = FP8Kernel.quantize(weight, bound=bound)
        self._operations = operations
        self.inverse_scale = self.kernel.inverse_scale
        self.allocate(grid, weight, E4M3)

    def __call__(self, frames: int) -> Tensor:
        self.recall(frames)
        batch, _, height, width, _ = self.buffer.shape
        assert self.bias is not None
        y = self.bias.new_empty(batch, frames, height - 2, width - 2, len(self.bias))
        assert self.kernel is not None
        self._operations.convolve(self.buffer, frames, self.kernel, y)
        self.keep_last(frames)
        return y


class StageBuilder:
    """Builds the convolutions of a stage, and places its weights, on the device of the stage.

    grid: sizes of the inputs of the stage. operations: those of the device.
    """

    def __init__(self, grid: Grid, device: torch.device, operations: DecoderOperations) -> None:
        self.grid, self.operations, self._device = grid, operations, device

    def weight(self, weight: Tensor) -> Tensor:
        """Return a weight on the device."""
        return weight.detach().to(self._device)

    def weight_and_bias(self, conv: nn.Conv2d | nn.Conv3d) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of a convolution on the device."""
        assert conv.bias is not None
        return self.weight(conv.weight), self.weight(conv.bias)

    def matrix_and_bias(self, conv: nn.Conv2d | nn.Conv3d) -> tuple[Tensor, Tensor]:
        """Return the matrix and the bias of a convolution of single pixels on the device."""
        weight, bias = self.weight_and_bias(conv)
        return weight.flatten(1), bias

    def convolution(self, conv: nn.Conv3d) -> Convolution:
        """Return a convolution in the data type of its weights."""
        return PlainConvolution(*self.weight_and_bias(conv), self.grid)

    def product(self, conv: nn.Conv3d) -> Convolution:
        """Return a 3x3x3 convolution of few input channels."""
        return ProductConvolution(*self.weight_and_bias(conv), self.grid)

    def convolution_after_norm(self, conv: nn.Conv3d, gamma: Tensor) -> Convolution:
        """Return a convolution of a residual block. gamma: weight of the norm before it, on the device, [C]."""
        if not self.grid.fp8:
            return self.convolution(conv)
        return FP8Convolution(*self.weight_and_bias(conv), self.grid, gamma=gamma, operations=self.operations)


def _zero(x: Tensor) -> None:
    # as bytes: not every device fills E4M3
    x.view(torch.uint8 if x.dtype == E4M3 else x.dtype).zero_()
