"""Packed NVFP4 weights in a safetensors file, and the header that says how they are to be read.

A packed layer NAME has NAME.weight_codes, uint8 [out, in/2]; NAME.weight_scales, float8_e4m3fn [out, in/16]; and
NAME.weight_tensor_scale, a float32 scalar, in place of NAME.weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longvideo.checkpoint.diffusers_json import QUANTIZATION
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError
from longvideo.quantization.linear import CODES, SCALES, TENSOR_SCALE, NVFP4Linear

CONVENTION_KEY = "nvfp4_convention"
CONVENTION = (
    "1: e2m1 codes, low nibble first; e4m3 scale of 16 along in, row-major; value = code * scale * tensor_scale"
)
LEAVES = (CODES, SCALES, TENSOR_SCALE)
DTYPES = {CODES: torch.uint8, SCALES: torch.float8_e4m3fn, TENSOR_SCALE: torch.float32}


def is_packed(weights: Weights) -> bool:
    """Say whether any tensor is of a packed layer."""
    return any(_leaf(name) in LEAVES for name in weights.infos)


def check_convention(weights: Weights) -> None:
    """Raise CheckpointError unless packed tensors come with our convention and its dtypes, and only then with it."""
    found = weights.metadata.get(CONVENTION_KEY)
    if not is_packed(weights):
        if found is not None:
            raise CheckpointError(f"{weights.label} says it is packed ({CONVENTION_KEY}={found!r}) but holds no codes")
        return
    if found != CONVENTION:
        raise CheckpointError(
            f"{weights.label} is packed under the convention {found!r}, wanted {CONVENTION!r}; pack it again with"
            " `longvideo quantize`"
        )
    for name, info in weights.infos.items():
        wanted = DTYPES.get(_leaf(name), info.dtype)
        if info.dtype != wanted:
            raise CheckpointError(f"{weights.label}: {name} is {info.dtype}, wanted {wanted}")


def to_save(
    model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, floating ones cast to dtype unless they are of packed layers, and the metadata to go along."""
    packed = any(isinstance(module, NVFP4Linear) for module in model.modules())
    cast = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() and _leaf(name) not in LEAVES else tensor
        for name, tensor in tensors.items()
    }
    return cast, {CONVENTION_KEY: CONVENTION} if packed else {}


def config_entry(metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what config.json says of packed weights, so that other readers refuse them rather than misread them."""
    if CONVENTION_KEY not in metadata:
        return {}
    return {QUANTIZATION: {"quant_method": "longvideo_nvfp4", "convention": metadata[CONVENTION_KEY]}}


def num_represented(name: str, num_values: int) -> int:
    """Return how many weights a stored tensor stands for: two a byte of codes, none in their scales."""
    return {CODES: 2 * num_values, SCALES: 0, TENSOR_SCALE: 0}.get(_leaf(name), num_values)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
