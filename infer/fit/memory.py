"""How much memory of each GPU streaming will take, from shapes alone, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from longvideo.checkpoint.modules import OnMeta
from longvideo.infer.fit.placement import Placement, numbered
from longvideo.infer.fit.shapes import ModelShapes
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.number_formats import FP8_FORMATS, NumberFormats
from longvideo.quantization.selection import linear_layers
from longvideo.rollout import branches
from longvideo.streaming.decoder_plan import PlannedStage, boundary_of, plan_stages
from longvideo.streaming.decoder_stages import Grid
from longvideo.text.umt5 import UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.model.spec import ChunkSpec

CONTEXT_BYTES = 10**9
"""CUDA's context, kernels and libraries, which torch's allocator does not see."""
WORKSPACE_BYTES = 150_000_000
"""What shapes do not explain: cuBLAS's workspaces, 32 MiB a thread and stream on Hopper, and the solver's latents."""
WIDTHS_OF_PASS = 9
"""Activations as wide as the model that a pass holds at most: h, an input, q, k, v, cross q, attended, two updates."""
QUANTISING_BYTES = {"fp8": 12, "fp8-emulated": 12, "nvfp4": 29, "nvfp4-weights": 29}
"""What quantising takes for each weight of a layer, its result included; storages alive in `from_linear`, counted."""

GRAPHS, CONTEXT = "CUDA graphs", "CUDA context"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is streamed, in which formats, and where.

    batch: number of videos made together, with the guidance of the settings. loaded_in: data type of a transformer that
    is not packed before it is converted to `formats.precision`; None means that of the placement.
    """

    shapes: ModelShapes
    formats: NumberFormats
    placement: Placement
    batch: int = 1
    loaded_in: torch.dtype | None = None

    @property
    def precision(self) -> str:
        """Of the transformer; without a choice that of its file."""
        return self.formats.precision_of(packed=self.shapes.packed)


@dataclass(frozen=True)
class MemoryPart:
    """What something takes of a device's memory."""

    name: str
    device: torch.device
    bytes: int


def estimate(workload: Workload) -> list[MemoryPart]:
    """Return the parts of each device's peak: that of loading or that of streaming, whichever is larger.

    "CUDA graphs" is what recorded passes keep for themselves, or what recording them takes beyond the rest: a pass runs
    once before, and torch gives nothing back to the GPU while it records. `torch.cuda.max_memory_allocated` counts
    neither that nor "CUDA context".
    """
    shapes, placement, batch = workload.shapes, workload.placement, workload.batch
    device, decode_device = numbered(placement.device), numbered(placement.decode_device)
    dtype = placement.denoise_dtype
    with OnMeta():
        transformer, autoencoder = CausalTransformer(shapes.transformer), Autoencoder(shapes.autoencoder)
        text_encoder = None if shapes.text_encoder is None else UMT5Encoder(shapes.text_encoder)
    scale = shapes.autoencoder.scale_factor_spatial
    grid = Grid(batch, 1, shapes.settings.height // scale, shapes.settings.width // scale)
    decoders = _decoders(autoencoder.to(dtype), grid, devices=(device, decode_device), share=placement.decode_share)
    denoisers = {
        device: _denoiser(
            transformer,
            shapes.spec,
            precision=workload.precision,
            formats=workload.formats,
            batch=batch,
            copies=branches(shapes.settings.guidance),
            dtype=dtype,
            loaded_in=None if shapes.packed else workload.loaded_in or dtype,
        )
    }
    text_encoders = {device: 0 if text_encoder is None else _num_values(text_encoder) * dtype.itemsize}
    autoencoders = {decode_device: _num_values(autoencoder) * dtype.itemsize}
    parts = []
    for place in dict.fromkeys((device, decode_device)):
        peak = _peak(
            denoisers.get(place, _Denoiser()),
            decoders.get(place, _Decoder()),
            text_encoder=text_encoders.get(place, 0),
            autoencoder=autoencoders.get(place, 0),
        )
        parts += [MemoryPart(name, place, size) for name, size in peak.items() if size]
    return parts


@dataclass(frozen=True)
class _Denoiser:
    """Bytes. later_text: of `text`, what comes with the first prompt. one_pass: activations of a pass at most."""

    loading: int = 0
    weights: int = 0
    cache: int = 0
    text: int = 0
    later_text: int = 0
    queries: int = 0
    one_pass: int = 0


@dataclass(frozen=True)
class _Decoder:
    """Bytes. kept: weights, buffers and what recordings read and return. Then what a pass takes: over an opening frame,
    which is not recorded, and over later ones.
    """

    kept: int = 0
    opening: int = 0
    later: int = 0


def _peak(denoiser: _Denoiser, decoder: _Decoder, *, text_encoder: int, autoencoder: int) -> dict[str, int]:
    """Return the parts of a device's peak."""
    loaded = {"text encoder": text_encoder, "autoencoder": autoencoder}
    loading = {"transformer while loading": denoiser.loading, **loaded, CONTEXT: CONTEXT_BYTES}
    streaming = decoder.later + denoiser.one_pass
    # the decoder is recorded first; neither a prompt nor an opening frame is there yet
    recording = decoder.later + max(decoder.later, 2 * denoiser.one_pass) - denoiser.later_text - decoder.opening
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
    return max(running, loading, key=lambda sizes: sum(sizes.values()))


def _denoiser(
    model: CausalTransformer,
    spec: ChunkSpec,
    *,
    precision: str,
    formats: NumberFormats,
    batch: int,
    copies: int,
    dtype: torch.dtype,
    loaded_in: torch.dtype | None,
) -> _Denoiser:
    """precision: in place of that of the formats, which can be None. copies: how often a video is run in a step.

    loaded_in: None for packed weights.
    """
    config, rows, size = model.config, batch * copies, dtype.itemsize
    attended_size = 1 if formats.attention in FP8_FORMATS else size
    num_values = _num_values(model)
    layers = [cast("nn.Linear", model.get_submodule(name)) for name in linear_layers(model)]
    num_weights = sum(layer.weight.numel() for layer in layers)
    if precision == "bf16":
        weights, quantising = num_values * size, 0
    else:
        num_scales = sum(layer.out_features for layer in layers)
        quantised = (
            num_weights + 4 * num_scales if precision in FP8_FORMATS else num_weights // 2 + num_weights // GROUP
        )
        if precision == "nvfp4":
            quantised += num_weights // GROUP  # FP4 units want the scales in an order of their own
        weights = (num_values - num_weights) * size + quantised
        quantising = QUANTISING_BYTES[precision] * max(layer.weight.numel() for layer in layers)
    loading = 0
    if loaded_in is not None:
        loading = max(num_values * loaded_in.itemsize, num_values * size + quantising)
    keys_values = 2 * rows * spec.window_frames * spec.tokens_per_frame * config.dim
    cache = config.num_layers * keys_values * attended_size
    if formats.kv_cache == "nvfp4":
        stored = keys_values // 2 + keys_values // GROUP
        means = 2 * rows * spec.window_chunks * config.dim
        fresh = (stored + means) // spec.window_chunks
        rotation = 4 * spec.window_frames * spec.tokens_per_frame * config.attention_head_dim
        cache = config.num_layers * (stored + means) + fresh + keys_values * attended_size + rotation
    prompt = 2 * config.num_layers * config.text_len * config.dim * size
    # the transformer's own copy; when a prompt changes, the old and the new context, and both as they are selected
    own_text, later_text = rows * prompt, 2 * (batch + copies - 1 + rows) * prompt
    tokens = rows * spec.tokens_per_chunk
    return _Denoiser(
        loading=loading,
        weights=weights,
        cache=cache,
        text=own_text + later_text,
        later_text=later_text,
        queries=tokens * config.dim * attended_size,
        # the widest layer and its GELU beside what is as wide as the model
        one_pass=tokens * (WIDTHS_OF_PASS * config.dim + 2 * config.ffn_dim) * size,
    )


def _decoders(
    autoencoder: Autoencoder, grid: Grid, *, devices: tuple[torch.device, torch.device], share: float
) -> dict[torch.device, _Decoder]:
    """Return what `StreamingDecoder` takes of each device; arguments as there."""
    plan = plan_stages(autoencoder, grid)
    boundary = boundary_of(plan, share) if share else 0
    copied = plan[boundary - 1].memory.result if boundary else 0
    decoders = {devices[1]: _decoder(plan[boundary:], copied)}
    if boundary:
        decoders[devices[0]] = _decoder(plan[:boundary], copied)
    return decoders


def _decoder(stages: Sequence[PlannedStage], copied: int) -> _Decoder:
    """Add up the stages of a device. copied: bytes that go from one device to the other; both keep a buffer of them."""
    return _Decoder(
        kept=sum(stage.memory.kept for stage in stages) + copied,
        opening=max(stage.memory.opening for stage in stages),
        later=max(stage.memory.later for stage in stages),
    )


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
