"""FP8 products on tensor cores through `torch.nn.functional.scaled_mm`, in torch since 2.10.

Limits of `scaled_mm` (torch 2.13, aten/src/ATen/native/cuda/ScaledBlas.cpp): it takes matrices only, K and N must be
multiples of 16, and a bias must be bfloat16 with a bfloat16 result and is refused with a float32 result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from longvideo.kernels.fp8.format import SIZE_MULTIPLE

if TYPE_CHECKING:
    from longvideo.kernels.fp8.format import FP8Rows, FP8Tensor

WITH_FP8_UNITS = (8, 9)
REMEDY = "use --precision bf16 or nvfp4-weights"


def unavailable(device: torch.device) -> str | None:
    """Return why FP8 products cannot run on a device, with a remedy; None if they can."""
    if device.type == "cuda" and not hasattr(functional, "scaled_mm"):
        return (
            f"FP8 products need torch 2.10 or newer, torch {torch.__version__} has no "
            f"torch.nn.functional.scaled_mm; {REMEDY}"
        )
    return missing_fp8_units(device, "FP8 products", REMEDY)


def missing_fp8_units(device: torch.device, what: str, remedy: str) -> str | None:
    """Return why a device cannot compute in FP8, with a remedy; None if it can. what: name of the operations."""
    if device.type != "cuda":
        return f"{what} need a GPU of compute capability 8.9 or newer, got device {str(device)!r}; {remedy}"
    capability = torch.cuda.get_device_capability(device)
    if capability < WITH_FP8_UNITS:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]} < 8.9 and so no FP8 units; {remedy}"
    return None


def matmul(a: FP8Rows, b: FP8Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [..., K] by the transpose of b [N, K] and add a bias [N]: [..., N]. The host does not wait.

    Sums are taken with the tensor cores' fast accumulation, which keeps fewer bits than float32. If the result is
    bfloat16, the bias is rounded to bfloat16 and added before the result is rounded, otherwise after it.
    Raises ValueError where K differs, or where K or N is not a multiple of 16. There is no backward pass.
    """
    (columns, depth), own_depth = b.shape, a.shape[-1]
    if depth != own_depth or depth % SIZE_MULTIPLE or columns % SIZE_MULTIPLE:
        raise ValueError(
            f"cannot multiply K={own_depth} by K={depth} with N={columns}; expected equal K, and K and N multiples of "
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


def matmul_tensors(a_RK: FP8Tensor, b_CK: FP8Tensor, out_dtype: torch.dtype, *, fast_sums: bool = False) -> Tensor:
    """Multiply a matrix by the transpose of another: [R, C], see `reference.matmul_tensors`. C is a multiple of 16.

    K is padded with zeros to a multiple of 16. One of the two may be in E5M2. fast_sums: whether the tensor cores'
    fast accumulation is used.
    """
    padding = -a_RK.values.shape[1] % SIZE_MULTIPLE
    a, b = (_padded(x.values, padding) for x in (a_RK, b_CK))
    return functional.scaled_mm(
        a,
        b.t(),
        a_RK.scale,
        functional.ScalingType.TensorWise,
        b_CK.scale,
        functional.ScalingType.TensorWise,
        output_dtype=out_dtype,
        use_fast_accum=fast_sums,
    )


def _padded(x: Tensor, columns: int) -> Tensor:
    """Return a contiguous matrix with columns of zeros added, through bytes, for which torch has the operator."""
    if not columns:
        return x.contiguous()
    return functional.pad(x.view(torch.uint8), (0, columns)).view(x.dtype)
