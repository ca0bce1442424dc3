"""The estimated memory of each GPU, against measured peaks and against what is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.settings import chunk_spec
from longvideo.infer.fit.memory import CONTEXT, GRAPHS, MemoryPart, estimate
from longvideo.infer.fit.shapes import ModelShapes
from longvideo.model.cache import CACHES, CachePrecision
from longvideo.model.config import PRESETS
from longvideo.model.slots import CacheSizes
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import NumberFormats
from longvideo.quantization.offloading import offload_blocks
from longvideo.streaming.decoder import StreamingDecoder
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from tests.infer.workloads import FIRST, SECOND, named, shapes, total, workload

# torch.cuda.max_memory_allocated in GB from `longvideo bench stream` on H200s, random weights, 704x1280, 2 steps, a
# window of 32 latent frames: precision, cache, attention, share, GB on the GPU that denoises and on the other one
MEASURED = [
    ("bf16", "bf16", "bf16", 0.0, (33.45,)),
    ("fp8", "bf16", "bf16", 0.0, (28.55,)),
    ("fp8", "bf16", "fp8", 0.0, (23.34,)),
    ("bf16", "bf16", "bf16", 0.09, (22.77, 11.23)),
    ("fp8", "bf16", "bf16", 0.15, (18.23, 10.88)),
    ("fp8", "bf16", "fp8", 0.23, (14.05, 10.72)),
    ("bf16", "bf16", "bf16", 0.0, (21.32, 12.31)),
    ("fp8", "bf16", "bf16", 0.0, (16.43, 12.31)),
    ("nvfp4-weights", "nvfp4", "bf16", 0.09, (8.98, 11.23)),
]
UNCOUNTED = (GRAPHS, CONTEXT)
"""Parts that `max_memory_allocated` does not count."""


def estimated(**changes: Any) -> list[MemoryPart]:
    return estimate(workload(**changes))


def small_shapes(*, height: int, width: int) -> ModelShapes:
    """Return the shapes of tiny at another picture size."""
    settings = replace(shapes().settings, height=height, width=width)
    return shapes(
        transformer=PRESETS["tiny"],
        autoencoder=AutoencoderConfig.tiny(),
        settings=settings,
        spec=chunk_spec(settings),
    )


@pytest.mark.parametrize(("precision", "kv_cache", "attention", "share", "measured"), MEASURED)
def test_the_estimate_is_close_to_the_measured_peak(
    precision: str, kv_cache: str, attention: str, share: float, measured: tuple[float, ...]
) -> None:
    parts = estimated(
        formats=NumberFormats.parse(precision, kv_cache, attention),
        decode_device=(FIRST, SECOND)[len(measured) - 1],
        decode_share=share,
        shapes=shapes(packed=precision == "nvfp4-weights"),  # the measured peaks do not include loading
    )
    for device, peak in zip((FIRST, SECOND), measured, strict=False):
        counted = total((part for part in parts if part.name not in UNCOUNTED), device)
        assert 0.95 * peak <= counted / 1e9 <= 1.15 * peak
        assert named(parts, device).keys() >= set(UNCOUNTED)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_estimate_of_the_decoder_is_what_it_allocates(low_memory: bool) -> None:
    small = small_shapes(height=64, width=96)
    coder, scale = Autoencoder(small.autoencoder), small.autoencoder.scale_factor_spatial
    decoder = StreamingDecoder(coder, Grid(2, 1, 64 // scale, 96 // scale, shares_buffer=low_memory))
    changes = {"shapes": replace(small, packed=True), "batch": 2, "dtype": torch.float32, "low_memory": low_memory}
    kept = named(estimated(**changes))["decoder"]
    shared = {parameter.untyped_storage().data_ptr() for parameter in coder.parameters()}
    assert kept == pytest.approx(_allocated(decoder, shared), rel=0.01)


def _allocated(root: object, shared: set[int]) -> int:
    """Return the bytes of all tensors that an object of longvideo holds, without those in shared memory."""
    sizes, waiting, seen = {}, [root], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif type(value).__module__.startswith(("longvideo.vae", "longvideo.streaming")) and not isinstance(
            value, torch.nn.Module
        ):
            waiting += vars(value).values()
    return sum(size for pointer, size in sizes.items() if pointer not in shared)


@pytest.mark.parametrize("sink_frames", [0, 8])
@pytest.mark.parametrize("pin_shots", [False, True])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_the_estimate_of_the_cache_is_what_it_allocates(
    kv_cache: CachePrecision, pin_shots: bool, sink_frames: int
) -> None:
    small = small_shapes(height=64, width=64)
    small = replace(small, spec=replace(small.spec, sink_frames=sink_frames, pin_shots=pin_shots))
    config = small.transformer
    slots = CACHES[kv_cache].slots_type(
        CacheSizes(
            small.spec,
            config.num_layers,
            config.num_attention_heads,
            config.attention_head_dim,
            batch=2,
            dtype=torch.bfloat16,
        )
    )
    tensors, waiting = {}, list(vars(slots).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "key_mean"):
            waiting += vars(value).values()
    parts = estimated(formats=NumberFormats.parse("bf16", kv_cache), shapes=small, batch=2)
    assert named(parts)["KV cache"] == pytest.approx(sum(tensors.values()), rel=0.01)


def test_guidance_doubles_the_cache_and_not_the_decoder() -> None:
    plain, guided = named(estimated()), named(estimated(shapes=shapes().with_guidance(5.0)))
    assert guided["KV cache"] == 2 * plain["KV cache"]
    assert guided["decoder"] == plain["decoder"]


def test_a_model_that_is_quantized_while_loading_needs_the_memory_of_the_whole_one() -> None:
    formats = NumberFormats("nvfp4-weights", "nvfp4")
    whole = estimated(formats=formats, decode_device=SECOND)
    packed = estimated(formats=formats, decode_device=SECOND, shapes=shapes(packed=True))
    assert total(packed) < total(whole)
    assert named(whole).keys() == {"transformer while loading", CONTEXT}
    assert named(whole)["transformer while loading"] > 10e9
    for staged in ({"low_memory": True}, {"offload_weights": True}):
        assert "transformer while loading" not in named(estimated(formats=formats, decode_device=SECOND, **staged))
    assert "transformer while loading" not in named(packed)
    assert "transformer while loading" not in named(estimated(formats=NumberFormats("fp8")))


def test_the_text_encoder_is_on_the_device_of_the_transformer() -> None:
    parts = estimated(decode_device=SECOND, shapes=shapes(text_encoder=UMT5Config.xxl()))
    assert named(parts)["text encoder"] == 2 * 5_680_910_336  # parameters of google/umt5-xxl's encoder
    assert "text encoder" not in named(parts, SECOND)
    assert total(parts) == total(estimated(decode_device=SECOND)) + named(parts)["text encoder"]


def test_the_weights_of_the_5b_take_two_bytes_for_each_parameter() -> None:
    with torch.device("meta"):
        model = CausalTransformer(PRESETS["wan2.2-ti2v-5b"])
    assert named(estimated())["transformer"] == 2 * sum(parameter.numel() for parameter in model.parameters())


def test_the_text_encoder_takes_less_in_8_and_4_bits_and_nothing_on_the_cpu() -> None:
    own = shapes(text_encoder=UMT5Config.xxl())
    embedding, others = 256384 * 4096, 5_680_910_336 - 256384 * 4096
    for formats, size in (
        (NumberFormats("bf16", text_encoder="fp8"), others),
        (NumberFormats("bf16", text_encoder="nvfp4"), others * 9 // 16),
    ):
        parts = estimated(shapes=own, formats=formats)
        assert named(parts)["text encoder"] == pytest.approx(embedding + size, rel=2e-3)
    on_cpu = estimated(shapes=own, text_on_cpu=True)
    assert total(on_cpu) == total(estimated())
    assert "text encoder" not in named(on_cpu)


def test_a_text_encoder_that_is_freed_counts_only_while_it_is_alone() -> None:
    own = shapes(text_encoder=UMT5Config.xxl())
    assert named(estimated(shapes=own, frees_text=True)) == named(estimated())
    packed = {
        "formats": NumberFormats("nvfp4-weights", "nvfp4"),
        "shapes": replace(own.with_decoder("taew2_2"), packed=True),
    }
    alone = named(estimated(**packed, frees_text=True))
    assert alone == {"text encoder": 2 * 5_680_910_336, "CUDA context": 10**9}


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4-weights", "nvfp4"])
def test_weights_in_host_memory_leave_two_blocks_and_what_is_not_a_matrix(precision: str) -> None:
    formats = NumberFormats.parse(precision)
    whole, left = (named(estimated(formats=formats, offload_weights=x))["transformer"] for x in (False, True))
    weights = 30 * (8 * 3072**2 + 2 * 3072 * 14336)  # of the blocks' linear layers
    moved = {"bf16": 2 * weights, "fp8": weights}.get(precision, weights * 9 // 16)
    assert whole - left == pytest.approx(moved * 28 / 30, rel=1e-6)
    assert left < 1e9


def test_offloading_is_estimated_as_it_allocates() -> None:
    small = shapes(transformer=PRESETS["tiny"])
    model = CausalTransformer(small.transformer).to(torch.bfloat16)
    offload_blocks(model, torch.device("cpu"))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    parts = estimated(shapes=small, offload_weights=True)
    assert named(parts)["transformer"] == pytest.approx(sum(storages.values()), rel=0.01)


def test_little_memory_has_the_larger_activations_alone_and_a_smaller_decoder() -> None:
    tiny_decoder = shapes().with_decoder("taew2_2")
    for own in (shapes(), tiny_decoder):
        plain, low = (named(estimated(shapes=own, low_memory=x)) for x in (False, True))
        assert low["decoder"] <= plain["decoder"] and low[GRAPHS] <= plain[GRAPHS]
        assert {name: low[name] for name in low if name not in ("decoder", GRAPHS)} == {
            name: plain[name] for name in plain if name not in ("decoder", GRAPHS)
        }
        assert sum(low.values()) < sum(plain.values()) - 0.7e9
    apart = {"shapes": tiny_decoder, "decode_device": SECOND}
    assert named(estimated(**apart, low_memory=True)) == named(estimated(**apart))  # nothing is used in turn there


def test_the_5b_fits_into_24_gb_and_with_a_small_decoder_into_16_gb() -> None:
    own = shapes(text_encoder=UMT5Config.xxl())
    few_bits = {"formats": NumberFormats("nvfp4-weights", "nvfp4"), "low_memory": True, "frees_text": True}
    assert total(estimated(shapes=own, **few_bits)) < 22e9
    assert total(estimated(shapes=own.with_decoder("taew2_2"), **few_bits)) < 14e9
    exact = {"formats": NumberFormats("bf16"), "low_memory": True, "offload_weights": True, "frees_text": True}
    assert total(estimated(shapes=own.with_decoder("taew2_2"), **exact)) < 16e9
