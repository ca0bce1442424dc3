"""The rollout: given frames, independence of samples, the order of reads, recache and continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.flow.unipc import UniPC
from longvideo.model.attention import Cached, Filling, Full
from longvideo.model.cache import KVCache, past_chunks, visible_chunks
from longvideo.model.conditioning import Conditioning
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer, TextContext
from longvideo.rollout import CachedTransformer, MadeChunk, branches, rollout
from tests.golden import relative_error
from tests.model import small

STEPS = 3


def conditioning(model: CausalTransformer, rows: list[int], **changes: Any) -> Conditioning:
    """Return a conditioning whose samples follow the prompts `rows`; the negative prompt is the last of four."""
    text = model.encode_text(small.features(4))
    negative = torch.full((len(rows),), 3)
    return Conditioning(text=text, prompt_index=torch.tensor(rows), negative_index=negative, **changes)


def make(model: CausalTransformer, chunks: list[Conditioning], seeds: list[int], guidance: float = 1.0) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    denoiser = CachedTransformer(model, small.SPEC, batch=branches(guidance) * len(seeds))
    latents = rollout(denoiser, chunks, solver=UniPC(STEPS), generators=generators, guidance=guidance)
    return torch.cat(list(latents), 2)


def test_one_chunk_equals_solving_without_a_cache() -> None:
    model = small.model()
    got = make(model, [conditioning(model, [1])], [5])
    trajectory = UniPC(STEPS).start(torch.randn(got.shape[1:], generator=torch.Generator().manual_seed(5))[None])
    layout, text = TokenLayout.one_chunk(small.SPEC, 0), model.encode_text(small.features(4)).select(torch.tensor([1]))
    with torch.no_grad():
        for timestep in UniPC(STEPS).timesteps:
            sigma = torch.full((1, small.SPEC.chunk_frames), timestep / 1000)
            trajectory.step(model(trajectory.sample, sigma, text, rope=model.rope(layout), attention=Full()))
    assert relative_error(got, trajectory.sample) < 1e-5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = small.model()
    for guidance in (1.0, 2.5):
        together = make(model, [conditioning(model, [0, 2])] * 3, [5, 6], guidance)
        alone = [make(model, [conditioning(model, [row])] * 3, [seed], guidance) for row, seed in ((0, 5), (2, 6))]
        assert relative_error(together, torch.cat(alone)) < 1e-5


def test_same_seed_same_bits_and_another_seed_another_video() -> None:
    model = small.model()
    first, again, other = (make(model, [conditioning(model, [0])] * 2, [seed]) for seed in (5, 5, 6))
    assert torch.equal(first, again) and relative_error(other, first) > 0.1


def test_guidance_towards_the_negative_prompt_itself_changes_nothing() -> None:
    model = small.model()
    plain = make(model, [conditioning(model, [3])] * 2, [5])
    guided = make(model, [conditioning(model, [3])] * 2, [5], guidance=4.0)
    assert relative_error(guided, plain) < 1e-4
    assert relative_error(make(model, [conditioning(model, [0])] * 2, [5], guidance=4.0), plain) > 0.01


def test_first_latent_is_kept_and_seen_by_what_follows() -> None:
    model = small.model()
    first = small.latents(1, seed=9)[:, :, :1]
    chunks = [conditioning(model, [0], first_latent=first), conditioning(model, [0])]
    got = make(model, chunks, [5])
    free = make(model, [conditioning(model, [0])] * 2, [5])
    assert torch.equal(got[:, :, :1], first)
    assert relative_error(got[:, :, 1:], free[:, :, 1:]) > 0.01


def test_chunks_are_read_one_at_a_time_and_only_when_needed() -> None:
    model, read = small.model(), []

    def endless() -> Iterator[Conditioning]:
        while True:
            read.append(len(read))
            yield conditioning(model, [0])

    generators = [torch.Generator().manual_seed(0)]
    denoiser = CachedTransformer(model, small.SPEC, batch=1)
    latents = rollout(denoiser, endless(), solver=UniPC(1), generators=generators)
    for count in range(1, 4):
        next(latents)
        assert len(read) == count


def test_a_cut_moves_positions_by_the_offset_from_there_on() -> None:
    model = small.model()
    spec = dataclasses.replace(small.SPEC, offset_per_shot=4)
    chunks = [conditioning(model, [0]), conditioning(model, [0], cut=True)]

    def run(chosen: ChunkSpec) -> Tensor:
        generators = [torch.Generator().manual_seed(1)]
        denoiser = CachedTransformer(model, chosen, batch=1)
        return torch.cat(list(rollout(denoiser, chunks, solver=UniPC(2), generators=generators)), 2)

    shifted, plain = run(spec), run(small.SPEC)
    frames = small.SPEC.chunk_frames
    assert torch.equal(shifted[:, :, :frames], plain[:, :, :frames])
    assert relative_error(shifted[:, :, frames:], plain[:, :, frames:]) > 1e-4


def prefilled(model: CausalTransformer, text: TextContext, chunks: dict[int, Tensor]) -> KVCache:
    """Return a cache that holds only these chunks, under a text."""
    cache = KVCache(model.cache_sizes(small.SPEC, batch=1))
    for index, latents in chunks.items():
        rope = model.rope(TokenLayout.one_chunk(small.SPEC, index))
        model.fill_cache(latents, torch.zeros(1, latents.shape[2]), text, rope=rope, attention=Filling(cache))
        cache.commit()
    return cache


def solve_last_chunk(
    model: CausalTransformer,
    chunks: Sequence[Tensor],
    contexts: list[tuple[TextContext, KVCache]],
    velocity: Callable[..., Tensor],
) -> Tensor:
    """Return the last of the chunks that `make` made with seed 5, solved again.

    contexts: text and cache of each pass of a step. velocity: function of the results of the passes.
    """
    generator, last = torch.Generator().manual_seed(5), len(chunks) - 1
    noise = [torch.randn(chunk.shape[1:], generator=generator)[None] for chunk in chunks][last]
    trajectory, rope = UniPC(STEPS).start(noise), model.rope(TokenLayout.one_chunk(small.SPEC, last))
    for timestep in UniPC(STEPS).timesteps:
        sigma = torch.full((1, small.SPEC.chunk_frames), timestep / 1000)
        passes = [model(trajectory.sample, sigma, text, rope=rope, attention=Cached(cache)) for text, cache in contexts]
        trajectory.step(velocity(*passes))
    return trajectory.sample


@torch.no_grad()
def test_recache_equals_a_fresh_prefill_of_the_window_under_the_new_text() -> None:
    model = small.model()
    old, new = conditioning(model, [0]), conditioning(model, [2], recache=True)
    latents = make(model, [old] * 5 + [new], [5]).split(small.SPEC.chunk_frames, 2)
    text = new.text.select(torch.tensor([2]))
    # the sink, and the other chunks in the window
    cache = prefilled(model, text, {index: latents[index] for index in (0, 3, 4)})
    solved = solve_last_chunk(model, latents, [(text, cache)], lambda velocity: velocity)
    assert relative_error(latents[5], solved) < 1e-5
    kept = make(model, [old] * 5 + [dataclasses.replace(new, recache=False)], [5]).split(small.SPEC.chunk_frames, 2)
    assert relative_error(kept[5], latents[5]) > 1e-3


@torch.no_grad()
def test_guidance_leads_away_from_a_negative_prompt_and_recache_prefills_its_cache_too() -> None:
    model, guidance = small.model(), 2.5
    old = conditioning(model, [0])
    new = dataclasses.replace(conditioning(model, [2], recache=True), negative_index=torch.tensor([1]))
    latents = make(model, [old] * 5 + [new], [5], guidance).split(small.SPEC.chunk_frames, 2)
    texts = [new.text.select(torch.tensor([row])) for row in (2, 1)]
    # the sink, and the other chunks in the window
    caches = [prefilled(model, text, {index: latents[index] for index in (0, 3, 4)}) for text in texts]
    contexts = list(zip(texts, caches, strict=True))
    solved = solve_last_chunk(
        model, latents, contexts, lambda with_text, without: without + guidance * (with_text - without)
    )
    assert relative_error(latents[5], solved) < 1e-5
    same = dataclasses.replace(new, negative_index=old.negative_index)
    other = make(model, [old] * 5 + [same], [5], guidance).split(small.SPEC.chunk_frames, 2)
    assert relative_error(other[5], latents[5]) > 1e-3


def test_a_rollout_continues_after_chunks_of_another() -> None:
    model, first = small.model(), conditioning(small.model(), [1])
    chunks = [dataclasses.replace(first, cut=index == 2) for index in range(4)]
    whole = make(model, chunks, [5]).split(small.SPEC.chunk_frames, 2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        torch.randn(whole[0].shape[1:], generator=generator)
    past = [(MadeChunk(index, int(index >= 2), index == 2, whole[index]), first) for index in range(3)]
    denoiser = CachedTransformer(model, small.SPEC, batch=1)
    (last,) = rollout(denoiser, chunks[3:], solver=UniPC(STEPS), generators=[generator], past=past)
    assert relative_error(last, whole[3]) < 1e-5


@pytest.mark.parametrize("pin_shots", [False, True])
def test_past_chunks_are_those_that_a_rollout_sees(pin_shots: bool) -> None:
    spec = dataclasses.replace(small.SPEC, pin_shots=pin_shots)
    cuts = [index in (3, 4, 9) for index in range(12)]
    visible = visible_chunks(spec, [*cuts, False])
    for chunk in range(len(cuts) + 1):
        seen = visible[chunk, :chunk].nonzero().flatten().tolist()
        assert past_chunks(spec, cuts[:chunk]) == seen
