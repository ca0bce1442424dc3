"""Time the passes of the streaming transformer and of the streaming decoder, one by one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longvideo.infer.bench.comparison import PROMPT, compare_velocities
from longvideo.streaming.transformer import StreamingTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed import ProcessGroup

    from longvideo.infer.generation import Models, Stages
    from longvideo.model.transformer import TextContext

SUSTAINED_STEPS = 25
"""Number of steps that are timed in a row on a GPU: after a few steps its clocks are those of sustained work."""
REPEATS = 3


@dataclass(frozen=True)
class PassReport:
    """Times of ranks that share every chunk.

    ranks: number of ranks. error: relative error of velocities against the plain path on one rank. cache_bytes,
    peak_bytes: cache and peak GPU memory of rank 0; the peak is 0 on a CPU.
    """

    ranks: int
    error: float
    step_ms: float
    clean_pass_ms: float
    cache_bytes: int
    peak_bytes: int


def measure_passes(models: Models, *, group: ProcessGroup | None) -> PassReport:
    """Measure a step and a clean pass of the ranks of a group that share every chunk. Every rank makes this call.

    Raises UserError, with the numbers, where the velocities differ from those of the plain path on one rank.
    """
    denoiser = StreamingTransformer(
        models.transformer,
        models.spec,
        batch=1,
        kv_cache=models.formats.kv_cache,
        attention=models.formats.attention,
        group=group,
    )
    denoiser.warm_up(clean_pass=models.settings.clean_pass)
    error = compare_velocities(models, denoiser)
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(models.device)
    step_ms, clean_pass_ms = time_passes(models, denoiser)
    return PassReport(
        ranks=1 if group is None else group.size(),
        error=error,
        step_ms=step_ms,
        clean_pass_ms=clean_pass_ms,
        cache_bytes=denoiser.cache_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(models.device) if on_gpu else 0,
    )


@torch.inference_mode()
def time_passes(models: Models, denoiser: StreamingTransformer) -> tuple[float, float]:
    """Return the mean times of a step and of a clean pass with a full window, in milliseconds.

    The clean pass takes 0 for a model that has none.
    """
    device, text = models.device, _text(models, denoiser)
    latents = torch.randn(denoiser.latent_shape, device=device)
    sigma = torch.full((latents.shape[0], latents.shape[2]), 0.5, device=device)
    for index in range(models.spec.window_chunks):
        denoiser.begin(index, shot=0, text=text)
        denoiser.fill(latents)
        denoiser.commit()
    denoiser.begin(models.spec.window_chunks, shot=0, text=text)
    count = SUSTAINED_STEPS if device.type == "cuda" else REPEATS
    step_ms, clean_pass_ms = _mean_ms(lambda: denoiser.velocity(latents, sigma), count, device), 0.0
    if models.settings.clean_pass:
        clean_pass_ms = _mean_ms(lambda: denoiser.fill(latents), REPEATS, device)
    denoiser.reset()
    return step_ms, clean_pass_ms


def time_decoding(models: Models, stages: Stages) -> float:
    """Return the mean time from the latents of a later chunk to its frames in host memory, in milliseconds."""
    decoder, scale = stages.decoder, models.decoder.config.scale_factor_temporal
    assert decoder is not None
    latents = torch.randn((1, *stages.denoiser.latent_shape[1:]), device=models.device)
    num_frames = models.spec.chunk_frames * scale
    decoder.decode(latents, num_frames - scale + 1)  # the first chunk of a video has fewer frames
    ms = _mean_ms(lambda: decoder.decode(latents, num_frames), REPEATS, models.decode_device)
    decoder.reset()
    return ms


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until the GPUs among these devices have finished all work."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _text(models: Models, denoiser: StreamingTransformer) -> TextContext:
    """Return the text of one prompt, for all samples."""
    features, _ = models.text_encoder.encode([PROMPT])
    text = models.transformer.encode_text(features.to(models.device))
    return text.select(torch.zeros(denoiser.latent_shape[0], dtype=torch.int64, device=models.device))


def _mean_ms(work: Callable[[], object], count: int, device: torch.device) -> float:
    work()
    wait_for([device])
    start = time.perf_counter()
    for _ in range(count):
        work()
    wait_for([device])
    return 1000 * (time.perf_counter() - start) / count
