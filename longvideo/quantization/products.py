"""How a quantised linear layer multiplies: a product object is chosen once and shared by all layers of a model."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4 import scaled_mm
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule

logger = logging.getLogger(__name__)

Input = Tensor | ExactOperand | scaled_mm.ScaledOperand
Weight = NVFP4Tensor | scaled_mm.ScaledOperand


class Product(Protocol):
    """x [..., in] times the transpose of a packed weight [out, in], plus a bias [out]."""

    def prepare_weight(self, weight: NVFP4Tensor) -> Weight:
        """Lay a weight out as the product reads it, once."""
        ...

    def prepare(self, x: Tensor) -> Input:
        """Do what several layers with one input need done to it once."""
        ...

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor: ...


class W4A16:
    """4-bit weights, rounded to the input's dtype and multiplied in it."""

    def __init__(self, device: torch.device):
        self._operations = nvfp4_operations(device)

    def prepare_weight(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        return weight

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor) and isinstance(weight, NVFP4Tensor)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, self._operations.dequantize(weight, x.dtype), bias)


class EmulatedW4A4:
    """4-bit weights and inputs, multiplied without FP4 units.

    Every product of code and group scale is exact in bfloat16, so this is the NVFP4 product up to the order in which
    float32 sums are taken, and one more rounding to the input's dtype before the tensor scales are applied.
    """

    def __init__(self, device: torch.device, rule: Rule = Rule.ADAPTIVE):
        self._operations = nvfp4_operations(device)
        self.rule = rule

    def prepare_weight(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        return weight

    def prepare(self, x: Tensor) -> ExactOperand:
        return self._operations.quantize_exact(x, self.rule, dtype=x.dtype)

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        assert isinstance(operand, ExactOperand) and isinstance(weight, NVFP4Tensor)
        product = F.linear(operand.values, self._operations.exact(weight, operand.values.dtype).values)
        return self._operations.add_scaled_bias(product, operand.tensor_scale * weight.tensor_scale, bias)


class ScaledW4A4:
    """4-bit weights and inputs on FP4 units, through `torch.nn.functional.scaled_mm`. Results are bfloat16."""

    def __init__(self, device: torch.device, rule: Rule = Rule.ADAPTIVE):
        if reason := scaled_mm.unavailable(device):
            raise ValueError(f"the backend torch cannot run on {device}: {reason}")
        self._operations = nvfp4_operations(device)
        self.rule = rule

    def prepare_weight(self, weight: NVFP4Tensor) -> scaled_mm.ScaledOperand:
        return scaled_mm.operand(weight)

    def prepare(self, x: Tensor) -> scaled_mm.ScaledOperand:
        return scaled_mm.operand(self._operations.quantize(x.flatten(0, -2), self.rule))

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        assert isinstance(operand, scaled_mm.ScaledOperand) and isinstance(weight, scaled_mm.ScaledOperand)
        return scaled_mm.matmul(operand, weight, bias)


BACKENDS = {"torch": ScaledW4A4, "emulated": EmulatedW4A4}


def choose_w4a4(device: torch.device, rule: Rule = Rule.ADAPTIVE, *, backend: str | None = None) -> Product:
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
