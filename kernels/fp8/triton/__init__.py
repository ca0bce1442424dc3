"""FP8 on CUDA: Triton quantizes rows and tensors, `scaled_mm` multiplies; `kernels.fp8.reference` defines both."""

from longvideo.kernels.fp8.scaled_mm import matmul, matmul_tensors
from longvideo.kernels.fp8.triton.rows import gelu_tanh_quantize_rows, quantize_rows
from longvideo.kernels.fp8.triton.tensors import (
    largest_magnitude,
    quantize_both,
    quantize_tensor,
    quantize_transposed,
)

__all__ = [
    "gelu_tanh_quantize_rows",
    "largest_magnitude",
    "matmul",
    "matmul_tensors",
    "quantize_both",
    "quantize_rows",
    "quantize_tensor",
    "quantize_transposed",
]
