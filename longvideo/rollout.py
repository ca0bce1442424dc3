"""Generation of latents chunk by chunk: denoise a chunk, yield it, run its clean pass, and continue with the next.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.model.attention import AttentionPattern, Cached, Filling
from longvideo.model.cache import ChunkCache, ChunkWindow, KVCache
from longvideo.model.layout import TokenLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from longvideo.flow.unipc import UniPC
    from longvideo.model.conditioning import Conditioning
    from longvideo.model.rope import Rope
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer, TextContext


class Denoiser(Protocol):
    """A model with its memory of the finished chunks, which works on one live chunk at a time.

    latent_shape: shape of the latents of a chunk, [B, C, T, H, W].
    """

    device: torch.device
    latent_shape: tuple[int, int, int, int, int]
    spec: ChunkSpec

    def reset(self) -> None:
        """Remove all chunks from memory."""
        ...

    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        """Begin chunk `index`. Chunks that are skipped since the previous one are not part of the past.

        shot: number of cuts before the chunk or at it. text: prompt of every sample, in their order.
        """
        ...

    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        """Return the velocity of the live chunk.

        keep: whether later chunks attend to the keys and values of this pass.
        """
        ...

    def fill(self, latents_BCTHW: Tensor) -> None:
        """Run the clean pass over the finished live chunk, to whose keys and values later chunks attend."""
        ...

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk part of the past. cut: whether it opened a shot."""
        ...


class CachedTransformer:
    """A `Denoiser` that runs the model as it is trained, with any cache."""

    def __init__(
        self, model: CausalTransformer, spec: ChunkSpec, *, batch: int, cache_type: type[ChunkCache] = KVCache
    ) -> None:
        weight, (_, p, q) = model.patch_embedding.weight, model.config.patch_size
        self.device = weight.device
        self.latent_shape = (
            batch,
            model.config.in_channels,
            spec.chunk_frames,
            p * spec.grid_height,
            q * spec.grid_width,
        )
        self._model, self.spec = model, spec
        self._new_cache = partial(cache_type, model.cache_sizes(spec, batch=batch))
        self._cache = self._new_cache()
        self._text: TextContext | None = None
        self._rope: Rope | None = None

    def reset(self) -> None:
        self._cache = self._new_cache()

    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        self._cache.window.skip_to(index)
        self._text = text
        self._rope = self._model.rope(TokenLayout.one_chunk(self.spec, index, shot=shot).to(self.device))

    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        assert self._text is not None and self._rope is not None, "velocity before begin"
        attention: AttentionPattern = Filling(self._cache) if keep else Cached(self._cache)
        return self._model(latents_BCTHW, sigma_BT, self._text, rope=self._rope, attention=attention)

    def fill(self, latents_BCTHW: Tensor) -> None:
        assert self._text is not None and self._rope is not None, "fill before begin"
        sigma = torch.zeros(latents_BCTHW.shape[0], latents_BCTHW.shape[2], device=self.device)
        self._model.fill_cache(latents_BCTHW, sigma, self._text, rope=self._rope, attention=Filling(self._cache))

    def commit(self, *, cut: bool = False) -> None:
        self._cache.commit(cut=cut)


@dataclass(frozen=True)
class ContextLevel:
    """Noise level of a finished chunk when later chunks attend to it.

    sigma: noise level of its latents. model_sigma: noise level that the model receives.
    """

    sigma: float = 0.0
    model_sigma: float = 0.0


CLEAN_CONTEXT = ContextLevel()


def context_level(solver: UniPC, *, clean_pass: bool) -> ContextLevel:
    """Return the noise level of the pass that stores the keys and values of a chunk in a rollout."""
    if clean_pass:
        return CLEAN_CONTEXT
    return ContextLevel(solver.sigmas[solver.num_steps - 1], solver.timesteps[-1] / NUM_TRAIN_TIMESTEPS)


@dataclass(frozen=True)
class MadeChunk:
    """A finished chunk.

    shot: number of cuts before it or at it. cut: whether it opens a shot.
    latents: normalized clean latents on the device of the denoiser, [B, C, T, H, W].
    """

    index: int
    shot: int
    cut: bool
    latents: Tensor


def rollout(
    denoiser: Denoiser,
    chunks: Iterable[Conditioning],
    *,
    solver: UniPC,
    generators: Sequence[torch.Generator],
    guidance: float = 1.0,
    clean_pass: bool = True,
    past: Iterable[tuple[MadeChunk, Conditioning]] = (),
) -> Iterator[Tensor]:
    """Yield normalized clean latents [B, C, T, H, W], float32, one chunk for each conditioning.

    denoiser: denoiser without a past, for `branches(guidance)` copies of the batch.
    chunks: conditionings, read one at a time just before a chunk is begun, so that a caller can decide late. They may
        never end.
    generators: one CPU generator per sample; the noise of a sample does not depend on its batch.
    guidance: scale of classifier-free guidance. At 1 the negative prompt is not used; otherwise every sample runs twice
        in one batch, and each copy has its own cache.
    clean_pass: whether later chunks attend to the keys and values of a clean pass over the finished chunk; otherwise to
        those of its last step, for models that were trained so.
    past: finished chunks after which the rollout continues, with the conditioning of each: in order, those that the
        next chunk attends to (`longvideo.model.cache.past_chunks`), with the last finished one. They go through the
        clean pass, in which each attends to those before it.
    """
    copies = branches(guidance)
    assert denoiser.latent_shape[0] == copies * len(generators), (denoiser.latent_shape, len(generators))
    memory = _Memory(denoiser.spec)
    first, shot, finish = 0, 0, None
    for chunk, conditioning in past:
        _fill(denoiser, chunk, conditioning, copies)
        memory.add(chunk)
        first, shot = chunk.index + 1, chunk.shot
    for index, conditioning in enumerate(chunks, first):
        with torch.inference_mode():
            if conditioning.recache:
                denoiser.reset()
                for chunk in memory.attended():
                    _fill(denoiser, chunk, conditioning, copies)
            elif finish is not None:
                finish()
            shot += conditioning.cut and index > 0
            denoiser.begin(index, shot=shot, text=conditioning.text.select(_prompt_rows(conditioning, copies)))
            noise = _noise(denoiser, generators)
            latents = _denoise(denoiser, conditioning.first_latent, noise, solver, guidance, keep_last=not clean_pass)
        memory.add(MadeChunk(index, shot, conditioning.cut, latents))
        finish = partial(
            _commit, denoiser, latents.repeat(copies, 1, 1, 1, 1) if clean_pass else None, conditioning.cut
        )
        yield latents


def branches(guidance: float) -> int:
    """Return how many times every sample is run in a step."""
    return 1 if guidance == 1.0 else 2


class _Memory:
    """The chunks that the next one attends to, with their latents."""

    def __init__(self, spec: ChunkSpec) -> None:
        self._window = ChunkWindow(spec)
        self._chunks: dict[int, MadeChunk] = {}

    def add(self, chunk: MadeChunk) -> None:
        self._window.skip_to(chunk.index)
        self._window.begin()
        self._window.commit(cut=chunk.cut)
        self._chunks[chunk.index] = chunk
        self._chunks = {index: kept for index, kept in self._chunks.items() if index in self._window.chunks}

    def attended(self) -> list[MadeChunk]:
        self._window.begin()
        return [chunk for index, chunk in sorted(self._chunks.items()) if index in self._window.chunks]


@torch.inference_mode()
def _fill(denoiser: Denoiser, chunk: MadeChunk, conditioning: Conditioning, copies: int) -> None:
    text = conditioning.text.select(_prompt_rows(conditioning, copies))
    denoiser.begin(chunk.index, shot=chunk.shot, text=text)
    denoiser.fill(chunk.latents.repeat(copies, 1, 1, 1, 1))
    denoiser.commit(cut=chunk.cut)


def _commit(denoiser: Denoiser, latents: Tensor | None, cut: bool) -> None:
    """Run the clean pass of the previous chunk. It waits for the next chunk, so that latents are yielded early."""
    if latents is not None:
        denoiser.fill(latents)
    denoiser.commit(cut=cut)


def _denoise(
    denoiser: Denoiser, first: Tensor | None, noise: Tensor, solver: UniPC, guidance: float, *, keep_last: bool
) -> Tensor:
    batch, _, frames, _, _ = noise.shape
    copies = denoiser.latent_shape[0] // batch
    trajectory = solver.start(noise)
    for number, timestep in enumerate(solver.timesteps, start=1):
        sigma = torch.full((batch, frames), timestep / NUM_TRAIN_TIMESTEPS, device=noise.device)
        if first is not None:
            trajectory.replace(slice(0, 1), first)
            sigma[:, 0] = 0.0
        velocity = denoiser.velocity(
            trajectory.sample.repeat(copies, 1, 1, 1, 1),
            sigma.repeat(copies, 1),
            keep=keep_last and number == solver.num_steps,
        )
        if copies == 2:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        trajectory.step(velocity)
    if first is not None:
        trajectory.replace(slice(0, 1), first)
    return trajectory.sample


def _prompt_rows(conditioning: Conditioning, branches: int) -> Tensor:
    rows = [conditioning.prompt_index]
    if branches == 2:
        assert conditioning.negative_index is not None, "guidance needs a negative prompt"
        rows.append(conditioning.negative_index)
    return torch.cat(rows)


def _noise(denoiser: Denoiser, generators: Sequence[torch.Generator]) -> Tensor:
    noise = torch.stack([torch.randn(denoiser.latent_shape[1:], generator=generator) for generator in generators])
    if denoiser.device.type == "cuda":
        noise = noise.pin_memory()  # a pageable copy would wait for all earlier work
    return noise.to(denoiser.device, non_blocking=True)
