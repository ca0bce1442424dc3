"""Weights in 8 or 4 bits that are dequantized for each product, for modules that run once a prompt.

Every linear layer and every embedding of a module is replaced, whatever its sizes: a layer whose inputs are not a
multiple of 16 stays in 8 bits. The arithmetic is that of the module's own dtype, so no FP8 or FP4 units are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.fp8.format import FP8Rows
from longvideo.kernels.fp8.reference import quantize_rows
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A16

if TYPE_CHECKING:
    from collections.abc import Iterator

WeightPrecision = Literal["fp8", "nvfp4"]
SCALE_BYTES = 4
ROWS_AT_ONCE = 16384
"""Number of rows of an embedding that are quantized at once; the whole would need four bytes for each of its values."""


class _FP8Weight(nn.Module):
    """A frozen weight [rows, columns] in E4M3, with a float32 scale for each row. dtype: that of results."""

    def __init__(self, weight: Tensor, *, name: str) -> None:
        super().__init__()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} {list(weight.shape)} holds NaN or infinity; expected finite values")
        self.dtype = weight.dtype
        parts = [quantize_rows(rows) for rows in weight.split(ROWS_AT_ONCE)]
        self.register_buffer("values", torch.cat([part.values for part in parts]))
        self.register_buffer("scales", torch.cat([part.scales for part in parts]))

    @property
    def quantized(self) -> FP8Rows:
        return FP8Rows(self.get_buffer("values"), self.get_buffer("scales"))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return dequantized rows."""
        quantized = self.quantized
        return (quantized.values[index].float() * quantized.scales[index].unsqueeze(-1)).to(self.dtype)


class FP8WeightLinear(_FP8Weight):
    """A linear layer without gradient whose weight is in FP8 and whose input is not."""

    def __init__(self, linear: nn.Linear, *, name: str) -> None:
        super().__init__(linear.weight.detach(), name=name)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows(slice(None)), self.bias)  # pyright: ignore[reportArgumentType]


class FP8Embedding(_FP8Weight):
    """An embedding without gradient whose rows are in FP8."""

    def __init__(self, embedding: nn.Embedding, *, name: str) -> None:
        super().__init__(embedding.weight.detach(), name=name)

    def forward(self, index: Tensor) -> Tensor:
        return self.rows(index)


def quantize_weights(
    module: nn.Module, precision: WeightPrecision, device: torch.device, *, keep: str | None = None
) -> None:
    """Replace linear layers and embeddings in place, and move everything to a device, one layer after another.

    The module may be on another device; then `device` never holds more than one unquantized linear layer. Embeddings
    are in FP8 in both precisions. keep: last part of the names of layers that are not replaced.
    Raises ValueError for NaN or infinity in a weight.
    """
    product = W4A16(nvfp4_operations(device)) if precision == "nvfp4" else None
    replaced: dict[int, nn.Module] = {}
    for name, layer in list(_layers(module, keep)):
        if id(layer) not in replaced:
            replaced[id(layer)] = _quantized(layer, product, device, name=f"{name}.weight")
        module.set_submodule(name, replaced[id(layer)])
    module.to(device)


def quantized_bytes(
    module: nn.Module, precision: WeightPrecision, dtype: torch.dtype, *, keep: str | None = None
) -> int:
    """Return the size of a module after `quantize_weights`. module: may be on the meta device. dtype: its dtype."""
    total = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
    for layer in {id(layer): layer for _, layer in _layers(module, keep)}.values():
        rows, columns = layer.weight.shape
        size = rows * (columns + SCALE_BYTES)
        if precision == "nvfp4" and _fits_groups(layer):
            size = rows * (columns // 2 + columns // GROUP)
        total += size - rows * columns * dtype.itemsize
    return total


def _layers(module: nn.Module, keep: str | None) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear | nn.Embedding) and name.rpartition(".")[2] != keep:
            yield name, layer


def _fits_groups(layer: nn.Linear | nn.Embedding) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features % GROUP == 0


def _quantized(layer: nn.Linear | nn.Embedding, product: W4A16 | None, device: torch.device, *, name: str) -> nn.Module:
    """Return a layer with its weight in 4 bits for a product; in FP8 without a product, or where 4 bits do not fit."""
    if isinstance(layer, nn.Embedding):
        return FP8Embedding(layer, name=name).to(device)
    layer = layer.to(device)
    if product is None or not _fits_groups(layer):
        return FP8WeightLinear(layer, name=name)
    packed = NVFP4Linear.from_linear(layer, name=name)
    packed.set_product(product)
    return packed
