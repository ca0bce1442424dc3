"""Time a denoising step of a transformer with random weights and a full window, in every number format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.infer.bench.random_weights import random_weights
from longvideo.infer.bench.timing import median_ms
from longvideo.kernels.backends import nvfp4_operations
from longvideo.model.attention import Cached, Filling
from longvideo.model.cache import CACHES, ChunkCache
from longvideo.model.layout import TokenLayout
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import quantize_layers, set_product
from longvideo.quantization.products import W4A16, choose_w4a4

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec


@dataclass(frozen=True)
class StepTiming:
    """Time and memory of a step.

    ms: time in milliseconds. model_bytes: size of the weights. cache_bytes: size of keys and values of all layers.
    peak_bytes: peak memory of the device; 0 on a CPU.
    """

    precision: str
    kv_cache: str
    ms: float
    model_bytes: int
    cache_bytes: int
    peak_bytes: int


def random_model(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> CausalTransformer:
    """Return a transformer with random weights."""
    return random_weights(partial(CausalTransformer, config), device, dtype)


@torch.inference_mode()
def time_steps(
    config: TransformerConfig, spec: ChunkSpec, *, device: torch.device, on_case: Callable[[str], None]
) -> list[StepTiming]:
    """Time a forward pass over one chunk with a full window, batch 1 and no guidance, without compilation.

    on_case: called with the name of each case before it is timed.
    """
    model = random_model(config, device)
    timings = []
    for precision in ("bf16", "nvfp4-weights", "nvfp4"):
        if precision == "nvfp4-weights":
            quantize_layers(model)
            set_product(model, W4A16(nvfp4_operations(device)))
        elif precision == "nvfp4":
            set_product(model, choose_w4a4(device))
        for name, cache_type in CACHES.items():
            on_case(f"{precision}, {name} cache")
            timings.append(_time(model, spec, cache_type, precision, name, device))
    return timings


def _time(
    model: CausalTransformer,
    spec: ChunkSpec,
    cache_type: type[ChunkCache],
    precision: str,
    kv_cache: str,
    device: torch.device,
) -> StepTiming:
    config = model.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = cache_type(model.cache_sizes(spec, batch=1))
    text = model.encode_text(torch.zeros(1, config.text_len, config.text_dim, device=device))
    _, height, width = config.patch_size
    shape = (1, config.in_channels, spec.chunk_frames, spec.grid_height * height, spec.grid_width * width)
    latents, sigma = torch.randn(shape, device=device), torch.full((1, spec.chunk_frames), 0.5, device=device)
    for index in range(spec.window_chunks):
        rope = model.rope(TokenLayout.one_chunk(spec, index, shot=0).to(device))
        model.fill_cache(latents, 0 * sigma, text, rope=rope, attention=Filling(cache))
        cache.commit()
    rope = model.rope(TokenLayout.one_chunk(spec, spec.window_chunks, shot=0).to(device))
    ms = median_ms(lambda: model(latents, sigma, text, rope=rope, attention=Cached(cache)), device)
    tensors = (*model.parameters(), *model.buffers())
    return StepTiming(
        precision=precision,
        kv_cache=kv_cache,
        ms=ms,
        model_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        cache_bytes=cache.num_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )
