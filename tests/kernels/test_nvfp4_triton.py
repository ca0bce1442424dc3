"""The Triton kernels of NVFP4 give the bits of the definition: in the interpreter, or on the GPU if there is one.

The definition always runs on the CPU: on a GPU torch divides by a number by multiplying with its reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.codes import decode, unpack
from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    E4M3_MAX,
    GROUP,
    ExactOperand,
    NVFP4Tensor,
    Rule,
)
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.rounding import tensor_scale_of

pytest.importorskip("triton")
from longvideo.kernels.nvfp4 import triton as kernels
from longvideo.kernels.nvfp4.triton.quantizing import BLOCK_GROUPS, BLOCK_MAXIMA, amax_and_scales

ROWS, COLUMNS = 37, 96
EPS = 1e-6
# the interpreter computes with numpy, which warns about overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# few and large programs, since the interpreter needs milliseconds for each; with 37 x 6 groups the last is not full
GROUPS = 128


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normal() -> Tensor:
    return random_tensor(ROWS, COLUMNS)


def heavy_tailed() -> Tensor:
    return normal() / random_tensor(ROWS, COLUMNS, seed=1).abs().clamp_min(1e-4)


def rows_of_all_sizes() -> Tensor:
    return normal() * torch.logspace(-12, 3, ROWS).unsqueeze(1)


def zeros_of_both_signs() -> Tensor:
    return torch.zeros(ROWS, COLUMNS).copysign(normal())


def zeros_among_numbers() -> Tensor:
    return torch.where(random_tensor(ROWS, COLUMNS, seed=2) > 0, normal(), 0.0).index_fill(0, torch.tensor([3, 5]), 0.0)


def denormal() -> Tensor:
    return zeros_among_numbers() * 1e-40


def huge() -> Tensor:
    return heavy_tailed() / heavy_tailed().abs().max() * torch.finfo(torch.float32).max


def ties() -> Tensor:
    """Return groups scaled by powers of two, with values halfway between two codes."""
    quarters = torch.randint(-24, 25, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)) / 4
    quarters[:, ::GROUP] = E2M1_MAX
    quarters[0, 0] = E2M1_MAX * E4M3_MAX
    return quarters


def scales_at_every_boundary() -> Tensor:
    """Return groups with scales that are E4M3 numbers, halfway between two, or next to that."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat((numbers, halfway, halfway * (1 + 2e-7), halfway * (1 - 2e-7)))
    return around.unsqueeze(1) * E2M1_MAX * torch.linspace(-1, 1, GROUP)


KINDS = (
    normal,
    heavy_tailed,
    rows_of_all_sizes,
    zeros_of_both_signs,
    zeros_among_numbers,
    denormal,
    huge,
    ties,
    scales_at_every_boundary,
)


def assert_same_bits(got: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    assert torch.equal(got.tensor_scale.cpu(), expected.tensor_scale)
    assert torch.equal(got.scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(got.codes.cpu(), expected.codes)


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    """Assert equality, in which NaN equals NaN."""
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_have_the_bits_of_the_definition(rule: Rule, kind: Callable[[], Tensor], device: str) -> None:
    x = kind()
    assert_same_bits(kernels.quantize(x.to(device), rule, block_groups=GROUPS), reference.quantize(x, rule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(GROUP,), (1, 3, 80), (2, 13, 5, 32)])
@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_every_dtype_and_shape_has_the_bits_of_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], rule: Rule, device: str
) -> None:
    x = (random_tensor(*shape) * 30).to(dtype)
    assert_same_bits(kernels.quantize(x.to(device), rule, block_groups=GROUPS), reference.quantize(x, rule))


@pytest.mark.parametrize("scale_shape", [(), (1,), (ROWS, 1), (ROWS, COLUMNS // GROUP)])
def test_a_given_largest_magnitude_is_used(scale_shape: tuple[int, ...], device: str) -> None:
    x = normal()
    amax = random_tensor(*scale_shape, seed=3).abs()
    got = kernels.quantize(x.to(device), amax=amax.to(device), block_groups=GROUPS)
    expected = reference.quantize(x, amax=amax)
    assert_same_bits(got, expected)
    assert_same_numbers(kernels.dequantize(got), reference.dequantize(expected))


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
@pytest.mark.parametrize("position", [(0, 0), (ROWS - 1, COLUMNS - 1)])
def test_nan_anywhere_makes_everything_nan(rule: Rule, position: tuple[int, int], device: str) -> None:
    x = normal()
    x[position] = float("nan")
    quantized = kernels.quantize(x.to(device), rule, block_groups=GROUPS)
    assert quantized.tensor_scale.isnan()
    assert kernels.dequantize(quantized).isnan().all()
    assert kernels.gelu_tanh_quantize(x.to(device), rule, block_groups=GROUPS).tensor_scale.isnan()


def test_the_largest_magnitude_is_found_in_any_program(device: str) -> None:
    """There are more programs than are reduced at once."""
    maxima = torch.arange(1, 1 + 2 * (BLOCK_MAXIMA + 3), dtype=torch.float32).view(2, -1)
    for position in (0, BLOCK_MAXIMA - 1, BLOCK_MAXIMA + 2):
        maxima[1, position] = 3e4 + position
        amax, scale = amax_and_scales(maxima.view(torch.int32).to(device), Rule.STATIC6)
        assert torch.equal(amax.cpu(), maxima.amax(1))
        assert torch.equal(scale.cpu(), tensor_scale_of(maxima.amax(1), Rule.STATIC6))


def test_infinity_leaves_nothing_finite(device: str) -> None:
    x = normal()
    x[2, 3] = -float("inf")
    quantized = kernels.quantize(x.to(device), block_groups=GROUPS)
    assert quantized.tensor_scale.isinf()
    assert not kernels.dequantize(quantized).isfinite().any()


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_operand_is_code_times_group_scale(rule: Rule, dtype: torch.dtype, device: str) -> None:
    x = zeros_among_numbers()
    got = kernels.quantize_exact(x.to(device), rule, dtype=dtype, block_groups=GROUPS)
    expected = reference.exact(reference.quantize(x, rule), torch.float32)
    assert torch.equal(
        got.values.cpu().float().view(torch.int32), expected.values.view(torch.int32)
    )  # zeros have signs
    assert torch.equal(got.tensor_scale.cpu(), expected.tensor_scale)
    assert got.values.dtype is dtype


def assert_same_operand(got: ExactOperand, expected: ExactOperand) -> None:
    assert torch.equal(got.tensor_scale.cpu(), expected.tensor_scale)
    assert torch.equal(got.values.cpu().float().view(torch.int32), expected.values.float().view(torch.int32))


@pytest.mark.parametrize("rule", Rule)
def test_tiles_have_the_bits_of_the_definition(rule: Rule, device: str) -> None:
    for x in (heavy_tailed(), rows_of_all_sizes().bfloat16()):
        x = x[:32].contiguous()
        # with four tiles per program, the last program of six columns is half full
        got = kernels.quantize_tiles_exact(x.to(device), rule, block_tiles=4)
        assert_same_operand(got, reference.quantize_tiles_exact(x, rule))


def test_a_matrix_that_tiles_do_not_divide_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="rows in multiples of 16"):
        kernels.quantize_tiles_exact(normal().to(device), Rule.STATIC6)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_groups_across_rows_have_the_bits_of_the_definition(rule: Rule, hadamard: bool, device: str) -> None:
    """With 37 rows the last group has five, and with 96 columns the last program has 32."""
    x = heavy_tailed()
    expected = reference.quantize_across(x, rule, hadamard=hadamard)
    assert expected.shape == (COLUMNS, 48)
    assert_same_bits(kernels.quantize_across(x.to(device), rule, hadamard=hadamard), expected)
    x = rows_of_all_sizes().bfloat16()
    exact = kernels.quantize_across_exact(x.to(device), rule, hadamard=hadamard, block_columns=128)
    assert_same_operand(exact, reference.quantize_across_exact(x, rule, hadamard=hadamard))


def test_nan_in_a_row_makes_everything_nan_across_rows(device: str) -> None:
    x = normal()
    x[36, 95] = float("nan")
    for hadamard in (False, True):
        operand = kernels.quantize_across_exact(x.to(device), Rule.STATIC6, hadamard=hadamard, block_columns=128)
        assert operand.tensor_scale.isnan() and operand.values.isnan().any()


def test_stochastic_rounding_across_rows_is_unbiased(device: str) -> None:
    """Equal columns are rounded with different random numbers."""
    count = 4096
    column = random_tensor(GROUP, 1)
    x = column.expand(GROUP, count).contiguous().to(device)
    operand = kernels.quantize_across_exact(
        x, Rule.STATIC6, hadamard=True, seed=3, dtype=torch.float32, block_columns=1024
    )
    values = (operand.values.double() * operand.tensor_scale).cpu()
    expected = random_hadamard(column.t().contiguous())[0]
    assert values.unique(dim=0).shape[0] > count / 4
    z = (values.mean(0) - expected) / (values.std(0) / count**0.5 + 1e-6)
    assert z.abs().max() < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_byte_under_every_scale_is_written_out_as_defined(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, codes.shape[1] * 2 // GROUP)
    quantized = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(3.1e-3))
    placed = NVFP4Tensor(codes.to(device), quantized.scales.to(device), quantized.tensor_scale.to(device))
    assert_same_numbers(kernels.dequantize(placed, dtype, block_words=2048), reference.dequantize(quantized, dtype))
    assert_same_numbers(kernels.exact(placed, dtype, block_words=2048).values, reference.exact(quantized, dtype).values)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_last_program_writes_out_what_is_left(rows: int, device: str) -> None:
    expected = reference.quantize(random_tensor(rows, 48))
    placed = NVFP4Tensor(expected.codes.to(device), expected.scales.to(device), expected.tensor_scale.to(device))
    got = kernels.dequantize(placed, torch.bfloat16, block_words=16)
    assert_same_numbers(got, reference.dequantize(expected, torch.bfloat16))


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased(device: str) -> None:
    count = 4096
    row = random_tensor(4 * GROUP, seed=5)
    x = row.repeat(count, 1)
    # the interpreter is faster with large programs, which the compiler for a GPU unrolls
    block_groups = 4096 if device == "cpu" else BLOCK_GROUPS
    quantized = kernels.quantize(x.to(device), Rule.STATIC6, seed=7, block_groups=block_groups)
    drawn = kernels.dequantize(quantized).cpu().double()
    error, variance = drawn.mean(0) - row, drawn.var(0) / count
    assert variance.count_nonzero() > row.numel() // 2
    assert abs(error.sum()) < 3 * variance.sum().sqrt()
    # of 64 numbers one is expected above 2.4 standard errors, none above 4
    assert (error.abs() <= 4 * variance.sqrt() + 1e-6 * row.abs()).all()


def test_stochastic_rounding_picks_a_neighbor(device: str) -> None:
    x = normal()
    quantized = kernels.quantize(x.to(device), Rule.STATIC6, seed=1, block_groups=GROUPS)
    group_scale = quantized.scales.cpu().float() * quantized.tensor_scale.cpu()
    scaled = x / group_scale.repeat_interleave(GROUP, 1)
    assert scaled.abs().max() <= E2M1_MAX * (1 + 1e-6)  # scales are rounded up
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    values = decode(unpack(quantized.codes.cpu()))
    assert ((values - scaled).abs() <= step * (1 + 1e-5)).all()
    assert torch.equal(values.signbit(), x.signbit())


def test_no_two_programs_share_random_bits(device: str) -> None:
    """Halfway between two codes every bit matters; each row is one program."""
    programs, groups = 8, 16
    x = torch.full((programs, groups * GROUP), 0.25, device=device)
    x[:, ::GROUP] = E2M1_MAX
    x[0, 0] = E2M1_MAX * E4M3_MAX
    codes = kernels.quantize(x, Rule.STATIC6, seed=11, block_groups=groups).codes
    assert codes[:, 8:].unique(dim=0).shape[0] == programs
    ups = unpack(codes)[:, GROUP:].unflatten(1, (-1, GROUP))[..., 1:]
    assert ups.flatten(0, 1).unique(dim=0).shape[0] == programs * (groups - 1)
    assert 0.4 < ups.float().mean() < 0.6


def test_random_bits_belong_to_elements_and_seeds(device: str) -> None:
    x = normal().to(device)

    def codes(seed: int | Tensor, block_groups: int) -> Tensor:
        return kernels.quantize(x, Rule.STATIC6, seed=seed, block_groups=block_groups).codes

    assert torch.equal(codes(3, 256), codes(3, 32))
    assert torch.equal(codes(3, 256), codes(torch.tensor(3, device=device), 256))
    assert not torch.equal(codes(3, 256), codes(4, 256))


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gelu_is_quantized_as_torch_computes_it(rule: Rule, dtype: torch.dtype, device: str) -> None:
    h = (random_tensor(ROWS, 160) * 4).to(dtype)
    expected = reference.quantize(F.gelu(h.float(), approximate="tanh").to(dtype), rule)
    got = kernels.gelu_tanh_quantize(h.to(device), rule, block_groups=GROUPS)
    assert_nearly_the_same(got, expected)
    assert_exact_of(kernels.gelu_tanh_quantize_exact(h.to(device), rule, block_groups=GROUPS), got)


def test_gelu_of_large_numbers_is_finite(device: str) -> None:
    h = torch.tensor([[-1e4, -60.0, -11.0, 60.0, 1e4, *[0.0] * 11]])
    got = kernels.dequantize(kernels.gelu_tanh_quantize(h.to(device), block_groups=GROUPS)).cpu()
    torch.testing.assert_close(got[0, [0, 1, 2, 4]], torch.tensor([0.0, 0.0, 0.0, 1e4]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dim", [64, 176])
def test_modulated_layer_norm_is_quantized_as_torch_computes_it(
    dtype: torch.dtype, per_token: bool, dim: int, device: str
) -> None:
    batch, frames, tokens = 2, 2, 5
    h = (random_tensor(batch, frames * tokens, dim) * 3 + 1).to(dtype)
    # as in the transformer: two of six modulations, which are stored side by side
    modulation = random_tensor(batch, frames, tokens if per_token else 1, 6, dim, seed=1)
    shift, scale = modulation.unbind(-2)[:2]
    normed = F.layer_norm(h.float(), (dim,), eps=EPS).unflatten(1, (frames, tokens))
    modulated = (normed * (1 + scale) + shift).flatten(1, 2).to(dtype)
    placed_shift, placed_scale = modulation.to(device).unbind(-2)[:2]
    rows = 3  # rows per program; the last program has one row less
    got = kernels.layer_norm_modulate_quantize(h.to(device), placed_shift, placed_scale, eps=EPS, block_rows=rows)
    assert_nearly_the_same(got, reference.quantize(modulated))
    assert_exact_of(
        kernels.layer_norm_modulate_quantize_exact(h.to(device), placed_shift, placed_scale, eps=EPS, block_rows=rows),
        got,
    )


def test_one_modulation_serves_the_whole_batch(device: str) -> None:
    h = random_tensor(2, 6, 32).to(device)
    shift, scale = (random_tensor(1, 3, 1, 32, seed=s).to(device) for s in (1, 2))
    got = kernels.layer_norm_modulate_quantize(h, shift, scale, eps=EPS)
    shifts, scales = (m.repeat(2, 1, 2, 1) for m in (shift, scale))
    assert_same_bits(got, _on_cpu(kernels.layer_norm_modulate_quantize(h, shifts, scales, eps=EPS)))


def test_nan_in_one_row_of_a_layer_norm_is_not_lost(device: str) -> None:
    h = random_tensor(1, 6, 32)
    h[0, 4, 7] = float("nan")
    modulation = torch.zeros(1, 2, 1, 32, device=device)
    got = kernels.layer_norm_modulate_quantize(h.to(device), modulation, modulation, eps=EPS)
    assert got.tensor_scale.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_bias_is_rounded_once_and_in_place(dtype: torch.dtype, with_bias: bool, device: str) -> None:
    product = (random_tensor(7, 33) * 100).to(dtype)
    product[0, :4] = torch.tensor([float("nan"), float("inf"), -torch.finfo(dtype).max, torch.finfo(dtype).max])
    scale, bias = torch.tensor(1.0037), random_tensor(33, seed=1).to(dtype) if with_bias else None
    expected = product.float() * scale
    expected = (expected if bias is None else expected + bias.float()).to(dtype)
    placed = product.to(device)
    got = kernels.add_scaled_bias(placed, scale.to(device), None if bias is None else bias.to(device), block=128)
    assert got is placed
    assert_same_numbers(got, expected)


@pytest.mark.sm100
@pytest.mark.parametrize("shape", [(128, 256, 256), (200, 130, 320)])
def test_product_on_fp4_units_is_the_defined_one(shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    a, b = (reference.quantize(random_tensor(n, inner, seed=n)) for n in (rows, columns))
    got = kernels.scaled_product(_on(a, "cuda"), _on(b, "cuda"), dtype=torch.float32).cpu()
    torch.testing.assert_close(got, reference.matmul(a, b), rtol=1e-5, atol=1e-4)


def test_what_cannot_be_quantized_is_refused(device: str) -> None:
    x = normal().to(device)
    with pytest.raises(ValueError, match="a multiple of 16"):
        kernels.quantize(x[:, :-1].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.quantize(x[:, :48])
    with pytest.raises(ValueError, match="float64"):
        kernels.quantize(x.double())
    with pytest.raises(ValueError, match="empty"):
        kernels.quantize(x[:0])
    with pytest.raises(ValueError, match="biases stochastic rounding"):
        kernels.quantize(x, Rule.ADAPTIVE, seed=0)
    with pytest.raises(ValueError, match="biases stochastic rounding"):
        kernels.quantize_exact(x, Rule.ADAPTIVE_MAX, seed=0)


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    a = _on(reference.quantize(normal()), device)
    b = _on(reference.quantize(normal()[:, :48].contiguous()), device)
    with pytest.raises(ValueError, match="expected \\[N, 96\\]"):
        kernels.scaled_product(a, b)
    with pytest.raises(ValueError, match="float32 scalar"):
        kernels.add_scaled_bias(normal().to(device), torch.ones(2, device=device))
    with pytest.raises(ValueError, match="expected \\[96\\]"):
        kernels.add_scaled_bias(normal().to(device), torch.ones((), device=device), torch.ones(95, device=device))
    modulation = torch.zeros(1, 2, 1, COLUMNS, device=device)
    with pytest.raises(ValueError, match="a multiple of 2, the number of frames"):
        kernels.layer_norm_modulate_quantize(normal()[None].to(device), modulation, modulation, eps=EPS)


def assert_nearly_the_same(got: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    """Sums have another order, so a few numbers are rounded the other way."""
    torch.testing.assert_close(got.tensor_scale.cpu(), expected.tensor_scale, rtol=1e-5, atol=0)
    codes = (unpack(part.cpu()) for part in (got.codes, expected.codes))
    assert torch.ne(*codes).float().mean() < 0.01
    numbers, wanted_numbers = reference.dequantize(_on_cpu(got)), reference.dequantize(expected)
    assert (numbers - wanted_numbers).norm() < 0.01 * wanted_numbers.norm()


def assert_exact_of(got: ExactOperand, quantized: NVFP4Tensor) -> None:
    expected = reference.exact(_on_cpu(quantized))
    assert torch.equal(got.values.cpu().view(torch.int16), expected.values.view(torch.int16))
    assert torch.equal(got.tensor_scale.cpu(), expected.tensor_scale)


def _on(quantized: NVFP4Tensor, device: str) -> NVFP4Tensor:
    return NVFP4Tensor(quantized.codes.to(device), quantized.scales.to(device), quantized.tensor_scale.to(device))


def _on_cpu(quantized: NVFP4Tensor) -> NVFP4Tensor:
    return _on(quantized, "cpu")


def test_scales_have_memory_of_their_own(device: str) -> None:
    """Compiled code assumes that the results of an operator are aligned."""
    x = normal().to(device)
    for result in (kernels.quantize(x), kernels.quantize_across(x, Rule.ADAPTIVE)):
        assert result.tensor_scale.storage_offset() == 0
