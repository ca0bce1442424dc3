"""Rounding, packing and unpacking of groups of 16, as functions for Triton kernels.

Rounding to E2M1 or E4M3 takes one addition: the sum with a power of two whose last bit is worth one step is rounded to
a whole number of steps, ties to even. A row of a block is a group. One thread has the whole group, so neither its
maximum nor its errors are exchanged between threads.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_TINY,
    GROUP,
    HADAMARD_SIGNS,
    Rule,
)
from longvideo.kernels.nvfp4.rounding import AMAX_SHIFT

WORD_CODES = 8  # codes in 32 bits

GROUP_SIZE = tl.constexpr(GROUP)
GROUP_WORDS = tl.constexpr(GROUP // WORD_CODES)
_WORD_CODES = tl.constexpr(WORD_CODES)
_HALF = tl.constexpr(GROUP // 2)
_QUARTER = tl.constexpr(GROUP // 4)
_E2M1_MAX = tl.constexpr(E2M1_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_E4M3_TINY = tl.constexpr(E4M3_TINY)
_STATIC4 = tl.constexpr(Rule.STATIC4.value)
_STATIC4_PRODUCT = tl.constexpr(Rule.STATIC4.largest_product)
_STATIC6_PRODUCT = tl.constexpr(Rule.STATIC6.largest_product)
_ADAPTIVE_PRODUCT = tl.constexpr(Rule.ADAPTIVE.largest_product)
_AMAX_SHIFT = tl.constexpr(AMAX_SHIFT)
_ERROR_DIVISOR = tl.constexpr(Rule.ADAPTIVE.largest_product * AMAX_SHIFT)
# rounded to float32: a correct division by a constant needs a correctly rounded reciprocal
_ERROR_RECIPROCAL = tl.constexpr(torch.tensor(1.0 / (Rule.ADAPTIVE.largest_product * AMAX_SHIFT)).item())
_ADAPTIVE_SQUARED = tl.constexpr(Rule.ADAPTIVE.value)
_ADAPTIVE_MAX = tl.constexpr(Rule.ADAPTIVE_MAX.value)
_FLIPPED = tl.constexpr(sum(1 << lane for lane, sign in enumerate(HADAMARD_SIGNS) if sign < 0))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(0x80000000)
_EXPONENT = tl.constexpr(0x7F800000)
_E4M3_NAN = tl.constexpr(0x7F)
# times a power of two between 1 and 4: a float32 number whose last bit is worth a step of E2M1
_E2M1_ANCHOR = tl.constexpr(2.0**22)
# factor of E2M1 numbers in float32 that moves their codes to bit 22, even that of 0.5, which becomes denormal
_FLOAT32_TO_E2M1 = tl.constexpr(2.0**-126)
_E2M1_TO_FLOAT32 = tl.constexpr(2.0**126)
# factor for the bits of an E4M3 number at the exponent and mantissa of float32: the difference of the biases
_E4M3_TO_FLOAT32 = tl.constexpr(2.0**120)
# the interpreter's casts truncate, so it needs arithmetic to round; a GPU has instructions
_SOFTWARE_ROUNDING = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to dtype, to nearest, ties to even; also in the interpreter."""
    if _SOFTWARE_ROUNDING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # half a unit, minus one bit if the number below is even; NaN must not carry into the sign
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x != x, bits | 0x400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif _SOFTWARE_ROUNDING and dtype == tl.float8e4nv:
        byte, _ = encode_scale(tl.minimum(tl.abs(x), _E4M3_MAX), False)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (byte.to(tl.uint32) | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x| as int32, which have the order of the magnitudes, with NaN last."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def decode_words(words, lane):
    """Return the E2M1 values [R, 8] in float32 of words of eight codes, uint32 [R]; lane: 0 to 7."""
    codes = words[:, None] >> (lane * 4).to(tl.uint32)[None, :]
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * _E2M1_TO_FLOAT32


@triton.jit
def decode_scale(byte):
    """Return in float32 the E4M3 numbers with these bytes, uint8."""
    bits = byte.to(tl.uint32)
    value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * _E4M3_TO_FLOAT32
    signed = value.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
    return tl.where((bits & 0x7F) == _E4M3_NAN, float("nan"), signed.to(tl.float32, bitcast=True))


@triton.jit
def encode_scale(scale, ROUND_UP: tl.constexpr):
    """Round numbers in [0, 448] to E4M3: return the bytes as int32 and the values."""
    # for a number with exponent e this is 2^(20 + e), whose last bit is worth 2^(e - 3), a step of E4M3
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
def _power(magnitude):
    """Return the power of two at or below a number, at least 1, which is two steps of E2M1."""
    bits = tl.maximum(magnitude.to(tl.int32, bitcast=True) & _EXPONENT, 127 << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _to_nearest(magnitude):
    power = _power(magnitude)
    # the products are exact, so each line rounds once
    total = tl.fma(power, _E2M1_ANCHOR, magnitude)
    return tl.fma(power, -_E2M1_ANCHOR, total)


@triton.jit
def _stochastically(magnitude, draw):
    step = _power(magnitude) * 0.5
    # the reciprocal of a power of two has the negated exponent
    steps = magnitude * ((254 << 23) - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    lower = tl.floor(steps)
    # not floor(steps + draw): the sum would be rounded, for instance up to a number above 6
    return (lower + (draw < steps - lower).to(tl.float32)) * step


@triton.jit
def _scaled(magnitude, factor):
    return tl.minimum(magnitude * factor[:, None], _E2M1_MAX)


@triton.jit
def _sum_in_order(x):
    """Sum 8 columns from the first to the last."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 4, 2)))
    x04, x26 = _alternating(even)
    x15, x37 = _alternating(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return ((((((x0 + x1) + x2) + x3) + x4) + x5) + x6) + x7


@triton.jit
def _alternating(x):
    return tl.split(tl.reshape(x, (x.shape[0], 2, 2)))


@triton.jit
def _halves(x):
    """Return the first and the last 8 of 16 columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, _HALF)), (0, 2, 1)))


@triton.jit
def _sum_of_groups(x):
    """Sum 16 columns as the reference does: the halves, then their eight sums in order."""
    first, second = _halves(x)
    return _sum_in_order(first + second)


@triton.jit
def _sum_of_tiles(x, TILES: tl.constexpr):
    """Sum tiles, [16 rows x TILES, 16], as the reference does: halves of even and of odd rows, then eight sums."""
    # a thread gets all rows of a column
    columns = tl.permute(tl.reshape(x, (GROUP_SIZE, TILES, GROUP_SIZE)), (1, 2, 0))
    even, odd = tl.split(tl.reshape(columns, (TILES * GROUP_SIZE, _HALF, 2)))
    first_even, second_even = _halves(tl.reshape(_sum_in_order(even), (TILES, GROUP_SIZE)))
    first_odd, second_odd = _halves(tl.reshape(_sum_in_order(odd), (TILES, GROUP_SIZE)))
    return _sum_in_order(((first_even + second_even) + first_odd) + second_odd)


@triton.jit
def _rounded(value, scale, shifted_amax):
    """Return `value x scale x amax / (6 x 256)`, with the roundings of the reference."""
    product = (value * scale[:, None]) * shifted_amax[:, None]
    if _SOFTWARE_ROUNDING:
        return tl.div_rn(product, _ERROR_DIVISOR)
    # Markstein's theorem: with a correctly rounded reciprocal, one correction by the exact remainder gives the
    # correctly rounded quotient
    quotient = product * _ERROR_RECIPROCAL
    remainder = tl.fma(quotient, -_ERROR_DIVISOR, product)
    return tl.fma(remainder, _ERROR_RECIPROCAL, quotient)


@triton.jit
def _error(value, scale, shifted_amax, magnitude, RULE: tl.constexpr, TILES: tl.constexpr):
    error = _rounded(value, scale, shifted_amax) - magnitude
    if RULE == _ADAPTIVE_MAX:
        total = tl.max(tl.abs(error), axis=1)
        if TILES:
            total = _of_rows(tl.reduce(_rows_of_tiles(total, TILES), 1, _larger), TILES)
    else:
        error = error * error if RULE == _ADAPTIVE_SQUARED else tl.abs(error)
        total = _of_rows(_sum_of_tiles(error, TILES), TILES) if TILES else _sum_of_groups(error)
    return total


@triton.jit
def _rows_of_tiles(x, TILES: tl.constexpr):
    """Reorder a number for each group, [16 rows x TILES], to [TILES, 16]."""
    return tl.permute(tl.reshape(x, (GROUP_SIZE, TILES)), (1, 0))


@triton.jit
def _of_rows(x, TILES: tl.constexpr):
    """Return for each group, [16 rows x TILES], the number of its tile, [TILES]."""
    return tl.reshape(tl.broadcast_to(x[None, :], (GROUP_SIZE, TILES)), (GROUP_SIZE * TILES,))


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_groups(
    x,
    amax,
    draw,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILES: tl.constexpr = 0,
):
    """Return E2M1 magnitudes, and scales as bytes and as values, of groups x, float32 [G, 16].

    amax: largest magnitude of the tensor, scalar or [G], not below the lower bound of the rule.
    draw: random numbers in [0, 1), [G, 16]; used only if STOCHASTIC.
    TILES: number of tiles, if not 0; the groups are then 16 rows of TILES groups, and those of a column share a scale.
    """
    magnitude = tl.abs(x)
    group_amax = tl.reduce(magnitude, 1, _larger)
    if TILES:
        group_amax = _of_rows(tl.reduce(_rows_of_tiles(group_amax, TILES), 1, _larger), TILES)
    if ADAPTIVE:
        value, byte, scale = _round_adaptively(magnitude, group_amax, amax, RULE, TILES)
    else:
        value, byte, scale = _round_statically(magnitude, group_amax, amax, draw, RULE, STOCHASTIC)
    return value, byte, scale


@triton.jit
def _round_statically(magnitude, group_amax, amax, draw, RULE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if RULE == _STATIC4:
        tensor_scale = tl.div_rn(amax, _STATIC4_PRODUCT)
        exact_scale = tl.div_rn(tl.div_rn(group_amax, 4.0), tensor_scale)
    else:
        tensor_scale = tl.div_rn(amax, _STATIC6_PRODUCT)
        exact_scale = tl.div_rn(tl.div_rn(group_amax, _E2M1_MAX), tensor_scale)
    byte, scale = encode_scale(_clamp(exact_scale, _E4M3_TINY), STOCHASTIC)
    scaled = _scaled(magnitude, tl.div_rn(tl.div_rn(1.0, tensor_scale), scale))
    value = _stochastically(scaled, draw) if STOCHASTIC else _to_nearest(scaled)
    return value, byte, scale


@triton.jit
def _round_adaptively(magnitude, group_amax, amax, RULE: tl.constexpr, TILES: tl.constexpr):
    """Round with the largest magnitude of a group at 6 and at 4, and use the result with the lower error."""
    encoding_scale = tl.div_rn(_ADAPTIVE_PRODUCT, amax)
    decoding_scale = tl.div_rn(1.0, encoding_scale)
    exact_scale = tl.div_rn(group_amax, _E2M1_MAX) * encoding_scale
    shifted_amax = tl.zeros_like(group_amax) + amax * _AMAX_SHIFT
    value, byte, scale = _round_with(magnitude, exact_scale, decoding_scale)
    value_to_four, byte_to_four, scale_to_four = _round_with(magnitude, exact_scale * 1.5, decoding_scale)
    error = _error(value, scale, shifted_amax, magnitude, RULE, TILES)
    better = _error(value_to_four, scale_to_four, shifted_amax, magnitude, RULE, TILES) < error
    value = tl.where(better[:, None], value_to_four, value)
    byte = tl.where(better, byte_to_four, byte)
    scale = tl.where(better, scale_to_four, scale)
    return value, byte, scale


@triton.jit
def _round_with(magnitude, exact_scale, decoding_scale):
    byte, scale = encode_scale(_clamp(exact_scale, 0.0), False)
    # a group whose scale rounds to zero is zero
    factor = tl.where(scale > 0, tl.div_rn(1.0, decoding_scale * tl.where(scale > 0, scale, 1.0)), 0.0)
    return _to_nearest(_scaled(magnitude, factor)), byte, scale


@triton.jit
def _clamp(scale, smallest):
    clamped = tl.minimum(tl.maximum(scale, smallest), _E4M3_MAX)
    return tl.where(scale == scale, clamped, scale)


@triton.jit
def load_groups(ptr, group, inside):
    """Load groups as float32 [G, 16], zeros where not inside. A thread loads a whole group, 16 bytes at a time."""
    start = group[:, None] * GROUP_SIZE
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        ptr += start + tl.arange(0, _QUARTER)[None, :]
        first = _side_by_side(_load(ptr, inside), _load(ptr + _QUARTER, inside))
        second = _side_by_side(_load(ptr + 2 * _QUARTER, inside), _load(ptr + 3 * _QUARTER, inside))
        return _side_by_side(first, second)
    else:
        ptr += start + tl.arange(0, _HALF)[None, :]
        return _side_by_side(_load(ptr, inside), _load(ptr + _HALF, inside)).to(tl.float32)


@triton.jit
def load_columns(ptr, row, num_rows, num_columns, column, inside):
    """Load 16 rows of columns as float32 [G, 16], one column per row; zeros after the last row and where not inside."""
    x0 = _two_rows(ptr, row, num_rows, num_columns, column, inside)
    x1 = _two_rows(ptr, row + 2, num_rows, num_columns, column, inside)
    x2 = _two_rows(ptr, row + 4, num_rows, num_columns, column, inside)
    x3 = _two_rows(ptr, row + 6, num_rows, num_columns, column, inside)
    x4 = _two_rows(ptr, row + 8, num_rows, num_columns, column, inside)
    x5 = _two_rows(ptr, row + 10, num_rows, num_columns, column, inside)
    x6 = _two_rows(ptr, row + 12, num_rows, num_columns, column, inside)
    x7 = _two_rows(ptr, row + 14, num_rows, num_columns, column, inside)
    first = _side_by_side(_side_by_side(x0, x1), _side_by_side(x2, x3))
    return _side_by_side(first, _side_by_side(_side_by_side(x4, x5), _side_by_side(x6, x7))).to(tl.float32)


@triton.jit
def _two_rows(ptr, row, num_rows, num_columns, column, inside):
    ptr += row * num_columns + column
    first = tl.load(ptr, mask=inside & (row < num_rows), other=0.0)
    return tl.join(first, tl.load(ptr + num_columns, mask=inside & (row + 1 < num_rows), other=0.0))


@triton.jit
def random_hadamard(x, dtype: tl.constexpr):
    """Apply the 16-point transform to every row of float32 [G, 16], rounded to dtype, as the reference does."""
    lane = tl.arange(0, GROUP_SIZE)
    flipped = (((tl.zeros_like(lane) + _FLIPPED) >> lane) & 1).to(tl.uint32) << 31
    x = (x.to(tl.uint32, bitcast=True) ^ flipped[None, :]).to(tl.float32, bitcast=True)
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], _HALF, 2)))
        x = _side_by_side(even + odd, even - odd)
    return round_to(x * 0.25, dtype).to(tl.float32)


@triton.jit
def uniform(seed, group):
    """Return random numbers in [0, 1), [G, 16], from four Philox blocks for each group."""
    block = group[:, None] * _QUARTER + tl.arange(0, _QUARTER)[None, :]
    first, second, third, fourth = tl.rand4x(seed, block)
    return _side_by_side(_side_by_side(first, second), _side_by_side(third, fourth))


@triton.jit
def _load(ptr, inside):
    return tl.load(ptr, mask=inside[:, None], other=0.0)


@triton.jit
def _side_by_side(left, right):
    joined = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(joined, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def store_codes(words_ptr, scales_ptr, x, value, byte, group, inside) -> None:
    """Store the codes of groups with the signs of x, two words for each group, and their scales."""
    code = (value * _FLOAT32_TO_E2M1).to(tl.uint32, bitcast=True) << 6
    code += x.to(tl.uint32, bitcast=True) & _SIGN  # shift and addition are one instruction
    code = code >> (28 - 4 * (tl.arange(0, GROUP_SIZE) % _WORD_CODES)).to(tl.uint32)[None, :]
    words = tl.sum(tl.reshape(code, (x.shape[0], GROUP_WORDS, _WORD_CODES)), axis=2)
    offset = group[:, None] * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, :]
    tl.store(words_ptr + offset, words.to(tl.int32, bitcast=True), mask=inside[:, None])
    tl.store(scales_ptr + group, byte.to(tl.uint8), mask=inside)


@triton.jit
def store_exact(values_ptr, x, value, scale, group, inside) -> None:
    """Store code x group scale with the signs of x, in a dtype in which it is exact."""
    signed = (value * scale[:, None]).to(tl.uint32, bitcast=True) | (x.to(tl.uint32, bitcast=True) & _SIGN)
    # exact, so it does not matter how the cast rounds
    exact_value = signed.to(tl.float32, bitcast=True).to(values_ptr.dtype.element_ty)
    halves = tl.permute(tl.reshape(exact_value, (x.shape[0], 2, _HALF)), (0, 2, 1))
    first, second = tl.split(halves)
    values_ptr += group[:, None] * GROUP_SIZE + tl.arange(0, _HALF)[None, :]
    tl.store(values_ptr, first, mask=inside[:, None])
    tl.store(values_ptr + _HALF, second, mask=inside[:, None])
