"""Layers in FP8 with a scale for each row, in the layout of NVIDIA ModelOpt's FP8_PER_CHANNEL_PER_TOKEN.

A layer NAME has NAME.weight, E4M3 [out, in], and NAME.weight_scale, float32 [out]; the weight is their product. Inputs
are scaled token by token while the model runs, so there is no NAME.input_scale. These are the numbers with which this
project computes in FP8.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.scaled import SCALE, ScaledE4M3
from longvideo.checkpoint.tensors import Computed, Lazy, TensorInfo, Weights, read
from longvideo.kernels.fp8 import reference
from longvideo.kernels.fp8.format import FP8Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def stored_rows(weights: Weights, layer: str) -> FP8Rows | None:
    """Return the weight of a layer as it is stored in E4M3, on the CPU; None for a layer in another format.

    One scale of a whole weight becomes the scale of each row, which changes no value.
    """
    weight = weights.tensors.get(f"{layer}.weight")
    if not isinstance(weight, ScaledE4M3):
        return None
    return FP8Rows(read(weight.values), _scale_of_rows(weight))


def in_fp8(weights: Weights, layers: Sequence[str]) -> Weights:
    """Return weights with layers in FP8.

    Layers that are stored in E4M3 with scales keep both; the others are quantized row by row when they are read.
    """
    changes: dict[str, Lazy | None] = {}
    for layer in layers:
        weight = weights.tensors[f"{layer}.weight"]
        rows, columns = weight.info.shape
        scale = TensorInfo((rows,), torch.float32)
        if isinstance(weight, ScaledE4M3):
            changes[f"{layer}.weight"] = weight.values
            changes[f"{layer}.{SCALE}"] = Computed(scale, partial(_scale_of_rows, weight))
        else:
            values = TensorInfo((rows, columns), torch.float8_e4m3fn)
            changes[f"{layer}.weight"] = Computed(values, partial(_quantized_values, weight))
            changes[f"{layer}.{SCALE}"] = Computed(scale, partial(_quantized_scales, weight))
    return weights.replaced(changes)


def has_fp8_layers(weights: Weights) -> bool:
    """Return whether any layer is in the layout of `in_fp8`."""
    return any(name.endswith(f".{SCALE}") and info.dtype == torch.float32 for name, info in weights.infos.items())


def _scale_of_rows(weight: ScaledE4M3) -> Tensor:
    return read(weight.scale).float().reshape(-1).expand(weight.info.shape[0]).contiguous()


def _quantized_values(weight: Lazy) -> Tensor:
    return reference.quantize_rows(read(weight)).values


def _quantized_scales(weight: Lazy) -> Tensor:
    return reference.quantize_rows(read(weight)).scales
