"""The 4-bit cache against a slow definition, and against the plain cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import get_args

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import NVFP4Tensor
from longvideo.model.attention import Cached, Filling
from longvideo.model.cache import CACHES, CachePrecision, ChunkCache, KVCache, NVFP4KVCache, NVFP4MixedKVCache
from longvideo.model.config import PRESETS
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope, rope_from_positions, rotate
from longvideo.model.slots import CacheSizes
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from tests.golden import relative_error
from tests.model import small

SPEC = ChunkSpec(grid_height=2, grid_width=3, chunk_frames=2, window_frames=8, sink_frames=2, pin_shots=True)
HEADS, HEAD_DIM, BATCH = 2, 32, 2


def new_cache(kind: type[ChunkCache], dtype: torch.dtype = torch.float32) -> ChunkCache:
    return kind(CacheSizes(SPEC, num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM, batch=BATCH, dtype=dtype))


def chunk(number: int) -> tuple[Tensor, Tensor, Rope]:
    generator = torch.Generator().manual_seed(number)
    shape = (2, BATCH, SPEC.tokens_per_chunk, HEADS, HEAD_DIM)
    keys, values = torch.randn(shape, generator=generator)
    # channels have offsets, which smoothing removes; one sample is larger than the other
    keys = (keys + 5 * torch.randn(HEAD_DIM, generator=generator)) * torch.tensor([1.0, 30.0])[:, None, None, None]
    layout = TokenLayout.one_chunk(SPEC, number, shot=0)
    return keys, values, rope_from_positions(layout.position_BL3, HEAD_DIM)


def kept_as(keys: Tensor, values: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a chunk after quantization to four bits, sample by sample."""
    mean = keys.mean(1, keepdim=True).bfloat16().float()
    rounded = [torch.stack([reference.dequantize(reference.quantize(s)) for s in x]) for x in (keys - mean, values)]
    return rotate(rounded[0] + mean, rope), rounded[1]


def test_the_past_is_what_four_bits_hold_and_the_present_is_exact() -> None:
    cache, cuts = new_cache(NVFP4KVCache), {3, 5}
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for number in range(9):
        keys, values, rope = chunk(number)
        for _ in range(2):
            attended = cache.attended(0, keys, values, rope)
        slots = [x.unflatten(1, (-1, SPEC.tokens_per_chunk)) for x in attended]
        for slot, owner in enumerate(cache.window.chunks):
            expected = held[owner] if owner != number else (rotate(keys, rope), values)
            for got, want in zip(slots, expected, strict=True):
                torch.testing.assert_close(got[:, slot], want, rtol=0, atol=1e-4 if owner != number else 0)
        past = cache.past(0)
        past_slots = cache.window.past_slots()
        for got, want in zip(past, slots, strict=True):
            assert torch.equal(got, want[:, past_slots].flatten(1, 2))
        held[number] = kept_as(keys, values, rope)
        cache.keep(0, keys, values, rope)
        cache.commit(cut=number in cuts)


def test_eviction_is_that_of_the_other_cache() -> None:
    caches, cuts = (new_cache(NVFP4KVCache), new_cache(KVCache)), {2, 6}
    for number in range(10):
        for cache in caches:
            cache.attended(0, *chunk(number))
            cache.keep(0, *chunk(number))
        assert caches[0].window.chunks == caches[1].window.chunks
        for cache in caches:
            cache.commit(cut=number in cuts)


MIXED_SPECS = {
    "sink and pin": dataclasses.replace(SPEC, window_frames=12),
    "two sinks": dataclasses.replace(SPEC, window_frames=12, sink_frames=4, pin_shots=False),
    "two sinks and the pin": dataclasses.replace(SPEC, window_frames=14, sink_frames=4),
    "no sink": dataclasses.replace(SPEC, sink_frames=0, pin_shots=False),
    "the pin alone": dataclasses.replace(SPEC, sink_frames=0),
    "sink and pin alone": dataclasses.replace(SPEC, window_frames=6),
    "live chunk alone": dataclasses.replace(SPEC, window_frames=2, sink_frames=0, pin_shots=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [range(16), (0, 1, 4, 9, 10, 11, 12, 13, 16)], ids=["all chunks", "some chunks"])
@pytest.mark.parametrize("name", MIXED_SPECS)
def test_a_mixed_cache_is_exact_for_sink_and_newest_chunk_and_else_the_one_in_four_bits(
    name: str, numbers: Iterable[int], dtype: torch.dtype
) -> None:
    spec, layers, cuts = MIXED_SPECS[name], 2, {1, 3, 4, 9, 12}
    caches = mixed, packed = [
        kind(CacheSizes(spec, num_layers=layers, num_heads=HEADS, head_dim=HEAD_DIM, batch=BATCH, dtype=dtype))
        for kind in (NVFP4MixedKVCache, NVFP4KVCache)
    ]
    newest, num_packed = None, 0
    for number in numbers:
        for cache in caches:
            cache.window.skip_to(number)
        for layer in range(layers):
            written = kept_at(number, layer, dtype)
            slots, four_bits = (
                [x.unflatten(1, (-1, spec.tokens_per_chunk)) for x in cache.attended(layer, *written)]
                for cache in caches
            )
            owners = mixed.window.chunks
            for slot, owner in enumerate(owners):
                expected = [x[:, slot] for x in four_bits]
                if owner < spec.sink_chunks or owner in (newest, number):
                    keys, values, rope = kept_at(owner, layer, dtype)
                    expected = [rotate(keys, rope).to(dtype), values]
                else:
                    num_packed += 1
                for got, want in zip(slots, expected, strict=True):
                    assert torch.equal(got[:, slot], want), (number, layer, owner)
            for got, want in zip(mixed.past(layer), slots, strict=True):
                assert torch.equal(got, want[:, mixed.window.past_slots()].flatten(1, 2))
            for cache in caches:
                cache.keep(layer, *written)
        for cache in caches:
            cache.commit(cut=number in cuts)
        newest = number
    assert (num_packed > 0) == (spec.window_chunks > spec.sink_chunks + 2 - spec.pin_shots)
    assert packed.window.chunks == mixed.window.chunks


def kept_at(number: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Rope]:
    """Return keys and values of a chunk in a layer, and its rotation."""
    keys, values, _ = chunk(100 * layer + number)
    return keys.to(dtype), values.to(dtype), chunk(number)[2]


@pytest.mark.parametrize("window_frames", [4, 6])
def test_a_mixed_cache_whose_past_is_all_exact_is_the_plain_one(window_frames: int) -> None:
    spec = dataclasses.replace(SPEC, window_frames=window_frames, pin_shots=False)
    caches = [
        kind(CacheSizes(spec, num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM, batch=BATCH))
        for kind in (NVFP4MixedKVCache, KVCache)
    ]
    for number in range(7):
        attended = [cache.attended(0, *chunk(number)) for cache in caches]
        assert all(map(torch.equal, *attended))
        for cache in caches:
            cache.keep(0, *chunk(number))
            cache.commit()


def test_an_exact_copy_is_read_while_the_next_chunk_is_live_and_written_only_by_keep() -> None:
    cache = new_cache(NVFP4MixedKVCache)
    cache.keep(0, *chunk(0))
    cache.commit()
    cache.keep(0, *chunk(1))
    cache.commit()
    before = [x.clone() for x in cache.past(0)]
    for seed in (2, 3):
        keys, values, _ = chunk(seed)
        cache.attended(0, keys, values, chunk(2)[2])
        assert all(map(torch.equal, cache.past(0), before))


def test_every_format_has_a_cache() -> None:
    assert tuple(CACHES) == get_args(CachePrecision)


def test_a_sample_does_not_depend_on_its_neighbors() -> None:
    keys, values, rope = chunk(0)
    both = new_cache(NVFP4KVCache)
    alone = NVFP4KVCache(CacheSizes(SPEC, num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM))
    for cache, rows in ((both, slice(None)), (alone, slice(1))):
        cache.keep(0, keys[rows], values[rows], rope)
        cache.commit()
    for mine, theirs in zip(alone.past(0), both.past(0), strict=True):
        assert torch.equal(mine[0], theirs[0])


def test_smoothing_lowers_the_error_of_keys_with_an_offset() -> None:
    keys, values, rope = chunk(0)
    plain = torch.stack([reference.dequantize(reference.quantize(sample)) for sample in keys])
    smooth = kept_as(keys, values, rope)[0]
    assert relative_error(smooth, rotate(keys, rope)) < 0.5 * relative_error(plain, keys)


def test_rollout_with_four_bits_is_near_the_exact_one() -> None:
    config = dataclasses.replace(small.CONFIG, attention_head_dim=32)
    torch.manual_seed(0)
    model = CausalTransformer(config).eval()
    outputs = []
    for kind in (KVCache, NVFP4KVCache, NVFP4MixedKVCache):
        cache = kind(model.cache_sizes(SPEC, batch=1))
        with torch.no_grad():
            text = model.encode_text(small.features(1))
            for number in range(3):
                rope = model.rope(TokenLayout.one_chunk(SPEC, number))
                latents, sigma = small.latents(1, seed=number), torch.full((1, SPEC.chunk_frames), 0.5)
                flow = model(latents, sigma, text, rope=rope, attention=Cached(cache))
                model.fill_cache(latents, 0 * sigma, text, rope=rope, attention=Filling(cache))
                cache.commit()
        outputs.append(flow)
    packed, mixed = (relative_error(output, outputs[0]) for output in outputs[1:])
    assert 0 < packed < 0.02
    # sink and newest chunk are all that the third chunk attends to
    assert mixed == 0


def test_five_billion_parameters_keep_their_past_in_at_most_029_of_the_bytes() -> None:
    config = PRESETS["wan2.2-ti2v-5b"]
    spec = ChunkSpec(grid_height=22, grid_width=40)
    sizes = [
        kind(
            CacheSizes(
                spec,
                num_layers=config.num_layers,
                num_heads=config.num_attention_heads,
                head_dim=config.attention_head_dim,
                dtype=torch.bfloat16,
                device=torch.device("meta"),
            )
        ).num_bytes
        for kind in (NVFP4KVCache, KVCache)
    ]
    assert sizes[1] == 10_380_902_400 and sizes[0] <= 0.29 * sizes[1]


def test_a_head_dim_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 24; expected a multiple of 16"):
        NVFP4KVCache(CacheSizes(SPEC, num_layers=1, num_heads=1, head_dim=24))


def test_scales_that_do_not_fit_their_codes_are_refused() -> None:
    quantized = reference.quantize(torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"need scales \[4, 2\]"):
        NVFP4Tensor(quantized.codes, quantized.scales[:, :1], quantized.tensor_scale)
