"""The autoencoder's decoder for streaming: the same weights, arranged for speed, and buffers that stay where they are.

Every causal convolution owns a buffer of the frames it is given, the last two of the call before in front; what comes
before a convolution writes there, so nothing is joined and nothing is padded. Biases, norms, SiLU and shortcuts between
convolutions are one pass over memory. A 2x upsampling and the 3x3 convolution after it are one 2x2 convolution at the
low resolution, with four times the outputs: a result sees at most two different pixels along an axis.

Shapes: B batch, T frames, H W grid, C channels, z latent channels; activations lie in memory as BTHWC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.errors import UserError
from longvideo.kernels.backends import DecoderOperations, decoder_operations
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.layers import CausalConv3d, ResidualBlock, State, UpBlock

HISTORY = 2


def fold_upsampling(weight_OI33: Tensor) -> Tensor:
    """Return [4 O, I, 2, 2]: a 2x nearest upsampling and a 3x3 convolution, as one 2x2 convolution with padding 1.

    Phase (a, b) of pixel (i, j) is output 2 a + b at (i + a, j + b). In phase 0 the upper tap sees the pixel before and
    the other two this one; in phase 1 the lower tap sees the pixel after.
    """
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    weight = weight_OI33.double().cpu()
    folded = torch.einsum("apy,bqx,oiyx->aboipq", taps, taps, weight).flatten(0, 2)
    return folded.to(weight_OI33)


class _Convolution:
    """A causal convolution with the frames it is given: those it remembers, then those of this call."""

    def __init__(self, conv: nn.Conv3d, batch: int, frames: int, height: int, width: int):
        self.weight = conv.weight.detach().contiguous(memory_format=torch.channels_last_3d)
        _, height_taps, width_taps = conv.kernel_size
        self.padding = (0, height_taps // 2, width_taps // 2)
        assert conv.bias is not None
        # cuDNN leaves the bias to a pass of its own; what follows the convolution adds it in passing
        bias = conv.bias.detach()
        self.own_bias, self.bias = (None, bias) if bias.is_cuda else (bias, None)
        self.buffer = self.weight.new_zeros(batch, HISTORY + frames, height, width, conv.in_channels)

    def inputs(self, frames: int) -> Tensor:
        return self.buffer[:, HISTORY : HISTORY + frames]

    def __call__(self, frames: int) -> Tensor:
        """Convolve what is in the buffer, but for `bias`, and remember its last frames."""
        x = self.buffer[:, : HISTORY + frames]
        y = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.own_bias, padding=self.padding).permute(0, 2, 3, 4, 1)
        for index in range(HISTORY):  # one after the other: with one new frame they overlap
            self.buffer[:, index] = self.buffer[:, frames + index]
        return y


class _Residual:
    """A residual block whose input waits, normalised, in the buffer of its first convolution."""

    def __init__(self, block: ResidualBlock, convolutions: tuple[_Convolution, _Convolution]):
        self.first, self.second = convolutions
        self.gamma_in, self.gamma = (norm.gamma.detach().flatten() for norm in (block.norm1, block.norm2))
        shortcut = block.conv_shortcut
        self.shortcut = shortcut if isinstance(shortcut, nn.Conv3d) else None

    def narrow(self, x: Tensor) -> Tensor:
        """Return what goes around the block."""
        if self.shortcut is None:
            return x
        return F.linear(x, self.shortcut.weight.flatten(1), self.shortcut.bias)


@dataclass
class _Level:
    """The blocks at one resolution, and the way up from it: `times` frames for one, `offsets` of its shortcut."""

    blocks: list[_Residual]
    upsampling: Tensor | None = None
    bias: Tensor | None = None
    time: _Convolution | None = None
    times: int = 1
    offsets: tuple[int, int, int] = (1, 1, 1)


class StreamingDecoder:
    """Latents of a batch of videos to pixels, in order. What it remembers is allocated once.

    Agrees with `Autoencoder.decode` up to rounding. latents_per_step: later latent frames that are decoded together;
    one bounds memory, more suit small grids.
    """

    def __init__(self, autoencoder: Autoencoder, *, batch: int, height: int, width: int, latents_per_step: int = 1):
        """height, width: of the latents."""
        decoder, first = autoencoder.decoder, autoencoder.post_quant_conv
        assert first.bias is not None
        self.config, self.shape, self.latents_per_step = autoencoder.config, (batch, height, width), latents_per_step
        self.device, self.dtype = first.weight.device, first.weight.dtype
        self.operations: DecoderOperations = decoder_operations(self.device)
        # to undo the latents' normalisation and to convolve with 1x1x1 is one matrix
        matrix, mean = first.weight.detach().flatten(1).float(), autoencoder.latents_mean.flatten()
        self._matrix = (matrix * autoencoder.latents_std.flatten()).to(self.dtype)
        self._offset = (matrix @ mean + first.bias.detach().float()).to(self.dtype)
        self._convolutions: list[_Convolution] = []
        self._frames, self._height, self._width = latents_per_step, height, width
        self._conv_in = self._convolution(decoder.conv_in)
        self._mid = [self._residual(block) for block in cast(list[ResidualBlock], list(decoder.mid_block.resnets))]
        self._attention = decoder.mid_block.attentions[0]
        self._levels = [self._level(block) for block in cast(list[UpBlock], list(decoder.up_blocks))]
        self._norm_out = decoder.norm_out.gamma.detach().flatten()
        self._conv_out = self._convolution(decoder.conv_out)
        self._opened = False

    @torch.inference_mode()
    def decode(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 [B, frames, H, W, 3] of the next latent frames, normalised as a transformer makes them.

        The first of a video is one frame, later ones `scale_factor_temporal`.
        """
        batch, channels, frames, height, width = latents_BzTHW.shape
        if (batch, height, width) != self.shape or channels != self.config.z_dim or not frames:
            raise UserError(
                f"latents are {list(latents_BzTHW.shape)}, wanted [{self.shape[0]}, {self.config.z_dim}, 1 or more,"
                f" {self.shape[1]}, {self.shape[2]}]"
            )
        pieces = []
        if not self._opened:
            pieces.append(self._decode(latents_BzTHW[:, :, :1], opening=True))
            latents_BzTHW, self._opened = latents_BzTHW[:, :, 1:], True
        pieces += [
            self._decode(part, opening=False)
            for part in latents_BzTHW.split(self.latents_per_step, dim=2)
            if part.shape[2]
        ]
        return torch.cat(pieces, dim=1)

    def state(self) -> State:
        """Return copies of what is remembered of the frames so far; empty before the first."""
        return tuple(conv.buffer[:, :HISTORY].clone() for conv in self._convolutions) if self._opened else ()

    def restore(self, state: State) -> None:
        """Go on from where `state` was taken; from () with a new video."""
        self._opened = bool(state)
        for index, conv in enumerate(self._convolutions):
            conv.buffer[:, :HISTORY] = state[index] if state else 0

    def _decode(self, latents_BzTHW: Tensor, *, opening: bool) -> Tensor:
        add_norm_silu = self.operations.add_norm_silu
        frames = latents_BzTHW.shape[2]
        x = F.linear(latents_BzTHW.permute(0, 2, 3, 4, 1).to(self.dtype), self._matrix, self._offset)
        self._conv_in.inputs(frames).copy_(x)
        x = self._conv_in(frames)
        first, second = self._mid
        add_norm_silu(x, self._conv_in.bias, None, x, first.gamma_in, first.first.inputs(frames))
        x = self._run(first, x, frames, None, None)
        x = self._attention(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).contiguous()
        add_norm_silu(x, None, None, None, second.gamma_in, second.first.inputs(frames))
        entry = self._levels[0].blocks[0]
        x = self._run(second, x, frames, entry.gamma_in, entry.first.inputs(frames))
        for index, level in enumerate(self._levels):
            following = self._levels[index + 1].blocks[0] if index + 1 < len(self._levels) else None
            x = self._climb(level, x, frames, following, opening=opening)
            frames = frames if opening else frames * level.times
        packed = self._conv_out(frames)
        batch, _, height, width, _ = packed.shape
        patch = self.config.patch_size
        pixels = torch.empty(batch, frames, patch * height, patch * width, 3, dtype=torch.uint8, device=self.device)
        self.operations.to_pixels(packed, self._conv_out.bias, patch, pixels)
        return pixels

    def _run(
        self,
        block: _Residual,
        x: Tensor,
        frames: int,
        gamma: Tensor | None,
        out: Tensor | None,
        *,
        into: Tensor | None = None,
        keep: bool = True,
    ) -> Tensor:
        """Run a residual block; write its result, normalised with gamma, to out.

        The result itself is returned, in `into` where that is given; without keep it is not even written.
        """
        h = block.first(frames)
        self.operations.add_norm_silu(h, block.first.bias, None, None, block.gamma, block.second.inputs(frames))
        h = block.second(frames)
        total = h if into is None else into
        self.operations.add_norm_silu(h, block.second.bias, block.narrow(x), total if keep else None, gamma, out)
        return total

    def _climb(self, level: _Level, x: Tensor, frames: int, following: _Residual | None, *, opening: bool) -> Tensor:
        """Go through a level and up to the next, whose first block's input is left ready."""
        inner = x
        for block, after in zip(level.blocks[:-1], level.blocks[1:], strict=True):
            inner = self._run(block, inner, frames, after.gamma_in, after.first.inputs(frames))
        if level.upsampling is None:
            return self._run(level.blocks[-1], inner, frames, self._norm_out, self._conv_out.inputs(frames), keep=False)
        assert following is not None and level.bias is not None
        time = None if opening else level.time
        inner = self._run(level.blocks[-1], inner, frames, None, None, into=time and time.inputs(frames))
        if time is not None:
            pairs = time(frames)
            batch, _, height, width, channels = pairs.shape
            inner = pairs.new_empty(batch, frames, 2, height, width, channels // 2)
            pairs = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
            if time.bias is None:
                inner.copy_(pairs)
            else:
                torch.add(pairs, time.bias.view(2, 1, 1, -1), out=inner)
            inner = inner.flatten(1, 2)
        folded = F.conv2d(inner.flatten(0, 1).permute(0, 3, 1, 2), level.upsampling, padding=1).permute(0, 2, 3, 1)
        batch, frames, height, width, channels = inner.shape
        folded = folded.unflatten(0, (batch, frames))
        total = folded.new_empty(batch, frames, 2 * height, 2 * width, level.bias.shape[0])
        self.operations.upsample_add_norm_silu(
            folded, level.bias, x, level.offsets, level.times, total, following.gamma_in, following.first.inputs(frames)
        )
        return total

    def _convolution(self, conv: CausalConv3d) -> _Convolution:
        added = _Convolution(conv, self.shape[0], self._frames, self._height, self._width)
        self._convolutions.append(added)
        return added

    def _residual(self, block: ResidualBlock) -> _Residual:
        return _Residual(block, (self._convolution(block.conv1), self._convolution(block.conv2)))

    def _level(self, block: UpBlock) -> _Level:
        resnets = cast(list[ResidualBlock], list(block.resnets))
        blocks = [self._residual(resnet) for resnet in resnets]
        if block.upsampler is None:
            return _Level(blocks)
        upsampler, (times, _, _) = block.upsampler, block.factors
        time = None if upsampler.time_conv is None else self._convolution(upsampler.time_conv)
        conv = cast(nn.Conv2d, upsampler.resample[1])
        assert conv.bias is not None
        self._frames, self._height, self._width = times * self._frames, 2 * self._height, 2 * self._width
        return _Level(
            blocks,
            upsampling=fold_upsampling(conv.weight.detach()).contiguous(memory_format=torch.channels_last),
            bias=conv.bias.detach(),
            time=time,
            times=times,
            offsets=_offsets(resnets[0].conv1.in_channels // block.out_channels, block.factors),
        )


def _offsets(surplus: int, factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Say along which axes surplus channels of the shortcut become pixels: see `layers.unfold_from_channels`."""
    offsets = []
    for factor in factors:
        offsets.append(factor if surplus > 1 else 1)
        surplus //= offsets[-1]
    return offsets[0], offsets[1], offsets[2]
