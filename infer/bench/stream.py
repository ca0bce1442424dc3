"""Measure streaming: compare with the plain path, time the passes, then stream a video with a full window."""

from __future__ import annotations

import platform
import resource
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from longvideo.errors import UserError
from longvideo.evaluation.sheet import write_picture
from longvideo.infer.bench import gpu_timeline
from longvideo.infer.bench.comparison import PROMPT, compare_stages
from longvideo.infer.bench.passes import time_decoding, time_passes, wait_for
from longvideo.kernels.backends import attention_backend, convolution_backend, kernels_on, product_backend
from longvideo.rollout import branches

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from io import FileIO
    from pathlib import Path

    from PIL import Image

    from longvideo.infer.bench.reserved_memory import ReservedMemory
    from longvideo.infer.generation import Models
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.session import Session

DRAWN_CHUNKS = 3


@dataclass(frozen=True)
class StreamReport:
    """Measurements of a stream. Times are in the unit of their name, sizes in bytes, errors are relative.

    errors: errors against the plain path. first_frame_s: time from the request to the first frame, when everything is
    warm. chunk_s: times between one chunk written and the next, with a full window. peak_bytes: peak memory of tensors
    on each GPU. reserved_bytes: peak of everything that torch reserves there, with the memory of recorded graphs and
    without the CUDA context. process_bytes: peak of each GPU since the process started, with loading, the text encoder,
    recording and the CUDA context; the comparison with the plain path is left out. peak_rss_bytes: peak memory of the
    process on the host after each part of the video; a part is a chunk, but the opening frame of the first chunk is a
    part of its own. kernel_shares: fraction of the time by GPU and kind of kernel, if a timeline was drawn.
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
    process_bytes: dict[str, int]
    peak_rss_bytes: tuple[int, ...]
    kernel_shares: dict[str, dict[str, float]]

    @property
    def denoise_fps(self) -> float:
        """Frames per second of the steps and the clean pass alone."""
        return 1000 * self.frames_per_chunk / (self.steps * self.step_ms + self.clean_pass_ms)

    @property
    def decode_fps(self) -> float:
        """Frames per second of the decoder alone."""
        return 1000 * self.frames_per_chunk / self.decode_ms

    def chunk_percentile(self, percent: float) -> float:
        """Return a percentile of the seconds between one chunk written and the next."""
        return float(np.percentile(self.chunk_s, percent))

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values as a table shows them."""
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
            *((f"peak of the process on {gpu}", f"{size / 1e9:.2f} GB") for gpu, size in self.process_bytes.items()),
            *(
                (f"{gpu}, {kind}", f"{share:.1%} of the time")
                for gpu, kinds in self.kernel_shares.items()
                for kind, share in kinds.items()
            ),
            ("peak of the process on the host", f"{self.peak_rss_bytes[-1] / 1e9:.2f} GB"),
        ]


class FrameSink(Protocol):
    """A destination of frames, uint8 [T, H, W, 3]."""

    def write(self, frames: np.ndarray) -> None: ...


def measure(
    pipeline: StreamingPipeline,
    *,
    steps: int | None,
    guidance: float | None,
    chunks: int,
    memory: ReservedMemory,
    sink: FrameSink | None = None,
    timeline: Path | None = None,
    on_stage: Callable[[str], None],
) -> StreamReport:
    """Measure a pipeline over a number of chunks, after as many chunks as the window holds.

    steps, guidance: None means the model's own. memory: memory of the process, counted since before the pipeline was
    loaded. sink: destination of the frames; None writes their bytes to a temporary
    file. timeline: file for a picture of what the GPUs do during three more chunks. on_stage: called with the name of
    each stage of the measurement as it starts.
    Raises UserError, with the numbers, where the fast path does not compute what the plain path computes.
    """
    models, settings = pipeline.models, pipeline.models.settings
    steps = settings.steps if steps is None else steps
    guidance = settings.guidance if guidance is None else guidance
    gpus = sorted({device for device in (models.device, models.decode_device) if device.type == "cuda"}, key=str)
    on_stage("warming up")
    start = time.perf_counter()
    stages = pipeline.stages.acquire(batch=1, copies=branches(guidance))
    wait_for(gpus)
    warm_up_s = time.perf_counter() - start
    on_stage("checking velocities and pixels")
    with memory.suspended():  # the plain path has a cache and activations of its own
        errors = compare_stages(replace(models, settings=replace(settings, steps=steps, guidance=guidance)), stages)
    on_stage("timing the parts")
    step_ms, clean_pass_ms = time_passes(models, stages.denoiser)
    decode_ms = time_decoding(models, stages)
    pipeline.stages.release(stages)
    if gpus:
        torch.cuda.empty_cache()
    memory.begin_part()
    num_chunks = models.spec.window_chunks + chunks
    on_stage(f"streaming {models.spec.window_chunks} + {chunks} chunks")
    log, kernel_shares = _Log(), {}
    with _sink_or_file(sink) as target, pipeline.session(PROMPT, steps=steps, guidance=guidance) as session:
        log.stream(session, target, num_chunks)
        if timeline is not None:
            title = f"{steps} steps, {DRAWN_CHUNKS} chunks in a row"
            picture, kernel_shares = _timeline(session, target, title=title)
            write_picture(picture, timeline)
    times = log.times[-chunks - 1 :]
    return StreamReport(
        steps=steps,
        guidance=guidance,
        backends=_backends(models),
        errors=errors,
        warm_up_s=warm_up_s,
        step_ms=step_ms,
        clean_pass_ms=clean_pass_ms,
        decode_ms=decode_ms,
        first_frame_s=log.times[0] - log.start,
        chunk_s=tuple(after - before for before, after in pairwise(times)),
        frames_per_chunk=log.frames[-1],
        end_to_end_fps=sum(log.frames[-chunks:]) / (times[-1] - times[0]),
        peak_bytes={str(gpu): torch.cuda.max_memory_allocated(gpu) for gpu in gpus},
        reserved_bytes={str(gpu): torch.cuda.max_memory_reserved(gpu) for gpu in gpus},
        process_bytes=memory.peaks(),
        peak_rss_bytes=tuple(log.peak_rss_bytes),
        kernel_shares=kernel_shares,
    )


@dataclass
class _Log:
    """Measurements of a stream, one for each part that was written.

    start, times: seconds on the clock of the request and of each part. frames: numbers of frames. peak_rss_bytes: peak
    memory of the process so far.
    """

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)

    def stream(self, session: Session, target: FrameSink, num_chunks: int) -> None:
        """Write the first chunks of a session."""
        self.start = time.perf_counter()
        for chunk in session:
            target.write(chunk.frames[0])
            self.times.append(time.perf_counter())
            self.frames.append(chunk.frames.shape[1])
            self.peak_rss_bytes.append(_peak_rss())
            if chunk.step.index == num_chunks - 1:
                break


def _timeline(session: Session, target: FrameSink, *, title: str) -> tuple[Image.Image, dict[str, dict[str, float]]]:
    """Return a picture of what the GPUs do during the next chunks, and the shares of the time."""

    def more() -> None:
        for _ in range(DRAWN_CHUNKS):
            target.write(next(session).frames[0])

    spans = gpu_timeline.record(more)
    if not spans:
        raise UserError("--timeline found no work on a GPU; leave it out, or choose a GPU with --device")
    picture = gpu_timeline.draw(spans, begin=0.0, end=max(span.end for span in spans), title=title)
    return picture, gpu_timeline.share_by_kind(spans)


def _backends(models: Models) -> dict[str, str]:
    """Return the backend of each operation."""
    device, decode_device = models.device, models.decode_device
    return {
        "products": str(product_backend(models.formats.precision_of(packed=False), device)),
        "attention": str(attention_backend(models.formats.attention, device)),
        "norms, rotation, cache": kernels_on(device),
        "decoder": models.decoder.name,
        "convolutions": str(convolution_backend(models.formats.decoder, decode_device)),
        "between convolutions": kernels_on(decode_device),
        "passes": "CUDA graphs" if device.type == "cuda" and not models.placement.offload_weights else "eager",
    }


@contextmanager
def _sink_or_file(sink: FrameSink | None) -> Generator[FrameSink, None, None]:
    if sink is not None:
        yield sink
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        yield _RawFile(file)


class _RawFile:
    """A file of raw frames. Every part overwrites the one before, so the file stays small."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, frames: np.ndarray) -> None:
        self._file.seek(0)
        self._file.write(np.ascontiguousarray(frames).data)


def _peak_rss() -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
