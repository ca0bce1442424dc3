"""Layers that other programs store in FP8 or NVFP4 with scales, as weights of this project.

FP8: a layer NAME has NAME.weight, and its scale NAME.scale_weight (older files of ComfyUI) or NAME.weight_scale (newer
ones, and NVIDIA ModelOpt), one number or one for each row. The weight is values x scale, computed in float32.

NVFP4 of ModelOpt: NAME.weight, uint8 [out, in/2], low nibble first; NAME.weight_scale, E4M3 [out, in/16], row-major;
NAME.weight_scale_2, one float32. These are this project's three numbers under other names, so nothing is rounded.

Scales of inputs are not read, since this project computes them for every input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.packed import CONVENTION, CONVENTION_KEY, PACKED_LEAVES
from longvideo.checkpoint.tensors import Computed, Expanded, Lazy, TensorInfo, Weights, listing, read, read_range
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.linear import CODES, SCALES, TENSOR_SCALE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

WEIGHT, SCALE, OLD_SCALE, SECOND_SCALE = "weight", "weight_scale", "scale_weight", "weight_scale_2"
INPUT_SCALES = ("input_scale", "scale_input")
LAYER_MARK, HEADER_MARK = "comfy_quant", "_quantization_metadata"
"""ComfyUI's marks of a layer, and of a file, whose 4-bit scales are in the order of tensor cores."""
MARKS = ("scaled_fp8", LAYER_MARK)
"""Tensors that are not weights but marks of formats."""
SMOOTHING = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""Tensors of AWQ and SVDQuant, without which a layer has another result."""
VALUES_AT_ONCE = 2**22
MATRIX = 2


@dataclass(frozen=True)
class ScaledE4M3(Expanded):
    """A matrix in float32 that is stored as E4M3 values and one scale, or one scale for each row."""

    values: Lazy
    scale: Lazy


def as_own_layers(weights: Weights) -> Weights:
    """Return weights with plain layers in place of scaled FP8, and packed layers in place of ModelOpt's NVFP4.

    Raises CheckpointError for a layer in another format.
    """
    if smoothed := [name for name in weights.infos if _leaf(name) in SMOOTHING]:
        raise CheckpointError(
            f"{weights.label} has layers with scaled inputs, as AWQ and SVDQuant make them ({listing(smoothed)}), which"
            " are not supported; export the model with ModelOpt's NVFP4 or FP8"
        )
    changes: dict[str, Lazy | None] = {name: None for name in weights.infos if _leaf(name) in MARKS}
    packed = False
    for name in weights.infos:
        layer = name.removesuffix(f".{WEIGHT}")
        scales = {
            leaf: f"{layer}.{leaf}" for leaf in (SCALE, OLD_SCALE, SECOND_SCALE) if f"{layer}.{leaf}" in weights.infos
        }
        if layer == name or not scales:
            continue
        changes |= dict.fromkeys(scales.values())
        stored = {leaf: weights.tensors[scale] for leaf, scale in scales.items()}
        if weights.infos[name].dtype == torch.uint8:
            changes |= {name: None, **_packed_layer(weights, layer, stored)}
            packed = True
        else:
            changes[name] = _scaled_layer(weights, name, stored)
    for name in weights.infos:
        layer, _, leaf = name.rpartition(".")
        if leaf in INPUT_SCALES and f"{layer}.{WEIGHT}" in weights.infos:
            changes[name] = None
    own = weights.replaced(changes)
    return Weights(own.tensors, own.files, {**own.metadata, CONVENTION_KEY: CONVENTION}) if packed else own


def to_modelopt(weights: Weights) -> Weights:
    """Return this project's packed layers under ModelOpt's names; other weights are unchanged."""
    leaves = dict(zip(PACKED_LEAVES, (WEIGHT, SCALE, SECOND_SCALE), strict=True))

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        return f"{layer}.{leaves[leaf]}" if leaf in leaves else name

    renamed = weights.renamed(rename)
    return Weights(renamed.tensors, renamed.files, {k: v for k, v in renamed.metadata.items() if k != CONVENTION_KEY})


def _scaled_layer(weights: Weights, name: str, scales: Mapping[str, Lazy]) -> Lazy:
    info, (scale, *others) = weights.infos[name], scales.values()
    if others or SECOND_SCALE in scales or not info.dtype.is_floating_point or not info.shape:
        raise CheckpointError(
            f"{weights.label}: {name} is {info.dtype} with {', '.join(scales)}; expected FP8 with one scale, or uint8"
            f" with {SCALE} and {SECOND_SCALE}, as NVIDIA ModelOpt stores NVFP4; use another file of the model"
        )
    if not scale.info.dtype.is_floating_point or scale.info.num_values not in (1, info.shape[0]):
        raise CheckpointError(
            f"{weights.label}: {name} {list(info.shape)} has scales {list(scale.info.shape)}, {scale.info.dtype};"
            " expected one number or one for each row; use another file of the model"
        )
    own, values = TensorInfo(info.shape, torch.float32), weights.tensors[name]
    if info.dtype == torch.float8_e4m3fn and len(info.shape) == MATRIX:
        return ScaledE4M3(own, partial(_multiplied, values, scale), values, scale)
    return Expanded(own, partial(_multiplied, values, scale))


def _multiplied(values: Lazy, scale: Lazy) -> Iterator[Tensor]:
    rows, columns = values.info.shape[0], math.prod(values.info.shape[1:])
    factors = read(scale).float().reshape(-1, 1)
    step = max(1, VALUES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        piece = read_range(values, start * columns, count * columns).view(count, columns).float()
        yield (piece * (factors if len(factors) == 1 else factors[start : start + count])).flatten()


def _packed_layer(weights: Weights, layer: str, scales: Mapping[str, Lazy]) -> dict[str, Lazy]:
    name = f"{layer}.{WEIGHT}"
    codes = weights.tensors[name]
    if HEADER_MARK in weights.metadata or f"{layer}.{LAYER_MARK}" in weights.infos:
        raise CheckpointError(
            f"{weights.label}: {name} is in ComfyUI's own layout of NVFP4, which is not supported; use the bf16 or FP8"
            " file of the model, or an export of NVIDIA ModelOpt"
        )
    if missing := {SCALE, SECOND_SCALE} - scales.keys():
        raise CheckpointError(
            f"{weights.label}: {name} is uint8 without {' and '.join(sorted(missing))}; expected NVFP4 as NVIDIA"
            " ModelOpt stores it; use another file of the model"
        )
    groups, second = scales[SCALE], scales[SECOND_SCALE]
    rows, half = codes.info.shape if len(codes.info.shape) == 2 else (0, 0)
    expected = TensorInfo((rows, 2 * half // GROUP), torch.float8_e4m3fn)
    if groups.info != expected or 2 * half % GROUP or second.info != TensorInfo(second.info.shape, torch.float32):
        raise CheckpointError(
            f"{weights.label}: {name} {list(codes.info.shape)} has {SCALE} {list(groups.info.shape)},"
            f" {groups.info.dtype}, and {SECOND_SCALE} {second.info.dtype}; expected {SCALE}"
            f" {list(expected.shape)}, {expected.dtype}, and {SECOND_SCALE} torch.float32; export the model without"
            " rearranging scales"
        )
    if second.info.num_values != 1:
        raise CheckpointError(
            f"{weights.label}: {layer}.{SECOND_SCALE} has {second.info.num_values} values, expected 1"
        )
    return {
        f"{layer}.{CODES}": codes,
        f"{layer}.{SCALES}": groups,
        f"{layer}.{TENSOR_SCALE}": Computed(TensorInfo((), torch.float32), lambda: read(second).reshape(())),
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
