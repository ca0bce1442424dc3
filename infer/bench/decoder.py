"""Time the stages of the decoder in bf16 and in FP8, and measure what FP8 changes in each, on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.infer.bench.kernels import KernelMismatch
from longvideo.infer.bench.timing import median_ms
from longvideo.kernels.backends import decoder_operations
from longvideo.pixels import psnr
from longvideo.streaming.decoder import StreamingDecoder
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoder_plan import plan_stages
from longvideo.streaming.decoder_stages import Activations, Target, UpsamplingStage, hand_over
from longvideo.vae.autoencoder import Autoencoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longvideo.kernels.vae.format import FP8Kernel
    from longvideo.streaming.decoder_stages import DecoderStage
    from longvideo.vae.config import AutoencoderConfig

REPEATS = 2
"""Number of times that each convolution is computed and compared before it is timed."""
ABSOLUTE, RELATIVE = 0.06, 1 / 64
"""Largest difference of a value: a share of the root mean square of all, since tensor cores keep about 14 bits of a
sum, plus a share of the value, which is rounded to bf16 twice."""
VIDEO_LATENTS = 3


@dataclass(frozen=True)
class StageTiming:
    """A stage of the decoder for one later latent frame.

    shape: frames, height and width of its input. bf16_ms, fp8_ms: median times. error: error of FP8 relative to bf16 on
    the same input. checked: number of values of its convolutions that were compared with the definition.
    """

    stage: str
    shape: tuple[int, int, int]
    bf16_ms: float
    fp8_ms: float
    error: float
    checked: int


@dataclass(frozen=True)
class DecoderTiming:
    """Times and errors of the stages, and of whole videos. psnr: of pixels in FP8 against bf16, dB."""

    stages: list[StageTiming]
    psnr: float

    @property
    def bf16_ms(self) -> float:
        """Time of the stages for one later latent frame in bf16."""
        return sum(stage.bf16_ms for stage in self.stages)

    @property
    def fp8_ms(self) -> float:
        """Time of the stages for one later latent frame in FP8."""
        return sum(stage.fp8_ms for stage in self.stages)


@torch.inference_mode()
def time_decoder(config: AutoencoderConfig, size: tuple[int, int], *, device: torch.device) -> DecoderTiming:
    """Time a decoder with random weights that keep activations near unit size.

    size: height and width of the latents. Raises KernelMismatch, with the number of wrong values, for a convolution
    whose result differs from the definition with the same rounded operands; all values are compared, twice.
    """
    autoencoder = _random_autoencoder(config, device)
    plans = [plan_stages(autoencoder, Grid(1, 1, *size, fp8)) for fp8 in (False, True)]
    inputs = Activations(torch.randn(1, 1, *size, config.z_dim, device=device, dtype=torch.bfloat16))
    timings = []
    for plain, quantized in zip(*plans, strict=True):
        stages = [plan.build(device, decoder_operations(device)) for plan in (plain, quantized)]
        results = [_run(stage, inputs) for stage in stages]
        checked = sum(_check(type(stages[1]).__name__, *operands) for operands in _operands(stages[1]))
        bf16_ms, fp8_ms = (median_ms(partial(_run, stage, inputs), device) for stage in stages)
        error = _relative_error(results[1].x.float(), results[0].x.float())
        _, frames, height, width, _ = inputs.x.shape
        name = type(stages[0]).__name__.removesuffix("Stage").lower()
        timings.append(
            StageTiming(f"{name} {inputs.x.shape[-1]}", (frames, height, width), bf16_ms, fp8_ms, error, checked)
        )
        inputs = results[0]
    return DecoderTiming(timings, _psnr(autoencoder, size, device))


def _run(stage: DecoderStage, inputs: Activations) -> Activations:
    """Return the result of a stage that stands alone, for later frames."""
    x = Activations(inputs.x.clone(), inputs.around)
    hand_over(decoder_operations(x.x.device), x.x, stage.target(x.x.shape[1], False))
    return stage(x, Target(), False)


def _operands(stage: DecoderStage) -> Iterator[tuple[Tensor, FP8Kernel]]:
    for conv in stage.convolutions:
        if conv.kernel is not None:
            yield conv.buffer, conv.kernel
    if isinstance(stage, UpsamplingStage) and stage.kernel is not None:
        yield stage.buffer, stage.kernel


def _check(name: str, inputs: Tensor, kernel: FP8Kernel) -> int:
    """Compare every value of a convolution with cuDNN's in bf16, which represents every value of E4M3."""
    frames = inputs.shape[1] - kernel.size[0] + 1
    x = inputs.to(torch.bfloat16).permute(0, 4, 1, 2, 3)
    weight = kernel.weight().to(torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    expected = F.conv3d(x, weight).permute(0, 2, 3, 4, 1).float() * kernel.scales
    bound = ABSOLUTE * expected.square().mean().sqrt() + RELATIVE * expected.abs()
    for _ in range(REPEATS):
        result = torch.full_like(expected, float("nan"), dtype=torch.bfloat16)
        decoder_operations(inputs.device).convolve(inputs, frames, kernel, result)
        wrong = int((~((result.float() - expected).abs() <= bound)).sum())
        if wrong:
            raise KernelMismatch(f"{name}, {list(inputs.shape)}: {wrong} of {expected.numel()} values differ")
    return expected.numel()


def _random_autoencoder(config: AutoencoderConfig, device: torch.device) -> Autoencoder:
    torch.manual_seed(0)
    with torch.device(device):
        autoencoder = Autoencoder(config).to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("gamma"):
            parameter.normal_(1, 0.1)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return autoencoder


def _psnr(autoencoder: Autoencoder, size: tuple[int, int], device: torch.device) -> float:
    latents = torch.randn(1, autoencoder.config.z_dim, VIDEO_LATENTS, *size, device=device)
    videos = [StreamingDecoder(autoencoder, Grid(1, 1, *size, fp8)).decode(latents).double() for fp8 in (False, True)]
    return psnr((float((videos[0] - videos[1]).square().mean()),))


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
