"""Products of quantized linear layers. A product is chosen once, and all layers of a model share it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import NVFP4Operations, nvfp4_operations, product_backend
from longvideo.kernels.nvfp4 import scaled_mm, te
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlatOperand:
    """A rounded input [..., in] as a matrix. leading: the dimensions that were flattened."""

    matrix: scaled_mm.ScaledOperand
    leading: torch.Size


Input = Tensor | ExactOperand | FlatOperand


@dataclass(frozen=True)
class InputPair:
    """An input of layers of which some have a branch. rounded: for their products. exact: for the branches."""

    rounded: Input
    exact: Tensor


Weight = NVFP4Tensor | scaled_mm.ScaledOperand


class Product(Protocol):
    """Product of x [..., in] and the transpose of a packed weight [out, in], plus a bias [out]."""

    def prepare_weight(self, weight: NVFP4Tensor) -> Weight:
        """Return a weight as the product reads it."""
        ...

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor: ...


class W4A16:
    """Product of 4-bit weights, dequantized to the dtype of the input, and inputs that are not rounded."""

    def __init__(self, operations: NVFP4Operations) -> None:
        self._operations = operations

    def prepare_weight(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        return weight

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor) and isinstance(weight, NVFP4Tensor)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, self.unpacked(weight, x.dtype), bias)

    def unpacked(self, weight: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
        """Return a dequantized weight."""
        return self._operations.dequantize(weight, dtype)


class W4A4(ABC):
    """Product of 4-bit weights and inputs. The module before a layer may round its input."""

    def __init__(self, operations: NVFP4Operations, rule: Rule = Rule.ADAPTIVE) -> None:
        self._operations, self.rule = operations, rule

    @abstractmethod
    def prepare_weight(self, weight: NVFP4Tensor) -> Weight: ...

    @abstractmethod
    def prepare(self, x: Tensor) -> Input:
        """Return a rounded input."""

    @abstractmethod
    def prepare_modulated(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, *, eps: float) -> Input:
        """Return the rounded result of `ModulatedNorm`."""

    @abstractmethod
    def prepare_gelu(self, h: Tensor) -> Input:
        """Return the rounded result of GELU (tanh formula)."""

    @abstractmethod
    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor: ...


class EmulatedW4A4(W4A4):
    """Product of 4-bit weights and inputs without FP4 units.

    Every code times its group scale is exact in bfloat16, so this is the NVFP4 product up to the order of float32 sums,
    and one more rounding to the dtype of the input before the tensor scales are applied.
    """

    def prepare_weight(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        return weight

    def prepare(self, x: Tensor) -> ExactOperand:
        return self._operations.quantize_exact(x.contiguous(), self.rule, dtype=x.dtype)

    def prepare_modulated(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, *, eps: float) -> ExactOperand:
        return self._operations.layer_norm_modulate_quantize_exact(
            h_BLD, shift_BTSD, scale_BTSD, self.rule, eps=eps, dtype=h_BLD.dtype
        )

    def prepare_gelu(self, h: Tensor) -> ExactOperand:
        return self._operations.gelu_tanh_quantize_exact(h, self.rule, dtype=h.dtype)

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        assert isinstance(operand, ExactOperand) and isinstance(weight, NVFP4Tensor)
        product = F.linear(operand.values, self._operations.exact(weight, operand.values.dtype).values)
        return self._operations.add_scaled_bias(product, operand.tensor_scale * weight.tensor_scale, bias)


class ScaledW4A4(W4A4):
    """Product of 4-bit weights and inputs on FP4 units, by `torch.nn.functional.scaled_mm`. Results are bfloat16."""

    def prepare_weight(self, weight: NVFP4Tensor) -> scaled_mm.ScaledOperand:
        return scaled_mm.operand(weight)

    def prepare(self, x: Tensor) -> FlatOperand:
        return _flat(self._operations.quantize(x.contiguous(), self.rule))

    def prepare_modulated(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, *, eps: float) -> FlatOperand:
        return _flat(self._operations.layer_norm_modulate_quantize(h_BLD, shift_BTSD, scale_BTSD, self.rule, eps=eps))

    def prepare_gelu(self, h: Tensor) -> FlatOperand:
        return _flat(self._operations.gelu_tanh_quantize(h, self.rule))

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        assert isinstance(operand, FlatOperand) and isinstance(weight, scaled_mm.ScaledOperand)
        return scaled_mm.matmul(operand.matrix, weight, bias).unflatten(0, operand.leading)


class TransformerEngineW4A4(ScaledW4A4):
    """`ScaledW4A4`, whose operands TransformerEngine multiplies."""

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        assert isinstance(operand, FlatOperand) and isinstance(weight, scaled_mm.ScaledOperand)
        return te.matmul(operand.matrix, weight, bias).unflatten(0, operand.leading)


def _flat(quantized: NVFP4Tensor) -> FlatOperand:
    matrix = NVFP4Tensor(quantized.codes.flatten(0, -2), quantized.scales.flatten(0, -2), quantized.tensor_scale)
    return FlatOperand(scaled_mm.operand(matrix), quantized.shape[:-1])


ProductBackend = Literal["torch", "te", "emulated"]
W4A4_PRODUCTS: dict[ProductBackend, type[W4A4]] = {
    "torch": ScaledW4A4,
    "te": TransformerEngineW4A4,
    "emulated": EmulatedW4A4,
}


def choose_w4a4(device: torch.device, rule: Rule = Rule.ADAPTIVE, *, backend: ProductBackend | None = None) -> W4A4:
    """Return the fastest product of 4-bit weights and inputs that a device can run, or that of a backend.

    backend: "torch" or "te" (TransformerEngine), both on FP4 units, or "emulated"; by default "torch" or "emulated".
    The choice is logged with its reason.
    Raises ValueError with the reason if the given backend cannot run.
    """
    products = product_backend("nvfp4", device)
    if backend == "torch" and products.is_emulated:
        raise ValueError(f"the backend torch cannot run on {device}: {products.reason}; use emulated")
    if backend == "te" and (reason := te.product_unavailable(device)):
        raise ValueError(f"the backend te cannot run on {device}: {reason}; use torch or emulated")
    operations = nvfp4_operations(device)
    if backend is not None:
        return W4A4_PRODUCTS[backend](operations, rule)
    if products.is_emulated:
        logger.info("NVFP4 products on %s are emulated: %s", device, products.reason)
        return EmulatedW4A4(operations, rule)
    logger.info("NVFP4 products on %s run on its FP4 units through torch.nn.functional.scaled_mm", device)
    return ScaledW4A4(operations, rule)
