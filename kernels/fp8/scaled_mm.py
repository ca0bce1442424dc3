"""Row-wise FP8 products on tensor cores through `torch.nn.functional.scaled_mm`, in torch since 2.10.

Limits of `scaled_mm` (torch 2.13, aten/src/ATen/native/cuda/ScaledBlas.cpp): matrices only, 16 must divide K and N, and
a bias is bfloat16 beside a bfloat16 result and refused beside a float32 one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from longvideo.kernels.fp8.format import FP8Rows

WITH_FP8_UNITS = (8, 9)
SIZE_MULTIPLE = 16
REMEDY = "use --precision bf16 or nvfp4-weights"


def unavailable(device: torch.device) -> str | None:
    """Return the reason why FP8 products cannot run on a device and what can, None if they can."""
    if device.type != "cuda":
        return f"FP8 products need a GPU of compute capability 8.9 or newer, got device {str(device)!r}; {REMEDY}"
    if not hasattr(functional, "scaled_mm"):
        return (
            f"FP8 products need torch 2.10 or newer, torch {torch.__version__} has no "
            f"torch.nn.functional.scaled_mm; {REMEDY}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < WITH_FP8_UNITS:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]} < 8.9 and so no FP8 units; {REMEDY}"
    return None


def matmul(a: FP8Rows, b: FP8Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [..., K] by the transpose of b [N, K] and add a bias [N]: [..., N]. Waits for nothing.

    Sums are taken with the tensor cores' fast accumulation, which keeps fewer bits than float32. Beside a bfloat16
    result the bias is rounded to bfloat16 and added before the result is rounded, otherwise after it.
    Raises ValueError where K differs or 16 does not divide K and N. It has no backward.
    """
    (columns, depth), wanted = b.shape, a.shape[-1]
    if depth != wanted or depth % SIZE_MULTIPLE or columns % SIZE_MULTIPLE:
        raise ValueError(
            f"cannot multiply K={wanted} by K={depth} with N={columns}; wanted equal K, and K and N multiples of "
            f"{SIZE_MULTIPLE}"
        )
    within = bias is not None and out_dtype == torch.bfloat16
    product = functional.scaled_mm(
        a.values.reshape(-1, depth),
        b.values.t(),
        a.scales.reshape(-1, 1),
        functional.ScalingType.RowWise,
        b.scales.reshape(1, -1),
        functional.ScalingType.RowWise,
        bias=bias.to(out_dtype) if bias is not None and within else None,
        output_dtype=out_dtype,
        use_fast_accum=True,
    )
    if bias is not None and not within:
        product = product + bias.to(out_dtype)
    return product.view(*a.shape[:-1], columns)
