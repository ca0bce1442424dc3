"""How a quantised linear layer multiplies: a product object is chosen once and shared by all layers of a model."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4 import scaled_mm
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlatOperand:
    """A rounded input [..., in] as a matrix, and the dimensions that were flattened."""

    matrix: scaled_mm.ScaledOperand
    leading: torch.Size


Input = Tensor | ExactOperand | FlatOperand
Weight = NVFP4Tensor | scaled_mm.ScaledOperand


class Product(Protocol):
    """x [..., in] times the transpose of a packed weight [out, in], plus a bias [out]."""

    def prepare_weight(self, weight: NVFP4Tensor) -> Weight:
        """Lay a weight out as the product reads it, once."""
        ...

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor: ...


class W4A16:
    """4-bit weights, rounded to the input's dtype and multiplied in it."""

    def __init__(self, device: torch.device):
        self._operations = nvfp4_operations(device)

    def prepare_weight(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        return weight

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor) and isinstance(weight, NVFP4Tensor)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, self.unpacked(weight, x.dtype), bias)

    def unpacked(self, weight: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight as it is multiplied."""
        return self._operations.dequantize(weight, dtype)


class W4A4(ABC):
    """4-bit weights and inputs. What comes before a layer can hand it an input that is rounded already."""

    def __init__(self, device: torch.device, rule: Rule = Rule.ADAPTIVE):
        self._operations = nvfp4_operations(device)
        self.rule = rule

    @abstractmethod
    def prepare_weight(self, weight: NVFP4Tensor) -> Weight: ...

    @abstractmethod
    def prepare(self, x: Tensor) -> Input:
        """Round an input."""

    @abstractmethod
    def prepare_modulated(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, *, eps: float) -> Input:
        """Normalise and modulate as `ModulatedNorm` does, and round, in one go."""

    @abstractmethod
    def prepare_gelu(self, h: Tensor) -> Input:
        """Apply GELU by its tanh formula, and round, in one go."""

    @abstractmethod
    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor: ...


class EmulatedW4A4(W4A4):
    """4-bit weights and inputs, multiplied without FP4 units.

    Every product of code and group scale is exact in bfloat16, so this is the NVFP4 product up to the order in which
    float32 sums are taken, and one more rounding to the input's dtype before the tensor scales are applied.
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
    """4-bit weights and inputs on FP4 units, through `torch.nn.functional.scaled_mm`. Results are bfloat16."""

    def __init__(self, device: torch.device, rule: Rule = Rule.ADAPTIVE):
        if reason := scaled_mm.unavailable(device):
            raise ValueError(f"the backend torch cannot run on {device}: {reason}")
        super().__init__(device, rule)

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


def _flat(quantized: NVFP4Tensor) -> FlatOperand:
    matrix = NVFP4Tensor(quantized.codes.flatten(0, -2), quantized.scales.flatten(0, -2), quantized.tensor_scale)
    return FlatOperand(scaled_mm.operand(matrix), quantized.shape[:-1])


BACKENDS: dict[str, type[W4A4]] = {"torch": ScaledW4A4, "emulated": EmulatedW4A4}


def choose_w4a4(device: torch.device, rule: Rule = Rule.ADAPTIVE, *, backend: str | None = None) -> W4A4:
    """Return the fastest product of 4-bit weights and inputs that a device can run, or the named one.

    backend: "torch" (FP4 units) or "emulated". Logs which was chosen and why. Raises ValueError, listing what is
    missing, when the named one cannot run.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        return BACKENDS[backend](device, rule)
    if reason := scaled_mm.unavailable(device):
        logger.info("NVFP4 products on %s are emulated: %s", device, reason)
        return EmulatedW4A4(device, rule)
    logger.info("NVFP4 products on %s run on its FP4 units through torch.nn.functional.scaled_mm", device)
    return ScaledW4A4(device, rule)
