"""NVFP4 products on Blackwell's FP4 units through `torch.nn.functional.scaled_mm`, in torch since 2.10.

The operands have the same bytes as in the reference: codes viewed as float4_e2m1fn_x2, group scales in the 128 x 4
layout of the tensor cores, and the tensor scale as the second level, which cuBLAS applies. Limits of `scaled_mm`
(torch 2.13, aten/src/ATen/native/cuda/ScaledBlas.cpp): it takes matrices only, with K in multiples of 32 and N in
multiples of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from longvideo.kernels.nvfp4.codes import swizzle_scales

if TYPE_CHECKING:
    from longvideo.kernels.nvfp4.format import NVFP4Tensor

BLACKWELL = (10, 0)
DEPTH_MULTIPLE, COLUMNS_MULTIPLE = 32, 16


@dataclass(frozen=True)
class ScaledOperand:
    """A quantized matrix [R, K] as `scaled_mm` reads it, along its rows.

    packed: float4_e2m1fn_x2 [R, K/2], the codes themselves. scales: float8_e4m3fn, flat and swizzled, rows padded to
    128 and columns to 4. tensor_scale: float32 scalar.
    """

    packed: Tensor
    scales: Tensor
    tensor_scale: Tensor


def unavailable(device: torch.device) -> str | None:
    """Return why these products cannot run on a device; None if they can."""
    if not hasattr(functional, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; use torch 2.10 or newer"
    return missing_hardware(device)


def missing_hardware(device: torch.device) -> str | None:
    """Return why a device has no FP4 units; None if it has them."""
    if device.type != "cuda":
        return f"FP4 products need a CUDA GPU, got device {str(device)!r}"
    if not torch.cuda.is_available():
        return f"FP4 products need a CUDA GPU, torch {torch.__version__} finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < BLACKWELL:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]} < 10.0 and so no FP4 units"
    return None


def operand(quantized: NVFP4Tensor) -> ScaledOperand:
    """Return a quantized matrix [R, K] as `matmul` reads it: weights once, activations in every step.

    Raises ValueError for anything but a matrix with a single tensor scale and K in multiples of 32.
    """
    if len(quantized.shape) != 2 or quantized.shape[1] % DEPTH_MULTIPLE:
        raise ValueError(
            f"the operand is {list(quantized.shape)}; expected a matrix with K in multiples of {DEPTH_MULTIPLE}; "
            "flatten leading dimensions, pad K with zeros"
        )
    if quantized.tensor_scale.numel() != 1:
        raise ValueError(f"the tensor scale is {list(quantized.tensor_scale.shape)}; expected one scale for the matrix")
    return ScaledOperand(
        packed=quantized.codes.contiguous().view(torch.float4_e2m1fn_x2),
        scales=swizzle_scales(quantized.scales).view(torch.float8_e4m3fn),
        tensor_scale=quantized.tensor_scale.reshape(()),
    )


def matmul(
    a: ScaledOperand, b: ScaledOperand, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multiply a [M, K] by the transpose of b [N, K], accumulate in float32 and round to out_dtype: [M, N].

    bias: [N], added after that rounding. cuBLAS takes no bias with a float32 result, and torchao found that it takes
        none with a second scale. So there is one more rounding than in `reference.matmul`.
    Raises ValueError where K differs or N is not a multiple of 16. There is no backward pass: gradients need products
    of their own.
    """
    (_, depth), (columns, other_depth) = a.packed.shape, b.packed.shape
    if depth != other_depth or columns % COLUMNS_MULTIPLE:
        raise ValueError(
            f"cannot multiply K={2 * depth} by K={2 * other_depth} with N={columns}; expected equal K and "
            f"N a multiple of {COLUMNS_MULTIPLE}"
        )
    recipe = [functional.ScalingType.BlockWise1x16, functional.ScalingType.TensorWise]
    swizzle = [functional.SwizzleType.SWIZZLE_32_4_4, functional.SwizzleType.NO_SWIZZLE]
    product = functional.scaled_mm(
        a.packed,
        b.packed.t(),
        [a.scales, a.tensor_scale],
        recipe,
        [b.scales, b.tensor_scale],
        recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=out_dtype,
    )
    return product if bias is None else product + bias.to(out_dtype)
