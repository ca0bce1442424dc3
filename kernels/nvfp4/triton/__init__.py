"""NVFP4 in Triton: quantise, write out and multiply. `reference` defines every bit; only stochastic rounding differs.

Kernels compute in float32, divide as IEEE 754 has it and are launched without FMA contraction. Bytes moved are given
per element of the quantised tensor, E being the bytes of an input element; a packed output takes 9/16 of a byte, an
exact one 2 bytes.
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
