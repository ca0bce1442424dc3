"""The 4-bit cache against a slow definition, and against the plain cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import NVFP4Tensor
from longvideo.model.attention import Cached, Filling
from longvideo.model.cache import ChunkCache, KVCache, NVFP4KVCache
from longvideo.model.config import PRESETS
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope, rope_from_positions, rotate
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from tests.golden import relative_error
from tests.model import small

SPEC = ChunkSpec(grid_height=2, grid_width=3, chunk_frames=2, window_frames=8, sink_frames=2, pin_shots=True)
HEADS, HEAD_DIM, BATCH = 2, 32, 2


def new_cache(kind: type[ChunkCache], dtype: torch.dtype = torch.float32) -> ChunkCache:
    return kind(SPEC, num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM, batch=BATCH, dtype=dtype)


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


def test_a_sample_does_not_depend_on_its_neighbors() -> None:
    keys, values, rope = chunk(0)
    both, alone = new_cache(NVFP4KVCache), NVFP4KVCache(SPEC, num_layers=1, num_heads=HEADS, head_dim=HEAD_DIM)
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
    for kind in (KVCache, NVFP4KVCache):
        cache = kind(SPEC, num_layers=config.num_layers, num_heads=2, head_dim=32)
        with torch.no_grad():
            text = model.encode_text(small.features(1))
            for number in range(3):
                rope = model.rope(TokenLayout.one_chunk(SPEC, number))
                latents, sigma = small.latents(1, seed=number), torch.full((1, SPEC.chunk_frames), 0.5)
                flow = model(latents, sigma, text, rope=rope, attention=Cached(cache))
                model.fill_cache(latents, 0 * sigma, text, rope=rope, attention=Filling(cache))
                cache.commit()
        outputs.append(flow)
    assert 0 < relative_error(outputs[1], outputs[0]) < 0.02


def test_five_billion_parameters_keep_their_past_in_at_most_029_of_the_bytes() -> None:
    config = PRESETS["wan2.2-ti2v-5b"]
    spec = ChunkSpec(grid_height=22, grid_width=40)
    sizes = [
        kind(
            spec,
            num_layers=config.num_layers,
            num_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            dtype=torch.bfloat16,
            device="meta",
        ).num_bytes
        for kind in (NVFP4KVCache, KVCache)
    ]
    assert sizes[1] == 10_380_902_400 and sizes[0] <= 0.29 * sizes[1]


def test_a_head_dim_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 24; expected a multiple of 16"):
        NVFP4KVCache(SPEC, num_layers=1, num_heads=1, head_dim=24)


def test_scales_that_do_not_fit_their_codes_are_refused() -> None:
    quantized = reference.quantize(torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"need scales \[4, 2\]"):
        NVFP4Tensor(quantized.codes, quantized.scales[:, :1], quantized.tensor_scale)
