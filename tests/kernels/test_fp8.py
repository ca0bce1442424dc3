"""Row-wise FP8: properties of the definition, the kernels against it, and the products of a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import fp8_operations
from longvideo.kernels.fp8 import reference, scaled_mm
from longvideo.kernels.fp8.format import E4M3_MAX, SCALE_MIN, FP8Rows
from tests.golden import relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAN, INFINITY = float("nan"), float("inf")
HALF_STEP, SMALLEST_STEP = 2.0**-4, 2.0**-9  # steps of E4M3: relative for normal numbers, absolute below them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meant(rows: FP8Rows) -> Tensor:
    return rows.values.double() * rows.scales.double().unsqueeze(-1)


def assert_same_bits(got: FP8Rows, expected: FP8Rows) -> None:
    assert got.shape == expected.shape
    assert torch.equal(got.scales.cpu(), expected.scales)
    assert torch.equal(got.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


# the definition


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    x = (random(5, 200) * 10 ** random(5, 1, seed=1)).to(dtype)
    rows = reference.quantize_rows(x)
    error = (meant(rows) - x.double()).abs()
    bound = torch.maximum(x.double().abs() * HALF_STEP, rows.scales.double()[:, None] * SMALLEST_STEP / 2)
    assert (error <= bound * (1 + 1e-6)).all()


def test_the_largest_magnitude_of_each_row_is_mapped_to_448() -> None:
    x = random(2, 7, 96) * torch.tensor([1e-30, 1e-3, 1.0, 2.0, 50.0, 1e10, 1e36])[:, None]
    rows = reference.quantize_rows(x)
    assert rows.shape == x.shape and rows.scales.shape == (2, 7)
    assert (rows.values.float().abs().amax(-1) == E4M3_MAX).all()
    torch.testing.assert_close(rows.scales * E4M3_MAX, x.abs().amax(-1), rtol=1e-6, atol=0)


def test_rows_of_zeros_and_of_next_to_nothing_are_finite() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-45, -3e-45, 0.0], [3e-39, 1e-40, -2e-39]])
    rows = reference.quantize_rows(x)
    assert rows.scales.tolist() == [1.0, SCALE_MIN, SCALE_MIN]
    assert not rows.values[0].float().any() and rows.values.float().isfinite().all()


def test_the_largest_numbers_saturate() -> None:
    x = torch.full((1, 4), torch.finfo(torch.float32).max) * torch.tensor([1.0, -1.0, 0.5, 0.0])
    rows = reference.quantize_rows(x)
    assert rows.values.float().tolist() == [[448.0, -448.0, 224.0, 0.0]]
    assert rows.scales.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_what_is_not_finite_spoils_its_row_and_no_other(bad: float) -> None:
    x = random(3, 32)
    x[1, 5] = bad
    values = meant(reference.quantize_rows(x))
    assert not values[1].isfinite().any() and values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_that_of_float64_up_to_one_rounding(out_dtype: torch.dtype, biased: bool) -> None:
    a, b = reference.quantize_rows(random(2, 5, 96) * 3), reference.quantize_rows(random(48, 96, seed=1))
    bias = random(48, seed=2) if biased else None
    expected = meant(a) @ meant(b).t() + (0 if bias is None else bias.double())
    got = reference.matmul(a, b, bias, out_dtype)
    assert got.dtype == out_dtype and got.shape == (2, 5, 48)
    sums = meant(a).abs() @ meant(b).abs().t() + 1
    rounding = 2.0**-8 if out_dtype == torch.bfloat16 else 0.0
    assert ((got.double() - expected).abs() <= rounding * expected.abs() + 96 * 2.0**-24 * sums).all()


def test_product_is_near_that_of_what_was_quantized() -> None:
    x, weight = random(64, 256), random(32, 256, seed=1)
    got = reference.matmul(reference.quantize_rows(x), reference.quantize_rows(weight), None, torch.float32)
    assert 0.01 < relative_error(got, x @ weight.t()) < 0.04


def test_wrong_rows_are_refused() -> None:
    values = torch.zeros(2, 3, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"values \[2, 3, 8\] need scales \[2, 3\]; got \[2, 1\]"):
        FP8Rows(values, torch.ones(2, 1))
    # the result of `module.to(torch.bfloat16)`
    with pytest.raises(ValueError, match="expected float8_e4m3fn and float32"):
        FP8Rows(values.bfloat16(), torch.ones(2, 3).bfloat16())


# the kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 100, 257])
def test_kernel_has_the_bits_of_the_definition(columns: int, dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    x = (random(2, 3, columns) * 10 ** random(2, 3, 1, seed=1)).to(dtype)
    x[0, 1] = 0.0
    assert_same_bits(kernels.quantize_rows(x.to(device)), reference.quantize_rows(x))
    assert_same_bits(kernels.quantize_rows(x[0, 0].to(device)), reference.quantize_rows(x[0, 0]))


def test_kernel_rounds_every_step_and_tie_as_the_definition(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    steps = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (steps[1:] + steps[:-1]) / 2
    both = torch.cat((steps, ties, ties.nextafter(torch.tensor(INFINITY)), ties.nextafter(torch.tensor(0.0))))
    x = torch.cat((both, -both))[None]
    expected = reference.quantize_rows(x)
    assert expected.scales.item() == 1.0
    assert_same_bits(kernels.quantize_rows(x.to(device)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (70, 130), (129, 33)])
def test_a_matrix_has_the_bits_of_the_definition_also_transposed(
    shape: tuple[int, int], form: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    x = (random(*shape) * 10 ** random(*shape, seed=1)).to(dtype)
    for amax in (x.abs().amax().float(), x.abs().amax().float() / 8):
        both = kernels.quantize_both(x.to(device), amax.to(device), form)
        alone = (
            kernels.quantize_tensor(x.to(device), amax.to(device), form),
            kernels.quantize_transposed(x.to(device), amax.to(device), form),
        )
        assert alone[1].values.shape == (shape[1], -(-shape[0] // 16) * 16)
        for quantized in (both, alone):
            for mine, expected in zip(quantized, reference.quantize_both(x, amax, form), strict=True):
                assert torch.equal(mine.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
                assert torch.equal(mine.scale.cpu(), expected.scale)


def test_e5m2_rounds_every_step_and_tie_as_the_definition(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    steps = torch.arange(124, dtype=torch.uint8).view(torch.float8_e5m2).float()
    ties = (steps[1:] + steps[:-1]) / 2
    both = torch.cat((steps, ties, ties.nextafter(torch.tensor(INFINITY)), ties.nextafter(torch.tensor(0.0))))
    x, amax = torch.cat((both, -both, torch.tensor([1e9, -1e9])))[None], torch.tensor(57344.0)
    mine, expected = (
        one.quantize_tensor(y, z, torch.float8_e5m2)
        for one, y, z in ((kernels, x.to(device), amax.to(device)), (reference, x, amax))
    )
    assert torch.equal(mine.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    spoiled = kernels.quantize_tensor(
        torch.tensor([[1.0, math.nan]], device=device), amax.to(device), torch.float8_e5m2
    )
    assert spoiled.values.float()[0].isnan().tolist() == [False, True]


def test_the_largest_magnitude_is_that_of_the_definition(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    for x in (random(50, 70).bfloat16(), -random(3, 3).abs(), torch.zeros(2, 2), torch.tensor([[1.0, math.nan]])):
        mine, expected = kernels.largest_magnitude(x.to(device)).cpu(), reference.largest_magnitude(x)
        assert mine.dtype == torch.float32 and torch.equal(mine, expected) or mine.isnan() and expected.isnan()


def test_kernel_keeps_the_extremes_of_the_definition(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 1.0], [0.0, -0.0, 0.0], [1e-45, -3e-45, 0.0], [3e-39, 1e-40, -2e-39]])
    assert_same_bits(kernels.quantize_rows(x.to(device)), reference.quantize_rows(x))
    bad = torch.tensor([[1.0, NAN, 2.0], [INFINITY, 1.0, 2.0], [1.0, 2.0, 3.0]])
    values = meant(kernels.quantize_rows(bad.to(device))).cpu()
    assert not values[:2].isfinite().any() and values[2].isfinite().all()


def test_kernel_reads_rows_with_a_stride_and_writes_all_of_its_outputs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    def filled(*args: Any, **options: Any) -> Tensor:
        result = allocate(*args, **options)
        return result.copy_(torch.full(result.shape, NAN, device=result.device).to(result.dtype))

    allocate = torch.empty
    x = torch.full((2, 5, 3, 24), NAN)
    x[:, :, 1] = random(2, 5, 24)
    monkeypatch.setattr(torch, "empty", filled)
    got = kernels.quantize_rows(x.to(device)[:, :, 1])
    assert_same_bits(got, reference.quantize_rows(x[:, :, 1].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_quantized_as_torch_computes_it(dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    h = (random(6, 300) * 4).to(dtype)
    expected = reference.quantize_rows(F.gelu(h.float(), approximate="tanh").to(dtype))
    assert_same_bits(reference.gelu_tanh_quantize_rows(h), expected)
    got = kernels.gelu_tanh_quantize_rows(h.to(device))
    torch.testing.assert_close(got.scales.cpu(), expected.scales, rtol=2.0**-7, atol=0)
    # another order of float32 arithmetic may move a number across a tie
    moved = got.values.cpu().view(torch.uint8).int() - expected.values.view(torch.uint8).int()
    assert moved.abs().max() <= 1 and (moved != 0).float().mean() < 0.005


def test_gelu_of_large_numbers_is_finite(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    h = torch.tensor([[-1e4, -60.0, -11.0, 60.0, 1e4]])
    assert meant(kernels.gelu_tanh_quantize_rows(h.to(device))).cpu()[0, [0, 1, 2, 4]].tolist() == pytest.approx(
        [0.0, 0.0, 0.0, 1e4]
    )


def test_tensors_the_kernels_cannot_read_are_refused() -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.fp8 import triton as kernels

    with pytest.raises(ValueError, match=r"\[8, 4\] has strides \(1, 8\); expected contiguous rows"):
        kernels.quantize_rows(random(4, 8).t())
    with pytest.raises(ValueError, match="expected contiguous rows"):
        kernels.quantize_rows(random(4, 8, 16)[:, :6])
    with pytest.raises(ValueError, match="expected bfloat16, float16 or float32"):
        kernels.quantize_rows(random(4, 8).double())
    with pytest.raises(ValueError, match="empty tensor"):
        kernels.gelu_tanh_quantize_rows(random(0, 8))


# the products of a GPU


def test_products_of_unfit_sizes_raise() -> None:
    a, b, c = (reference.quantize_rows(random(*shape)) for shape in ((4, 32), (16, 64), (24, 32)))
    with pytest.raises(ValueError, match="cannot multiply K=32 by K=64 with N=16"):
        scaled_mm.matmul(a, b, None, torch.bfloat16)
    with pytest.raises(ValueError, match="with N=24; expected equal K, and K and N multiples of 16"):
        scaled_mm.matmul(a, c, None, torch.bfloat16)


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason=f"torch {torch.__version__} has no scaled_mm")
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_accepts_the_operands_on_the_meta_device(biased: bool, out_dtype: torch.dtype) -> None:
    def on_meta(*shape: int) -> FP8Rows:
        rows = reference.quantize_rows(random(*shape))
        return FP8Rows(rows.values.to("meta"), rows.scales.to("meta"))

    bias = torch.empty(48, device="meta") if biased else None
    product = scaled_mm.matmul(on_meta(2, 37, 96), on_meta(48, 96), bias, out_dtype)
    assert product.shape == (2, 37, 48) and product.dtype == out_dtype


def test_what_is_missing_is_said_with_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaled_mm.unavailable(CPU) == (
        "FP8 products need a GPU of compute capability 8.9 or newer, got device 'cpu';"
        " use --precision bf16 or nvfp4-weights"
    )
    assert fp8_operations(CPU).quantize_rows is reference.quantize_rows
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert scaled_mm.unavailable(CUDA) == (
        "NVIDIA A100 has compute capability 8.0 < 8.9 and so no FP8 units; use --precision bf16 or nvfp4-weights"
    )
    with pytest.raises(ValueError, match="no FP8 units|no kernels for device"):
        fp8_operations(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    assert scaled_mm.unavailable(CUDA) is None
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    reason = scaled_mm.unavailable(CUDA)
    assert reason is not None and reason.startswith("FP8 products need torch 2.10 or newer")


needs_fp8_units = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < scaled_mm.WITH_FP8_UNITS,
    reason="needs a GPU of compute capability 8.9 or newer",
)


@pytest.mark.gpu
@needs_fp8_units
@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (37, 96, 48), (880, 3072, 3072), (333, 3072, 14336), (100, 14336, 3072)]
)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_product_on_a_gpu_is_that_of_the_definition(
    shape: tuple[int, int, int], out_dtype: torch.dtype, biased: bool
) -> None:
    rows, depth, columns = shape
    operations = fp8_operations(CUDA)
    a, b = (
        operations.quantize_rows(random(count, depth, seed=seed, dtype=torch.bfloat16).cuda())
        for seed, count in ((0, rows), (1, columns))
    )
    bias = random(columns, seed=2, dtype=torch.bfloat16).cuda() if biased else None
    got = operations.matmul(a, b, bias, out_dtype)
    expected = reference.matmul(a, b, bias, torch.float32)
    assert got.dtype == out_dtype
    # fast accumulation keeps about 14 bits of a sum
    assert relative_error(got.float(), expected) < 4e-3


@pytest.mark.gpu
@needs_fp8_units
@pytest.mark.parametrize("columns", [3072, 5000, 14336])
def test_kernel_has_the_bits_of_the_definition_at_the_sizes_of_a_model(columns: int) -> None:
    x = random(77, columns, dtype=torch.bfloat16)
    assert_same_bits(fp8_operations(CUDA).quantize_rows(x.cuda()), reference.quantize_rows(x))
    assert_same_bits(
        FP8Rows(*(part.cpu() for part in vars(reference.quantize_rows(x.cuda())).values())), reference.quantize_rows(x)
    )


@pytest.mark.gpu
@needs_fp8_units
def test_a_recorded_product_follows_its_inputs() -> None:
    operations = fp8_operations(CUDA)
    weight = operations.quantize_rows(random(64, 128, seed=1, dtype=torch.bfloat16).cuda())
    bias, x = random(64, seed=2).cuda(), random(37, 128, dtype=torch.bfloat16).cuda()

    def layer() -> Tensor:
        return operations.matmul(operations.gelu_tanh_quantize_rows(x), weight, bias, torch.bfloat16)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = layer()
    x.copy_(random(37, 128, seed=3, dtype=torch.bfloat16))
    graph.replay()
    assert torch.equal(product, layer())
