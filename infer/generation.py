"""Generate chunks from steps: denoise in one thread, decode in another, return frames.

All chunks of the project that have pixels come from `generate_chunks`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longvideo.checkpoint.decoders import StoredDecoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.infer.background import BackgroundIterator
from longvideo.infer.decode import ChunkDecoder, PendingFrames, PendingLatents, decoding_threads, mark_ready
from longvideo.infer.encode import FrameEncoder
from longvideo.infer.fit.placement import Placement
from longvideo.infer.history import ChunkRecord, Past
from longvideo.infer.timeline import Step
from longvideo.model.conditioning import Conditioning, chunk_text
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import NumberFormats
from longvideo.rollout import Denoiser, MadeChunk, branches, rollout
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoders import DecoderModel
from longvideo.streaming.recording import GraphRecorder
from longvideo.streaming.transformer import StreamingTransformer
from longvideo.text.known_prompts import PromptEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from longvideo.infer.video_inputs import VideoInputs

T = TypeVar("T")

CHUNKS_AHEAD = 1  # enough to keep both threads busy; with more, a new prompt would take effect later


@dataclass(frozen=True)
class Models:
    """The loaded parts of a model, and their placement and number formats.

    encoder: encoder of given frames, which may be loaded with the first ones. placement: devices and data type.
    formats: number formats; the precisions are not None and not "auto". group: ranks that share the denoising of every
    chunk, of which rank 0 decodes; None means one rank. folder: model that the transformer was loaded from, with its
    adapters; None for random weights. stored_decoder: file of the decoder; None for the model's autoencoder.
    """

    transformer: CausalTransformer
    decoder: DecoderModel
    encoder: FrameEncoder
    text_encoder: PromptEncoder
    settings: ModelSettings
    spec: ChunkSpec
    placement: Placement
    formats: NumberFormats
    group: ProcessGroup | None = None
    folder: ModelFolder | None = None
    stored_decoder: StoredDecoder | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names and strengths of the adapters in the transformer, for people."""
        return () if self.folder is None else tuple(one.short_description for one in self.folder.adapters)

    @property
    def decodes(self) -> bool:
        """Whether this rank decodes."""
        return self.group is None or self.group.rank() == 0

    @property
    def decoder_label(self) -> str:
        """Name and precision of the decoder, for people."""
        return f"{self.decoder.name} in {self.formats.decoder}"

    @property
    def chunk_grid(self) -> Grid:
        """Sizes of the latents of a chunk of one video, as the decoder gets them."""
        settings, scale = self.settings, self.decoder.config.scale_factor_spatial
        height, width = settings.height // scale, settings.width // scale
        return Grid(1, settings.chunk_frames, height, width, shares_buffer=self.placement.low_memory)

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.placement.device

    @property
    def decode_device(self) -> torch.device:
        """Device of the decoder."""
        return self.placement.decode_device


class Stages:
    """A denoiser and a decoder with their memory and CUDA graphs.

    They generate one video, or one batch of videos, at a time, and are used again for the next.
    """

    def __init__(self, models: Models, *, batch: int, copies: int) -> None:
        """Allocate the memory, compile the kernels and record the graphs.

        batch: number of videos. copies: number of times each video is run in a step; see `longvideo.rollout.branches`.
        """
        self.size, placement = (batch, copies), models.placement
        recorder = GraphRecorder(models.device) if placement.takes_turns and models.device.type == "cuda" else None
        self.denoiser = StreamingTransformer(
            models.transformer,
            models.spec,
            batch=batch * copies,
            kv_cache=models.formats.kv_cache,
            attention=models.formats.attention,
            group=models.group,
            recorder=recorder,
        )
        self.decoder: ChunkDecoder | None = None
        if models.decodes:
            self.decoder = ChunkDecoder(
                models.decoder,
                replace(models.chunk_grid, batch=batch),
                first_device=models.device,
                first_share=placement.decode_share,
                recorder=recorder,
            )
            # now, not while chunks are denoised: cuDNN times its convolutions, for which the GPU must be idle
            self.decoder.warm_up()
        if models.device.type == "cuda":
            self.denoiser.warm_up(clean_pass=models.settings.clean_pass)

    def reset(self) -> None:
        """Prepare for another video."""
        self.denoiser.reset()
        if self.decoder is not None:
            self.decoder.reset()


@dataclass(frozen=True)
class GeneratedChunk:
    """Frames of a chunk. The first chunk of a video is returned in two parts: its first frame, then the others.

    record: step, latents and noise of the chunk. frames: uint8 [B, T, H, W, 3], in host memory. seconds: time from the
    beginning of the chunk until these frames were in host memory. is_complete: whether they are its last frames.
    """

    record: ChunkRecord
    frames: np.ndarray
    seconds: float
    is_complete: bool

    @property
    def step(self) -> Step:
        """The step from which the chunk was generated."""
        return self.record.step


def generate_chunks(models: Models, stages: Stages, inputs: VideoInputs) -> Generator[GeneratedChunk, None, None]:
    """Generate the chunks of a video, in order. stages: new ones, or reset.

    Denoising runs in one thread and decoding in another, each at most one finished chunk ahead of its reader. On a CPU
    each thread gets half of torch's threads; if torch has only one, or if both use the same memory, denoising and
    decoding alternate in the caller's.
    If several ranks share the denoising, the ranks that do not decode get chunks without frames.
    """
    denoise = partial(_denoise, models, stages.denoiser, inputs)
    if stages.decoder is None:
        yield from _without_pixels(denoise())
        return
    cpu_threads = torch.get_num_threads()
    has_one_thread = cpu_threads == 1 and models.device.type == models.decode_device.type == "cpu"
    if has_one_thread or models.placement.takes_turns:
        yield from _decode(stages.decoder, inputs.past, denoise())
        return
    # On two cores, one thread each for denoising and decoding is faster than two threads for one after the other (86
    # against 58 frames per second). It also has no barriers, where every small operation waits for the scheduler of a
    # busy machine.
    share = decoding_threads()
    latents = BackgroundIterator(partial(_with_threads, share, denoise), capacity=CHUNKS_AHEAD, name="denoise")
    decode = partial(_decode, stages.decoder, inputs.past, latents)
    frames = BackgroundIterator(partial(_with_threads, share, decode), capacity=CHUNKS_AHEAD, name="decode")
    try:
        yield from frames
    finally:
        latents.close()  # first: otherwise the thread that decodes waits for one more chunk
        frames.close()
        torch.set_num_threads(cpu_threads)


@torch.inference_mode()
def encode_first_frame(models: Models, pixels_HWC: Tensor) -> Tensor:
    """Encode a picture as the latent of a given first frame.

    pixels_HWC: uint8, of the size of the video. Returns the normalized latent, float32 [1, C, 1, H, W].
    """
    return models.encoder.encode(pixels_HWC[None]).to(models.device)


def _with_threads(count: int, source: Callable[[], Generator[T, None, None]]) -> Generator[T, None, None]:
    """Iterate with a number of CPU threads, which torch counts for each calling thread."""
    torch.set_num_threads(count)
    yield from source()


@dataclass(frozen=True)
class _LatentChunk:
    """A denoised chunk.

    noise: as in `ChunkRecord`. ready: event after which the latents may be read. start: time at which the chunk began,
    on `time.perf_counter`.
    """

    step: Step
    latents: Tensor
    noise: tuple[Tensor, ...]
    ready: torch.cuda.Event | None
    start: float


def _denoise(models: Models, denoiser: Denoiser, inputs: VideoInputs) -> Generator[_LatentChunk, None, None]:
    waiting: deque[tuple[Step, tuple[Tensor, ...], float]] = deque()
    prompts = _Prompts(models, is_guided=branches(inputs.guidance) == 2)

    def conditionings() -> Iterator[Conditioning]:
        for step in inputs.steps:
            noise = tuple(generator.get_state() for generator in inputs.generators)
            waiting.append((step, noise, time.perf_counter()))
            conditioning = prompts.conditioning(step.prompts, step.negative_prompts, cut=step.cut)
            first = inputs.first_latent if step.index == 0 else None
            yield replace(conditioning, cut=step.cut, recache=step.recache, first_latent=first)

    chunks = rollout(
        denoiser,
        conditionings(),
        solver=inputs.solver,
        generators=inputs.generators,
        guidance=inputs.guidance,
        clean_pass=models.settings.clean_pass,
        # a generator: the text of each chunk is freed before the next one's is encoded
        past=(
            (
                MadeChunk(chunk.index, chunk.shot, chunk.cut, chunk.latents.to(models.device)),
                prompts.conditioning(chunk.prompts, chunk.negative_prompts, cut=chunk.announces),
            )
            for chunk in (inputs.past.context if inputs.past else ())
        ),
    )
    for latents in chunks:
        step, noise, start = waiting.popleft()
        yield _LatentChunk(step, latents, noise, mark_ready(latents), start)


def _decode(
    decoder: ChunkDecoder, past: Past | None, chunks: Iterator[_LatentChunk]
) -> Generator[GeneratedChunk, None, None]:
    """Yield frames as they are finished. past: chunks that the first one continues.

    On a GPU the next chunk is requested, and its decoding launched, before all latent frames of this chunk are decoded.
    So neither the GPU that decodes nor the one that denoises waits for the host.
    """
    if past is not None:
        decoder.prime(past.decoder_latents, from_start=past.from_start)
    under_way: deque[tuple[_LatentChunk, PendingLatents, PendingFrames]] = deque()
    for chunk in chunks:
        host_latents = decoder.fetch(chunk.latents, ready=chunk.ready)
        parts = [(chunk.latents, chunk.step.num_frames)]
        if chunk.step.index == 0 and chunk.step.num_frames > 1:
            # the first latent frame is one pixel frame; it can be shown while the others are decoded, at no cost
            parts = [(chunk.latents[:, :, :1], 1), (chunk.latents[:, :, 1:], chunk.step.num_frames - 1)]
        for latents, num_frames in parts:
            pending = decoder.launch(latents, num_frames, ready=chunk.ready)
            while under_way:
                yield _finished(*under_way.popleft())
            if latents is not parts[-1][0]:
                yield _finished(chunk, host_latents, pending, is_complete=False)
            elif pending.is_under_way:
                under_way.append((chunk, host_latents, pending))
            else:
                yield _finished(chunk, host_latents, pending)
        if under_way:
            under_way[-1][2].wait_for_most()
    while under_way:
        yield _finished(*under_way.popleft())


def _without_pixels(chunks: Iterator[_LatentChunk]) -> Generator[GeneratedChunk, None, None]:
    """Yield chunks without frames, on a rank that does not decode."""
    for chunk in chunks:
        if chunk.ready is not None:
            chunk.ready.synchronize()  # otherwise this rank would launch many chunks ahead of the other ranks
        no_frames = np.empty((chunk.latents.shape[0], 0, 0, 0, 3), dtype=np.uint8)
        record = ChunkRecord(chunk.step, chunk.latents.cpu(), chunk.noise)
        yield GeneratedChunk(record, no_frames, time.perf_counter() - chunk.start, is_complete=True)


def _finished(
    chunk: _LatentChunk, host_latents: PendingLatents, pending: PendingFrames, *, is_complete: bool = True
) -> GeneratedChunk:
    frames = pending.result()
    record = ChunkRecord(chunk.step, host_latents.result(), chunk.noise)
    return GeneratedChunk(record, frames, time.perf_counter() - chunk.start, is_complete)


class _Prompts:
    """The encoded text of the current prompts. It is encoded when they change, and the previous text is freed."""

    def __init__(self, models: Models, *, is_guided: bool) -> None:
        """is_guided: whether negative prompts are used."""
        self._models, self._is_guided = models, is_guided
        self._texts: tuple[str, ...] | None = None
        self._conditioning: Conditioning | None = None

    @torch.inference_mode()
    def conditioning(self, prompts: tuple[str, ...], negative_prompts: tuple[str, ...], *, cut: bool) -> Conditioning:
        """Return the conditioning of a chunk. cut: whether the prompts have the words that announce a cut."""
        prefix = self._models.settings.cut_prefix
        texts = tuple(chunk_text(prompt, cut=cut, cut_prefix=prefix) for prompt in prompts)
        if self._is_guided:
            texts += negative_prompts
        if self._conditioning is None or texts != self._texts:
            features_PLD, rows = self._models.text_encoder.encode(texts)
            rows, batch = rows.to(self._models.device), len(prompts)
            self._conditioning = Conditioning(
                text=self._models.transformer.encode_text(features_PLD.to(self._models.device)),
                prompt_index=rows[:batch],
                negative_index=rows[batch:] if self._is_guided else None,
            )
            self._texts = texts
        return self._conditioning
