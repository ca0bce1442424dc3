"""Triton kernels for NVFP4. `reference` defines every bit; only the numbers of stochastic rounding differ.

Kernels compute in float32, divide by the rules of IEEE 754 and are launched without FMA contraction. Docstrings give
the bytes moved per element of the quantized tensor, where E is the size of an input element; a packed output takes 9/16
of a byte, an exact one 2 bytes.
"""

from longvideo.kernels.nvfp4.triton.layer_norm import layer_norm_modulate_quantize, layer_norm_modulate_quantize_exact
from longvideo.kernels.nvfp4.triton.products import add_scaled_bias, dequantize, exact, scaled_product
from longvideo.kernels.nvfp4.triton.quantizing import (
    gelu_tanh_quantize,
    gelu_tanh_quantize_exact,
    quantize,
    quantize_exact,
)
from longvideo.kernels.nvfp4.triton.training import quantize_across, quantize_across_exact, quantize_tiles_exact

__all__ = [
    "add_scaled_bias",
    "dequantize",
    "exact",
    "gelu_tanh_quantize",
    "gelu_tanh_quantize_exact",
    "layer_norm_modulate_quantize",
    "layer_norm_modulate_quantize_exact",
    "quantize",
    "quantize_across",
    "quantize_across_exact",
    "quantize_exact",
    "quantize_tiles_exact",
    "scaled_product",
]
