"""NVFP4 products on Blackwell's FP4 units through `torch.nn.functional.scaled_mm`, in torch since 2.10.

The operands are the reference's own bytes: codes viewed as float4_e2m1fn_x2, group scales in the 128 x 4 layout of the
tensor cores, and the tensor scale as the second level, which cuBLAS multiplies in. Limits of `scaled_mm` (torch 2.13,
aten/src/ATen/native/cuda/ScaledBlas.cpp): matrices only, 32 must divide K and 16 must divide N.
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
    """A quantised matrix [R, K] as `scaled_mm` reads it, along its rows.

    packed: float4_e2m1fn_x2 [R, K/2], the codes themselves. scales: float8_e4m3fn, flat and swizzled, rows padded to
    128 and columns to 4. tensor_scale: float32 scalar.
    """

    packed: Tensor
    scales: Tensor
    tensor_scale: Tensor


def unavailable(device: torch.device) -> str | None:
    """Return the reason why these products cannot run on a device, None if they can."""
    if not hasattr(functional, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; use torch 2.10 or newer"
    return missing_hardware(device)


def missing_hardware(device: torch.device) -> str | None:
    """Return the reason why a device has no FP4 units, None if it has."""
    if device.type != "cuda":
        return f"FP4 products need a CUDA GPU, got device {str(device)!r}"
    if not torch.cuda.is_available():
        return f"FP4 products need a CUDA GPU, torch {torch.__version__} finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < BLACKWELL:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]} < 10.0 and so no FP4 units"
    return None


def operand(quantized: NVFP4Tensor) -> ScaledOperand:
    """Lay a quantised matrix [R, K] out for `matmul`, on its device; weights once, activations in every step.

    Raises ValueError for anything but a matrix with a single tensor scale whose K 32 divides.
    """
    if len(quantized.shape) != 2 or quantized.shape[1] % DEPTH_MULTIPLE:
        raise ValueError(
            f"scaled_mm multiplies matrices whose K {DEPTH_MULTIPLE} divides, got {list(quantized.shape)}; "
            "flatten leading dimensions, pad K with zeros"
        )
    if quantized.tensor_scale.numel() != 1:
        raise ValueError(f"scaled_mm takes one tensor scale a matrix, got {list(quantized.tensor_scale.shape)}")
    return ScaledOperand(
        packed=quantized.codes.contiguous().view(torch.float4_e2m1fn_x2),
        scales=swizzle_scales(quantized.scales).view(torch.float8_e4m3fn),
        tensor_scale=quantized.tensor_scale.reshape(()),
    )


def matmul(
    a: ScaledOperand, b: ScaledOperand, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multiply a [M, K] by the transpose of b [N, K], accumulate in float32 and round to out_dtype: [M, N].

    bias: [N], added after that rounding: cuBLAS takes none beside a float32 result, and torchao found it refused beside
    a second scale. So there is one more rounding than in `reference.matmul`.
    Raises ValueError where K differs or 16 does not divide N. It has no backward: gradients need products of their own.
    """
    (_, depth), (columns, wanted) = a.packed.shape, b.packed.shape
    if depth != wanted or columns % COLUMNS_MULTIPLE:
        raise ValueError(
            f"cannot multiply K={2 * depth} by K={2 * wanted} with N={columns}; wanted equal K and N a multiple of "
            f"{COLUMNS_MULTIPLE}"
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
