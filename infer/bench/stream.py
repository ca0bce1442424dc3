"""Measure streaming: check first, then warm up, time the parts one by one, and last a whole stream to the last byte."""

from __future__ import annotations

import platform
import resource
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.flow.unipc import UniPC
from longvideo.infer.bench import gpu_timeline
from longvideo.kernels.backends import attention_backend, kernels_on, product_backend
from longvideo.model.cache import ChunkCache, KVCache
from longvideo.model.conditioning import Conditioning
from longvideo.model.quantized_cache import NVFP4KVCache
from longvideo.pixels import to_uint8
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.rollout import CachedTransformer, Denoiser, branches, rollout
from longvideo.streaming.transformer import StreamingTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch.distributed import ProcessGroup

    from longvideo.infer.generation import Models, Stages
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.session import Session
    from longvideo.model.transformer import TextContext

CHECKED_CHUNKS = 2
CHECKED_LATENTS = 2
SUSTAINED_STEPS = 25
REPEATS = 3
DRAWN_CHUNKS = 3
PROMPT = "a red ball bounces"
VELOCITY_BOUNDS = {"bf16": 2.5e-2, "nvfp4-weights": 2.5e-2, "fp8": 0.1, "nvfp4": 0.15}
"""Relative error allowed against the plain path in the same precision: a rounding may fall the other way."""
FP8_ATTENTION_BOUND = 0.15
"""The same beside attention in the model's dtype: what FP8 attention itself costs is in it."""
PIXEL_BOUND = 3e-2


@dataclass(frozen=True)
class StreamReport:
    """What a stream took. Times in the unit of their name, sizes in bytes, errors relative.

    peak_bytes: for each GPU, of tensors. reserved_bytes: of all that torch holds there, with what recorded graphs need
    for themselves; the CUDA context is not in it. first_frame_s: from the request, warm. peak_rss_bytes: of the process
    after each part of the video that came out, a chunk but for the first, whose opening frame comes alone.
    kernel_shares: of the time, by GPU and kind, where a time line was drawn.
    """

    steps: int
    guidance: float
    backends: dict[str, str]
    errors: dict[str, float]
    warm_up_s: float
    step_ms: float
    clean_pass_ms: float
    decode_ms: float
    first_frame_s: float
    chunk_s: tuple[float, ...]
    frames_per_chunk: int
    end_to_end_fps: float
    peak_bytes: dict[str, int]
    reserved_bytes: dict[str, int]
    peak_rss_bytes: tuple[int, ...]
    kernel_shares: dict[str, dict[str, float]]

    @property
    def denoise_fps(self) -> float:
        return 1000 * self.frames_per_chunk / (self.steps * self.step_ms + self.clean_pass_ms)

    @property
    def decode_fps(self) -> float:
        return 1000 * self.frames_per_chunk / self.decode_ms

    def rows(self) -> list[tuple[str, str]]:
        """Return what was measured as names and values to read."""
        peaks = [
            (f"peak on {device}, with graphs", f"{size / 1e9:.2f} GB, {self.reserved_bytes[device] / 1e9:.2f} GB")
            for device, size in self.peak_bytes.items()
        ]
        chunk = " / ".join(f"{self.chunk_percentile(percent):.3f}" for percent in (50, 95))
        return [
            *((f"{name} by", backend) for name, backend in self.backends.items()),
            *((f"error of {name}", f"{error:.1e}") for name, error in self.errors.items()),
            ("warm-up", f"{self.warm_up_s:.1f} s"),
            ("step, clean pass", f"{self.step_ms:.1f} ms, {self.clean_pass_ms:.1f} ms"),
            ("decoding a chunk", f"{self.decode_ms:.1f} ms"),
            ("first frame, warm", f"{self.first_frame_s:.2f} s"),
            ("chunk, p50 / p95", f"{chunk} s"),
            (f"denoising alone, {self.steps} steps", f"{self.denoise_fps:.1f} frames/s"),
            ("decoding alone", f"{self.decode_fps:.1f} frames/s"),
            ("end to end", f"{self.end_to_end_fps:.1f} frames/s"),
            *peaks,
            *(
                (f"{gpu}, {kind}", f"{share:.1%} of the time")
                for gpu, kinds in self.kernel_shares.items()
                for kind, share in kinds.items()
            ),
            ("peak of the process on the host", f"{self.peak_rss_bytes[-1] / 1e9:.2f} GB"),
        ]

    def chunk_percentile(self, percent: float) -> float:
        """Return a percentile of the seconds between one chunk written and the next."""
        return float(np.percentile(self.chunk_s, percent))


@dataclass(frozen=True)
class PassReport:
    """What passes of ranks that share a chunk took; error against the plain path on one rank, sizes of the first."""

    ranks: int
    error: float
    step_ms: float
    clean_pass_ms: float
    cache_bytes: int
    peak_bytes: int


class FrameSink(Protocol):
    """Where frames go, uint8 [T, H, W, 3]."""

    def write(self, frames: np.ndarray) -> None: ...


def measure(
    pipeline: StreamingPipeline,
    *,
    steps: int | None,
    guidance: float | None,
    chunks: int,
    sink: FrameSink | None = None,
    timeline: Path | None = None,
    on_stage: Callable[[str], None],
) -> StreamReport:
    """Measure a pipeline over `chunks` chunks after as many as its window holds.

    sink: takes the frames; None writes their bytes to a file that is then deleted. timeline: a picture of what the GPUs
    do during three more chunks.
    Raises UserError, with the numbers, where the fast path does not make what the plain path makes.
    """
    models, settings = pipeline.models, pipeline.models.settings
    steps = settings.steps if steps is None else steps
    guidance = settings.guidance if guidance is None else guidance
    devices = {device for device in (models.device, models.decode_device) if device.type == "cuda"}
    on_stage("warming up")
    began = time.perf_counter()
    stages = pipeline.acquire(batch=1, copies=branches(guidance))
    _wait(devices)
    warm_up_s = time.perf_counter() - began
    on_stage("checking velocities and pixels")
    errors = _check(models, stages, steps, guidance)
    on_stage("timing the parts")
    step_ms, clean_pass_ms = _time_passes(models, stages.denoiser)
    decode_ms = _time_decoding(models, stages)
    pipeline.release(stages)
    for device in devices:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    on_stage(f"streaming {models.spec.window_chunks} + {chunks} chunks")
    first, times, frames, rss, kernel_shares = _stream(
        pipeline, steps, guidance, models.spec.window_chunks + chunks, sink, timeline
    )
    sustained = times[-chunks - 1 :]
    return StreamReport(
        steps=steps,
        guidance=guidance,
        backends=_backends(models),
        errors=errors,
        warm_up_s=warm_up_s,
        step_ms=step_ms,
        clean_pass_ms=clean_pass_ms,
        decode_ms=decode_ms,
        first_frame_s=first,
        chunk_s=tuple(after - before for before, after in zip(sustained, sustained[1:], strict=False)),
        frames_per_chunk=frames[-1],
        end_to_end_fps=sum(frames[-chunks:]) / (sustained[-1] - sustained[0]),
        peak_bytes={str(device): torch.cuda.max_memory_allocated(device) for device in sorted(devices, key=str)},
        reserved_bytes={str(device): torch.cuda.max_memory_reserved(device) for device in sorted(devices, key=str)},
        peak_rss_bytes=tuple(rss),
        kernel_shares=kernel_shares,
    )


def measure_passes(models: Models, *, group: ProcessGroup | None, on_stage: Callable[[str], None]) -> PassReport:
    """Measure a step and a clean pass of the ranks of a group that share every chunk; each calls it alike.

    Raises UserError, with the numbers, where they do not make what one rank makes on the plain path.
    """
    on_stage("warming up")
    denoiser = StreamingTransformer(
        models.transformer,
        models.spec,
        batch=1,
        kv_cache=models.kv_cache,
        attention=models.attention,
        group=group,
    )
    denoiser.warm_up(clean_pass=models.settings.clean_pass)
    on_stage("checking velocities")
    error = _velocity_error(models, denoiser, models.settings.steps, 1.0)
    _refuse({"velocities": error}, {"velocities": _velocity_bound(models)})
    on_stage("timing passes")
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(models.device)
    step_ms, clean_pass_ms = _time_passes(models, denoiser)
    return PassReport(
        ranks=1 if group is None else group.size(),
        error=error,
        step_ms=step_ms,
        clean_pass_ms=clean_pass_ms,
        cache_bytes=denoiser.cache_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(models.device) if on_gpu else 0,
    )


def _stream(
    pipeline: StreamingPipeline,
    steps: int,
    guidance: float,
    chunks: int,
    sink: FrameSink | None,
    timeline: Path | None,
) -> tuple[float, list[float], list[int], list[int], dict[str, dict[str, float]]]:
    """Return seconds to the first frame; for each part when it was written, frames, and the host's memory peak; and
    what the GPUs did, if it was drawn."""
    times, frames, rss = [], [], []
    kernel_shares: dict[str, dict[str, float]] = {}
    with _sink(sink) as target, pipeline.session(PROMPT, steps=steps, guidance=guidance) as session:
        requested = time.perf_counter()
        for chunk in session:
            target.write(chunk.frames[0])
            times.append(time.perf_counter())
            frames.append(chunk.frames.shape[1])
            rss.append(_peak_rss())
            if chunk.step.index == chunks - 1:
                break
        if timeline is not None:
            kernel_shares = _draw(session, target, timeline, title=f"{steps} steps, {DRAWN_CHUNKS} chunks in a row")
    return times[0] - requested, times, frames, rss, kernel_shares


def _draw(session: Session, target: FrameSink, path: Path, *, title: str) -> dict[str, dict[str, float]]:
    def more() -> None:
        for _ in range(DRAWN_CHUNKS):
            target.write(next(session).frames[0])

    spans = gpu_timeline.record(more)
    if not spans:
        raise UserError("--timeline needs a GPU: there is nothing to draw")
    gpu_timeline.draw(spans, path, begin=0.0, end=max(span.end for span in spans), title=title)
    return gpu_timeline.share_by_kind(spans)


def _check(models: Models, stages: Stages, steps: int, guidance: float) -> dict[str, float]:
    """Return relative errors against the plain path; raise UserError where they are too large."""
    decoder = stages.decoder
    assert decoder is not None
    scale, (_, *shape) = models.autoencoder.config.scale_factor_temporal, stages.denoiser.latent_shape
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))[:, :, :CHECKED_LATENTS]
    latents = latents.to(models.decode_device)
    pixels = torch.from_numpy(decoder.decode(latents, 1 + scale * (CHECKED_LATENTS - 1)))
    decoder.reset()
    with torch.inference_mode():
        weight = models.autoencoder.post_quant_conv.weight
        video, _ = models.autoencoder.decode(models.autoencoder.denormalize(latents).to(weight.dtype))
    errors = {
        "velocities": _velocity_error(models, stages.denoiser, steps, guidance),
        "pixels": _relative_error(pixels.float() - 127.5, to_uint8(video).cpu().float() - 127.5),
    }
    _refuse(errors, {"velocities": _velocity_bound(models), "pixels": PIXEL_BOUND})
    return errors


def _velocity_bound(models: Models) -> float:
    if models.attention in FP8_FORMATS:
        return FP8_ATTENTION_BOUND
    return VELOCITY_BOUNDS[models.precision.removesuffix("-emulated")]


def _refuse(errors: dict[str, float], bounds: dict[str, float]) -> None:
    for name, allowed in bounds.items():
        if not errors[name] <= allowed:
            raise UserError(
                f"the check failed, so nothing is timed: {name} of the fast path differ from the plain path's by"
                f" {errors[name]:.2e}, allowed are {allowed:.1e}"
            )


class _Recorder:
    """A denoiser that notes each call it passes on, as what to do with another one, and the velocities."""

    def __init__(self, inner: Denoiser) -> None:
        self._inner = inner
        self.device, self.latent_shape, self.spec = inner.device, inner.latent_shape, inner.spec
        self.calls: list[Callable[[Denoiser], Tensor | None]] = []
        self.velocities: list[Tensor] = []

    def reset(self) -> None:
        self._note(lambda denoiser: denoiser.reset())

    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        self._note(lambda denoiser: denoiser.begin(index, shot=shot, text=text))

    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        latents, sigma = latents_BCTHW.clone(), sigma_BT.clone()
        velocity = self._note(lambda denoiser: denoiser.velocity(latents, sigma, keep=keep))
        assert velocity is not None
        self.velocities.append(velocity)
        return velocity

    def fill(self, latents_BCTHW: Tensor) -> None:
        latents = latents_BCTHW.clone()
        self._note(lambda denoiser: denoiser.fill(latents))

    def commit(self, *, cut: bool = False) -> None:
        self._note(lambda denoiser: denoiser.commit(cut=cut))

    def _note(self, call: Callable[[Denoiser], Tensor | None]) -> Tensor | None:
        self.calls.append(call)
        return call(self._inner)


def _velocity_error(models: Models, fast: StreamingTransformer, steps: int, guidance: float) -> float:
    """Return the relative error of the velocities at the latents that the plain path goes through.

    Not of the latents of a whole solution: there, every step multiplies the roundings of those before it.
    """
    cache_type: type[ChunkCache] = NVFP4KVCache if models.kv_cache == "nvfp4" else KVCache
    plain = CachedTransformer(models.transformer, models.spec, batch=branches(guidance), cache_type=cache_type)
    recorder = _Recorder(plain)
    features, rows = models.text_encoder.encode([PROMPT, ""])
    rows = rows.to(models.device)
    with torch.inference_mode():
        text = models.transformer.encode_text(features.to(models.device))
    made = rollout(
        recorder,
        [Conditioning(text, rows[:1], rows[1:])] * CHECKED_CHUNKS,
        solver=UniPC(steps, models.settings.shift),
        generators=[torch.Generator().manual_seed(0)],
        guidance=guidance,
        clean_pass=models.settings.clean_pass,
    )
    assert len(list(made)) == CHECKED_CHUNKS
    with torch.inference_mode():
        found = [velocity for call in recorder.calls if (velocity := call(fast)) is not None]
    fast.reset()
    return _relative_error(torch.cat(found), torch.cat(recorder.velocities))


def _text(models: Models, denoiser: Denoiser) -> TextContext:
    """Return the text of one prompt for all samples."""
    features, _ = models.text_encoder.encode([PROMPT])
    text = models.transformer.encode_text(features.to(models.device))
    return text.select(torch.zeros(denoiser.latent_shape[0], dtype=torch.int64, device=models.device))


@torch.inference_mode()
def _time_passes(models: Models, denoiser: StreamingTransformer) -> tuple[float, float]:
    """Return the mean milliseconds of a step with a full window, 25 in a row on a GPU, and those of a clean pass."""
    device = models.device
    text = _text(models, denoiser)
    latents = torch.randn(denoiser.latent_shape, device=device)
    sigma = torch.full((latents.shape[0], latents.shape[2]), 0.5, device=device)
    for index in range(models.spec.window_chunks):
        denoiser.begin(index, shot=0, text=text)
        denoiser.fill(latents)
        denoiser.commit()
    denoiser.begin(models.spec.window_chunks, shot=0, text=text)
    count = SUSTAINED_STEPS if device.type == "cuda" else REPEATS
    step = _mean_ms(lambda: denoiser.velocity(latents, sigma), count, device)
    clean = 0.0
    if models.settings.clean_pass:
        clean = _mean_ms(lambda: denoiser.fill(latents), REPEATS, device)
    denoiser.reset()
    return step, clean


def _time_decoding(models: Models, stages: Stages) -> float:
    """Return the mean milliseconds from latents of a later chunk to its frames in host memory."""
    decoder = stages.decoder
    assert decoder is not None
    latents = torch.randn((1, *stages.denoiser.latent_shape[1:]), device=models.device)
    frames = models.spec.chunk_frames * models.autoencoder.config.scale_factor_temporal
    decoder.decode(latents, frames - models.autoencoder.config.scale_factor_temporal + 1)
    ms = _mean_ms(lambda: decoder.decode(latents, frames), REPEATS, models.decode_device)
    decoder.reset()
    return ms


def _mean_ms(work: Callable[[], object], count: int, device: torch.device) -> float:
    work()
    _wait({device})
    began = time.perf_counter()
    for _ in range(count):
        work()
    _wait({device})
    return 1000 * (time.perf_counter() - began) / count


def _backends(models: Models) -> dict[str, str]:
    """Say what runs each operation."""
    device, where = models.device, models.decode_device
    return {
        "products": str(product_backend(models.precision, device)),
        "attention": str(attention_backend(models.attention, device)),
        "norms, rotation, cache": kernels_on(device),
        "convolutions": "cuDNN" if where.type == "cuda" else "oneDNN",
        "between convolutions": kernels_on(where),
        "passes": "CUDA graphs" if device.type == "cuda" else "eager",
    }


@contextmanager
def _sink(sink: FrameSink | None) -> Iterator[FrameSink]:
    if sink is not None:
        yield sink
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        yield _RawFile(file)


class _RawFile:
    """Frames as bytes, into a file that does not grow beyond the longest part."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, frames: np.ndarray) -> None:
        self._file.seek(0)
        self._file.write(np.ascontiguousarray(frames).data)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
