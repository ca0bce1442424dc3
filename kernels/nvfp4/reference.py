"""NVFP4 in plain torch: the definition that every kernel is compared with, and the way to run it on any device.

static6 equals torchao's `nvfp4_quantize` bit for bit, and TransformerEngine's reference but for ties and for groups
whose scale lies below E4M3's normal numbers. The adaptive rules equal the public four-over-six code of LongLive 2.0 in
float32 on a CPU bit for bit; that fixes the order of every rounding and of the sums of errors, and kernels repeat it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_TINY,
    GROUP,
    HADAMARD_SIGNS,
    ExactOperand,
    NVFP4Tensor,
    Rule,
    check_groups,
)

SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4
MX_GROUP = 32
LANES = 8  # float32 numbers in a register of the CPU whose sums the adaptive rules repeat
AMAX_SHIFT = 2.0**-11  # keeps code x group scale x largest magnitude below that magnitude
EXPONENT_BITS = 0x7F800000  # of a float32
ANCHOR = 1.5 * 2.0**22  # times a power of two: a float32 whose last bit is worth half of that power


def quantize(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    tile_rows: int = 1,
    amax: Tensor | None = None,
    generator: torch.Generator | None = None,
    name: str | None = None,
) -> NVFP4Tensor:
    """Quantise along the last dimension, whose size 16 must divide.

    tile_rows: 16 gives every 16 x 16 tile of a matrix one scale, so that its transpose has the same codes.
    amax: largest magnitude that the tensor scale is made for, float32, broadcasting against [..., K/16]; by default
        that of the whole tensor. Group scales are made with it, not with the tensor scale, its rounded quotient.
    generator: on x's device, rounds stochastically; without it, to nearest, ties to even.
    name: of the tensor; when given, NaN and infinity raise ValueError with it. That waits for the device. Without it
        they turn the tensor scale, and so every value, into NaN or infinity.
    Raises ValueError for shapes that groups do not divide, and for stochastic rounding with an adaptive rule, whose
    choice after the rounding would be biased.
    """
    values, scales, tensor_scale = _round(x, rule, tile_rows, amax, generator, name)
    return NVFP4Tensor(pack(encode(values)).view(*x.shape[:-1], -1), scales, tensor_scale)


def quantize_exact(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    tile_rows: int = 1,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ExactOperand:
    """Quantise and write out `code x group scale` at once: `exact(quantize(x))` without packing in between.

    seed: rounds stochastically, with numbers of a generator of its own.
    """
    values, scales, tensor_scale = _round(x, rule, tile_rows, None, _generator(seed, x.device), None)
    return ExactOperand((values * scales.float().unsqueeze(-1)).view(x.shape).to(dtype), tensor_scale)


def quantize_tiles_exact(x_RK: Tensor, rule: Rule, *, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Quantise a matrix in 16 x 16 tiles and write it out; its transpose has the same values."""
    return quantize_exact(x_RK, rule, tile_rows=GROUP, dtype=dtype)


def quantize_across(x_MC: Tensor, rule: Rule = Rule.ADAPTIVE, *, hadamard: bool = False) -> NVFP4Tensor:
    """Quantise the transpose of a matrix, [C, M] with M filled up with zeros to a multiple of 16.

    hadamard: apply `random_hadamard` along M first, rounded to the dtype of x.
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
    """As `quantize_across`, written out as `code x group scale`; seed: as in `quantize_exact`."""
    return quantize_exact(_across(x_MC, hadamard), rule, seed=seed, dtype=dtype)


def exact(quantized: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Write out `code x group scale`; bfloat16 and wider dtypes hold it exactly."""
    values = _decode_bytes(quantized.codes, dtype).unflatten(-1, (-1, GROUP))
    # both factors are exact in dtype and so is their product
    product = values * quantized.scales.to(dtype).unsqueeze(-1)
    return ExactOperand(product.flatten(-2), quantized.tensor_scale)


def dequantize(quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the represented values, computed in float32 and rounded once to dtype."""
    values = _decode_bytes(quantized.codes, torch.float32).unflatten(-1, (-1, GROUP))
    scale = quantized.scales.float() * quantized.tensor_scale
    return (values * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def matmul(a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply a [..., M, K] by the transpose of b [N, K]: float32 products of exact operands, scaled at the end."""
    left, right = exact(a, torch.float32), exact(b, torch.float32)
    product = left.values @ right.values.t() * (left.tensor_scale * right.tensor_scale)
    return product if bias is None else product + bias.float()


def add_scaled_bias(product: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Finish the product of exact operands [..., N]: times both tensor scales, plus a bias [N], rounded once more."""
    scaled = product.float() * scale
    return (scaled if bias is None else scaled + bias.float()).to(product.dtype)


def layer_norm_modulate_quantize(
    h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, rule: Rule = Rule.ADAPTIVE, *, eps: float
) -> NVFP4Tensor:
    """Quantise `LayerNorm(h) * (1 + scale) + shift`: float32 inside, no weight or bias, rounded to h's dtype first.

    shift, scale: float32 [B or 1, T, S or 1, D] for T latent frames of S = L/T tokens.
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
    """As `layer_norm_modulate_quantize`, written out as `code x group scale`."""
    return quantize_exact(_modulated(h_BLD, shift_BTSD, scale_BTSD, eps), rule, dtype=dtype)


def gelu_tanh_quantize(h: Tensor, rule: Rule = Rule.ADAPTIVE) -> NVFP4Tensor:
    """Quantise GELU by its tanh formula: float32 inside, rounded to h's dtype first."""
    return quantize(_gelu(h), rule)


def gelu_tanh_quantize_exact(
    h: Tensor, rule: Rule = Rule.ADAPTIVE, *, dtype: torch.dtype = torch.bfloat16
) -> ExactOperand:
    """As `gelu_tanh_quantize`, written out as `code x group scale`."""
    return quantize_exact(_gelu(h), rule, dtype=dtype)


def transpose(quantized: NVFP4Tensor) -> NVFP4Tensor:
    """Transpose a matrix quantised in 16 x 16 tiles, without another rounding."""
    rows, columns = quantized.shape
    check_groups(torch.Size((columns, rows)), tile_rows=GROUP)
    tiles = quantized.scales.view(torch.uint8).unflatten(0, (-1, GROUP))
    if not torch.equal(tiles, tiles[:, :1].expand_as(tiles)):
        raise ValueError("only a matrix quantised with tile_rows=16 can be transposed without another rounding")
    scales = tiles[:, 0].t().repeat_interleave(GROUP, 0).contiguous().view(torch.float8_e4m3fn)
    return NVFP4Tensor(pack(unpack(quantized.codes).t().contiguous()), scales, quantized.tensor_scale)


def pack(codes: Tensor) -> Tensor:
    """Put two uint8 codes [..., K] into a byte [..., K/2], the first in the low nibble."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """Return uint8 codes [..., K] of bytes [..., K/2]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def encode(values: Tensor) -> Tensor:
    """Return the uint8 codes of E2M1 values; the sign of zero is kept."""
    # NaN becomes any integer, which must not index past the table
    index = (values.abs() * 2).to(torch.int32).clamp(0, int(E2M1_MAX * 2))
    magnitudes = _encoding_table(values.device)[index]
    return magnitudes | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the E2M1 values of uint8 codes."""
    return _decoding_table(codes.device, dtype)[codes.int()]


def swizzle_scales(scales: Tensor) -> Tensor:
    """Lay E4M3 scales [R, C] out as Blackwell's tensor cores read them: flat uint8, tiles of 128 x 4 padded with zeros.

    Inside a tile, row r and column c lie at byte 16 (r mod 32) + 4 (r div 32) + c. Source: cuBLAS documentation, "1D
    block scaling factors layout".
    """
    rows, columns = scales.shape
    tile_rows, tile_columns = -(-rows // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    padded = scales.new_zeros(tile_rows * SWIZZLE_ROWS, tile_columns * SWIZZLE_COLUMNS, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    return padded.view(tile_rows, 4, 32, tile_columns, 4).permute(0, 3, 2, 1, 4).flatten()


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `swizzle_scales`: float8_e4m3fn [rows, columns]."""
    tile_rows, tile_columns = -(-rows // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    wanted = tile_rows * tile_columns * SWIZZLE_ROWS * SWIZZLE_COLUMNS
    if swizzled.numel() != wanted:
        raise ValueError(f"{swizzled.numel()} swizzled scales, wanted {wanted} for {rows} x {columns}")
    tiles = swizzled.view(torch.uint8).view(tile_rows, tile_columns, 32, 4, 4).permute(0, 3, 2, 1, 4)
    padded = tiles.reshape(tile_rows * SWIZZLE_ROWS, tile_columns * SWIZZLE_COLUMNS)
    return padded[:rows, :columns].contiguous().view(torch.float8_e4m3fn)


def random_hadamard(x: Tensor) -> Tensor:
    """Apply the orthogonal 16-point transform to every 16 neighbours of the last dimension, after fixed sign flips.

    It spreads an outlier over its group. Applied to both operands of a product along the dimension that is summed, it
    leaves the product as it was. Computed in float32 by the fast transform, whose order of sums a kernel can repeat.
    """
    check_groups(x.shape)
    out = x.float().unflatten(-1, (-1, GROUP)) * _hadamard_signs(x.device)
    for _ in range(GROUP.bit_length() - 1):
        # pairs of the lowest bit of the index become its highest, so that after four rounds all are in order again
        even, odd = out[..., ::2], out[..., 1::2]
        out = torch.cat((even + odd, even - odd), dim=-1)
    return (out * GROUP**-0.5).flatten(-2).to(x.dtype)


def quantize_dequantize_mxfp4(x: Tensor) -> Tensor:
    """Round to MXFP4 and back, for comparison: E2M1 codes, a power of two for every 32 of them, no tensor scale.

    Source: OCP Microscaling Formats specification 1.0, 6.3: the scale is 2 to the floor of log2 of the largest
    magnitude, less 2, the exponent of the largest E2M1 number.
    """
    if x.shape[-1] % MX_GROUP:
        raise ValueError(f"the last dimension of {list(x.shape)} is not a multiple of {MX_GROUP}")
    groups = x.float().unflatten(-1, (-1, MX_GROUP))
    exponent = torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 1 - 2
    scale = torch.exp2(exponent.clamp(-127, 127).float())
    return (_to_nearest((groups / scale).clamp(-E2M1_MAX, E2M1_MAX)) * scale).flatten(-2).to(x.dtype)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x| as a float32 scalar; NaN if there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def tensor_scale_of(amax: Tensor, rule: Rule) -> Tensor:
    """Return the tensor scale for a largest magnitude."""
    return _divide(amax.float().clamp_min(rule.smallest_amax), rule.largest_product)


def _round(
    x: Tensor,
    rule: Rule,
    tile_rows: int,
    amax: Tensor | None,
    generator: torch.Generator | None,
    name: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E2M1 values [..., G, 16] in float32, E4M3 scales [..., G] and the tensor scale."""
    check_groups(x.shape, tile_rows=tile_rows)
    if generator is not None and rule.is_adaptive:
        raise ValueError(
            f"rule {rule.value!r} chooses a scale after rounding, which biases stochastic rounding; use static6"
        )
    if name is not None and not torch.isfinite(x).all():
        raise ValueError(f"{name} {list(x.shape)} holds NaN or infinity and cannot be quantised")
    amax = (largest_magnitude(x) if amax is None else amax.float()).clamp_min(rule.smallest_amax)
    groups = x.float().unflatten(-1, (-1, GROUP))
    group_amax = groups.abs().amax(-1)
    if tile_rows == GROUP:
        group_amax = group_amax.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP, 0)
    tensor_scale = tensor_scale_of(amax, rule)
    if rule.is_adaptive:
        values, scales = _round_adaptively(groups, group_amax, amax, rule, tile_rows)
    else:
        values, scales = _round_statically(groups, group_amax, tensor_scale, rule, generator)
    return values, scales, tensor_scale


def _round_statically(
    groups: Tensor, group_amax: Tensor, tensor_scale: Tensor, rule: Rule, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    exact_scale = _divide(group_amax, 4.0 if rule is Rule.STATIC4 else E2M1_MAX) / tensor_scale
    # torchao gives no group less than a normal number
    scales = _to_e4m3(exact_scale.clamp(E4M3_TINY, E4M3_MAX), round_up=generator is not None)
    values = _scaled(groups, tensor_scale.reciprocal() / scales.float())
    return _to_nearest(values) if generator is None else _stochastically(values, generator), scales


def _round_adaptively(
    groups: Tensor, group_amax: Tensor, amax: Tensor, rule: Rule, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Round with the group's largest magnitude at 6 and at 4, and keep what has the lower error in every group."""
    encoding_scale = torch.full_like(amax, rule.largest_product) / amax
    decoding_scale = encoding_scale.reciprocal()
    exact_scale = _divide(group_amax, E2M1_MAX) * encoding_scale
    candidates = []
    for candidate_scale in (exact_scale, exact_scale * 1.5):
        scales = _to_e4m3(candidate_scale.clamp(0.0, E4M3_MAX), round_up=False)
        # a group whose scale rounds to zero is zero
        factor = torch.where(scales.float() > 0, (decoding_scale * scales.float()).reciprocal(), 0.0)
        values = _to_nearest(_scaled(groups, factor))
        candidates.append((values, scales, _error(groups, values, scales, amax, rule, tile_rows)))
    (to_six, scales_to_six, error_to_six), (to_four, scales_to_four, error_to_four) = candidates
    better = error_to_four < error_to_six
    values = torch.where(better.unsqueeze(-1), to_four, to_six)
    scales = torch.where(better, scales_to_four.view(torch.uint8), scales_to_six.view(torch.uint8))
    return values, scales.view(torch.float8_e4m3fn)


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


def _divide(x: Tensor, by: float) -> Tensor:
    """Divide as IEEE 754 has it on every device; by a Python number, CUDA multiplies by a rounded reciprocal."""
    return x / torch.full((), by, device=x.device)


def _scaled(groups: Tensor, factor: Tensor) -> Tensor:
    return (groups * factor.unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)


def _error(groups: Tensor, values: Tensor, scales: Tensor, amax: Tensor, rule: Rule, tile_rows: int) -> Tensor:
    """Return the error of every group, summed over its tile if there are tiles.

    A value is `code x scale x amax / (6 x 256)`, rounded after the second product and after the division. The power of
    two in the divisor comes first, which changes no bit and keeps the product from overflowing.
    """
    product = values * scales.float().unsqueeze(-1) * (amax * AMAX_SHIFT).unsqueeze(-1)
    error = _divide(product, rule.largest_product * AMAX_SHIFT) - groups
    if rule is Rule.ADAPTIVE_MAX:
        worst = error.abs().amax(-1)
        return worst if tile_rows == 1 else worst.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP, 0)
    error = error.square() if rule is Rule.ADAPTIVE else error.abs()
    return _sum_of_groups(error) if tile_rows == 1 else _sum_of_tiles(error).repeat_interleave(GROUP, 0)


def _sum_of_groups(x: Tensor) -> Tensor:
    """Sum 16 numbers of the last dimension as a CPU with registers of eight does: its halves, then their eight sums."""
    first, second = x.unflatten(-1, (2, LANES)).unbind(-2)
    return _sum_in_order(first + second)


def _sum_of_tiles(x_RG16: Tensor) -> Tensor:
    """Sum tiles of 16 x 16 as a CPU does with four registers of eight, one for each half of even and of odd rows."""
    halves_TNPGHL = x_RG16.unflatten(-1, (2, LANES)).unflatten(0, (-1, GROUP // 2, 2))
    total_TPGHL = halves_TNPGHL[:, 0]
    for step in range(1, GROUP // 2):
        total_TPGHL = total_TPGHL + halves_TNPGHL[:, step]
    even_TGHL, odd_TGHL = total_TPGHL.unbind(1)
    total_TGL = even_TGHL[..., 0, :] + even_TGHL[..., 1, :] + odd_TGHL[..., 0, :] + odd_TGHL[..., 1, :]
    return _sum_in_order(total_TGL)


def _sum_in_order(x: Tensor) -> Tensor:
    """Sum the last dimension from the first number to the last."""
    first, *others = x.unbind(-1)
    for other in others:
        first = first + other
    return first


def _to_e4m3(scale: Tensor, *, round_up: bool) -> Tensor:
    """Round a scale in [0, 448] to E4M3: to nearest, ties to even, or up, so that nothing scaled exceeds 6."""
    rounded = scale.to(torch.float8_e4m3fn)
    if round_up:
        # positive E4M3 numbers are ordered as their bytes are
        below = rounded.float() < scale
        rounded = (rounded.view(torch.uint8) + below.to(torch.uint8)).view(torch.float8_e4m3fn)
    return rounded


def _to_nearest(x: Tensor) -> Tensor:
    """Round to E2M1, ties to the even code.

    Beside a number whose last bit is worth one step, a sum is rounded to whole steps by float32 itself.
    """
    magnitude = x.abs()
    anchor = _octave(magnitude) * ANCHOR
    return torch.copysign((magnitude + anchor) - anchor, x)


def _stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two E2M1 neighbours, to the upper with the probability that makes the mean exact."""
    magnitude = x.abs()
    step = _octave(magnitude) * 0.5
    steps = magnitude / step
    lower = torch.floor(steps)
    # not floor(steps + draw): that sum may be rounded up past a number that is on the grid already
    up = torch.rand(x.shape, generator=generator, device=x.device) < steps - lower
    return torch.copysign((lower + up) * step, x)


def _octave(magnitude: Tensor) -> Tensor:
    """Return the power of two at or below a magnitude, at least 1: twice the step of the E2M1 grid there."""
    return (magnitude.view(torch.int32) & EXPONENT_BITS).view(torch.float32).clamp_min(1.0)


def _decode_bytes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `decode(unpack(codes), dtype)`; both values of a byte are looked up at once, as one number."""
    pairs = torch.index_select(_pair_table(codes.device, dtype), 0, codes.flatten().int())
    return pairs.view(dtype).view(*codes.shape[:-1], -1)


@functools.cache
def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    pairs = decode(unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(1)), dtype)
    whole = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return pairs.contiguous().view(whole).flatten().to(device)


@functools.cache
def _encoding_table(device: torch.device) -> Tensor:
    table = torch.zeros(int(E2M1_MAX * 2) + 1, dtype=torch.uint8)
    for code, value in enumerate(E2M1_VALUES):
        table[int(value * 2)] = code
    return table.to(device)


@functools.cache
def _decoding_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    positive = torch.tensor(E2M1_VALUES, dtype=dtype)
    return torch.cat((positive, -positive)).to(device)


# a tensor made and kept in inference mode could not be multiplied under autograd afterwards
@functools.cache
@torch.inference_mode(False)
def _hadamard_signs(device: torch.device) -> Tensor:
    return torch.tensor(HADAMARD_SIGNS, dtype=torch.float32, device=device)
