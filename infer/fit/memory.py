"""Estimate the memory of each GPU that streaming needs, from shapes alone, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from longvideo.checkpoint.modules import OnMeta
from longvideo.infer.decode import step_of
from longvideo.infer.fit.placement import Placement, numbered
from longvideo.infer.fit.shapes import ModelShapes
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import FP8_FORMATS, PACKED_CACHES, NumberFormats
from longvideo.quantization.offloading import NUM_BUFFERS
from longvideo.quantization.selection import linear_layers
from longvideo.quantization.weights_only import quantized_bytes
from longvideo.rollout import branches
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoders import DecoderBytes, decoder_bytes
from longvideo.text.umt5 import POSITION_BIASES, UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from longvideo.kernels.backends import TransformerPrecision
    from longvideo.model.config import TransformerConfig
    from longvideo.quantization.number_formats import DecoderPrecision
    from longvideo.streaming.decoders import DecoderConfig
    from longvideo.text.umt5 import UMT5Config

CONTEXT_BYTES = 10**9
"""CUDA's context, kernels and libraries, which torch's allocator does not count."""
WORKSPACE_BYTES = 150_000_000
"""Memory that does not follow from shapes: workspaces of cuBLAS (32 MiB for each thread and stream on Hopper), and the
latents of the solver."""
WIDTHS_OF_PASS = 9
"""Largest number of activations as wide as the model in a pass: h, an input, q, k, v, the q of cross-attention, the
output of attention, two updates."""
QUANTIZING_BYTES = {"fp8": 12, "fp8-emulated": 12, "nvfp4": 29, "nvfp4-weights": 29, "nvfp4-te": 29}
"""Bytes for each weight of a layer while it is quantized, with the result: the tensors alive in `from_linear`."""

GRAPHS, CONTEXT, RESIDENT = "CUDA graphs", "CUDA context", "loaded before"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model to stream, with its number formats and placement.

    batch: number of videos that are generated together, with the guidance of the settings. frees_text: whether the text
    encoder encodes all prompts before anything else is loaded, and is freed then. resident: bytes of the weights that
    are on a device already, which the model uses where they are. loaded: bytes of the same model that are on a device
    already, each of which is freed or used again while it is loaded.
    """

    shapes: ModelShapes
    formats: NumberFormats
    placement: Placement
    batch: int = 1
    frees_text: bool = False
    resident: Mapping[torch.device, int] = field(default_factory=dict)
    loaded: Mapping[torch.device, int] = field(default_factory=dict)

    @property
    def precision(self) -> TransformerPrecision:
        """Precision of the transformer: the one of `formats`, or else that of its files."""
        return self.formats.precision_of(packed=self.shapes.packed)


@dataclass(frozen=True)
class MemoryPart:
    """A part of the memory that streaming needs on a device.

    name: what takes it. bytes: its size, negative for memory that is not needed again.
    """

    name: str
    device: torch.device
    bytes: int


def estimate(workload: Workload) -> list[MemoryPart]:
    """Return the parts of each device's peak: the peak of loading or that of streaming, whichever is larger.

    "CUDA graphs" is the memory of recorded passes, or the additional memory while they are recorded, whichever is
    larger: a pass runs once before it is recorded, and torch returns no memory to the GPU while it records. Denoiser
    and decoder use the same memory where they take turns.
    `torch.cuda.max_memory_allocated` counts neither "CUDA graphs" nor "CUDA context".
    """
    shapes, placement = workload.shapes, workload.placement
    device, decode_device = numbered(placement.device), numbered(placement.decode_device)
    scale = shapes.autoencoder.scale_factor_spatial
    settings, fp8 = shapes.settings, workload.formats.decoder in FP8_FORMATS
    height, width = settings.height // scale, settings.width // scale
    chunk = Grid(workload.batch, settings.chunk_frames, height, width, fp8, shares_buffer=placement.low_memory)
    config, own_dtype = shapes.decoder_config, placement.decoder_dtype(workload.formats.decoder)
    decoders = decoder_bytes(
        config,
        step_of(chunk, decode_device),
        dtype=own_dtype,
        devices=(device, decode_device),
        share=placement.decode_share,
    )
    denoisers = {device: _denoiser(_transformer(shapes.transformer), workload)}
    text_encoders = {numbered(placement.text_device): _text_encoder_bytes(workload)}
    autoencoders = {decode_device: _decoder_values(config) * own_dtype.itemsize}
    parts = []
    for place in dict.fromkeys((device, decode_device)):
        peak = _peak(
            denoisers.get(place, _DenoiserBytes()),
            decoders.get(place, DecoderBytes()),
            text_encoder=text_encoders.get(place, 0),
            autoencoder=autoencoders.get(place, 0),
            frees_text=workload.frees_text,
            takes_turns=placement.takes_turns,
        )
        peak[RESIDENT] = -workload.resident.get(place, 0)
        parts += [MemoryPart(name, place, size) for name, size in peak.items() if size]
    return parts


def loaded_bytes(workload: Workload) -> dict[torch.device, int]:
    """Return the bytes that a loaded model takes on each GPU while no video is generated, with CUDA's context."""
    shapes, placement = workload.shapes, workload.placement
    _, weights = _loading_and_weights(_transformer(shapes.transformer), workload)
    decoder_dtype = placement.decoder_dtype(workload.formats.decoder)
    parts = (
        (placement.device, weights),
        (placement.text_device, _text_encoder_bytes(workload)),
        (placement.decode_device, _decoder_values(shapes.decoder_config) * decoder_dtype.itemsize),
    )
    sizes = {numbered(device): CONTEXT_BYTES for device, _ in parts if device.type == "cuda"}
    for device, size in parts:
        if device.type == "cuda":
            sizes[numbered(device)] += size
    return sizes


def decoding_parts(
    config: DecoderConfig, decoder: DecoderPrecision, placement: Placement, chunk: Grid
) -> list[MemoryPart]:
    """Return the parts of the memory that the decoding of saved latents needs, without a transformer.

    decoder: number format of the decoder. chunk: sizes of the latents of a chunk.
    """
    device, dtype = numbered(placement.decode_device), placement.decoder_dtype(decoder)
    grid = replace(step_of(chunk, device), fp8=decoder in FP8_FORMATS)
    sizes = decoder_bytes(config, grid, dtype=dtype, devices=(device, device), share=0.0)[device]
    autoencoder = _decoder_values(config) * dtype.itemsize
    peak = _peak(_DenoiserBytes(), sizes, text_encoder=0, autoencoder=autoencoder, frees_text=False, takes_turns=False)
    return [MemoryPart(name, device, size) for name, size in peak.items() if size]


@dataclass(frozen=True)
class _DenoiserBytes:
    """Bytes of the transformer, its cache and its text.

    loading: peak while it is loaded, 0 where it needs no more than later. text: keys and values of the prompts.
    later_text: the part of them that is allocated with the first prompt. queries: rotated queries. one_pass: peak of
    the activations of a pass.
    """

    loading: int = 0
    weights: int = 0
    cache: int = 0
    text: int = 0
    later_text: int = 0
    queries: int = 0
    one_pass: int = 0


def _peak(
    denoiser: _DenoiserBytes,
    decoder: DecoderBytes,
    *,
    text_encoder: int,
    autoencoder: int,
    frees_text: bool,
    takes_turns: bool,
) -> dict[str, int]:
    """Return the parts of a device's peak.

    text_encoder, autoencoder: bytes of their weights. takes_turns: whether denoiser and decoder use the same memory.
    """
    encoding = {"text encoder": text_encoder, CONTEXT: CONTEXT_BYTES}
    loaded = {"text encoder": 0 if frees_text else text_encoder, "autoencoder": autoencoder}
    loading = {"transformer while loading": denoiser.loading, **loaded, CONTEXT: CONTEXT_BYTES}
    if takes_turns:
        streaming = max(decoder.later, denoiser.one_pass)
        recording = streaming + max(decoder.later, denoiser.one_pass)
    else:
        streaming = decoder.later + denoiser.one_pass
        recording = decoder.later + max(decoder.later, 2 * denoiser.one_pass)
    # the decoder is recorded first, before there is a prompt or an opening frame
    recording -= denoiser.later_text + decoder.opening
    running = {
        "transformer": denoiser.weights,
        "KV cache": denoiser.cache,
        "text": denoiser.text,
        **loaded,
        "decoder": decoder.kept,
        "opening frame": decoder.opening,
        "workspace": denoiser.queries + WORKSPACE_BYTES,
        GRAPHS: max(streaming, recording),
        CONTEXT: CONTEXT_BYTES,
    }
    return max(running, loading, encoding, key=lambda sizes: sum(sizes.values()))


def _denoiser(model: CausalTransformer, workload: Workload) -> _DenoiserBytes:
    """Return what the transformer, its cache and its text take. model: on the meta device."""
    config, spec, formats = model.config, workload.shapes.spec, workload.formats
    size = workload.placement.denoise_dtype.itemsize
    copies = branches(workload.shapes.settings.guidance)  # number of times each video is run in a step
    rows = workload.batch * copies
    attended_size = 1 if formats.attention in FP8_FORMATS else size
    loading, weights = _loading_and_weights(model, workload)
    keys_values = 2 * rows * spec.window_frames * spec.tokens_per_frame * config.dim
    cache = config.num_layers * keys_values * attended_size
    if formats.kv_cache in PACKED_CACHES:
        packed = keys_values // 2 + keys_values // GROUP
        means = 2 * rows * spec.window_chunks * config.dim
        live = (packed + means) // spec.window_chunks
        rotation = 4 * spec.window_frames * spec.tokens_per_frame * config.attention_head_dim
        exact_chunks = spec.exact_chunks if formats.kv_cache == "nvfp4-mixed" else 0
        exact = keys_values // spec.window_chunks * exact_chunks * attended_size
        cache = config.num_layers * (packed + means + exact) + live + keys_values * attended_size + rotation
    prompt = 2 * config.num_layers * config.text_len * config.dim * size
    # the transformer has a copy of the text; when a prompt changes, the old and the new context exist, each twice
    own_text, later_text = rows * prompt, 2 * (workload.batch + copies - 1 + rows) * prompt
    tokens = rows * spec.tokens_per_chunk
    return _DenoiserBytes(
        loading=loading,
        weights=weights,
        cache=cache,
        text=own_text + later_text,
        later_text=later_text,
        queries=tokens * config.dim * attended_size,
        # activations as wide as the model, and the widest layer and its GELU
        one_pass=tokens * (WIDTHS_OF_PASS * config.dim + 2 * config.ffn_dim + workload.shapes.branch_rank) * size,
    )


def _loading_and_weights(model: CausalTransformer, workload: Workload) -> tuple[int, int]:
    """Return the peak while the transformer is loaded, 0 where it needs no more than later, and its size after that."""
    precision, placement = workload.precision, workload.placement
    num_values, size = _num_values(model), placement.denoise_dtype.itemsize
    shapes, layers = workload.shapes, {name: _linear(model, name) for name in linear_layers(model)}
    num_weights, largest = (function(layer.weight.numel() for layer in layers.values()) for function in (sum, max))
    quantized = [] if precision == "bf16" else [layer for name, layer in layers.items() if name not in shapes.unpacked]
    num_quantized = sum(layer.weight.numel() for layer in quantized)
    matrices, more = (num_weights - num_quantized + shapes.branch_values) * size, 0  # what is offloaded, and the rest
    if precision in FP8_FORMATS:
        matrices += num_quantized
        more = 4 * sum(layer.out_features for layer in quantized)
    elif precision != "bf16":
        matrices += num_quantized // 2 + num_quantized // GROUP
        # FP4 units need a copy of the scales in another order
        more = num_quantized // GROUP if precision in ("nvfp4", "nvfp4-te") else 0
    weights = (num_values - num_weights) * size + matrices + more
    quantizing = 0 if precision == "bf16" else QUANTIZING_BYTES[precision] * largest
    loading = num_values * size + quantizing
    if placement.low_memory or placement.offload_weights:  # layers come from the host one by one
        loading = weights + size * largest + quantizing
    if shapes.packed or not quantizing:
        loading = 0
    if placement.offload_weights:
        weights += NUM_BUFFERS * matrices // model.config.num_layers - matrices
    return loading, weights


def _linear(model: CausalTransformer, name: str) -> nn.Linear:
    return cast("nn.Linear", model.get_submodule(name))


def _text_encoder_bytes(workload: Workload) -> int:
    precision, dtype = workload.formats.text_encoder, workload.placement.denoise_dtype
    if workload.shapes.text_encoder is None:
        return 0
    model = _text_encoder(workload.shapes.text_encoder)
    if precision == "bf16":
        return _num_values(model) * dtype.itemsize
    return quantized_bytes(model, precision, dtype, keep=POSITION_BIASES)


@cache
def _transformer(config: TransformerConfig) -> CausalTransformer:
    with OnMeta():
        return CausalTransformer(config)


@cache
def _text_encoder(config: UMT5Config) -> UMT5Encoder:
    with OnMeta():
        return UMT5Encoder(config)


@cache
def _decoder_values(config: DecoderConfig) -> int:
    """Return the number of weights of a decoder; one of Wan's form counts with its encoder, as a model's own has it."""
    with OnMeta():
        return _num_values(TinyDecoder(config) if isinstance(config, TinyAutoencoderConfig) else Autoencoder(config))


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
