"""The decoder of the autoencoder for streaming: the same weights, arranged for speed, with buffers at fixed addresses.

Every causal convolution has a buffer for its input frames, after the last two frames of the previous call; in little
memory all of them use one buffer in turn, and keep the last two frames elsewhere. The
operation before a convolution writes to the buffer, so nothing is concatenated or padded. Biases, norms, SiLU and
shortcuts between convolutions are one pass over memory. A 2x upsampling and the 3x3 convolution after it are one 2x2
convolution at the low resolution with four times the outputs, since a result depends on at most two different pixels
along an axis.

`decoder_convolutions` has the convolutions, `decoder_stages` the stages, `decoder_plan` their list. Two devices can
share them. On CUDA, the work of a device in a step is one graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.kernels.backends import decoder_operations
from longvideo.streaming.decoder_plan import PlannedStage, boundary_of, plan_stages
from longvideo.streaming.decoder_stages import Activations, Target, hand_over
from longvideo.streaming.recording import GraphRecorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.streaming.decoder_convolutions import Convolution, Grid
    from longvideo.vae.autoencoder import Autoencoder
    from longvideo.vae.layers import State


class StreamingDecoder:
    """Decoder of a batch of videos, in order, with memory that is allocated once.

    The result equals that of `Autoencoder.decode` up to rounding. The weights of the convolutions are copies in cuDNN's
    order, 1.1 GB in addition to those of the autoencoder for Wan2.2 in bf16.

    On CUDA the first whole step of later latent frames runs and is then recorded; later ones are replayed.
    An opening frame and shorter steps are not recorded. cuDNN uses the fastest convolutions that it measures in that
    first step, so another process may round differently. The decoder works on the current streams of its devices, and
    its methods must not be called from two threads at once.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        grid: Grid,
        *,
        devices: tuple[torch.device, torch.device] | None = None,
        first_share: float = 0.5,
        recorder: GraphRecorder | None = None,
    ) -> None:
        """Arrange the weights of an autoencoder and allocate the buffers.

        grid: sizes of the latents of a whole step of later latent frames, which are decoded together; one frame needs
            the least memory, more suit small grids.
        devices: two devices that share the decoder; None means the device of the autoencoder. The second one returns
            the pixels.
        first_share: share of the multiply-adds of the first device, as near as the ends of residual blocks and
            upsamplings allow.
        recorder: recorder of the graphs; None means one for each device.
        Raises UserError for a share outside (0, 1).
        """
        weight = autoencoder.post_quant_conv.weight
        self.config, self.dtype, self.latents_per_step = autoencoder.config, weight.dtype, grid.frames
        self.shape = (grid.batch, grid.height, grid.width)
        plan = plan_stages(autoencoder, grid)
        if devices is None:
            parts = [(plan, weight.device)]
        else:
            boundary = boundary_of(plan, first_share)
            first, second = (torch.empty(0, device=device).device for device in devices)  # "cuda" becomes "cuda:0"
            parts = [(plan[:boundary], first), (plan[boundary:], second)]
        self._parts = [_Part(stages, device, grid, recorder or _own_recorder(device)) for stages, device in parts]
        self.devices = tuple(part.device for part in self._parts)
        total = sum(stage.multiply_adds for stage in plan)
        self.shares = tuple(part.multiply_adds / total for part in self._parts)
        self._convolutions = [conv for part in self._parts for stage in part.stages for conv in stage.convolutions]
        self.opened = False

    @torch.inference_mode()
    def decode(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 frames [B, T, H, W, 3] of the next latent frames, on the last device.

        latents_BzTHW: normalized latents, as a transformer returns them. The first latent frame of a video is one
            frame, a later one `scale_factor_temporal` frames.
        Raises UserError for latents of another shape.
        """
        batch, channels, num_latents, height, width = latents_BzTHW.shape
        if (batch, height, width) != self.shape or channels != self.config.z_dim or not num_latents:
            raise UserError(
                f"latents are {list(latents_BzTHW.shape)}; expected [{self.shape[0]}, {self.config.z_dim}, 1 or more,"
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
        """Compile and record the work of CUDA devices, which takes seconds, and begin a new video."""
        self.begin()
        if all(device.type != "cuda" for device in self.devices):
            return
        batch, height, width = self.shape
        blank = torch.zeros(batch, self.config.z_dim, self.latents_per_step, height, width, device=self.devices[0])
        # cuDNN keeps the first kernel that a thread uses for a convolution, so the measured choice must come first
        self.begin(inside=True)
        self.decode(blank)
        self.begin()
        self.decode(blank[:, :, :1])
        self.begin()
        torch.cuda.empty_cache()  # graphs have memory of their own

    def state(self) -> State:
        """Return copies of the frames that the convolutions keep; empty before the first frame of a video."""
        return tuple(conv.history.clone() for conv in self._convolutions) if self.opened else ()

    @torch.inference_mode()
    def begin(self, *, inside: bool = False) -> None:
        """Begin a new video. inside: whether later latent frames come first, after frames of zeros."""
        self.opened = inside
        for conv in self._convolutions:
            conv.clear()

    @torch.inference_mode()
    def restore(self, state: State) -> None:
        """Continue after the frames of a `state`; () begins a new video."""
        if not state:
            self.begin()
            return
        self.opened = True
        for conv, frames in zip(self._convolutions, state, strict=True):
            conv.history.copy_(frames)

    def _step(self, x_BTHWz: Tensor, *, opening: bool) -> Tensor:
        activations = Activations(x_BTHWz)
        is_whole = not opening and x_BTHWz.shape[1] == self.latents_per_step
        for part in self._parts:
            activations = part(activations, opening=opening, is_whole=is_whole)
        return activations.x


class _Part:
    """Consecutive stages on one device: all of them, or the first or second of two parts.

    recorder: recorder of the graph of a step; None where no graph is recorded.
    """

    def __init__(
        self, plan: list[PlannedStage], device: torch.device, grid: Grid, recorder: GraphRecorder | None
    ) -> None:
        self.device, self._recorder = device, recorder
        self.multiply_adds = sum(stage.multiply_adds for stage in plan)
        self._operations = decoder_operations(device)
        self.stages = [stage.build(device, self._operations) for stage in plan]
        if grid.shares_buffer:
            _share_buffer([conv for stage in self.stages for conv in stage.convolutions], device)
        self._recording: _Recording | None = None

    def __call__(self, inputs: Activations, *, opening: bool, is_whole: bool) -> Activations:
        """Run on the current stream of the device. Inputs may be on another device.

        The result of a recorded step is valid until the next step.
        """
        with _on(self.device):
            if self._recorder is None or not is_whole:
                return self._run(inputs.to(self.device), opening=opening)
            if self._recording is not None:
                return self._recording.replay(inputs)
            # the recording reads the tensors of this run, so neither copies nor cuDNN's choices depend on the call
            own = inputs.empty_like(self.device)
            own.copy_(inputs)
            with _measured_convolutions():
                result = self._run(own, opening=False)
                graph, recorded = self._recorder.record(partial(self._run, own, opening=False))
                self._recording = _Recording(graph, own, recorded)
            return result

    def _run(self, inputs: Activations, *, opening: bool) -> Activations:
        frames = inputs.x.shape[1]
        hand_over(self._operations, inputs.x, self.stages[0].target(frames, opening))
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            frames = frames if opening else frames * stage.times
            target = Target() if following is None else following.target(frames, opening)
            inputs = stage(inputs, target, opening)
        return inputs


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Activations
    result: Activations

    def replay(self, inputs: Activations) -> Activations:
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.result


def _own_recorder(device: torch.device) -> GraphRecorder | None:
    return GraphRecorder(device) if device.type == "cuda" else None


def _share_buffer(convolutions: Sequence[Convolution], device: torch.device) -> None:
    """Give convolutions one buffer. A stage has read the buffer of one before it writes to that of the next."""
    size = max((conv.buffer_bytes for conv in convolutions), default=0)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    for conv in convolutions:
        conv.share(memory)


def _on(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device, wherever its arguments are
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _measured_convolutions() -> AbstractContextManager[object]:
    cudnn = torch.backends.cudnn
    # a kernel that is chosen by its time must give the same bits in every run
    return cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=cudnn.allow_tf32)
