"""NVFP4 in Triton: quantise, write out and multiply. `reference` defines every bit; only stochastic rounding differs.

Kernels compute in float32, divide as IEEE 754 has it and are launched without FMA contraction. To round to E2M1 or
E4M3 takes one addition: beside a power of two whose last bit is worth one step, a sum is rounded to a whole number of
steps, ties to even. A row of a block is a group of 16. Bytes moved are given per element of the quantised tensor, E
being the bytes of an input element; a packed output takes 9/16 of a byte, an exact one 2 bytes.
"""

# a launch takes more than its function is declared with: options, and constants as plain values
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_TINY,
    GROUP,
    TENSOR_SCALE_MIN,
    ExactOperand,
    NVFP4Tensor,
    Rule,
    check_groups,
)

BLOCK_GROUPS = 128  # groups per program: 16 values for each of its 128 threads
BLOCK_ROWS = 4  # rows per program of the LayerNorm, which share their frame's modulation
BLOCK_WORDS = 128  # words of 8 codes when writing out: one for each thread, so that it stores 16 bytes of bfloat16
BLOCK_TILES = 4  # times that in one program
MAXIMA_BLOCKS = 4  # times the groups in a program that only looks for their largest magnitude
MAXIMA_WARPS = 8
BLOCK_MAXIMA = 4096  # results of such programs that are reduced at a time
BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 256
WORD_CODES = 8  # codes in 32 bits

_GROUP = tl.constexpr(GROUP)
_PAIRS = tl.constexpr(GROUP // 2)
_WORD_CODES = tl.constexpr(WORD_CODES)
_E2M1_MAX = tl.constexpr(E2M1_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_E4M3_TINY = tl.constexpr(E4M3_TINY)
_TENSOR_SCALE_MIN = tl.constexpr(TENSOR_SCALE_MIN)
_STATIC4 = tl.constexpr(Rule.STATIC4.value)
_ADAPTIVE_SQUARED = tl.constexpr(Rule.ADAPTIVE.value)
_ADAPTIVE_MAX = tl.constexpr(Rule.ADAPTIVE_MAX.value)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(0x80000000)
_EXPONENT = tl.constexpr(0x7F800000)
_E4M3_NAN = tl.constexpr(0x7F)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
# bits of an E2M1 or E4M3 number moved to where float32 has exponent and mantissa, less the difference of the biases
_E2M1_TO_FLOAT32 = tl.constexpr(2.0**126)
_E4M3_TO_FLOAT32 = tl.constexpr(2.0**120)
# the interpreter's cast to bfloat16 truncates, so it rounds by integer arithmetic; a GPU has an instruction
_SOFTWARE_ROUNDING = tl.constexpr(knobs.runtime.interpret)


def quantize(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    tensor_scale: Tensor | None = None,
    seed: int | Tensor | None = None,
    block_groups: int = BLOCK_GROUPS,
) -> NVFP4Tensor:
    """Quantise a contiguous [..., K] tensor along its last dimension, as `reference.quantize` does. Waits for nothing.

    tensor_scale: float32, broadcasting against [..., K/16]; by default from the largest magnitude of the whole tensor.
    seed: an integer or int64 scalar on the device, rounds stochastically: scales up, codes to one of both neighbours.
        Element i of the tensor draws number i of the seed's Philox stream.
    NaN and infinity turn the tensor scale, and so every value, into NaN or infinity.
    Bytes moved: 2 E + 9/16, or E + 9/16 with a tensor scale.
    Raises ValueError for shapes that groups do not divide, memory that is not contiguous, and a seed with an adaptive
    rule, whose choice after the rounding would be biased.
    """
    codes, scales, tensor_scale = _quantize(x, rule, tensor_scale, seed, block_groups, exact_dtype=None, gelu=False)
    return NVFP4Tensor(codes, scales, tensor_scale)


def quantize_exact(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block_groups: int = BLOCK_GROUPS,
) -> ExactOperand:
    """Quantise and write out `code x group scale` at once. As `quantize` otherwise; bytes moved: 2 E + 2."""
    values, _, tensor_scale = _quantize(x, rule, None, seed, block_groups, exact_dtype=dtype, gelu=False)
    return ExactOperand(values, tensor_scale)


def gelu_tanh_quantize(h: Tensor, rule: Rule = Rule.ADAPTIVE, *, block_groups: int = BLOCK_GROUPS) -> NVFP4Tensor:
    """Quantise GELU, by its tanh formula, of a contiguous [..., K] tensor; float32 inside, rounded to h's dtype first.

    It is computed twice, once for the largest magnitude: to store it in between would move 2 E more bytes. Bytes moved:
    2 E + 9/16. Raises as `quantize`.
    """
    return NVFP4Tensor(*_quantize(h, rule, None, None, block_groups, exact_dtype=None, gelu=True))


def gelu_tanh_quantize_exact(
    h: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_groups: int = BLOCK_GROUPS,
) -> ExactOperand:
    """As `gelu_tanh_quantize`, written out as `code x group scale`. Bytes moved: 2 E + 2."""
    values, _, tensor_scale = _quantize(h, rule, None, None, block_groups, exact_dtype=dtype, gelu=True)
    return ExactOperand(values, tensor_scale)


def layer_norm_modulate_quantize(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    eps: float,
    block_rows: int = BLOCK_ROWS,
) -> NVFP4Tensor:
    """Quantise `LayerNorm(h) * (1 + scale) + shift`: float32 inside, no weight or bias, rounded to h's dtype first.

    h: contiguous [B, L, D]. shift, scale: float32 [B or 1, T, S or 1, D] for T latent frames of S = L/T tokens, D
    contiguous. It is computed twice, once for the largest magnitude and the mean and deviation of each row: to store it
    in between would move 2 E more bytes. Bytes moved: 2 E + 9/16, and 16/D for the rows' statistics.
    Raises ValueError for shapes that do not fit and for h that is not contiguous.
    """
    codes, scales, tensor_scale = _layer_norm_quantize(
        h_BLD, shift_BTSD, scale_BTSD, rule, eps, block_rows, exact_dtype=None
    )
    return NVFP4Tensor(codes, scales, tensor_scale)


def layer_norm_modulate_quantize_exact(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
    block_rows: int = BLOCK_ROWS,
) -> ExactOperand:
    """As `layer_norm_modulate_quantize`, written out as `code x group scale`. Bytes moved: 2 E + 2, and 16/D."""
    values, _, tensor_scale = _layer_norm_quantize(
        h_BLD, shift_BTSD, scale_BTSD, rule, eps, block_rows, exact_dtype=dtype
    )
    return ExactOperand(values, tensor_scale)


def exact(
    quantized: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, block_words: int = BLOCK_WORDS
) -> ExactOperand:
    """Write out `code x group scale`, exact in bfloat16 and wider dtypes. Bytes moved: 9/16 + those of dtype."""
    return ExactOperand(_write_out(quantized, None, dtype, block_words), quantized.tensor_scale)


def dequantize(quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32, *, block_words: int = BLOCK_WORDS) -> Tensor:
    """Return the represented values: code x (group scale x tensor scale) in float32, rounded once to dtype.

    Bytes moved: 9/16 + those of dtype. Raises ValueError for codes or scales that are not contiguous.
    """
    return _write_out(quantized, quantized.tensor_scale, dtype, block_words)


def scaled_product(a: NVFP4Tensor, b: NVFP4Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply a [..., M, K] by the transpose of b [N, K] on FP4 tensor cores: dtype [..., M, N].

    Only for GPUs of compute capability 10.0 or newer; elsewhere Triton refuses to compile it. Both tensor scales are
    scalars. Raises ValueError for shapes that do not fit.
    """
    inner = a.shape[-1]
    if len(b.shape) != 2 or b.shape[1] != inner:
        raise ValueError(f"cannot multiply {list(a.shape)} by the transpose of {list(b.shape)}; wanted [N, {inner}]")
    if a.tensor_scale.numel() != 1 or b.tensor_scale.numel() != 1:
        raise ValueError("the product needs scalar tensor scales: they are applied to its sums")
    for part in (a.codes, a.scales, b.codes, b.scales):
        _check_contiguous(part, "an operand of the product")
    rows, columns = a.codes.numel() * 2 // inner, b.shape[0]
    out = torch.empty(*a.shape[:-1], columns, dtype=dtype, device=a.codes.device)
    _scaled_product_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, BLOCK_N))](
        a.codes,
        a.scales.view(torch.uint8),
        a.tensor_scale,
        b.codes,
        b.scales.view(torch.uint8),
        b.tensor_scale,
        out,
        rows,
        columns,
        inner,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=8,
    )
    return out


def add_scaled_bias(product: Tensor, scale: Tensor, bias: Tensor | None = None, *, block: int = 4096) -> Tensor:
    """Replace a product of exact operands [..., N] by `product * scale + bias`, rounded once from float32; return it.

    scale: float32 scalar on the device, both tensor scales multiplied. bias: [N]. Bytes moved: twice the product's.
    Raises ValueError for shapes that do not fit and for a product that is not contiguous.
    """
    _check_contiguous(product, "the product")
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}, wanted a float32 scalar")
    columns = product.shape[-1]
    if bias is not None:
        _check_contiguous(bias, "the bias")
        if bias.shape != (columns,):
            raise ValueError(f"bias is {list(bias.shape)}, wanted [{columns}] for a product {list(product.shape)}")
    if product.numel():
        grid = (triton.cdiv(product.numel(), block),)
        _scaled_bias_kernel[grid](
            product, scale, bias, product.numel(), columns, BLOCK=block, num_warps=8, enable_fp_fusion=False
        )
    return product


def tensor_scales(maxima: Tensor, rule: Rule) -> Tensor:
    """Return the tensor scale of each row of maxima: int32 [R, P], bits of the largest magnitudes P programs found.

    As integers, magnitudes are ordered as they are as numbers, and NaN is above all of them.
    """
    rows, count = maxima.shape
    out = torch.empty(rows, dtype=torch.float32, device=maxima.device)
    block = min(BLOCK_MAXIMA, triton.next_power_of_2(count))
    _tensor_scale_kernel[(rows,)](
        maxima,
        out,
        count,
        LARGEST_PRODUCT=rule.largest_product,
        ROUNDS=triton.cdiv(count, block),
        BLOCK=block,
        num_warps=MAXIMA_WARPS,
    )
    return out


def _quantize(
    x: Tensor,
    rule: Rule,
    tensor_scale: Tensor | None,
    seed: int | Tensor | None,
    block_groups: int,
    *,
    exact_dtype: torch.dtype | None,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes or exact values, scales and the tensor scale."""
    _check_input(x)
    if seed is not None and rule.is_adaptive:
        raise ValueError(
            f"rule {rule.value!r} chooses a scale after rounding, which biases stochastic rounding; use static6"
        )
    num_groups = x.numel() // GROUP
    grid = (triton.cdiv(num_groups, block_groups),)
    if tensor_scale is None:
        block_maxima = block_groups * MAXIMA_BLOCKS
        maxima = torch.empty(1, triton.cdiv(num_groups, block_maxima), dtype=torch.int32, device=x.device)
        _maxima_kernel[(maxima.numel(),)](
            x, maxima, num_groups, GELU=gelu, BLOCK=block_maxima, num_warps=MAXIMA_WARPS, enable_fp_fusion=False
        )
        tensor_scale = tensor_scales(maxima, rule).squeeze(0)
    codes, scales = _empty_outputs(x, exact_dtype)
    per_group = tensor_scale.numel() > 1
    _quantize_kernel[grid](
        x,
        tensor_scale.expand(scales.shape).contiguous() if per_group else tensor_scale,
        torch.full((), seed, dtype=torch.int64, device=x.device) if isinstance(seed, int) else seed,
        codes,
        None if exact_dtype else scales,
        num_groups,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        STOCHASTIC=seed is not None,
        GELU=gelu,
        EXACT=exact_dtype is not None,
        PER_GROUP=per_group,
        BLOCK=block_groups,
        enable_fp_fusion=False,
    )
    return codes, scales.view(torch.float8_e4m3fn), tensor_scale


def _layer_norm_quantize(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule,
    eps: float,
    block_rows: int,
    *,
    exact_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_input(h_BLD)
    if h_BLD.dim() != 3:
        raise ValueError(f"h is {list(h_BLD.shape)}, wanted [B, L, D]")
    batch, length, dim = h_BLD.shape
    frames = shift_BTSD.shape[1]
    if length % frames:
        raise ValueError(f"{length} tokens are not a multiple of {frames} frames, which shift and scale are given for")
    tokens = length // frames
    shifts, scales_ = (m.expand(batch, frames, tokens, dim) for m in (shift_BTSD, scale_BTSD))
    for m in (shifts, scales_):
        if m.dtype != torch.float32 or m.stride(-1) != 1:
            raise ValueError(
                f"shift and scale are {m.dtype} with a last stride of {m.stride(-1)}, wanted float32 and 1"
            )
    # a modulation that is the same for all tokens of a frame is loaded once for all rows of a program
    per_token = bool(shifts.stride(2) or scales_.stride(2)) and tokens > 1
    grid = (batch * frames, triton.cdiv(tokens, block_rows))
    statistics = torch.empty(batch * length, 2, dtype=torch.float32, device=h_BLD.device)
    maxima = torch.empty(1, grid[0] * grid[1], dtype=torch.int32, device=h_BLD.device)
    inputs = (h_BLD, shifts, scales_, statistics)
    layout = (frames, tokens, *shifts.stride()[:3], *scales_.stride()[:3])
    block_groups = triton.next_power_of_2(dim // GROUP)
    constants = {
        "DIM": dim,
        "PER_TOKEN": per_token,
        "ROWS": block_rows,
        "BLOCK": block_groups,
        "num_warps": 8 if block_groups >= BLOCK_GROUPS else 4,
        "enable_fp_fusion": False,
    }
    _layer_norm_maxima_kernel[grid](*inputs, maxima, *layout, eps, **constants)
    tensor_scale = tensor_scales(maxima, rule).squeeze(0)
    codes, scales = _empty_outputs(h_BLD, exact_dtype)
    _layer_norm_quantize_kernel[grid](
        *inputs,
        tensor_scale,
        codes,
        None if exact_dtype else scales,
        *layout,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        EXACT=exact_dtype is not None,
        **constants,
    )
    return codes, scales.view(torch.float8_e4m3fn), tensor_scale


def _write_out(quantized: NVFP4Tensor, tensor_scale: Tensor | None, dtype: torch.dtype, block_words: int) -> Tensor:
    _check_contiguous(quantized.codes, "the codes")
    _check_contiguous(quantized.scales, "the scales")
    words = quantized.codes.view(torch.int32)
    out = torch.empty(quantized.shape, dtype=dtype, device=words.device)
    per_group = tensor_scale is not None and tensor_scale.numel() > 1
    if per_group:
        assert tensor_scale is not None
        tensor_scale = tensor_scale.expand(quantized.scales.shape).contiguous()
    if words.numel():
        _write_out_kernel[(triton.cdiv(words.numel(), block_words * BLOCK_TILES),)](
            words,
            quantized.scales.view(torch.uint8),
            tensor_scale,
            out,
            words.numel(),
            SCALED=tensor_scale is not None,
            PER_GROUP=per_group,
            TILES=BLOCK_TILES,
            BLOCK=block_words,
            enable_fp_fusion=False,
        )
    return out


def _empty_outputs(x: Tensor, exact_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return memory for codes, or for exact values of a dtype, and for scales as bytes."""
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // GROUP, dtype=torch.uint8, device=x.device)
    if exact_dtype is not None:
        return torch.empty(x.shape, dtype=exact_dtype, device=x.device), scales
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device), scales


def _check_input(x: Tensor) -> None:
    check_groups(x.shape)
    _check_contiguous(x, "the tensor to quantise")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"cannot quantise {x.dtype}; wanted bfloat16, float16 or float32")
    if not x.numel():
        raise ValueError(f"cannot quantise an empty tensor {list(x.shape)}: it has no largest magnitude")


def _check_contiguous(x: Tensor, name: str) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} {list(x.shape)} has strides {x.stride()}; call .contiguous() first")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to dtype, to nearest, ties to even, in the interpreter too."""
    if _SOFTWARE_ROUNDING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # half a unit, less one bit where the number below is even; NaN must not be carried into the sign
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x != x, bits | 0x400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def magnitude_bits(x):
    """Return |x| as int32 bits: in the order of the magnitudes, NaN last."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def decode_words(words, lane):
    """Return the E2M1 values [R, 8] in float32 of words of eight codes, uint32 [R]; lane: 0 to 7."""
    codes = words[:, None] >> (lane * 4).to(tl.uint32)[None, :]
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * _E2M1_TO_FLOAT32


@triton.jit
def decode_scale(byte):
    """Return E4M3 numbers, given as uint8, in float32."""
    bits = byte.to(tl.uint32)
    value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * _E4M3_TO_FLOAT32
    signed = value.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
    return tl.where((bits & 0x7F) == _E4M3_NAN, float("nan"), signed.to(tl.float32, bitcast=True))


@triton.jit
def encode_scale(scale, ROUND_UP: tl.constexpr):
    """Round numbers in [0, 448] to E4M3: return the bytes as int32 and the values."""
    # 2^(20 + e) for a number with exponent e: its last bit is worth 2^(e - 3), a step of E4M3
    anchor_bits = tl.maximum(scale.to(tl.int32, bitcast=True) & _EXPONENT, (127 - 6) << 23) + (20 << 23)
    anchor = anchor_bits.to(tl.float32, bitcast=True)
    total = scale + anchor
    value = total - anchor
    byte = total.to(tl.int32, bitcast=True) - anchor_bits + (anchor_bits >> 20) - ((127 - 6 + 20) << 3)
    if ROUND_UP:
        step = (anchor_bits - (23 << 23)).to(tl.float32, bitcast=True)
        below = value < scale
        byte += below.to(tl.int32)
        value = tl.where(below, value + step, value)
    return tl.where(scale == scale, byte, _E4M3_NAN), value


@triton.jit
def _anchor_bits(magnitude):
    """Return 2^(22 + e), at least 2^22, for a number with exponent e: its last bit is worth a step of E2M1."""
    return tl.maximum(magnitude.to(tl.int32, bitcast=True) & _EXPONENT, 127 << 23) + (22 << 23)


@triton.jit
def _to_nearest(magnitude):
    anchor = _anchor_bits(magnitude).to(tl.float32, bitcast=True)
    return (magnitude + anchor) - anchor


@triton.jit
def _stochastically(magnitude, draw):
    step = (_anchor_bits(magnitude) - (23 << 23)).to(tl.float32, bitcast=True)
    steps = tl.div_rn(magnitude, step)
    lower = tl.floor(steps)
    # adding the draw to the steps instead would round their sum, up to a number beyond 6 among others
    return (lower + (draw < steps - lower).to(tl.float32)) * step


@triton.jit
def _encode(value):
    """Return the codes, without sign, of E2M1 magnitudes."""
    anchor_bits = _anchor_bits(value)
    steps = (value + anchor_bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - anchor_bits
    return steps + (anchor_bits >> 22) - ((127 + 22) << 1)


@triton.jit
def _scaled(magnitude, reciprocal, scale):
    # a group whose scale rounds to zero is zero
    factor = tl.where(scale > 0, tl.div_rn(reciprocal, tl.where(scale > 0, scale, 1.0)), 0.0)
    return tl.minimum(magnitude * factor[:, None], _E2M1_MAX)


@triton.jit
def _pairwise_sum(x):
    """Sum 16 columns as a tree of neighbouring pairs."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (x.shape[0], 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (x.shape[0], 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def _error(value, scale, tensor_scale, magnitude, RULE: tl.constexpr):
    error = value * (scale * tensor_scale)[:, None] - magnitude
    if RULE == _ADAPTIVE_MAX:
        return tl.max(tl.abs(error), axis=1)
    elif RULE == _ADAPTIVE_SQUARED:
        return _pairwise_sum(error * error)
    else:
        return _pairwise_sum(tl.abs(error))


@triton.jit
def quantize_groups(x, tensor_scale, draw, RULE: tl.constexpr, ADAPTIVE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Quantise float32 [G, 16] by a tensor scale, scalar or [G]. Return E2M1 magnitudes, scales as bytes and values."""
    amax_bits = tl.max(magnitude_bits(x), axis=1)
    magnitude = tl.abs(x)
    amax = amax_bits.to(tl.float32, bitcast=True)
    if RULE == _STATIC4:
        wanted = tl.div_rn(tl.div_rn(amax, 4.0), tensor_scale)
    else:
        wanted = tl.div_rn(tl.div_rn(amax, _E2M1_MAX), tensor_scale)
    reciprocal = tl.div_rn(1.0, tensor_scale)
    if ADAPTIVE:
        byte, scale = encode_scale(_clamp(wanted, 0.0), False)
        value = _to_nearest(_scaled(magnitude, reciprocal, scale))
        byte_to_four, scale_to_four = encode_scale(_clamp(wanted * 1.5, 0.0), False)
        value_to_four = _to_nearest(_scaled(magnitude, reciprocal, scale_to_four))
        error = _error(value, scale, tensor_scale, magnitude, RULE)
        better = _error(value_to_four, scale_to_four, tensor_scale, magnitude, RULE) < error
        value = tl.where(better[:, None], value_to_four, value)
        byte = tl.where(better, byte_to_four, byte)
        scale = tl.where(better, scale_to_four, scale)
    else:
        byte, scale = encode_scale(_clamp(wanted, _E4M3_TINY), STOCHASTIC)
        scaled = _scaled(magnitude, reciprocal, scale)
        if STOCHASTIC:
            value = _stochastically(scaled, draw)
        else:
            value = _to_nearest(scaled)
    return value, byte, scale


@triton.jit
def _clamp(wanted, smallest):
    clamped = tl.minimum(tl.maximum(wanted, smallest), _E4M3_MAX)
    return tl.where(wanted == wanted, clamped, wanted)


@triton.jit
def store_codes(codes_ptr, scales_ptr, x, value, byte, group, inside):
    """Store the codes and scales of groups, with the signs of x."""
    sign = (x.to(tl.uint32, bitcast=True) >> 28).to(tl.int32) & 8
    low, high = tl.split(tl.reshape(_encode(value) | sign, (value.shape[0], _PAIRS, 2)))
    offset = group[:, None] * _PAIRS + tl.arange(0, _PAIRS)[None, :]
    tl.store(codes_ptr + offset, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scales_ptr + group, byte.to(tl.uint8), mask=inside)


@triton.jit
def _store_exact(values_ptr, x, value, scale, group, inside):
    signed = (value * scale[:, None]).to(tl.uint32, bitcast=True) | (x.to(tl.uint32, bitcast=True) & _SIGN)
    offset = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    # exact, so it does not matter how the cast rounds
    exact_value = signed.to(tl.float32, bitcast=True).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + offset, exact_value, mask=inside[:, None])


@triton.jit
def _load_groups(x_ptr, group, inside, GELU: tl.constexpr):
    offset = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(x_ptr + offset, mask=inside[:, None], other=0.0).to(tl.float32)
    if GELU:
        # 1 + tanh(u) is 2 / (1 + exp(-2u)), without the cancellation
        u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = round_to(x / (1.0 + tl.exp(-2.0 * u)), x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _maxima_kernel(x_ptr, maxima_ptr, num_groups, GELU: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK)
    x = _load_groups(x_ptr + first * _GROUP, group, group < num_groups - first, GELU)
    tl.store(maxima_ptr + program, tl.max(tl.max(magnitude_bits(x), axis=1), axis=0))


@triton.jit
def _tensor_scale_kernel(
    maxima_ptr, out_ptr, count, LARGEST_PRODUCT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for turn in range(ROUNDS):
        position = turn * BLOCK + index
        largest = tl.maximum(largest, tl.load(maxima_ptr + row * count + position, mask=position < count, other=0))
    amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, LARGEST_PRODUCT)
    tl.store(out_ptr + row, tl.where(scale < _TENSOR_SCALE_MIN, _TENSOR_SCALE_MIN, scale))


@triton.jit
def _quantize_kernel(
    x_ptr,
    tensor_scale_ptr,
    seed_ptr,
    codes_ptr,
    scales_ptr,
    num_groups,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK)
    inside = group < num_groups - first
    x = _load_groups(x_ptr + first * _GROUP, group, inside, GELU)
    if PER_GROUP:
        tensor_scale = tl.load(tensor_scale_ptr + first + group, mask=inside, other=1.0)
    else:
        tensor_scale = tl.load(tensor_scale_ptr)
    draw = 0.0
    if STOCHASTIC:
        element = (first + group[:, None]) * _GROUP + tl.arange(0, _GROUP)[None, :]
        draw = tl.rand(tl.load(seed_ptr), element)
    value, byte, scale = quantize_groups(x, tensor_scale, draw, RULE, ADAPTIVE, STOCHASTIC)
    if EXACT:
        _store_exact(codes_ptr + first * _GROUP, x, value, scale, group, inside)
    else:
        store_codes(codes_ptr + first * _PAIRS, scales_ptr + first, x, value, byte, group, inside)


@triton.jit
def _modulated(x, mean, deviation_reciprocal, shift, scale, dtype: tl.constexpr):
    normed = (x - mean) * deviation_reciprocal
    return round_to(normed * (1.0 + scale) + shift, dtype).to(tl.float32)


@triton.jit
def _layer_norm_maxima_kernel(
    h_ptr,
    shift_ptr,
    scale_ptr,
    statistics_ptr,
    maxima_ptr,
    frames,
    tokens,
    shift_stride_b,
    shift_stride_t,
    shift_stride_s,
    scale_stride_b,
    scale_stride_t,
    scale_stride_s,
    eps,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame, block = tl.program_id(0), tl.program_id(1)
    group = tl.arange(0, BLOCK)
    inside = (group < DIM // _GROUP)[:, None]
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    shift_ptr += (frame // frames) * shift_stride_b + (frame % frames) * shift_stride_t
    scale_ptr += (frame // frames) * scale_stride_b + (frame % frames) * scale_stride_t
    if not PER_TOKEN:
        shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    largest = tl.zeros([BLOCK, _GROUP], dtype=tl.int32)
    for index in range(ROWS):
        token = block * ROWS + index
        if token < tokens:
            row = (frame * tokens + token).to(tl.int64)
            x = tl.load(h_ptr + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
            mean = tl.sum(tl.sum(x, axis=1), axis=0) / DIM
            centred = tl.where(inside, x - mean, 0.0)
            variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / DIM
            reciprocal = tl.rsqrt(variance + eps)
            tl.store(statistics_ptr + row * 2, mean)
            tl.store(statistics_ptr + row * 2 + 1, reciprocal)
            if PER_TOKEN:
                shift = tl.load(shift_ptr + token * shift_stride_s + column, mask=inside, other=0.0)
                scale = tl.load(scale_ptr + token * scale_stride_s + column, mask=inside, other=0.0)
            modulated = _modulated(x, mean, reciprocal, shift, scale, h_ptr.dtype.element_ty)
            largest = tl.maximum(largest, tl.where(inside, magnitude_bits(modulated), 0))
    program = frame * tl.num_programs(1) + block
    tl.store(maxima_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _layer_norm_quantize_kernel(
    h_ptr,
    shift_ptr,
    scale_ptr,
    statistics_ptr,
    tensor_scale_ptr,
    codes_ptr,
    scales_ptr,
    frames,
    tokens,
    shift_stride_b,
    shift_stride_t,
    shift_stride_s,
    scale_stride_b,
    scale_stride_t,
    scale_stride_s,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    EXACT: tl.constexpr,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame, block = tl.program_id(0), tl.program_id(1)
    group = tl.arange(0, BLOCK)
    inside = group < DIM // _GROUP
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    shift_ptr += (frame // frames) * shift_stride_b + (frame % frames) * shift_stride_t
    scale_ptr += (frame // frames) * scale_stride_b + (frame % frames) * scale_stride_t
    tensor_scale = tl.load(tensor_scale_ptr)
    if not PER_TOKEN:
        shift = tl.load(shift_ptr + column, mask=inside[:, None], other=0.0)
        scale = tl.load(scale_ptr + column, mask=inside[:, None], other=0.0)
    for index in range(ROWS):
        token = block * ROWS + index
        if token < tokens:
            row = (frame * tokens + token).to(tl.int64)
            x = tl.load(h_ptr + row * DIM + column, mask=inside[:, None], other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + row * 2)
            reciprocal = tl.load(statistics_ptr + row * 2 + 1)
            if PER_TOKEN:
                shift = tl.load(shift_ptr + token * shift_stride_s + column, mask=inside[:, None], other=0.0)
                scale = tl.load(scale_ptr + token * scale_stride_s + column, mask=inside[:, None], other=0.0)
            modulated = _modulated(x, mean, reciprocal, shift, scale, h_ptr.dtype.element_ty)
            value, byte, group_scale = quantize_groups(modulated, tensor_scale, 0.0, RULE, ADAPTIVE, False)
            if EXACT:
                _store_exact(codes_ptr + row * DIM, modulated, value, group_scale, group, inside)
            else:
                row_scales_ptr = scales_ptr + row * (DIM // _GROUP)
                store_codes(codes_ptr + row * (DIM // 2), row_scales_ptr, modulated, value, byte, group, inside)


@triton.jit
def _write_out_kernel(
    words_ptr,
    scales_ptr,
    tensor_scale_ptr,
    out_ptr,
    num_words,
    SCALED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word = tl.arange(0, BLOCK)
    lane = tl.arange(0, _WORD_CODES)
    offset = word[:, None] * _WORD_CODES + lane[None, :]
    tensor_scale = 1.0
    if SCALED and not PER_GROUP:
        tensor_scale = tl.load(tensor_scale_ptr)
    for tile in tl.static_range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK
        inside = word < num_words - first
        words = tl.load(words_ptr + first + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
        group = first // 2 + word // 2
        scale = decode_scale(tl.load(scales_ptr + group, mask=inside, other=0))
        if PER_GROUP:
            tensor_scale = tl.load(tensor_scale_ptr + group, mask=inside, other=0.0)
        if SCALED:
            scale = scale * tensor_scale
        values = round_to(decode_words(words, lane) * scale[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * _WORD_CODES + offset, values, mask=inside[:, None])


@triton.jit
def _scaled_product_kernel(
    a_ptr,
    a_scales_ptr,
    a_tensor_scale_ptr,
    b_ptr,
    b_scales_ptr,
    b_tensor_scale_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // _GROUP)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        codes_left = (byte < (inner - start) // 2)[None, :]
        scales_left = (group < (inner - start) // _GROUP)[None, :]
        code_offset = start // 2 + byte[None, :]
        scale_offset = start // _GROUP + group[None, :]
        a = tl.load(a_ptr + row[:, None] * (inner // 2) + code_offset, mask=row_inside & codes_left, other=0)
        b = tl.load(b_ptr + column[:, None] * (inner // 2) + code_offset, mask=column_inside & codes_left, other=0)
        a_offset = row[:, None] * (inner // _GROUP) + scale_offset
        b_offset = column[:, None] * (inner // _GROUP) + scale_offset
        a_scale = tl.load(a_scales_ptr + a_offset, mask=row_inside & scales_left, other=0)
        b_scale = tl.load(b_scales_ptr + b_offset, mask=column_inside & scales_left, other=0)
        total = tl.dot_scaled(
            a,
            a_scale.to(tl.float8e4nv, bitcast=True),
            "e2m1",
            b.T,
            b_scale.to(tl.float8e4nv, bitcast=True),
            "e2m1",
            acc=total,
        )
    total = total * (tl.load(a_tensor_scale_ptr) * tl.load(b_tensor_scale_ptr))
    offset = row[:, None] * columns + column[None, :]
    out = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, out, mask=row_inside & (column < columns)[None, :])


@triton.jit
def _scaled_bias_kernel(product_ptr, scale_ptr, bias_ptr, count, columns, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    product = tl.load(product_ptr + offset, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + offset % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(product_ptr + offset, round_to(product, product_ptr.dtype.element_ty), mask=inside)
