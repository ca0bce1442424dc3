"""The autoencoder's decoder for streaming: the same weights, arranged for speed, and buffers that stay where they are.

Every causal convolution owns a buffer of the frames it is given, the last two of the call before in front; what comes
before a convolution writes there, so nothing is joined and nothing is padded. Biases, norms, SiLU and shortcuts between
convolutions are one pass over memory. A 2x upsampling and the 3x3 convolution after it are one 2x2 convolution at the
low resolution, with four times the outputs: a result sees at most two different pixels along an axis.

`decoder_stages` has the stages of this. Two devices can share them; on CUDA, what a device does in a step is one graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.kernels.backends import DecoderOperations, decoder_operations
from longvideo.streaming.decoder_plan import PlannedStage, boundary_of, plan_stages
from longvideo.streaming.decoder_stages import HISTORY, Activations, Grid, Target, hand_over

if TYPE_CHECKING:
    from longvideo.vae.autoencoder import Autoencoder
    from longvideo.vae.layers import State


class StreamingDecoder:
    """Latents of a batch of videos to pixels, in order. What it remembers is allocated once.

    Agrees with `Autoencoder.decode` up to rounding. latents_per_step: later latent frames that are decoded together;
    one bounds memory, more suit small grids. The convolutions' weights are copies, in cuDNN's order: 1.1 GB beside the
    autoencoder's own for Wan2.2 in bf16.

    On CUDA the first step of `latents_per_step` later frames runs as it is and is then recorded, those after it are
    replayed; an opening frame and what is left over run as they are. cuDNN takes the fastest convolutions it measures
    in that first step, so another process may round otherwise. It works on the current streams of its devices, and its
    methods must not be called from two threads at a time.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        batch: int,
        height: int,
        width: int,
        latents_per_step: int = 1,
        devices: tuple[torch.device, torch.device] | None = None,
        first_share: float = 0.5,
    ):
        """height, width: of the latents.

        devices: two that share the decoder, None for the autoencoder's. The first takes the leading stages, as near to
        `first_share` of the convolutions' multiply-adds as the ends of residual blocks and upsamplings allow; pixels
        are made on the second. Raises UserError for a share outside (0, 1).
        """
        weight = autoencoder.post_quant_conv.weight
        self.config, self.shape, self.latents_per_step = autoencoder.config, (batch, height, width), latents_per_step
        self.dtype = weight.dtype
        plan = plan_stages(autoencoder, Grid(batch, latents_per_step, height, width))
        if devices is None:
            self._parts = [_Part(plan, weight.device)]
        else:
            boundary = boundary_of(plan, first_share)
            places = [torch.empty(0, device=device).device for device in devices]  # "cuda" becomes "cuda:0"
            self._parts = [_Part(plan[:boundary], places[0]), _Part(plan[boundary:], places[1])]
        self.devices = tuple(part.device for part in self._parts)
        total = sum(stage.multiply_adds for stage in plan)
        self.shares = tuple(part.multiply_adds / total for part in self._parts)
        self._convolutions = [conv for part in self._parts for stage in part.stages for conv in stage.convolutions]
        self.opened = False

    @torch.inference_mode()
    def decode(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 [B, frames, H, W, 3] of the next latent frames, normalised as a transformer makes them.

        The first of a video is one frame, later ones `scale_factor_temporal`. The pixels are on the last device.
        """
        batch, channels, num_latents, height, width = latents_BzTHW.shape
        if (batch, height, width) != self.shape or channels != self.config.z_dim or not num_latents:
            raise UserError(
                f"latents are {list(latents_BzTHW.shape)}, wanted [{self.shape[0]}, {self.config.z_dim}, 1 or more,"
                f" {self.shape[1]}, {self.shape[2]}]"
            )
        x_BTHWz = latents_BzTHW.to(self.dtype).permute(0, 2, 3, 4, 1)
        num_opening = 0 if self.opened else 1
        num_later, times, scale = (
            num_latents - num_opening,
            self.config.scale_factor_temporal,
            self.config.scale_factor_spatial,
        )
        pixels = torch.empty(
            (batch, num_opening + times * num_later, scale * height, scale * width, 3),
            dtype=torch.uint8,
            device=self.devices[-1],
        )
        if num_opening:
            pixels[:, :1] = self._step(x_BTHWz[:, :1], opening=True)
            self.opened = True
        for first in range(0, num_later, self.latents_per_step):
            end = min(first + self.latents_per_step, num_later)
            step = self._step(x_BTHWz[:, num_opening + first : num_opening + end], opening=False)
            pixels[:, num_opening + times * first : num_opening + times * end] = step
        return pixels

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and record what CUDA needs, which takes seconds, and begin a new video. Elsewhere only the latter."""
        self.begin()
        if all(device.type != "cuda" for device in self.devices):
            return
        batch, height, width = self.shape
        blank = torch.zeros(batch, self.config.z_dim, self.latents_per_step, height, width, device=self.devices[0])
        # cuDNN keeps what a thread ran a convolution with first: the measured choice has to be it
        self.begin(inside=True)
        self.decode(blank)
        self.begin()
        self.decode(blank[:, :, :1])
        self.begin()
        torch.cuda.empty_cache()  # the graphs have memory of their own

    def state(self) -> State:
        """Return copies of what is remembered of the frames so far; empty before the first."""
        return tuple(conv.buffer[:, :HISTORY].clone() for conv in self._convolutions) if self.opened else ()

    @torch.inference_mode()
    def begin(self, *, inside: bool = False) -> None:
        """Begin a new video. inside: later latents come first, and what was before them is zero."""
        self.opened = inside
        for conv in self._convolutions:
            conv.buffer[:, :HISTORY] = 0

    @torch.inference_mode()
    def restore(self, state: State) -> None:
        """Go on from where `state` was taken; from () with a new video."""
        if not state:
            self.begin()
            return
        self.opened = True
        for conv, remembered in zip(self._convolutions, state, strict=True):
            conv.buffer[:, :HISTORY] = remembered

    def _step(self, x_BTHWz: Tensor, *, opening: bool) -> Tensor:
        given = Activations(x_BTHWz)
        is_whole = not opening and x_BTHWz.shape[1] == self.latents_per_step
        for part in self._parts:
            given = part(given, opening=opening, is_whole=is_whole)
        return given.x


class _Part:
    """Stages that follow one another on one device: all of them, or the first or the second of two parts."""

    def __init__(self, plan: list[PlannedStage], device: torch.device):
        self.device = device
        self.multiply_adds = sum(stage.multiply_adds for stage in plan)
        self.stages = [stage.build(device) for stage in plan]
        self._operations: DecoderOperations = decoder_operations(device)
        self._recording: _Recording | None = None

    def __call__(self, given: Activations, *, opening: bool, is_whole: bool) -> Activations:
        """Run on the device's current stream; given may be elsewhere. What a recording gives lasts until the next."""
        with _on(self.device):
            if self.device.type != "cuda" or not is_whole:
                return self._run(given.to(self.device), opening=opening)
            if self._recording is not None:
                return self._recording.replay(given)
            # The recording reads where this run reads: neither the copies nor cuDNN's choices depend on the call.
            inputs = given.room(self.device)
            inputs.copy_(given)
            with _measured_convolutions():
                result = self._run(inputs, opening=False)
                self._recording = self._record(inputs)
            return result

    def _run(self, given: Activations, *, opening: bool) -> Activations:
        frames = given.x.shape[1]
        hand_over(self._operations, given.x, self.stages[0].target(frames, opening=opening))
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            frames = frames if opening else frames * stage.times
            target = Target() if following is None else following.target(frames, opening=opening)
            given = stage(given, target, opening=opening)
        return given

    def _record(self, inputs: Activations) -> _Recording:
        # not torch.cuda.graph: that waits for the whole device, where another thread may be recording as well
        graph = torch.cuda.CUDAGraph()
        # a graph keeps the priority of the stream it was recorded on
        priority = torch.cuda.current_stream(self.device).priority
        with torch.cuda.stream(torch.cuda.Stream(self.device, priority=priority)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = self._run(inputs, opening=False)
            finally:
                graph.capture_end()
        return _Recording(graph, inputs, result)


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph, and the places where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Activations
    result: Activations

    def replay(self, given: Activations) -> Activations:
        self.inputs.copy_(given)
        self.graph.replay()
        return self.result


def _on(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device, whatever its arguments are on
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _measured_convolutions() -> AbstractContextManager[object]:
    cudnn = torch.backends.cudnn
    # what is chosen by the clock has to give the same bits in every run of it
    return cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=cudnn.allow_tf32)
