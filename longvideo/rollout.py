"""Make latents chunk by chunk: denoise against the cache, hand the result out, run the clean pass, commit, go on.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from longvideo.conditioning import Conditioning
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.flow.unipc import UniPC
from longvideo.model.attention import AttentionPattern, Cached, Filling
from longvideo.model.cache import ChunkCache, KVCache
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer, TextContext


def rollout(
    model: CausalTransformer,
    chunks: Iterable[Conditioning],
    *,
    spec: ChunkSpec,
    solver: UniPC,
    generators: Sequence[torch.Generator],
    guidance: float = 1.0,
    cache_type: type[ChunkCache] = KVCache,
    clean_pass: bool = True,
) -> Iterator[Tensor]:
    """Yield normalised clean latents [B, C, T, H, W], float32, one chunk for each conditioning.

    chunks: read one at a time, just before a chunk is begun, so a caller can decide late; it may never end.
    generators: one CPU generator per sample; a sample's noise does not depend on the batch it is in.
    guidance: classifier-free guidance scale; at 1 the negative prompt is not run. Otherwise every sample runs twice in
        one batch, each copy with its own cache.
    cache_type: how the chunks already made are kept, for example NVFP4KVCache.
    clean_pass: give later chunks the keys and values of a pass over the finished one; otherwise those of its last step,
        which saves that pass, for models that were trained so.
    """
    device = model.patch_embedding.weight.device
    branches = 1 if guidance == 1.0 else 2
    clean_sigma = torch.zeros(branches * len(generators), spec.chunk_frames, device=device)
    cache = _new_cache(cache_type, model, spec, batch=branches * len(generators))
    shot, finish = 0, None
    for index, conditioning in enumerate(chunks):
        with torch.inference_mode():
            if finish is not None:
                finish()
            shot += conditioning.cut and index > 0
            text = conditioning.text.select(_prompt_rows(conditioning, branches))
            rope = model.rope(TokenLayout.one_chunk(spec, index, shot=shot).to(device))
            noise = _noise(model, spec, generators).to(device)
            steps: list[AttentionPattern] = [Cached(cache)] * solver.num_steps
            if not clean_pass:
                steps[-1] = Filling(cache)
            latents = _denoise(model, text, conditioning.first_latent, noise, rope, steps, solver, guidance)
        finish = partial(cache.commit, cut=conditioning.cut)
        if clean_pass:
            batch = latents.repeat(branches, 1, 1, 1, 1)
            finish = partial(_commit, model, batch, clean_sigma, text, rope, cache, conditioning.cut)
        yield latents


def _commit(
    model: CausalTransformer,
    latents: Tensor,
    sigma: Tensor,
    text: TextContext,
    rope: Rope,
    cache: ChunkCache,
    cut: bool,
) -> None:
    """Run the clean pass: only when another chunk is wanted, so that latents leave early and the last need none."""
    model.fill_cache(latents, sigma, text, rope=rope, attention=Filling(cache))
    cache.commit(cut=cut)


def _denoise(
    model: CausalTransformer,
    text: TextContext,
    first: Tensor | None,
    noise: Tensor,
    rope: Rope,
    attention: Sequence[AttentionPattern],
    solver: UniPC,
    guidance: float,
) -> Tensor:
    batch, _, frames, _, _ = noise.shape
    branches = text.num_prompts // batch
    trajectory = solver.start(noise)
    for timestep, pattern in zip(solver.timesteps, attention, strict=True):
        sigma = torch.full((batch, frames), timestep / NUM_TRAIN_TIMESTEPS, device=noise.device)
        if first is not None:
            trajectory.replace(slice(0, 1), first)
            sigma[:, 0] = 0.0
        velocity = model(
            trajectory.sample.repeat(branches, 1, 1, 1, 1),
            sigma.repeat(branches, 1),
            text,
            rope=rope,
            attention=pattern,
        )
        if branches == 2:
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


def _noise(model: CausalTransformer, spec: ChunkSpec, generators: Sequence[torch.Generator]) -> Tensor:
    _, p, q = model.config.patch_size
    shape = (model.config.in_channels, spec.chunk_frames, spec.grid_height * p, spec.grid_width * q)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _new_cache(cache_type: type[ChunkCache], model: CausalTransformer, spec: ChunkSpec, *, batch: int) -> ChunkCache:
    weight = model.patch_embedding.weight
    return cache_type(
        spec,
        num_layers=model.config.num_layers,
        num_heads=model.config.num_attention_heads,
        head_dim=model.config.attention_head_dim,
        batch=batch,
        dtype=weight.dtype,
        device=weight.device,
    )
