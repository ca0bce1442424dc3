"""Conversion between LongLive 2.0's packed weights and this project's: the same 4-bit numbers in two layouts.

In LongLive's files a layer NAME [out, in] has NAME.quantized_weight_values, uint8, low nibble first, rows padded to a
multiple of 128 and `in` to a multiple of 64; ..._scale_factors, E4M3, flat, in the order of Blackwell's tensor cores;
..._amax, float32 [1]; ..._metadata, int32 [out, in, padded out, padded in]. A value is code x scale x amax / (6 x 256),
as in the adaptive rule. Files packed under a static rule, which LongLive writes only during training, would need 448 in
place of 256, but do not record their rule.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longvideo.checkpoint.packed import CONVENTION, CONVENTION_KEY, PACKED_LEAVES
from longvideo.checkpoint.tensors import Computed, Lazy, TensorInfo, Weights, read
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4.codes import swizzle_scales, unswizzle_scales
from longvideo.kernels.nvfp4.format import ADAPTIVE_SCALE_MAX, E2M1_MAX, GROUP
from longvideo.quantization.linear import CODES, SCALES, TENSOR_SCALE

VALUES, FACTORS, AMAX, METADATA = (
    f"quantized_weight_{leaf}" for leaf in ("values", "scale_factors", "amax", "metadata")
)
ROWS, COLUMNS = 128, 64
"""Multiples to which a weight is padded."""
AMAX_OF_SCALE = E2M1_MAX * ADAPTIVE_SCALE_MAX


def is_packed(weights: Weights) -> bool:
    """Return whether any tensor belongs to a layer in LongLive's packed layout."""
    return any(name.endswith(f".{VALUES}") for name in weights.infos)


def to_ours(weights: Weights) -> Weights:
    """Return packed layers under this project's names and in its layout. Raises CheckpointError if sizes differ."""
    changes: dict[str, Lazy | None] = {}
    for name in weights.infos:
        if not name.endswith(f".{VALUES}"):
            continue
        layer = name.removesuffix(f".{VALUES}")
        stored = {leaf: _stored(weights, f"{layer}.{leaf}") for leaf in (VALUES, FACTORS, AMAX, METADATA)}
        rows, columns = _check_sizes(weights.label, layer, stored)
        changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in stored)
        changes[f"{layer}.{CODES}"] = Computed(
            TensorInfo((rows, columns // 2), torch.uint8), partial(_crop, stored[VALUES], rows, columns // 2)
        )
        changes[f"{layer}.{SCALES}"] = Computed(
            TensorInfo((rows, columns // GROUP), torch.float8_e4m3fn),
            partial(_unswizzle, stored[FACTORS], rows, columns // GROUP),
        )
        changes[f"{layer}.{TENSOR_SCALE}"] = Computed(
            TensorInfo((), torch.float32), lambda amax=stored[AMAX]: read(amax).reshape(()) / AMAX_OF_SCALE
        )
    ours = weights.replaced(changes)
    return Weights(ours.tensors, ours.files, {**ours.metadata, CONVENTION_KEY: CONVENTION})


def to_longlive(weights: Weights) -> Weights:
    """Return this project's packed layers under LongLive's names and in its layout."""
    changes: dict[str, Lazy | None] = {}
    for name, info in weights.infos.items():
        if not name.endswith(f".{CODES}"):
            continue
        layer = name.removesuffix(f".{CODES}")
        codes, scales, scale = (weights.tensors[f"{layer}.{leaf}"] for leaf in PACKED_LEAVES)
        rows, columns = info.shape[0], 2 * info.shape[1]
        padded = _padded(rows, ROWS), _padded(columns, COLUMNS)
        sizes = torch.tensor([rows, columns, *padded], dtype=torch.int32)
        changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in PACKED_LEAVES)
        changes[f"{layer}.{VALUES}"] = Computed(
            TensorInfo((padded[0], padded[1] // 2), torch.uint8), partial(_pad, codes, padded[0], padded[1] // 2)
        )
        changes[f"{layer}.{FACTORS}"] = Computed(
            TensorInfo((padded[0] * padded[1] // GROUP,), torch.float8_e4m3fn), partial(_swizzle, scales)
        )
        changes[f"{layer}.{AMAX}"] = Computed(
            TensorInfo((1,), torch.float32), lambda scale=scale: read(scale).reshape(1) * AMAX_OF_SCALE
        )
        changes[f"{layer}.{METADATA}"] = Computed(TensorInfo((4,), torch.int32), lambda sizes=sizes: sizes)
    return weights.replaced(changes)


def _stored(weights: Weights, name: str) -> Lazy:
    if name not in weights.tensors:
        raise CheckpointError(f"{weights.label} has no {name}, which a packed layer needs; download it again")
    return weights.tensors[name]


def _check_sizes(label: str, layer: str, stored: dict[str, Lazy]) -> tuple[int, int]:
    types = {VALUES: torch.uint8, FACTORS: torch.float8_e4m3fn, AMAX: torch.float32, METADATA: torch.int32}
    for leaf, dtype in types.items():
        if stored[leaf].info.dtype != dtype:
            raise CheckpointError(f"{label}: {layer}.{leaf} is {stored[leaf].info.dtype}, expected {dtype}")
    if stored[METADATA].info.shape != (4,) or stored[AMAX].info.num_values != 1:
        raise CheckpointError(f"{label}: {layer} must have four sizes in {METADATA} and one value in {AMAX}")
    rows, columns, padded_rows, padded_columns = (int(size) for size in read(stored[METADATA]))
    expected = (_padded(rows, ROWS), _padded(columns, COLUMNS))
    if rows < 1 or columns < GROUP or columns % GROUP or (padded_rows, padded_columns) != expected:
        raise CheckpointError(
            f"{label}: {layer}.{METADATA} has sizes {[rows, columns, padded_rows, padded_columns]}; expected positive"
            f" sizes, in multiples of {GROUP}, padded to multiples of {ROWS} and {COLUMNS}"
        )
    shapes = {VALUES: (padded_rows, padded_columns // 2), FACTORS: (padded_rows * padded_columns // GROUP,)}
    for leaf, shape in shapes.items():
        if stored[leaf].info.shape != shape:
            actual = list(stored[leaf].info.shape)
            raise CheckpointError(f"{label}: {layer}.{leaf} has shape {actual}, expected {list(shape)}")
    return rows, columns


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _crop(values: Lazy, rows: int, columns: int) -> Tensor:
    return read(values)[:rows, :columns].contiguous()


def _pad(codes: Lazy, rows: int, columns: int) -> Tensor:
    own = read(codes)
    padded = own.new_zeros(rows, columns)
    padded[: own.shape[0], : own.shape[1]] = own
    return padded


def _unswizzle(factors: Lazy, rows: int, columns: int) -> Tensor:
    return unswizzle_scales(read(factors), rows, columns)


def _swizzle(scales: Lazy) -> Tensor:
    return swizzle_scales(read(scales)).view(torch.float8_e4m3fn)
