"""Row-wise FP8 products in plain torch: the definition that every kernel is compared with, and the way on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.fp8.format import E4M3_MAX, SCALE_MIN, FP8Rows


def quantize_rows(x: Tensor) -> FP8Rows:
    """Quantise each row of [..., K] by its largest magnitude, which is mapped to 448.

    Float32 inside; to nearest, ties to even, saturating. A row of zeros has scale 1, and no other row a scale below the
    normal float32 numbers. NaN or infinity in a row turns its scale, and so what its values mean, into NaN or infinity.
    """
    rows = x.float()
    amax = rows.abs().amax(-1)
    # by a Python number CUDA would multiply by a rounded reciprocal
    scales = (amax / torch.full_like(amax, E4M3_MAX)).clamp_min(SCALE_MIN)
    scales = torch.where(amax == 0, 1.0, scales)
    # torch's cast turns what lies beyond 448 into NaN
    values = (rows * scales.reciprocal().unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return FP8Rows(values.to(torch.float8_e4m3fn), scales)


def gelu_tanh_quantize_rows(h: Tensor) -> FP8Rows:
    """Quantise the rows of GELU by its tanh formula: float32 inside, rounded to h's dtype first."""
    return quantize_rows(F.gelu(h.float(), approximate="tanh").to(h.dtype))


def matmul(a: FP8Rows, b: FP8Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [..., K] by the transpose of b [N, K] and add a bias [N]: [..., N].

    A float32 product of the FP8 values, times both scales, plus the bias, rounded once.
    """
    product = a.values.float() @ b.values.float().t()
    scaled = product * a.scales.unsqueeze(-1) * b.scales
    return (scaled if bias is None else scaled + bias.float()).to(out_dtype)
