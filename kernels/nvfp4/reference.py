"""NVFP4 in plain torch: the definition that every kernel is compared with; it runs on any device.

static6 equals torchao's `nvfp4_quantize` bit for bit, and the reference of TransformerEngine except for ties and for
groups with a scale below the normal numbers of E4M3. The adaptive rules equal the public four-over-six code of LongLive
2.0 in float32 on a CPU bit for bit. This fixes the order of every rounding and of the sums of errors; kernels repeat
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.nvfp4.codes import decode_bytes, encode, pack, unpack
from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    GROUP,
    ExactOperand,
    NVFP4Tensor,
    Rule,
    check_groups,
)
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.rounding import round_to_groups, to_nearest

MX_GROUP = 32


def quantize(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    tile_rows: int = 1,
    amax: Tensor | None = None,
    generator: torch.Generator | None = None,
    name: str | None = None,
) -> NVFP4Tensor:
    """Quantize along the last dimension, which must be a multiple of 16.

    tile_rows: 16 gives every 16 x 16 tile of a matrix one scale, so that its transpose has the same codes.
    amax: largest magnitude from which the tensor scale is computed, float32, broadcast against [..., K/16]; by default
        that of the whole tensor. Group scales are computed from it, not from the rounded tensor scale.
    generator: source of stochastic rounding, on the device of x; None rounds to nearest, ties to even.
    name: name of the tensor in the error for NaN and infinity. With it, the host waits for the device. Without it, NaN
        and infinity make the tensor scale, and so every value, NaN or infinite.
    Raises ValueError for shapes without whole groups, and for stochastic rounding with an adaptive rule, which would be
    biased by the choice after the rounding.
    """
    values, scales, tensor_scale = round_to_groups(x, rule, tile_rows, amax, generator, name)
    return NVFP4Tensor(pack(encode(values)).view(*x.shape[:-1], -1), scales, tensor_scale)


def quantize_exact(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    tile_rows: int = 1,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ExactOperand:
    """Return `exact(quantize(x))`, computed without packing.

    seed: seed of stochastic rounding; None rounds to nearest, ties to even.
    """
    values, scales, tensor_scale = round_to_groups(x, rule, tile_rows, None, _generator(seed, x.device), None)
    return ExactOperand((values * scales.float().unsqueeze(-1)).view(x.shape).to(dtype), tensor_scale)


def quantize_tiles_exact(x_RK: Tensor, rule: Rule, *, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Quantize a matrix in 16 x 16 tiles and return `code x group scale`; its transpose has the same values."""
    return quantize_exact(x_RK, rule, tile_rows=GROUP, dtype=dtype)


def quantize_across(x_MC: Tensor, rule: Rule = Rule.ADAPTIVE, *, hadamard: bool = False) -> NVFP4Tensor:
    """Quantize the transpose of a matrix, [C, M], with M padded with zeros to a multiple of 16.

    hadamard: whether to apply `random_hadamard` of 16 points along M first, rounded to the dtype of x.
    """
    return quantize(_across(x_MC, hadamard), rule)


def quantize_across_exact(
    x_MC: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    hadamard: bool = False,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ExactOperand:
    """Return `exact(quantize_across(...))`, computed without packing. seed: as in `quantize_exact`."""
    return quantize_exact(_across(x_MC, hadamard), rule, seed=seed, dtype=dtype)


def exact(quantized: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Return `code x group scale`, which is exact in bfloat16 and wider dtypes."""
    values = decode_bytes(quantized.codes, dtype).unflatten(-1, (-1, GROUP))
    # both factors are exact in dtype and so is their product
    product = values * quantized.scales.to(dtype).unsqueeze(-1)
    return ExactOperand(product.flatten(-2), quantized.tensor_scale)


def dequantize(quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the represented values, computed in float32 and rounded once to dtype."""
    values = decode_bytes(quantized.codes, torch.float32).unflatten(-1, (-1, GROUP))
    scale = quantized.scales.float() * quantized.tensor_scale
    return (values * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def matmul(a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply a [..., M, K] by the transpose of b [N, K]: the float32 product of exact operands, scaled at the end."""
    left, right = exact(a, torch.float32), exact(b, torch.float32)
    product = left.values @ right.values.t() * (left.tensor_scale * right.tensor_scale)
    return product if bias is None else product + bias.float()


def add_scaled_bias(product: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `product * scale + bias`, computed in float32 and rounded to the dtype of the product.

    product: product of exact operands, [..., N]. scale: product of both tensor scales, float32 scalar. bias: [N].
    """
    scaled = product.float() * scale
    return (scaled if bias is None else scaled + bias.float()).to(product.dtype)


def layer_norm_modulate_quantize(
    h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, rule: Rule = Rule.ADAPTIVE, *, eps: float
) -> NVFP4Tensor:
    """Quantize `LayerNorm(h) * (1 + scale) + shift`, computed in float32 and rounded to the dtype of h first.

    The norm has no weight or bias. shift, scale: float32 [B or 1, T, S or 1, D] for T latent frames of S = L/T tokens.
    """
    return quantize(_modulated(h_BLD, shift_BTSD, scale_BTSD, eps), rule)


def layer_norm_modulate_quantize_exact(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> ExactOperand:
    """Return `exact(layer_norm_modulate_quantize(...))`, computed without packing."""
    return quantize_exact(_modulated(h_BLD, shift_BTSD, scale_BTSD, eps), rule, dtype=dtype)


def gelu_tanh_quantize(h: Tensor, rule: Rule = Rule.ADAPTIVE) -> NVFP4Tensor:
    """Quantize GELU (tanh formula), computed in float32 and rounded to the dtype of h first."""
    return quantize(_gelu(h), rule)


def gelu_tanh_quantize_exact(
    h: Tensor, rule: Rule = Rule.ADAPTIVE, *, dtype: torch.dtype = torch.bfloat16
) -> ExactOperand:
    """Return `exact(gelu_tanh_quantize(...))`, computed without packing."""
    return quantize_exact(_gelu(h), rule, dtype=dtype)


def transpose(quantized: NVFP4Tensor) -> NVFP4Tensor:
    """Transpose a matrix that is quantized in 16 x 16 tiles, without another rounding."""
    rows, columns = quantized.shape
    check_groups(torch.Size((columns, rows)), tile_rows=GROUP)
    tiles = quantized.scales.view(torch.uint8).unflatten(0, (-1, GROUP))
    if not torch.equal(tiles, tiles[:, :1].expand_as(tiles)):
        raise ValueError("the rows of a tile have different scales; expected a matrix quantized with tile_rows=16")
    scales = tiles[:, 0].t().repeat_interleave(GROUP, 0).contiguous().view(torch.float8_e4m3fn)
    return NVFP4Tensor(pack(unpack(quantized.codes).t().contiguous()), scales, quantized.tensor_scale)


def quantize_dequantize_mxfp4(x: Tensor) -> Tensor:
    """Round to MXFP4 and back, for comparison: E2M1 codes, one power of two for every 32 of them, no tensor scale.

    Source: OCP Microscaling Formats specification 1.0, section 6.3. The scale is 2 to the power of e - 2, where e is
        the floor of log2 of the largest magnitude, and 2 the exponent of the largest E2M1 number.
    """
    if x.shape[-1] % MX_GROUP:
        raise ValueError(f"the shape is {list(x.shape)}; expected a last dimension that is a multiple of {MX_GROUP}")
    groups = x.float().unflatten(-1, (-1, MX_GROUP))
    exponent = torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 1 - 2
    scale = torch.exp2(exponent.clamp(-127, 127).float())
    return (to_nearest((groups / scale).clamp(-E2M1_MAX, E2M1_MAX)) * scale).flatten(-2).to(x.dtype)


def _generator(seed: int | Tensor | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def _across(x_MC: Tensor, hadamard: bool) -> Tensor:
    filled = F.pad(x_MC, (0, 0, 0, -x_MC.shape[0] % GROUP)).t().contiguous()
    return random_hadamard(filled) if hadamard else filled


def _modulated(h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(h_BLD.float(), h_BLD.shape[-1:], eps=eps).unflatten(1, (shift_BTSD.shape[1], -1))
    return (normed * (1 + scale_BTSD) + shift_BTSD).flatten(1, 2).to(h_BLD.dtype)


def _gelu(h: Tensor) -> Tensor:
    return F.gelu(h.float(), approximate="tanh").to(h.dtype)
