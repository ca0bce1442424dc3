"""FP8 products in plain torch: the definition that every kernel is compared with; it also runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.fp8.format import E4M3_MAX, SCALE_MIN, SIZE_MULTIPLE, FP8Rows, FP8Tensor


def quantize_rows(x: Tensor) -> FP8Rows:
    """Quantize each row of [..., K]; its largest magnitude becomes 448.

    Arithmetic is in float32. Values are rounded to nearest, ties to even, and saturate. A row of zeros has scale 1; the
    scale of any other row is a normal float32 number. NaN or infinity in a row makes its scale, and so the whole row,
    NaN or infinite.
    """
    rows = x.float()
    amax = rows.abs().amax(-1)
    # division by a Python number would be a product with a rounded reciprocal on CUDA
    scales = (amax / torch.full_like(amax, E4M3_MAX)).clamp_min(SCALE_MIN)
    scales = torch.where(amax == 0, 1.0, scales)
    # torch's cast turns magnitudes above 448 into NaN
    values = (rows * scales.reciprocal().unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return FP8Rows(values.to(torch.float8_e4m3fn), scales)


def gelu_tanh_quantize_rows(h: Tensor) -> FP8Rows:
    """Quantize the rows of GELU (tanh formula), computed in float32 and rounded to h's dtype first."""
    return quantize_rows(F.gelu(h.float(), approximate="tanh").to(h.dtype))


def matmul(a: FP8Rows, b: FP8Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [..., K] by the transpose of b [N, K] and add a bias [N]: [..., N].

    The float32 product of the FP8 values is multiplied by both scales; the bias is added, and the sum rounded once.
    """
    product = a.values.float() @ b.values.float().t()
    scaled = product * a.scales.unsqueeze(-1) * b.scales
    return (scaled if bias is None else scaled + bias.float()).to(out_dtype)


def quantize_tensor(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor:
    """Quantize a matrix to E4M3 or E5M2 with one scale, by which `amax` becomes the largest number of the format.

    amax: float32 scalar; larger magnitudes saturate. Arithmetic is in float32, rounding to nearest, ties to even.
    """
    scale, largest = tensor_scale(amax, dtype), torch.finfo(dtype).max
    return FP8Tensor((x_RC.float() * scale.reciprocal()).clamp(-largest, largest).to(dtype), scale)


def quantize_transposed(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor:
    """Quantize the transpose of a matrix, [C, R], with R padded with zeros to a multiple of 16."""
    return quantize_tensor(F.pad(x_RC, (0, 0, 0, -x_RC.shape[0] % SIZE_MULTIPLE)).t().contiguous(), amax, dtype)


def quantize_both(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[FP8Tensor, FP8Tensor]:
    """Return `quantize_tensor` and `quantize_transposed` of a matrix."""
    return quantize_tensor(x_RC, amax, dtype), quantize_transposed(x_RC, amax, dtype)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x| as a float32 scalar; NaN if x holds NaN."""
    return x.abs().amax().float()


def tensor_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale by which `amax` becomes the largest number of a format; 1 for an amax of zero."""
    scale = (amax / torch.full_like(amax, torch.finfo(dtype).max)).clamp_min(SCALE_MIN)
    return torch.where(amax == 0, 1.0, scale)


def matmul_tensors(a_RK: FP8Tensor, b_CK: FP8Tensor, out_dtype: torch.dtype, *, fast_sums: bool = False) -> Tensor:
    """Multiply a matrix by the transpose of another: [R, C]. The float32 product is multiplied by both scales.

    fast_sums: whether tensor cores may keep fewer bits of the sums than float32; here they are in float32.
    """
    del fast_sums
    # autocast would cast the operands of the product
    with torch.autocast(a_RK.values.device.type, enabled=False):
        product = a_RK.values.float() @ b_CK.values.float().t()
    return (product * (a_RK.scale * b_CK.scale)).to(out_dtype)
