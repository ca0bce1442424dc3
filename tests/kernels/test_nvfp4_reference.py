"""NVFP4 in plain torch equals torchao, TransformerEngine and the public four-over-six code, and follows the format."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.codes import decode, encode, pack, swizzle_scales, unpack, unswizzle_scales
from longvideo.kernels.nvfp4.format import E2M1_VALUES, E4M3_TINY, GROUP, HADAMARD_SIGNS, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.hadamard import random_hadamard

FIXTURES = Path(__file__).parents[1] / "fixtures"
ORACLES = load_file(FIXTURES / "nvfp4_oracles.safetensors")
PUBLIC = load_file(FIXTURES / "nvfp4_a.safetensors")
INPUTS = sorted(key for key in ORACLES if "." not in key)
ADAPTIVE_RULES = {"mse": Rule.ADAPTIVE, "mae": Rule.ADAPTIVE_ABS, "abs_max": Rule.ADAPTIVE_MAX}
TILES = {"1x16": 1, "16x16": GROUP}
FLOAT32_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-8


def scale_bytes(quantized: NVFP4Tensor) -> Tensor:
    return quantized.scales.view(torch.uint8)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# other implementations


@pytest.mark.parametrize("name", INPUTS)
def test_static6_equals_torchao_bit_for_bit(name: str) -> None:
    quantized = reference.quantize(ORACLES[name], Rule.STATIC6)
    assert torch.equal(scale_bytes(quantized), ORACLES[f"{name}.torchao.scales"])
    assert torch.equal(quantized.codes, ORACLES[f"{name}.torchao.codes"])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["gaussian_bf16", "gaussian_fp32", "tiny_fp32"])
def test_static6_equals_transformer_engine_bit_for_bit(name: str, tile: str) -> None:
    quantized = reference.quantize(ORACLES[name], Rule.STATIC6, tile_rows=TILES[tile])
    assert torch.equal(scale_bytes(quantized), ORACLES[f"{name}.te.{tile}.scales"])
    assert torch.equal(quantized.codes, ORACLES[f"{name}.te.{tile}.codes"])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["heavy_bf16", "holes_bf16", "wide_fp32"])
def test_static6_differs_from_transformer_engine_only_at_ties_and_below_normal_scales(name: str, tile: str) -> None:
    x = ORACLES[name]
    quantized = reference.quantize(x, Rule.STATIC6, tile_rows=TILES[tile])
    theirs = ORACLES[f"{name}.te.{tile}.scales"].view(torch.float8_e4m3fn).float()
    normal = theirs >= E4M3_TINY
    assert torch.equal(quantized.scales.float(), theirs.clamp_min(E4M3_TINY))
    # reciprocals are multiplied in another order, which matters for values that are within a rounding of a tie
    differs = unpack(quantized.codes) != unpack(ORACLES[f"{name}.te.{tile}.codes"])
    differs &= normal.repeat_interleave(GROUP, -1)
    scale = (quantized.scales.double() * quantized.tensor_scale.double()).repeat_interleave(GROUP, -1)
    scaled = (x.double() / scale).abs()[differs]
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    midpoints = (values[1:] + values[:-1]) / 2
    assert differs.float().mean() < 0.002
    assert ((scaled.unsqueeze(-1) / midpoints - 1).abs() < 4 * FLOAT32_ROUNDING).any(-1).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rule", ADAPTIVE_RULES)
def test_adaptive_rules_equal_the_public_four_over_six_code_bit_for_bit(rule: str, tile: str) -> None:
    quantized = reference.quantize(PUBLIC["input"], ADAPTIVE_RULES[rule], tile_rows=TILES[tile])
    scales = PUBLIC[f"{rule}.{tile}.scales_swizzled_e4m3"].view(torch.uint8).flatten()
    assert torch.equal(swizzle_scales(quantized.scales), scales)
    assert torch.equal(quantized.codes, PUBLIC[f"{rule}.{tile}.packed"].view(torch.uint8))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("error", "rule"), [("MSE", Rule.ADAPTIVE), ("MAE", Rule.ADAPTIVE_ABS)])
@pytest.mark.parametrize("name", INPUTS)
def test_adaptive_rules_choose_as_transformer_engine_in_all_but_a_hundredth(
    name: str, error: str, rule: Rule, tile: str
) -> None:
    quantized = reference.quantize(ORACLES[name], rule, tile_rows=TILES[tile])
    codes = unpack(quantized.codes) != unpack(ORACLES[f"{name}.te.{error}.{tile}.codes"])
    # codes with a scale of zero have no meaning
    codes &= (quantized.scales.float() > 0).repeat_interleave(GROUP, -1)
    assert codes.float().mean() < 0.01
    assert (scale_bytes(quantized) != ORACLES[f"{name}.te.{error}.{tile}.scales"]).float().mean() < 0.01


@pytest.mark.parametrize("name", INPUTS)
def test_random_hadamard_equals_transformer_engine(name: str) -> None:
    x, theirs = ORACLES[name], ORACLES[f"{name}.te.hadamard"]
    assert torch.tensor(HADAMARD_SIGNS).float().equal(ORACLES["te.hadamard_signs"])
    # the matrix product has its own order of 16 additions; one rounding to the dtype of x follows
    sums = x.float().abs().unflatten(-1, (-1, GROUP)).sum(-1).repeat_interleave(GROUP, -1) / math.sqrt(GROUP)
    rounding = BFLOAT16_ROUNDING if x.dtype == torch.bfloat16 else FLOAT32_ROUNDING
    error = (random_hadamard(x).float() - theirs.float()).abs()
    assert (error <= GROUP * FLOAT32_ROUNDING * sums + 2 * rounding * theirs.float().abs()).all()


# codes and layouts


def test_sixteen_codes_encode_and_decode_to_themselves() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode(codes)
    assert values.tolist() == [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8
    assert torch.equal(encode(values), codes)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=20).map(lambda codes: codes * 2))
@settings(deadline=None)
def test_packing_puts_the_first_code_in_the_low_nibble_and_unpacking_undoes_it(codes: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8))
    assert packed.tolist() == [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert unpack(packed).tolist() == codes


@given(rows=st.integers(1, 300), columns=st.integers(1, 13), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_swizzling_follows_the_cublas_layout_and_is_undone(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(1, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    swizzled = swizzle_scales(scales.view(torch.float8_e4m3fn))
    tile_columns = -(-columns // 4)
    assert swizzled.numel() == -(-rows // 128) * 128 * tile_columns * 4
    assert torch.equal(unswizzle_scales(swizzled, rows, columns).view(torch.uint8), scales)
    r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    tile = (r // 128) * tile_columns + c // 4
    within = 16 * (r % 128 % 32) + 4 * (r % 128 // 32) + c % 4
    position = tile * 512 + within
    assert torch.equal(swizzled[position], scales)
    assert swizzled.int().sum() == scales.int().sum(), "the padding is not zero"


def test_unswizzling_the_wrong_number_of_scales_raises() -> None:
    with pytest.raises(ValueError, match="511 swizzled scales; expected 512 for 3 x 2"):
        unswizzle_scales(torch.zeros(511, dtype=torch.uint8), 3, 2)


# rounding


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE, Rule.ADAPTIVE_ABS, Rule.ADAPTIVE_MAX])
@given(tensor_scale=st.floats(2.0**-64, 2.0**64, width=32))
@settings(deadline=None, max_examples=20)
def test_every_representable_value_is_kept(rule: Rule, tensor_scale: float) -> None:
    scales = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    codes = pack(torch.arange(16, dtype=torch.uint8)).expand(len(scales), -1)
    original = NVFP4Tensor(codes, scales, torch.tensor(tensor_scale))
    again = reference.quantize(reference.dequantize(original), rule, amax=original.tensor_scale * rule.largest_product)
    assert torch.equal(again.codes, original.codes)
    assert torch.equal(scale_bytes(again), scale_bytes(original))


def test_ties_go_to_the_even_code() -> None:
    values = torch.tensor(E2M1_VALUES)
    midpoints = (values[1:] + values[:-1]) / 2
    group = torch.cat((torch.tensor([6.0]), midpoints, -midpoints, torch.zeros(1)))
    amax = torch.tensor(Rule.STATIC6.largest_product)
    rounded = reference.dequantize(reference.quantize(group, Rule.STATIC6, amax=amax))
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert rounded.tolist() == [6.0, *even, *(-value for value in even), 0.0]
    assert all(E2M1_VALUES.index(value) % 2 == 0 for value in even)


# a tile of 256 Gaussian numbers rarely gains from the second scale
@pytest.mark.parametrize(("tile_rows", "gain"), [(1, 0.95), (GROUP, 1.0)])
def test_adaptive_error_of_a_group_never_exceeds_that_of_its_own_scaling_to_six(tile_rows: int, gain: float) -> None:
    x = gaussian(64, 128)
    errors = {}
    adaptive = reference.quantize(x, Rule.ADAPTIVE, tile_rows=tile_rows)
    amax = adaptive.tensor_scale * Rule.STATIC6.largest_product
    to_six = reference.quantize(x, Rule.STATIC6, tile_rows=tile_rows, amax=amax)
    for name, quantized in (("adaptive", adaptive), ("to six", to_six)):
        error = (reference.dequantize(quantized).double() - x.double()).square()
        errors[name] = error.unflatten(-1, (-1, GROUP)).unflatten(0, (-1, tile_rows)).sum((1, -1))
    assert (errors["adaptive"] <= errors["to six"] * (1 + 1e-5)).all()
    assert errors["adaptive"].sum() < gain * errors["to six"].sum()


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.STATIC4, Rule.ADAPTIVE])
def test_the_transpose_of_a_tiled_matrix_equals_the_quantized_transpose(rule: Rule) -> None:
    x = gaussian(32, 80)
    quantized = reference.quantize(x, rule, tile_rows=GROUP)
    transposed = reference.transpose(quantized)
    assert torch.equal(reference.dequantize(transposed), reference.dequantize(quantized).t())
    direct = reference.quantize(x.t().contiguous(), rule, tile_rows=GROUP)
    assert torch.equal(transposed.codes, direct.codes)
    assert torch.equal(scale_bytes(transposed), scale_bytes(direct))


def test_transposing_a_matrix_without_tiles_raises() -> None:
    with pytest.raises(ValueError, match="expected a matrix quantized with tile_rows=16"):
        reference.transpose(reference.quantize(gaussian(32, 32), Rule.STATIC6))


# extremes


EXTREMES = {
    "zero": torch.zeros(16, 32),
    "denormal": gaussian(16, 32).clamp(-1, 1) * 1e-40,
    "half denormal": torch.cat((torch.zeros(16, 24), torch.full((16, 8), 1e-40)), 1),
    "below the smallest tensor scale": gaussian(16, 32) * 1e-35,
    "huge": gaussian(16, 32).clamp(-3, 3) * 1e38,
    "mixed": torch.cat((gaussian(16, 16) * 1e37, torch.full((16, 8), -1e-40), torch.zeros(16, 8)), 1),
}


@pytest.mark.parametrize("tile_rows", [1, GROUP])
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_round_trip_without_nan(name: str, rule: Rule, tile_rows: int) -> None:
    x = EXTREMES[name]
    quantized = reference.quantize(x, rule, tile_rows=tile_rows, name=name)
    assert torch.isfinite(quantized.scales.float()).all()
    error = (reference.dequantize(quantized).double() - x.double()).abs()
    amax = x.double().abs().unflatten(-1, (-1, GROUP)).unflatten(0, (-1, tile_rows)).amax((1, -1))
    amax = amax.repeat_interleave(tile_rows, 0).repeat_interleave(GROUP, -1)
    # a third of the largest value of a group at the coarsest scales; the whole value below the smallest scale, 2^-9
    assert (error <= torch.maximum(amax / 3, 6 * 2.0**-10 * quantized.tensor_scale.double())).all()
    if not rule.is_adaptive:
        drawn = reference.quantize(x, rule, tile_rows=tile_rows, generator=torch.Generator().manual_seed(0))
        assert torch.isfinite(reference.dequantize(drawn)).all()


@pytest.mark.parametrize("rule", Rule)
def test_a_zero_tensor_has_zero_codes_and_finite_scales(rule: Rule) -> None:
    quantized = reference.quantize(torch.zeros(4, 32), rule)
    assert (quantized.codes == 0).all()
    assert torch.isfinite(quantized.scales.float()).all() and torch.isfinite(quantized.tensor_scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", Rule)
def test_nan_and_infinity_raise_with_the_name_and_spread_without_it(rule: Rule, bad: float) -> None:
    x = gaussian(2, 32)
    x[1, 3] = bad
    with pytest.raises(ValueError, match=r"blocks\.3\.weight \[2, 32\] holds NaN or infinity"):
        reference.quantize(x, rule, name="blocks.3.weight")
    assert not torch.isfinite(reference.dequantize(reference.quantize(x, rule))).any()


def test_sizes_that_groups_do_not_divide_raise() -> None:
    with pytest.raises(ValueError, match=r"\[2, 24\]; expected a last dimension that is a multiple of 16"):
        reference.quantize(torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"\[24, 32\]; expected a matrix with rows in multiples of 16"):
        reference.quantize(torch.zeros(24, 32), tile_rows=GROUP)
    with pytest.raises(ValueError, match="tile_rows=4; expected 1 or 16"):
        reference.quantize(torch.zeros(16, 32), tile_rows=4)


# stochastic rounding


@pytest.mark.parametrize("rule", [rule for rule in Rule if rule.is_adaptive])
def test_stochastic_rounding_with_an_adaptive_rule_raises(rule: Rule) -> None:
    with pytest.raises(ValueError, match="biases stochastic rounding; use static6"):
        reference.quantize(torch.zeros(1, 16), rule, generator=torch.Generator())


def test_stochastic_rounding_is_unbiased() -> None:
    magnitudes = torch.tensor([0.0, 0.1, 0.3, 0.7, 0.9, 1.2, 1.9, 2.3, 2.5, 3.3, 3.9, 4.1, 5.0, 5.7, 5.9, 6.0])
    group = torch.where(torch.arange(GROUP) % 2 == 0, magnitudes, -magnitudes)
    draws = 2**16  # with 16 values: a million
    quantized = reference.quantize(
        group.expand(draws, -1),
        Rule.STATIC6,
        amax=torch.tensor(Rule.STATIC6.largest_product),
        generator=torch.Generator().manual_seed(0),
    )
    assert (quantized.scales.float() == 1.0).all()
    values = reference.dequantize(quantized).double()
    standard_error = values.std(0) / math.sqrt(draws)
    assert ((values.mean(0) - group.double()).abs() <= 3 * standard_error + 1e-7).all()
    total = math.sqrt(standard_error.square().sum())
    assert abs((values.mean(0) - group.double()).sum()) <= 3 * total
    assert values.std(0)[1:-1].min() > 0.1


def test_stochastic_rounding_rounds_only_to_neighbors_and_never_clips() -> None:
    x = gaussian(256, 64)
    quantized = reference.quantize(x, Rule.STATIC6, generator=torch.Generator().manual_seed(0))
    scale = (quantized.scales.double() * quantized.tensor_scale.double()).repeat_interleave(GROUP, -1)
    scaled = x.double() / scale
    assert scaled.abs().max() <= 6.0 * (1 + 4 * FLOAT32_ROUNDING)
    steps = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    values = decode(unpack(quantized.codes)).double()
    assert ((values - scaled).abs() < steps * (1 + 1e-6)).all()


def test_a_seed_fixes_the_draws_and_equal_tiles_draw_differently() -> None:
    x = gaussian(16, 16).repeat(2, 2)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return reference.quantize(x, Rule.STATIC6, tile_rows=GROUP, generator=generator).codes

    codes = draw(1)
    assert torch.equal(codes, draw(1))
    assert not torch.equal(codes, draw(2))
    assert not torch.equal(codes[:16], codes[16:])
    assert not torch.equal(codes[:, :8], codes[:, 8:])


# products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_written_out_operands_are_exactly_code_times_scale(dtype: torch.dtype) -> None:
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)  # 126 positive scales and zero
    codes = pack(torch.arange(16, dtype=torch.uint8)).expand(127, -1)
    operand = reference.exact(NVFP4Tensor(codes, scales, torch.tensor(0.3)), dtype)
    product = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64) * scales.double()
    assert operand.values.dtype == dtype
    assert torch.equal(operand.values.double(), product)
    assert operand.tensor_scale == torch.tensor(0.3)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("tile_rows", [1, GROUP])
def test_quantizing_and_writing_out_at_once_changes_no_bit(rule: Rule, tile_rows: int) -> None:
    x = gaussian(32, 48)
    once = reference.quantize_exact(x, rule, tile_rows=tile_rows)
    twice = reference.exact(reference.quantize(x, rule, tile_rows=tile_rows))
    assert torch.equal(once.values.view(torch.int16), twice.values.view(torch.int16))
    assert torch.equal(once.tensor_scale, twice.tensor_scale)


@pytest.mark.parametrize("shape", [(1, 16, 16), (37, 21, 192), (8, 48, 1024)])
def test_products_are_within_the_accumulation_error_of_float32(shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    a = reference.quantize(gaussian(rows, depth), Rule.ADAPTIVE)
    b = reference.quantize(gaussian(columns, depth, seed=1), Rule.STATIC6)
    left, right = reference.exact(a, torch.float64), reference.exact(b, torch.float64)
    tensor_scale = left.tensor_scale.double() * right.tensor_scale.double()
    expected = left.values @ right.values.t() * tensor_scale
    # products of six-bit numbers are exact; depth - 1 additions and two scalings round: K 2^-24 sum |a| |b|, plus one
    bound = (depth + 1) * FLOAT32_ROUNDING * (left.values.abs() @ right.values.abs().t()) * tensor_scale
    assert ((reference.matmul(a, b).double() - expected).abs() <= bound).all()
    product = reference.exact(a).values @ reference.exact(b).values.t()
    error = (product.double() * tensor_scale - expected).abs()
    assert product.dtype == torch.bfloat16
    assert (error <= bound + BFLOAT16_ROUNDING * (expected.abs() + bound)).all()


def test_the_bias_is_added_after_the_scales() -> None:
    a, b = reference.quantize(gaussian(3, 32)), reference.quantize(gaussian(5, 32, seed=1))
    bias = gaussian(5, seed=2)
    assert torch.equal(reference.matmul(a, b, bias), reference.matmul(a, b) + bias)


# mxfp4


def test_mxfp4_is_idempotent_and_coarser_than_nvfp4() -> None:
    x = gaussian(64, 256)
    once = reference.quantize_dequantize_mxfp4(x)
    assert torch.equal(reference.quantize_dequantize_mxfp4(once), once)
    nvfp4 = reference.dequantize(reference.quantize(x, Rule.STATIC6))
    adaptive = reference.dequantize(reference.quantize(x, Rule.ADAPTIVE))
    errors = [(y - x).square().mean().item() for y in (once, nvfp4, adaptive)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_mxfp4_keeps_zeros_and_needs_groups_of_thirty_two() -> None:
    assert torch.equal(reference.quantize_dequantize_mxfp4(torch.zeros(2, 32)), torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"\[2, 48\]; expected a last dimension that is a multiple of 32"):
        reference.quantize_dequantize_mxfp4(torch.zeros(2, 48))


def test_stochastic_rounding_leaves_what_is_on_the_grid() -> None:
    # 6 is the largest magnitude of every group, so all of these are representable
    x = torch.tensor([6.0, -6.0, 4.0, 3.0, 0.5, 0.0, 1.5, 2.0] * 2).repeat(65536, 1)
    operand = reference.quantize_exact(x, Rule.STATIC6, seed=0, dtype=torch.float32)
    assert torch.equal(operand.values * operand.tensor_scale, (x / 6 * 2688) * operand.tensor_scale)
