"""From steps to pixels: rollout, decode worker, frames. Everything that makes chunks goes through `generate_chunks`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longvideo.checkpoint.settings import ModelSettings
from longvideo.flow.unipc import UniPC
from longvideo.infer.background import BackgroundIterator
from longvideo.infer.decode import ChunkDecoder, PendingFrames, PendingLatents, mark_ready
from longvideo.infer.fit.placement import Placement
from longvideo.infer.history import ChunkRecord, Past
from longvideo.infer.timeline import Step
from longvideo.model.conditioning import Conditioning, chunk_text
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import NumberFormats
from longvideo.rollout import Denoiser, MadeChunk, rollout
from longvideo.streaming.transformer import StreamingTransformer
from longvideo.text.encoder import TextEncoder
from longvideo.vae.autoencoder import Autoencoder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")

NEGATIVE_PROMPT = ""
CHUNKS_AHEAD = 1  # enough to keep both stages busy; more would delay a change of prompt


@dataclass(frozen=True)
class Models:
    """The loaded parts of a model, and how they run.

    placement: devices and data type of the parts. formats: number formats in which they compute; its precision is never
    None. group: ranks that denoise every chunk together; rank 0 decodes.
    """

    transformer: CausalTransformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    settings: ModelSettings
    spec: ChunkSpec
    placement: Placement
    formats: NumberFormats
    group: ProcessGroup | None = None

    @property
    def decodes(self) -> bool:
        """Whether this rank makes pixels."""
        return self.group is None or self.group.rank() == 0

    @property
    def device(self) -> torch.device:
        """Device of the text encoder and of the transformer."""
        return self.placement.device

    @property
    def decode_device(self) -> torch.device:
        """Device of the autoencoder."""
        return self.placement.decode_device


@dataclass(frozen=True)
class VideoInputs:
    """Everything that decides what one video shows, or a batch of videos that share their cuts.

    steps: one for each chunk. generators: one for each sample of the batch; noise is drawn from them. first_latent:
    [B, C, 1, H, W], normalized, fixed as the first latent frame. past: chunks that the first step continues.
    """

    steps: Iterator[Step]
    solver: UniPC
    guidance: float
    generators: tuple[torch.Generator, ...]
    first_latent: Tensor | None = None
    past: Past | None = None


class Stages:
    """What makes one video (or a batch) at a time, and is kept for the next: compiled, recorded, with its memory."""

    def __init__(self, models: Models, *, batch: int, copies: int) -> None:
        """batch: videos. copies: how often each is run in a step; see `longvideo.rollout.branches`."""
        self.size = (batch, copies)
        self.denoiser = StreamingTransformer(
            models.transformer,
            models.spec,
            batch=batch * copies,
            kv_cache=models.formats.kv_cache,
            attention=models.formats.attention,
            group=models.group,
        )
        self.decoder = self._new_decoder(models, batch) if models.decodes else None
        if models.device.type == "cuda":
            self.denoiser.warm_up(clean_pass=models.settings.clean_pass)

    def reset(self) -> None:
        """Get ready for another video."""
        self.denoiser.reset()
        if self.decoder is not None:
            self.decoder.reset()

    @staticmethod
    def _new_decoder(models: Models, batch: int) -> ChunkDecoder:
        scale = models.autoencoder.config.scale_factor_spatial
        decoder = ChunkDecoder(
            models.autoencoder,
            batch=batch,
            height=models.settings.height // scale,
            width=models.settings.width // scale,
            chunk_latents=models.settings.chunk_frames,
            first_device=models.device,
            first_share=models.placement.decode_share,
        )
        # now, not beside the denoising: cuDNN measures convolutions, which wants the GPU for itself
        decoder.warm_up()
        return decoder


@dataclass(frozen=True)
class GeneratedChunk:
    """Frames, uint8 [B, T, H, W, 3] in host memory, with the step they were made for.

    The first chunk of a video comes in two: its opening frame, as soon as that is decoded, then the others.
    seconds: from the moment the chunk was begun to the moment its frames were in host memory. is_complete: whether
    these are its last frames.
    """

    record: ChunkRecord
    frames: np.ndarray
    seconds: float
    is_complete: bool

    @property
    def step(self) -> Step:
        return self.record.step


def generate_chunks(models: Models, stages: Stages, inputs: VideoInputs) -> Generator[GeneratedChunk, None, None]:
    """Make the chunks of one video (or of a batch that shares its cuts), in order. stages: fresh or reset.

    Denoising and decoding run in threads of their own, at most one finished chunk ahead of each other and of the
    caller. On a CPU each takes half of torch's threads; where there is only one, they take turns.
    Of several ranks that share the denoising those that do not decode get chunks of no frames.
    """
    denoise = partial(_denoise, models, stages.denoiser, inputs)
    if stages.decoder is None:
        yield from _without_pixels(denoise())
        return
    cpu_threads = torch.get_num_threads()
    if cpu_threads == 1 and models.device.type == models.decode_device.type == "cpu":
        yield from _decode(stages.decoder, inputs.past, denoise())
        return
    # One thread a stage scales better on two cores than two threads in one stage after the other (86 frames a second
    # against 58), and has no barriers, at which a busy machine makes every small operation wait for the scheduler.
    share = max(1, cpu_threads // 2)
    latents = BackgroundIterator(partial(_with_threads, share, denoise), capacity=CHUNKS_AHEAD, name="denoise")
    decode = partial(_decode, stages.decoder, inputs.past, latents)
    frames = BackgroundIterator(partial(_with_threads, share, decode), capacity=CHUNKS_AHEAD, name="decode")
    try:
        yield from frames
    finally:
        latents.close()  # first, or the decode worker would wait for one more chunk
        frames.close()
        torch.set_num_threads(cpu_threads)


@torch.inference_mode()
def encode_first_frame(models: Models, pixels_HWC: Tensor) -> Tensor:
    """Encode a uint8 picture of the video's size as the normalised latent [1, C, 1, H, W] of a first frame."""
    weight = models.autoencoder.post_quant_conv.weight
    video_HWC = pixels_HWC.to(weight.device).float().div(127.5).sub(1)
    video_BCTHW = video_HWC.permute(2, 0, 1)[None, :, None].to(weight.dtype)
    moments, _ = models.autoencoder.encode(video_BCTHW)
    mean = moments.chunk(2, dim=1)[0].float()
    return models.autoencoder.normalize(mean).to(models.device)


def _with_threads(count: int, source: Callable[[], Generator[T, None, None]]) -> Generator[T, None, None]:
    torch.set_num_threads(count)
    yield from source()


@dataclass(frozen=True)
class _LatentChunk:
    step: Step
    latents: Tensor
    noise: tuple[Tensor, ...]
    ready: torch.cuda.Event | None
    began: float


def _denoise(models: Models, denoiser: Denoiser, inputs: VideoInputs) -> Generator[_LatentChunk, None, None]:
    begun: deque[tuple[Step, tuple[Tensor, ...], float]] = deque()
    prompts = _Prompts(models, guided=inputs.guidance != 1.0)

    def conditionings() -> Iterator[Conditioning]:
        for step in inputs.steps:
            noise = tuple(generator.get_state() for generator in inputs.generators)
            begun.append((step, noise, time.perf_counter()))
            conditioning = prompts.conditioning(step.prompts, cut=step.cut)
            first = inputs.first_latent if step.index == 0 else None
            yield replace(conditioning, cut=step.cut, recache=step.recache, first_latent=first)

    chunks = rollout(
        denoiser,
        conditionings(),
        solver=inputs.solver,
        generators=inputs.generators,
        guidance=inputs.guidance,
        clean_pass=models.settings.clean_pass,
        # one at a time: the text of the one before is let go
        past=(
            (
                MadeChunk(chunk.index, chunk.shot, chunk.cut, chunk.latents.to(models.device)),
                prompts.conditioning(chunk.prompts, cut=chunk.announces),
            )
            for chunk in (inputs.past.attended if inputs.past else ())
        ),
    )
    for latents in chunks:
        step, noise, began = begun.popleft()
        yield _LatentChunk(step, latents, noise, mark_ready(latents), began)


def _decode(
    decoder: ChunkDecoder, past: Past | None, chunks: Iterator[_LatentChunk]
) -> Generator[GeneratedChunk, None, None]:
    """Hand frames out as they are finished.

    On a GPU the next chunk is asked for, and its decoding issued, a little before this one is through, so that neither
    the GPU that decodes nor the one that denoises waits for the host.
    """
    if past is not None:
        decoder.prime(past.decoded, from_start=past.is_decoded_from_start)
    under_way: deque[tuple[_LatentChunk, PendingLatents, PendingFrames]] = deque()
    for chunk in chunks:
        fetched = decoder.fetch(chunk.latents, ready=chunk.ready)
        parts = [(chunk.latents, chunk.step.num_frames)]
        if chunk.step.index == 0 and chunk.step.num_frames > 1:
            # the first latent frame is one frame; to have it shown while the others are decoded costs nothing
            parts = [(chunk.latents[:, :, :1], 1), (chunk.latents[:, :, 1:], chunk.step.num_frames - 1)]
        for latents, num_frames in parts:
            pending = decoder.launch(latents, num_frames, ready=chunk.ready)
            while under_way:
                yield _finished(*under_way.popleft())
            if latents is not parts[-1][0]:
                yield _finished(chunk, fetched, pending, is_complete=False)
            elif pending.is_under_way:
                under_way.append((chunk, fetched, pending))
            else:
                yield _finished(chunk, fetched, pending)
        if under_way:
            under_way[-1][2].wait_for_most()
    while under_way:
        yield _finished(*under_way.popleft())


def _without_pixels(chunks: Iterator[_LatentChunk]) -> Generator[GeneratedChunk, None, None]:
    for chunk in chunks:
        if chunk.ready is not None:
            chunk.ready.synchronize()  # launches would run far ahead of the ranks that wait for each other
        none = np.empty((chunk.latents.shape[0], 0, 0, 0, 3), dtype=np.uint8)
        record = ChunkRecord(chunk.step, chunk.latents.cpu(), chunk.noise)
        yield GeneratedChunk(record, none, time.perf_counter() - chunk.began, is_complete=True)


def _finished(
    chunk: _LatentChunk, fetched: PendingLatents, pending: PendingFrames, *, is_complete: bool = True
) -> GeneratedChunk:
    frames = pending.result()
    record = ChunkRecord(chunk.step, fetched.result(), chunk.noise)
    return GeneratedChunk(record, frames, time.perf_counter() - chunk.began, is_complete)


class _Prompts:
    """Text context of the prompts in use; it is made when they change, and the one before is let go."""

    def __init__(self, models: Models, *, guided: bool) -> None:
        self._models = models
        self._negative = (NEGATIVE_PROMPT,) if guided else ()
        self._texts: tuple[str, ...] | None = None
        self._conditioning: Conditioning | None = None

    @torch.inference_mode()
    def conditioning(self, prompts: tuple[str, ...], *, cut: bool) -> Conditioning:
        """Return what a chunk under these prompts is made from; cut: whether it opens a shot, as far as text tells."""
        prefix = self._models.settings.cut_prefix
        texts = tuple(chunk_text(prompt, cut=cut, cut_prefix=prefix) for prompt in prompts)
        if self._conditioning is None or texts != self._texts:
            features_PLD, rows = self._models.text_encoder.encode([*texts, *self._negative])
            rows = rows.to(self._models.device)
            batch = len(texts)
            self._conditioning = Conditioning(
                text=self._models.transformer.encode_text(features_PLD.to(self._models.device)),
                prompt_index=rows[:batch],
                negative_index=rows[batch:].expand(batch) if self._negative else None,
            )
            self._texts = texts
        return self._conditioning
