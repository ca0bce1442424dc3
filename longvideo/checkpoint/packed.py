"""Packed NVFP4 weights in a safetensors file, and the header that says how they are to be read.

A packed layer NAME has NAME.weight_codes, uint8 [out, in/2]; NAME.weight_scales, float8_e4m3fn [out, in/16]; and
NAME.weight_tensor_scale, a float32 scalar, in place of NAME.weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from longvideo.checkpoint.diffusers_json import QUANTIZATION
from longvideo.checkpoint.tensors import Lazy, Made, TensorInfo, Weights, read
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.rounding import largest_magnitude, tensor_scale_of
from longvideo.quantization.linear import CODES, SCALES, TENSOR_SCALE

CONVENTION_KEY = "nvfp4_convention"
CONVENTION = (
    "1: e2m1 codes, low nibble first; e4m3 scale of 16 along in, row-major; value = code * scale * tensor_scale"
)
PACKED_LEAVES = (CODES, SCALES, TENSOR_SCALE)
DTYPES = {CODES: torch.uint8, SCALES: torch.float8_e4m3fn, TENSOR_SCALE: torch.float32}


def is_packed(weights: Weights) -> bool:
    """Say whether any tensor is of a packed layer."""
    return any(is_of_packed_layer(name) for name in weights.infos)


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


def header_metadata(weights: Weights) -> dict[str, str]:
    """Return what the header of a file with these tensors has to say."""
    return {CONVENTION_KEY: CONVENTION} if is_packed(weights) else {}


def is_of_packed_layer(name: str) -> bool:
    """Say whether a tensor is of a packed layer, whose dtypes are not to be changed."""
    return _leaf(name) in PACKED_LEAVES


VALUES_AT_ONCE = 2**17
OnPacked: TypeAlias = Callable[[str, Tensor, NVFP4Tensor], None]
"""Called with a layer's name, its weight, and that packed."""


def pack(
    weights: Weights, layers: Sequence[str], rule: Rule, *, on_packed: OnPacked = lambda layer, weight, packed: None
) -> Weights:
    """Show layers packed, each when it is read. Reading raises CheckpointError for NaN or infinity in a weight."""
    changes: dict[str, Lazy | None] = {}
    for layer in layers:
        name = f"{layer}.weight"
        source = _Quantized(weights.tensors[name], rule, f"{weights.label}: {name}", partial(on_packed, layer))
        rows, columns = weights.infos[name].shape
        changes[name] = None
        changes[f"{layer}.{CODES}"] = Made(TensorInfo((rows, columns // 2), torch.uint8), source.codes)
        changes[f"{layer}.{SCALES}"] = Made(TensorInfo((rows, columns // GROUP), torch.float8_e4m3fn), source.scales)
        changes[f"{layer}.{TENSOR_SCALE}"] = Made(TensorInfo((), torch.float32), source.tensor_scale)
    packed = weights.replaced(changes)
    return Weights(packed.tensors, packed.files, {**packed.metadata, CONVENTION_KEY: CONVENTION})


class _Quantized:
    """A weight that is quantised when its codes are read; its scales are kept until they are read too."""

    def __init__(self, weight: Lazy, rule: Rule, label: str, on_packed: Callable[[Tensor, NVFP4Tensor], None]) -> None:
        self.weight, self.rule, self.label, self.on_packed = weight, rule, label, on_packed
        self._scales: Tensor | None = None

    def codes(self) -> Tensor:
        weight = read(self.weight)
        quantized = self._quantize(weight)
        self.on_packed(weight, quantized)
        self._scales = quantized.scales
        return quantized.codes

    def scales(self) -> Tensor:
        scales, self._scales = self._scales, None
        return self._quantize(read(self.weight)).scales if scales is None else scales

    def tensor_scale(self) -> Tensor:
        return tensor_scale_of(largest_magnitude(read(self.weight)), self.rule)

    def _quantize(self, weight: Tensor) -> NVFP4Tensor:
        """Quantise some rows at a time, which stay in the processor's cache; the result is that of all at once."""
        amax = largest_magnitude(weight)
        try:
            parts = [
                reference.quantize(rows, self.rule, amax=amax, name=self.label)
                for rows in weight.split(max(1, VALUES_AT_ONCE // weight.shape[1]))
            ]
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        scales = torch.cat([part.scales.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return NVFP4Tensor(torch.cat([part.codes for part in parts]), scales, parts[0].tensor_scale)


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
