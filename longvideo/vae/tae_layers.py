"""Layers of the tiny autoencoder: 2-D convolutions of frames that are folded into the batch.

A layer takes and returns activations in NHWC memory (torch.channels_last). Wherever values are reordered, one pass over
the memory does it.

Shapes: B batch, C channels, T frames, H W grid, N = B x T frames, the frames of one video after another; S stride of
time, D two times C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.vae.layers import Memory

BLOCKS_PER_STAGE = 3
DEPTHWISE_KERNEL, EXPANSION = 7, 2


class TanhBound(nn.Module):
    """Bound values smoothly to [-bound, bound]."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.bound) * self.bound


class MemoryBlock(nn.Module):
    """Three 3x3 convolutions of a frame and the frame before it, with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
        return F.relu(self.conv(with_previous(x_NCHW, batch, memory)) + x_NCHW, inplace=True)


class DepthwiseMemoryBlock(nn.Module):
    """A 7x7 depthwise convolution of a frame and the frame before it, a 1x1 bottleneck, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        pair, hidden = 2 * channels, 2 * channels * EXPANSION
        self.conv = nn.Sequential(
            nn.Conv2d(pair, pair, DEPTHWISE_KERNEL, padding=DEPTHWISE_KERNEL // 2, groups=pair, bias=False),
            nn.Conv2d(pair, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
        return self.conv(with_previous(x_NCHW, batch, memory)) + x_NCHW


class NearestUpStage(nn.Module):
    """A stage of the base decoder: memory blocks, more frames, nearest upsampling, and a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.blocks = nn.ModuleList(MemoryBlock(in_channels) for _ in range(BLOCKS_PER_STAGE))
        self.grow = nn.Conv2d(in_channels, stride * in_channels, 1, bias=False)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
        for block in self.blocks:
            x_NCHW = block(x_NCHW, batch, memory)
        # a 1x1 convolution commutes with nearest upsampling; before it, it needs a quarter of the products
        return self.conv(upsample_nearest(unfold_frames(self.grow(x_NCHW), self.stride)))


class ShuffleUpStage(nn.Module):
    """A stage of the super decoder: memory blocks, a 3x3 convolution, pixel shuffle, and more frames."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.blocks = nn.ModuleList(DepthwiseMemoryBlock(in_channels) for _ in range(BLOCKS_PER_STAGE))
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        self.grow = nn.Conv2d(out_channels, stride * out_channels, 1, bias=False)

    def forward(self, x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
        for block in self.blocks:
            x_NCHW = block(x_NCHW, batch, memory)
        x_NCHW = shuffle_pixels(F.relu(self.conv(x_NCHW), inplace=True), 2)
        return unfold_frames(self.grow(x_NCHW), self.stride)


class PoolStage(nn.Module):
    """A stage of the encoder: a 1x1 convolution of `stride` frames, a 3x3 one of stride 2, and memory blocks."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pool = nn.Conv2d(stride * channels, channels, 1, bias=False)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.ModuleList(MemoryBlock(channels) for _ in range(BLOCKS_PER_STAGE))

    def forward(self, x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
        x_NCHW = self.conv(self.pool(join_frames(x_NCHW, self.stride)))
        for block in self.blocks:
            x_NCHW = block(x_NCHW, batch, memory)
        return x_NCHW


def with_previous(x_NCHW: Tensor, batch: int, memory: Memory) -> Tensor:
    """Return each frame joined with the frame before it along the channels; before the first frame are zeros."""
    x_BTHWC = x_NCHW.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
    past_BC1HW = memory.recall()
    memory.keep(x_BTHWC[:, -1:].permute(0, 4, 1, 2, 3))
    channels = x_BTHWC.shape[4]
    # one pass over the memory, where two concatenations would be two
    pair_BTHWD = x_BTHWC.new_empty(*x_BTHWC.shape[:4], 2 * channels)
    pair_BTHWD[..., :channels] = x_BTHWC
    pair_BTHWD[:, 1:, ..., channels:] = x_BTHWC[:, :-1]
    pair_BTHWD[:, :1, ..., channels:] = 0 if past_BC1HW is None else past_BC1HW.permute(0, 2, 3, 4, 1)
    return pair_BTHWD.flatten(0, 1).permute(0, 3, 1, 2)


def fold_frames(x_BCTHW: Tensor) -> Tensor:
    """Return frames as images [N, C, H, W] in NHWC memory, the frames of one video after another."""
    return x_BCTHW.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


def unfold_frames(x_NCHW: Tensor, stride: int) -> Tensor:
    """Turn channels into `stride` times as many frames; the first channels are the first frame."""
    if stride == 1:
        return x_NCHW
    x_NSHWC = x_NCHW.permute(0, 2, 3, 1).unflatten(3, (stride, -1)).permute(0, 3, 1, 2, 4)
    return x_NSHWC.flatten(0, 1).permute(0, 3, 1, 2)


def join_frames(x_NCHW: Tensor, stride: int) -> Tensor:
    """Join the channels of every `stride` successive frames, the inverse of `unfold_frames`."""
    if stride == 1:
        return x_NCHW
    x_NHWSC = x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, stride)).permute(0, 2, 3, 1, 4)
    return x_NHWSC.flatten(3).permute(0, 3, 1, 2)


def upsample_nearest(x_NCHW: Tensor) -> Tensor:
    """Double the grid by repeating every pixel."""
    num_frames, channels, height, width = x_NCHW.shape
    x = x_NCHW.permute(0, 2, 3, 1)[:, :, None, :, None].expand(num_frames, height, 2, width, 2, channels)
    return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def shuffle_pixels(x_NCHW: Tensor, factor: int) -> Tensor:
    """Turn channels (color, row, column) into factor x factor pixels, as torch.pixel_shuffle does, in NHWC memory."""
    x = x_NCHW.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def unshuffle_pixels(x_NCHW: Tensor, factor: int) -> Tensor:
    """Turn factor x factor pixels into channels, the inverse of `shuffle_pixels`."""
    x = x_NCHW.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).permute(0, 1, 3, 5, 2, 4)
    return x.flatten(3).permute(0, 3, 1, 2)
