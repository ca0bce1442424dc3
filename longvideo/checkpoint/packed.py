"""Packed NVFP4 weights in a safetensors file, and the header that records their convention.

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
from longvideo.checkpoint.tensors import Computed, Lazy, TensorInfo, Weights, read
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.rounding import largest_magnitude, tensor_scale_of
from longvideo.quantization.linear import CODES, SCALES, TENSOR_SCALE
from longvideo.quantization.selection import BLOCKS

CONVENTION_KEY = "nvfp4_convention"
CONVENTION = (
    "1: e2m1 codes, low nibble first; e4m3 scale of 16 along in, row-major; value = code * scale * tensor_scale"
)
PACKED_LEAVES = (CODES, SCALES, TENSOR_SCALE)
MATRIX_AXES = 2
DTYPES = {CODES: torch.uint8, SCALES: torch.float8_e4m3fn, TENSOR_SCALE: torch.float32}


def is_packed(weights: Weights) -> bool:
    """Return whether any tensor belongs to a packed layer."""
    return any(is_of_packed_layer(name) for name in weights.infos)


def check_convention(weights: Weights) -> None:
    """Raise CheckpointError unless packed tensors have this project's convention and dtypes.

    Weights that are not packed must not record a convention.
    """
    convention = weights.metadata.get(CONVENTION_KEY)
    if not is_packed(weights):
        if convention is not None:
            raise CheckpointError(
                f"{weights.label} records {CONVENTION_KEY}={convention!r} but has no packed layers; write it again with"
                " `longvideo quantize`"
            )
        return
    if convention != CONVENTION:
        raise CheckpointError(
            f"{weights.label} is packed with the convention {convention!r}, expected {CONVENTION!r}; pack the original"
            " model with `longvideo quantize`"
        )
    for name, info in weights.infos.items():
        expected = DTYPES.get(_leaf(name), info.dtype)
        if info.dtype != expected:
            raise CheckpointError(f"{weights.label}: {name} is {info.dtype}, expected {expected}")


def header_metadata(weights: Weights) -> dict[str, str]:
    """Return the metadata for the header of a file with these weights."""
    return {CONVENTION_KEY: CONVENTION} if is_packed(weights) else {}


def is_of_packed_layer(name: str) -> bool:
    """Return whether a tensor belongs to a packed layer, whose dtypes must not change."""
    return _leaf(name) in PACKED_LEAVES


def unpacked_matrices(weights: Weights) -> list[str]:
    """Return the names of the layers of blocks whose weights are not packed."""
    suffix = ".weight"
    return [
        name.removesuffix(suffix)
        for name, info in weights.infos.items()
        if name.startswith(BLOCKS) and name.endswith(suffix) and len(info.shape) == MATRIX_AXES
    ]


VALUES_AT_ONCE = 2**17
OnPacked: TypeAlias = Callable[[str, Tensor, NVFP4Tensor], None]
"""Called with a layer's name, its weight, and the packed weight."""


def pack(weights: Weights, layers: Sequence[str], rule: Rule, *, on_packed: OnPacked = lambda *_: None) -> Weights:
    """Return weights with packed layers, each packed when it is read.

    layers: official names. on_packed: called for every layer that is packed. Reading raises CheckpointError for NaN or
    infinity in a weight.
    """
    changes: dict[str, Lazy | None] = {}
    for layer in layers:
        name = f"{layer}.weight"
        source = _Quantized(weights.tensors[name], rule, f"{weights.label}: {name}", partial(on_packed, layer))
        rows, columns = weights.infos[name].shape
        changes[name] = None
        changes[f"{layer}.{CODES}"] = Computed(TensorInfo((rows, columns // 2), torch.uint8), source.codes)
        changes[f"{layer}.{SCALES}"] = Computed(
            TensorInfo((rows, columns // GROUP), torch.float8_e4m3fn), source.scales
        )
        changes[f"{layer}.{TENSOR_SCALE}"] = Computed(TensorInfo((), torch.float32), source.tensor_scale)
    packed = weights.replaced(changes)
    return Weights(packed.tensors, packed.files, {**packed.metadata, CONVENTION_KEY: CONVENTION})


def unpack(weights: Weights) -> Weights:
    """Return weights with the values of packed layers in float32, which represents them exactly."""
    changes: dict[str, Lazy | None] = {}
    for name, info in weights.infos.items():
        layer = name.removesuffix(f".{CODES}")
        if layer != name:
            parts = [weights.tensors[f"{layer}.{leaf}"] for leaf in PACKED_LEAVES]
            changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in PACKED_LEAVES)
            own = TensorInfo((info.shape[0], 2 * info.shape[1]), torch.float32)
            changes[f"{layer}.weight"] = Computed(own, partial(_values, parts))
    own = weights.replaced(changes)
    metadata = {key: value for key, value in own.metadata.items() if key != CONVENTION_KEY}
    return Weights(own.tensors, own.files, metadata)


def _values(parts: Sequence[Lazy]) -> Tensor:
    codes, scales, tensor_scale = map(read, parts)
    return reference.dequantize(NVFP4Tensor(codes, scales, tensor_scale), torch.float32)


class _Quantized:
    """A weight that is quantized when its codes are read; its scales are kept until they are read too."""

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
        """Quantize some rows at a time, which fit the processor's cache; the result equals that of all at once."""
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
    """Return the entry of config.json for packed weights; it makes other readers refuse them instead of misreading."""
    if CONVENTION_KEY not in metadata:
        return {}
    return {QUANTIZATION: {"quant_method": "longvideo_nvfp4", "convention": metadata[CONVENTION_KEY]}}


def num_represented(name: str, num_values: int) -> int:
    """Return the number of weights in a stored tensor: two for each byte of codes, none for their scales."""
    return {CODES: 2 * num_values, SCALES: 0, TENSOR_SCALE: 0}.get(_leaf(name), num_values)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
