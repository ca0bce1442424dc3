"""Transformers of a distillation: loaded, packed and compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from longvideo.checkpoint.adapters import UP_NAME, Adapter
from longvideo.checkpoint.modules import OnMeta
from longvideo.model.transformer import Block, CausalTransformer
from longvideo.quantization.compilation import leave_kernels_alone
from longvideo.quantization.convert import with_precision
from longvideo.training.precision import TrainingPrecision, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.distill.roles import LoraSettings
    from longvideo.model.config import TransformerConfig
    from longvideo.quantization.number_formats import NumberFormats

COMPILED_FORMS = 32
"""Number of compiled forms that torch keeps of each function of a block."""


def load_backbone(
    folder: ModelFolder | None,
    shape: TransformerConfig,
    *,
    formats: NumberFormats,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> CausalTransformer:
    """Load a backbone and pack it. Only one backbone at a time is in full precision on the device."""
    transformer = load_frozen(folder, shape, dtype=dtype, device=device, seed=seed)
    packed = folder is not None and folder.is_packed
    return with_precision(transformer, formats.precision_of(packed=packed), packed=packed)


def load_frozen(
    folder: ModelFolder | None, shape: TransformerConfig, *, dtype: torch.dtype, device: torch.device, seed: int
) -> CausalTransformer:
    """Load a transformer without gradients, or make one of this shape from a seed where there is no folder."""
    if folder is not None:
        return folder.load_transformer(device=device, dtype=dtype).requires_grad_(False)
    with OnMeta():
        transformer = CausalTransformer(shape)
    transformer = transformer.to(dtype).to_empty(device=device)
    transformer.initialize(torch.Generator(device).manual_seed(seed))
    return transformer.requires_grad_(False)


def compile_blocks(*backbones: CausalTransformer | None) -> None:
    """Compile the blocks, except their attention and what launches kernels of this package."""
    leave_kernels_alone()
    # three roles, with and without gradients, and the first block, whose input has no gradient: seven forms of each
    # function for each size of batch, of which the default limit of torch allows eight
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    for backbone in backbones:
        for block in backbone.blocks if backbone is not None else ():
            assert isinstance(block, Block)
            block.compile_around_attention()


def compute_dtype(precision: TrainingPrecision, device: torch.device) -> torch.dtype:
    """Return the dtype of the networks: bf16 on a GPU and float32 on a CPU, unless `precision` names one."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve(precision, device)]


def stored_adapter(weights: Mapping[str, nn.Parameter], lora: LoraSettings) -> Adapter:
    """Return an adapter in host memory."""
    return Adapter({name: weight.detach().cpu() for name, weight in weights.items()}, lora.rank, lora.scaling)


@torch.no_grad()
def set_adapter(weights: Mapping[str, nn.Parameter], adapter: Adapter, *, scaling: float) -> None:
    """Set the weights of an adapter to stored ones of the same rank and layers. scaling: that of the adapter to set."""
    for name, weight in weights.items():
        scale = adapter.scaling / scaling if name.endswith(UP_NAME) else 1.0
        weight.copy_(scale * adapter.weights[name])
