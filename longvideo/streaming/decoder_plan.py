"""The list of stages of a streaming decoder, with the work and the memory of each, before any is built.

A plan needs only the shapes of an autoencoder, so it can be made on the meta device. Memory is stated in bytes of the
dtype of the autoencoder's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from longvideo.errors import UserError
from longvideo.streaming.decoder_convolutions import HISTORY, Grid, StageBuilder
from longvideo.streaming.decoder_stages import (
    AttentionStage,
    DecoderStage,
    EntryStage,
    ExitStage,
    ResidualStage,
    UpsamplingStage,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.kernels.backends import DecoderOperations
    from longvideo.vae.autoencoder import Autoencoder
    from longvideo.vae.layers import CausalConv3d, FrameAttention, ResidualBlock, UpBlock

WIDTHS_OF_ATTENTION = 6
"""Number of tensors as wide as its input that attention among the pixels of a frame holds at most."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage takes on its device.

    kept: weights, and buffers, or the frames that convolutions keep if all use one buffer in turn.
    buffer: size that the stage needs of that one buffer, 0 if its convolutions have their own.
    opening: activations held at once for the opening frame of a video, which no graph records.
    later: activations held at once for a whole step of later frames.
    result: activations that a whole step of later frames gives to the next stage.
    """

    kept: int
    buffer: int
    opening: int
    later: int
    result: int


@dataclass(frozen=True)
class PlannedStage:
    """A stage before it is built.

    assemble: function that returns it, with what a builder on its device builds.
    grid: sizes of its inputs in a whole step of later frames.
    multiply_adds: number of multiply-adds of its convolutions in a whole step of later frames.
    may_end_part: whether the next stage may be on another device.
    """

    assemble: Callable[[StageBuilder], DecoderStage]
    grid: Grid
    multiply_adds: int
    memory: StageMemory
    may_end_part: bool = False

    def build(self, device: torch.device, operations: DecoderOperations) -> DecoderStage:
        """Return the stage on a device, with the operations of the device."""
        return self.assemble(StageBuilder(self.grid, device, operations))


def plan_stages(autoencoder: Autoencoder, grid: Grid) -> list[PlannedStage]:
    """Return the stages from latents to pixels. grid: sizes of the latents of a whole step of later frames."""
    decoder = autoencoder.decoder
    first, second = cast("list[ResidualBlock]", list(decoder.mid_block.resnets))
    plan = [
        _entry(autoencoder, grid),
        _residual(first, grid),
        _attention(cast("FrameAttention", decoder.mid_block.attentions[0]), grid),
        _residual(second, grid),
    ]
    for level in cast("list[UpBlock]", list(decoder.up_blocks)):
        blocks = cast("list[ResidualBlock]", list(level.resnets))
        is_last = level.upsampler is None
        around = 0 if is_last else blocks[0].conv1.in_channels
        plan += [
            _residual(block, grid, around=around, opens_level=not is_last and block is blocks[0]) for block in blocks
        ]
        if not is_last:
            plan.append(_upsampling(level, grid))
            times, _, _ = level.factors
            grid = replace(grid, frames=times * grid.frames, height=2 * grid.height, width=2 * grid.width)
    return [*plan, _exit(autoencoder, grid)]


def boundary_of(plan: Sequence[PlannedStage], first_share: float) -> int:
    """Return the number of leading stages whose share of the multiply-adds is the nearest to `first_share`.

    Raises UserError for a share outside (0, 1).
    """
    if not 0 < first_share < 1:
        raise UserError(f"first_share is {first_share}; expected a number above 0 and below 1")
    done = list(accumulate(stage.multiply_adds for stage in plan))
    counts = [index + 1 for index, stage in enumerate(plan) if stage.may_end_part]
    return min(counts, key=lambda count: abs(done[count - 1] - first_share * done[-1]))


def _entry(autoencoder: Autoencoder, grid: Grid) -> PlannedStage:
    conv = autoencoder.decoder.conv_in
    memory = _memory([conv], grid, conv.weight.dtype, held=conv.out_channels, result=conv.out_channels)
    return PlannedStage(partial(EntryStage, autoencoder), grid, grid.pixels * _num_weights(conv), memory)


def _residual(block: ResidualBlock, grid: Grid, *, around: int = 0, opens_level: bool = False) -> PlannedStage:
    """around: number of channels of the activations that go around the level of the block."""
    narrow, wide = block.conv1.in_channels, block.conv1.out_channels
    return PlannedStage(
        partial(ResidualStage, block, opens_level=opens_level),
        grid,
        grid.pixels * _num_weights(block),
        _memory(
            [block.conv1, block.conv2],
            grid,
            block.conv1.weight.dtype,
            held=narrow + 2 * wide + around,
            result=wide + around,
            fp8=grid.fp8,
        ),
        may_end_part=True,
    )


def _attention(attention: FrameAttention, grid: Grid) -> PlannedStage:
    width = attention.proj.in_channels
    memory = _memory([], grid, attention.proj.weight.dtype, held=WIDTHS_OF_ATTENTION * width, result=width)
    return PlannedStage(partial(AttentionStage, attention), grid, grid.pixels * _num_weights(attention), memory)


def _upsampling(level: UpBlock, grid: Grid) -> PlannedStage:
    assert level.upsampler is not None
    time, conv = level.upsampler.time_conv, cast("nn.Conv2d", level.upsampler.resample[1])
    narrow, around = conv.in_channels, cast("ResidualBlock", level.resnets[0]).conv1.in_channels
    times, _, _ = level.factors
    wide = 4 * conv.out_channels  # four pixels for one
    folded_weights = 4 * 4 * conv.in_channels * conv.out_channels
    kept = folded_weights * conv.weight.dtype.itemsize
    if grid.fp8:
        kept = folded_weights + grid.batch * times * grid.frames * grid.framed_pixels * narrow
    memory = _memory(
        [] if time is None else [time],
        grid,
        conv.weight.dtype,
        held=narrow + around + times * (2 * wide + (0 if time is None else narrow)),
        held_for_opening=narrow + around + 2 * wide,
        result=times * wide,
        more_kept=kept,
    )
    large = replace(grid, frames=times * grid.frames, height=grid.height + 1, width=grid.width + 1)
    multiply_adds = large.pixels * folded_weights + (0 if time is None else grid.pixels * _num_weights(time))
    return PlannedStage(partial(UpsamplingStage, level), grid, multiply_adds, memory, may_end_part=True)


def _exit(autoencoder: Autoencoder, grid: Grid) -> PlannedStage:
    conv = autoencoder.decoder.conv_out
    held = conv.in_channels + 2 * conv.out_channels
    memory = _memory([conv], grid, conv.weight.dtype, held=held, result=conv.out_channels)
    return PlannedStage(partial(ExitStage, autoencoder), grid, grid.pixels * _num_weights(conv), memory)


def _memory(
    convolutions: Sequence[CausalConv3d],
    grid: Grid,
    dtype: torch.dtype,
    *,
    held: int,
    result: int,
    held_for_opening: int | None = None,
    more_kept: int = 0,
    fp8: bool = False,
) -> StageMemory:
    """Return the memory of a stage with these causal convolutions.

    held, result: number of values for each pixel of the grid. held_for_opening: the same for an opening frame, by
    default `held`. more_kept: bytes that are kept besides weights and buffers of the convolutions. fp8: whether the
    convolutions compute in E4M3, with zeros around each frame.
    """
    frame = grid.pixels // grid.frames
    kept_frame, itemsize = (grid.batch * grid.framed_pixels, 1) if fp8 else (frame, dtype.itemsize)
    channels = [conv.in_channels for conv in convolutions]
    buffers = sum(channels) * kept_frame * (HISTORY if grid.shares_buffer else HISTORY + grid.frames)
    shared = max(channels, default=0) * kept_frame * (HISTORY + grid.frames) if grid.shares_buffer else 0
    weights = sum(conv.weight.numel() for conv in convolutions)
    return StageMemory(
        kept=(weights + buffers) * itemsize + more_kept,
        buffer=shared * itemsize,
        opening=frame * (held if held_for_opening is None else held_for_opening) * dtype.itemsize,
        later=grid.pixels * held * dtype.itemsize,
        result=grid.pixels * result * dtype.itemsize,
    )


def _num_weights(module: nn.Module) -> int:
    """Return the number of weights of convolutions, each of which is multiplied once for each pixel."""
    convolutions = [conv for conv in module.modules() if isinstance(conv, (nn.Conv2d, nn.Conv3d))]
    return sum(conv.weight.numel() for conv in convolutions)
