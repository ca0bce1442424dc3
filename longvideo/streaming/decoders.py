"""Decoders of latents as the pipeline sees them: Wan's autoencoder, a pruned one, or a tiny one.

A `DecoderModel` has loaded weights, and starts any number of `VideoDecoder`s, each with the state of a batch of videos.
The pipeline, the memory estimate, the benchmarks and the server use nothing else of a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from longvideo.checkpoint.modules import OnMeta
from longvideo.errors import UserError
from longvideo.kernels.vae.format import CHANNEL_MULTIPLE
from longvideo.pixels import to_uint8
from longvideo.streaming.decoder import StreamingDecoder
from longvideo.streaming.decoder_plan import PlannedStage, boundary_of, plan_stages
from longvideo.streaming.tiny_decoder import TinyStreamingDecoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.halo import decode_lookback
from longvideo.vae.tae import COLORS, TinyAutoencoderConfig, TinyDecoder
from longvideo.vae.tae_layers import BLOCKS_PER_STAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.streaming.decoder_convolutions import Grid
    from longvideo.streaming.recording import GraphRecorder
    from longvideo.vae.layers import State

DecoderConfig: TypeAlias = AutoencoderConfig | TinyAutoencoderConfig
OWN_DECODER = "the autoencoder"
"""Name of a model's own decoder, for people."""
BYTES_OF_COLOR = 14
"""Largest number of bytes of a color of a pixel while a tiny decoder's video is converted: 4 in the dtype, twice 4 in
float32, and twice 1 in 8 bits."""


class VideoDecoder(Protocol):
    """Decoder of a batch of videos, in order.

    devices: devices that it runs on; the last one returns the pixels. opened: whether the opening frame is decoded.
    Methods work on the current streams of the devices and must not be called from two threads at once.
    """

    devices: tuple[torch.device, ...]
    opened: bool

    def decode(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 frames [B, T, H, W, 3] of the next normalized latent frames, any number of them."""
        ...

    def warm_up(self) -> None:
        """Compile and record the work of CUDA devices, and begin a new video."""
        ...

    def begin(self, *, inside: bool = False) -> None:
        """Begin a new video. inside: whether later latent frames come first, after frames of zeros."""
        ...

    def state(self) -> State:
        """Return copies of the frames that are kept for later calls; empty before the first frame of a video."""
        ...

    def restore(self, state: State) -> None:
        """Continue after the frames of a `state`; () begins a new video."""
        ...


class DecoderModel(Protocol):
    """Loaded weights of a decoder.

    name: name of the decoder, for people. lookback: largest number of earlier latent frames that a frame depends on.
    """

    name: str
    lookback: int

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def start(
        self,
        grid: Grid,
        *,
        first_device: torch.device | None = None,
        first_share: float = 0.0,
        recorder: GraphRecorder | None = None,
    ) -> VideoDecoder:
        """Return a decoder of new videos.

        grid: sizes of the latents. Its frames are those that are decoded together where the decoder lets the caller
        choose; its number format is that of the model. first_device, first_share: device that does this fraction of the
        work, before the device of the weights does the rest. recorder: recorder of its CUDA graphs, whose memory they
        share with others; None means one of its own.
        """
        ...

    def plain(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 frames of a whole video by the definition, with which fast paths are compared."""
        ...


class WanDecoderModel:
    """The decoder of an autoencoder of Wan2.2's form, with any number of channels."""

    def __init__(self, autoencoder: Autoencoder, *, name: str, fp8: bool = False) -> None:
        """fp8: whether its large convolutions compute in E4M3."""
        self._autoencoder, self._fp8 = autoencoder, fp8
        self.name, self.lookback = name, decode_lookback(autoencoder.config)

    @property
    def config(self) -> AutoencoderConfig:
        return self._autoencoder.config

    @property
    def device(self) -> torch.device:
        return self._autoencoder.post_quant_conv.weight.device

    def start(
        self,
        grid: Grid,
        *,
        first_device: torch.device | None = None,
        first_share: float = 0.0,
        recorder: GraphRecorder | None = None,
    ) -> VideoDecoder:
        # more latent frames in a step of a GPU take more memory, and do not make it faster
        return StreamingDecoder(
            self._autoencoder,
            replace(grid, frames=1 if self.device.type == "cuda" else grid.frames, fp8=self._fp8),
            devices=None if first_device is None or not first_share else (first_device, self.device),
            first_share=first_share,
            recorder=recorder,
        )

    @torch.inference_mode()
    def plain(self, latents_BzTHW: Tensor) -> Tensor:
        autoencoder, dtype = self._autoencoder, self._autoencoder.post_quant_conv.weight.dtype
        video_BCTHW, _ = autoencoder.decode(autoencoder.denormalize(latents_BzTHW).to(dtype))
        return to_uint8(video_BCTHW)


class TinyDecoderModel:
    """A tiny decoder, which runs on one device."""

    def __init__(self, decoder: TinyDecoder, *, name: str) -> None:
        self._decoder, self.name, self.lookback = decoder, name, decoder.lookback

    @property
    def config(self) -> TinyAutoencoderConfig:
        return self._decoder.config

    @property
    def device(self) -> torch.device:
        return next(self._decoder.parameters()).device

    def start(
        self,
        grid: Grid,
        *,
        first_device: torch.device | None = None,
        first_share: float = 0.0,
        recorder: GraphRecorder | None = None,
    ) -> VideoDecoder:
        if first_device is not None:
            check_share(self.config, first_share, self.name)
        return TinyStreamingDecoder(self._decoder, grid, recorder=recorder)

    @torch.inference_mode()
    def plain(self, latents_BzTHW: Tensor) -> Tensor:
        video_BCTHW, _ = self._decoder.decode(latents_BzTHW.to(next(self._decoder.parameters()).dtype))
        return to_uint8(video_BCTHW)


@dataclass(frozen=True)
class DecoderBytes:
    """Bytes of a decoder on a device.

    kept: weights, buffers, and inputs and outputs of graphs. opening: peak of the activations for the opening frame of
    a video, which no graph records. later: peak of the activations for later frames.
    """

    kept: int = 0
    opening: int = 0
    later: int = 0


def decoder_bytes(
    config: DecoderConfig,
    grid: Grid,
    *,
    dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
    share: float,
) -> dict[torch.device, DecoderBytes]:
    """Return the bytes that a decoder takes on GPUs besides its loaded weights, from its configuration alone.

    grid: sizes of the latents, as in `DecoderModel.start`, and the number format. devices: the one that runs the first
    stages, and the one that runs the others. share: fraction of the first one's work; 0 leaves all of it to the second.
    """
    if isinstance(config, TinyAutoencoderConfig):
        return {devices[1]: _tiny_bytes(config, dtype, grid)}
    plan = plan_stages(_on_meta(config, dtype), replace(grid, frames=1))
    boundary = boundary_of(plan, share) if share else 0
    copied = plan[boundary - 1].memory.result if boundary else 0
    decoders = {devices[1]: _stage_bytes(plan[boundary:], copied)}
    if boundary:
        decoders[devices[0]] = _stage_bytes(plan[:boundary], copied)
    return decoders


def check_share(config: DecoderConfig, share: float, name: str) -> None:
    """Raise UserError where two devices cannot share a decoder. name: name of the decoder, for the error."""
    if share and isinstance(config, TinyAutoencoderConfig):
        raise UserError(
            f"decode_share is {share:g}, but the decoder is {name}, which runs on one device; leave --decode-share out,"
            " or use --decoder wan"
        )


def check_fp8(config: DecoderConfig, name: str) -> None:
    """Raise UserError where a decoder cannot compute in FP8 on any device. name: name of the decoder, for the error."""
    if isinstance(config, TinyAutoencoderConfig):
        raise UserError(f"the decoder is {name}, which has no FP8 form; use --decoder-precision bf16, or --decoder wan")
    channels = sorted({config.decoder_base_dim * factor for factor in config.dim_mult})
    if any(count % CHANNEL_MULTIPLE for count in channels):
        raise UserError(
            f"the decoder is {name}, whose levels have {', '.join(map(str, channels))} channels; FP8 needs multiples"
            f" of {CHANNEL_MULTIPLE}; use --decoder-precision bf16"
        )


@cache
def _on_meta(config: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    with OnMeta():
        return Autoencoder(config).to(dtype)


def _stage_bytes(stages: Sequence[PlannedStage], copied: int) -> DecoderBytes:
    """Return the sum over the stages of a device.

    copied: bytes that are copied from one device to the other, for which both have a buffer.
    """
    return DecoderBytes(
        kept=sum(stage.memory.kept for stage in stages) + max(stage.memory.buffer for stage in stages) + copied,
        opening=max(stage.memory.opening for stage in stages),
        later=max(stage.memory.later for stage in stages),
    )


def _tiny_bytes(config: TinyAutoencoderConfig, dtype: torch.dtype, grid: Grid) -> DecoderBytes:
    frame = grid.batch * grid.height * grid.width
    widths, scale = config.decoder_widths, config.scale_factor_spatial
    # in the last stage two activations before the patches, and the pixels while they are converted
    area = (scale // config.patch_size) ** 2
    pixels = COLORS * scale**2 * BYTES_OF_COLOR
    last = frame * config.scale_factor_temporal * (2 * area * widths[-1] * dtype.itemsize + pixels)
    state = sum(BLOCKS_PER_STAGE * width * frame * 4**index for index, width in enumerate(widths[:-1]))
    # the state is kept twice: a step returns the next one, which is then copied
    return DecoderBytes(kept=2 * state * dtype.itemsize, opening=last, later=last * grid.frames)
