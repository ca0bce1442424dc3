"""How a quantised linear layer multiplies: a product object is chosen once and shared by all layers of a model."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule

Input = Tensor | ExactOperand


class Product(Protocol):
    """x [..., in] times the transpose of a packed weight [out, in], plus a bias [out]."""

    def prepare(self, x: Tensor) -> Input:
        """Do what several layers with one input need done to it once."""
        ...

    def __call__(self, x: Input, weight: NVFP4Tensor, bias: Tensor | None) -> Tensor: ...


class W4A16:
    """4-bit weights, rounded to the input's dtype and multiplied in it."""

    def __init__(self, device: torch.device):
        self._operations = nvfp4_operations(device)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, x: Input, weight: NVFP4Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor)
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

    def prepare(self, x: Tensor) -> ExactOperand:
        return self._operations.quantize_exact(x, self.rule, dtype=x.dtype)

    def __call__(self, x: Input, weight: NVFP4Tensor, bias: Tensor | None) -> Tensor:
        operand = self.prepare(x) if isinstance(x, Tensor) else x
        dtype = operand.values.dtype
        product = F.linear(operand.values, self._operations.exact(weight, dtype).values)
        scale = operand.tensor_scale * weight.tensor_scale
        scaled = product.float() * scale
        return (scaled if bias is None else scaled + bias.float()).to(dtype)
