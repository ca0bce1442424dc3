"""The streaming transformer against its model, in rollouts that are longer than the window."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.flow.unipc import UniPC
from longvideo.kernels.backends import AttentionPrecision, TransformerPrecision
from longvideo.model.cache import CACHES, CachePrecision, past_chunks
from longvideo.model.conditioning import Conditioning
from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import with_precision
from longvideo.quantization.number_formats import PACKED_CACHES
from longvideo.rollout import CachedTransformer, Denoiser, MadeChunk, branches, rollout
from longvideo.streaming.transformer import StreamingTransformer
from tests.golden import relative_error

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    text_len=6,
    ffn_dim=96,
    num_layers=3,
    freq_dim=16,
)
SPEC = ChunkSpec(2, 4, chunk_frames=2, window_frames=6, sink_frames=2, pin_shots=False, offset_per_shot=4)
CUTS = (True, False, False, True, False)
RECACHED = 2
# with a past of three chunks, of which a mixed cache has one in 4 bits
WIDE = replace(SPEC, window_frames=8, pin_shots=True)


@cache
def _weights() -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model.eval().requires_grad_(False)


def transformer(precision: TransformerPrecision, device: str, dtype: torch.dtype) -> CausalTransformer:
    return with_precision(deepcopy(_weights()).to(device, dtype), precision)


def roll_out(
    denoiser: Denoiser,
    model: CausalTransformer,
    *,
    samples: int = 1,
    guidance: float = 1.0,
    clean_pass: bool = True,
    past: Sequence[MadeChunk] = (),
) -> Tensor:
    """Return the latents of a chunk for each of `CUTS`, or of those after the past."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, CONFIG.text_len, CONFIG.text_dim, generator=generator).to(denoiser.device)
    with torch.inference_mode():
        text = model.encode_text(features)
    rows = torch.arange(samples, device=denoiser.device)
    chunks = [
        Conditioning(text, (rows + cut) % 2, 0 * rows + 2, cut=cut, recache=index == RECACHED)
        for index, cut in enumerate(CUTS)
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in range(samples)]
    chunks_of_latents = rollout(
        denoiser,
        chunks[past[-1].index + 1 :] if past else chunks,
        solver=UniPC(2),
        generators=generators,
        guidance=guidance,
        clean_pass=clean_pass,
        past=[(chunk, chunks[chunk.index]) for chunk in past],
    )
    return torch.cat(list(chunks_of_latents), dim=2)


def both(
    precision: TransformerPrecision,
    kv_cache: CachePrecision,
    device: str,
    dtype: torch.dtype,
    *,
    spec: ChunkSpec = SPEC,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the latents of the streaming transformer, and those of the model."""
    batch = branches(options.get("guidance", 1.0)) * options.get("samples", 1)
    attention = options.pop("attention", "bf16")
    model = transformer(precision, device, dtype)
    expected = roll_out(CachedTransformer(model, spec, batch=batch, cache_type=CACHES[kv_cache]), model, **options)
    streaming = StreamingTransformer(model, spec, batch=batch, kv_cache=kv_cache, attention=attention)
    return roll_out(streaming, model, **options), expected


@pytest.mark.parametrize("spec", [SPEC, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("clean_pass", [True, False])
def test_it_makes_the_latents_of_the_model(kv_cache: CachePrecision, clean_pass: bool, spec: ChunkSpec) -> None:
    got, expected = both("bf16", kv_cache, "cpu", torch.float32, clean_pass=clean_pass, spec=spec)
    # in four bits a value may be rounded the other way
    assert relative_error(got, expected) < (1e-5 if kv_cache == "bf16" else 1e-3)


def test_a_mixed_cache_is_between_the_other_two() -> None:
    exact, packed, mixed = (both("bf16", kv_cache, "cpu", torch.float32, spec=WIDE) for kv_cache in CACHES)
    for path in range(2):
        assert 0 < relative_error(mixed[path], exact[path]) < relative_error(packed[path], exact[path])


@pytest.mark.parametrize("kv_cache", CACHES)
def test_it_continues_after_some_chunks_of_the_past(kv_cache: CachePrecision, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = (False, False, False, True, False, False, False, False, True, False, False)
    monkeypatch.setattr("tests.streaming.test_transformer.CUTS", cuts)
    shape = (1, CONFIG.in_channels, WIDE.chunk_frames, 2 * WIDE.grid_height, 2 * WIDE.grid_width)
    past = [
        MadeChunk(index, sum(cuts[: index + 1]), cuts[index], torch.randn(shape, generator=generator))
        for generator in [torch.Generator().manual_seed(2)]
        for index in past_chunks(WIDE, cuts[:7])
    ]
    assert [chunk.index for chunk in past] == [0, 3, 6]
    got, expected = both("bf16", kv_cache, "cpu", torch.float32, spec=WIDE, past=past)
    assert relative_error(got, expected) < (1e-5 if kv_cache == "bf16" else 1e-3)


@pytest.mark.parametrize("attention", ["bf16", "fp8-emulated"])
@pytest.mark.parametrize("clean_pass", [True, False])
def test_a_mixed_cache_whose_past_is_all_exact_gives_the_bits_of_a_plain_one(
    attention: AttentionPrecision, clean_pass: bool
) -> None:
    options = {"attention": attention, "clean_pass": clean_pass, "samples": 2}
    mixed, exact = (both("bf16", kv_cache, "cpu", torch.float32, **options) for kv_cache in ("nvfp4-mixed", "bf16"))
    assert torch.equal(mixed[0], exact[0]) and torch.equal(mixed[1], exact[1])


def test_samples_and_guidance() -> None:
    got, expected = both("bf16", "bf16", "cpu", torch.float32, samples=2, guidance=3.0)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("precision", ["nvfp4-weights", "nvfp4", "fp8-emulated"])
def test_it_multiplies_as_the_model_does(precision: TransformerPrecision) -> None:
    got, expected = both(precision, "bf16", "cpu", torch.float32)
    plain = roll_out(CachedTransformer(_weights(), SPEC, batch=1), _weights())
    # an input near the middle of two numbers may be rounded the other way, which is far below the rounding itself
    bound = 1e-5 if precision == "nvfp4-weights" else 0.3 * relative_error(expected, plain)
    assert relative_error(got, expected) < bound


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("precision", ["bf16", "fp8-emulated"])
def test_attention_in_fp8_is_near(precision: TransformerPrecision, kv_cache: CachePrecision) -> None:
    got, expected = both(precision, kv_cache, "cpu", torch.float32, attention="fp8-emulated", spec=WIDE)
    assert 1e-3 < relative_error(got, expected) < 0.1


def test_what_values_have_in_common_survives_attention_in_fp8() -> None:
    model = transformer("bf16", "cpu", torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.v.bias"):
            parameter += 20.0
    expected = roll_out(CachedTransformer(model, SPEC, batch=1), model)
    got = roll_out(StreamingTransformer(model, SPEC, batch=1, attention="fp8-emulated"), model)
    assert relative_error(got, expected) < 2e-3


@pytest.mark.parametrize("kv_cache", PACKED_CACHES)
def test_a_second_video_does_not_depend_on_the_first(kv_cache: CachePrecision) -> None:
    model = transformer("bf16", "cpu", torch.float32)
    streaming = StreamingTransformer(model, WIDE, batch=1, kv_cache=kv_cache)
    streaming.warm_up()
    first = roll_out(streaming, model)
    streaming.reset()
    assert torch.equal(roll_out(streaming, model), first)


@pytest.mark.parametrize("precision", ["bf16", "fp8-emulated"])
def test_two_of_them_share_the_weights_of_a_model(precision: TransformerPrecision) -> None:
    model = transformer(precision, "cpu", torch.float32)
    first = roll_out(StreamingTransformer(model, SPEC, batch=1), model)
    name = "weight" if precision == "bf16" else "quantized_weight"
    places = _places(model, name)
    second = roll_out(StreamingTransformer(model, SPEC, batch=1), model)
    assert torch.equal(first, second)
    assert _places(model, name) == places


def _places(model: CausalTransformer, name: str) -> list[int]:
    weights = [getattr(block.get_submodule("self_attn.k"), name) for block in model.blocks]
    return [(weight if isinstance(weight, Tensor) else weight.values).data_ptr() for weight in weights]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("precision", ["bf16", "nvfp4-weights", "nvfp4", "fp8"])
def test_graphs_make_the_latents_of_the_model(precision: TransformerPrecision, kv_cache: CachePrecision) -> None:
    model = transformer(precision, "cuda", torch.bfloat16)
    expected = roll_out(CachedTransformer(model, WIDE, batch=1, cache_type=CACHES[kv_cache]), model)
    plain = transformer("bf16", "cuda", torch.bfloat16)
    unrounded = roll_out(CachedTransformer(plain, WIDE, batch=1), plain)
    streaming = StreamingTransformer(model, WIDE, batch=1, kv_cache=kv_cache)
    streaming.warm_up()
    got = roll_out(streaming, model)
    # bits of bfloat16 differ, so numbers may be rounded the other way, which is less than the error of all rounding
    assert relative_error(got, expected) < max(1e-2, 0.75 * relative_error(expected, unrounded))
    streaming.reset()
    assert torch.equal(roll_out(streaming, model), got)


@pytest.mark.gpu
@pytest.mark.parametrize("clean_pass", [True, False])
def test_graphs_with_a_past_that_is_all_exact_give_the_bits_of_a_plain_cache(clean_pass: bool) -> None:
    model = transformer("bf16", "cuda", torch.bfloat16)
    latents = []
    for kv_cache in ("nvfp4-mixed", "bf16"):
        streaming = StreamingTransformer(model, SPEC, batch=2, kv_cache=kv_cache)
        streaming.warm_up(clean_pass=clean_pass)
        latents.append(roll_out(streaming, model, samples=2, clean_pass=clean_pass))
    assert torch.equal(*latents)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", PACKED_CACHES)
def test_nothing_waits_for_the_gpu(kv_cache: CachePrecision) -> None:
    model = transformer("bf16", "cuda", torch.bfloat16)
    streaming = StreamingTransformer(model, WIDE, batch=1, kv_cache=kv_cache)
    streaming.warm_up()
    with torch.inference_mode():
        text = model.encode_text(torch.randn(1, CONFIG.text_len, CONFIG.text_dim, device="cuda"))
    rows = torch.zeros(1, dtype=torch.int64, device="cuda")
    chunks = rollout(
        streaming,
        [Conditioning(text, rows)] * 5,
        solver=UniPC(2),
        generators=[torch.Generator().manual_seed(0)],
    )
    torch.cuda.set_sync_debug_mode("error")  # raises where the host waits
    try:
        assert len(list(chunks)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
