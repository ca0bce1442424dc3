"""The native NVFP4 backends: the bits of their layouts on any machine, their products on a Blackwell GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longvideo.kernels.nvfp4 import reference, scaled_mm, te
from longvideo.kernels.nvfp4.codes import swizzle_scales, unswizzle_scales
from longvideo.kernels.nvfp4.format import NVFP4Tensor, Rule

PUBLIC = load_file(Path(__file__).parents[1] / "fixtures" / "nvfp4_a.safetensors")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT32_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-8
has_scaled_mm = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "scaled_mm"), reason=f"torch {torch.__version__} has no scaled_mm"
)
without_blackwell = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0), reason="this GPU has FP4 units"
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# layouts


@pytest.mark.parametrize(("rows", "depth"), [(1, 32), (37, 96), (128, 256), (130, 32)])
@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_an_operand_holds_the_bytes_of_the_reference(rule: Rule, rows: int, depth: int) -> None:
    quantized = reference.quantize(gaussian(rows, depth), rule)
    operand = scaled_mm.operand(quantized)
    assert operand.packed.dtype == torch.float4_e2m1fn_x2 and operand.scales.dtype == torch.float8_e4m3fn
    assert torch.equal(operand.packed.view(torch.uint8), quantized.codes)
    assert torch.equal(operand.scales.view(torch.uint8), swizzle_scales(quantized.scales))
    assert torch.equal(operand.tensor_scale, quantized.tensor_scale) and operand.tensor_scale.shape == ()
    back = unswizzle_scales(operand.scales, rows, depth // 16)
    assert torch.equal(back.view(torch.uint8), quantized.scales.view(torch.uint8))


@pytest.mark.parametrize("tile", ["1x16", "16x16"])
def test_an_operand_equals_the_bytes_of_the_public_code(tile: str) -> None:
    quantized = reference.quantize(PUBLIC["input"], Rule.ADAPTIVE, tile_rows=int(tile.partition("x")[0]))
    operand = scaled_mm.operand(quantized)
    assert torch.equal(operand.packed.view(torch.uint8), PUBLIC[f"mse.{tile}.packed"].view(torch.uint8))
    expected = PUBLIC[f"mse.{tile}.scales_swizzled_e4m3"].view(torch.uint8).flatten()
    assert torch.equal(operand.scales.view(torch.uint8), expected)


def test_operands_that_scaled_mm_cannot_read_raise() -> None:
    with pytest.raises(ValueError, match=r"\[4, 48\]; expected a matrix with K in multiples of 32"):
        scaled_mm.operand(reference.quantize(gaussian(4, 48)))
    with pytest.raises(ValueError, match=r"\[2, 4, 32\]; expected a matrix with K in multiples of 32"):
        scaled_mm.operand(reference.quantize(gaussian(2, 4, 32)))
    rows = reference.quantize(gaussian(4, 32), amax=torch.full((4, 1), 10.0))
    with pytest.raises(ValueError, match=r"tensor scale is \[4, 1\]; expected one scale"):
        scaled_mm.operand(rows)


def test_products_of_unfit_sizes_raise() -> None:
    a, b, c = (scaled_mm.operand(reference.quantize(gaussian(*shape))) for shape in ((4, 32), (16, 64), (24, 32)))
    with pytest.raises(ValueError, match="cannot multiply K=32 by K=64 with N=16"):
        scaled_mm.matmul(a, b)
    with pytest.raises(ValueError, match="with N=24; expected equal K and N a multiple of 16"):
        scaled_mm.matmul(a, c)


@has_scaled_mm
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_accepts_the_operands_on_the_meta_device(bias: bool, out_dtype: torch.dtype) -> None:
    def on_meta(rows: int) -> scaled_mm.ScaledOperand:
        q = reference.quantize(gaussian(rows, 96))
        return scaled_mm.operand(NVFP4Tensor(q.codes.to("meta"), q.scales.to("meta"), q.tensor_scale.to("meta")))

    offset = torch.empty(48, device="meta") if bias else None
    product = scaled_mm.matmul(on_meta(37), on_meta(48), offset, out_dtype)
    assert product.shape == (37, 48) and product.dtype == out_dtype


@has_scaled_mm
def test_a_product_on_the_cpu_raises_and_does_not_fall_back() -> None:
    operand = scaled_mm.operand(reference.quantize(gaussian(16, 32)))
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        scaled_mm.matmul(operand, operand)


# what is missing


@has_scaled_mm
@without_blackwell
def test_scaled_mm_names_what_is_missing() -> None:
    assert scaled_mm.unavailable(CPU) == "FP4 products need a CUDA GPU, got device 'cpu'"
    reason = scaled_mm.unavailable(CUDA)
    expected = "< 10.0 and so no FP4 units" if torch.cuda.is_available() else "finds no GPU"
    assert reason is not None and expected in reason


def test_an_older_gpu_is_named_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    assert scaled_mm.missing_hardware(CUDA) == "NVIDIA H200 has compute capability 9.0 < 10.0 and so no FP4 units"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (10, 0))
    assert scaled_mm.missing_hardware(CUDA) is None


def test_a_torch_without_scaled_mm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    assert scaled_mm.unavailable(CUDA) == (
        f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; use torch 2.10 or newer"
    )


@without_blackwell
def test_te_names_what_is_missing() -> None:
    reason = te.unavailable(CUDA)
    assert reason is not None
    assert "transformer_engine cannot be imported" in reason or "FP4" in reason


@pytest.mark.parametrize("error", [ImportError, RuntimeError, FileNotFoundError, AssertionError])
def test_a_half_installed_te_is_a_reason_and_not_a_crash(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def find_spec(self, name: str, _path: Any, _target: Any = None) -> None:
            if name.startswith("transformer_engine"):
                raise error("Found empty `transformer-engine` meta package\nand more")

    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    reason = te.unavailable(CUDA)
    assert reason is not None
    assert f"({error.__name__}: Found empty `transformer-engine` meta package); pip install" in reason


# TransformerEngine's recipe


@pytest.fixture
def recipe_class() -> Any:
    try:
        from transformer_engine.common.recipe import NVFP4BlockScaling  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        pytest.skip(f"transformer_engine's recipes cannot be imported: {str(error).splitlines()[0]}")
    return NVFP4BlockScaling


def test_the_default_recipe_is_the_pretraining_recipe(recipe_class: Any) -> None:
    recipe = te.recipe()
    assert isinstance(recipe, recipe_class)
    inputs, weights, gradients = recipe.fp4_quant_fwd_inp, recipe.fp4_quant_fwd_weight, recipe.fp4_quant_bwd_grad
    parts = [
        (q.random_hadamard_transform, q.stochastic_rounding, q.fp4_2d_quantization)
        for q in (inputs, weights, gradients)
    ]
    assert parts == [(True, False, False), (False, False, True), (True, True, False)]
    assert getattr(recipe, "nvfp4_4over6", "none") == "none"


@pytest.mark.usefixtures("recipe_class")
@pytest.mark.parametrize("setting", ["stochastic_gradients", "hadamard", "tiled_weights"])
def test_each_setting_switches_one_thing(setting: str) -> None:
    names = {
        "stochastic_gradients": "disable_stochastic_rounding",
        "hadamard": "disable_rht",
        "tiled_weights": "disable_2d_quantization",
    }
    off: Any = {setting: False}
    recipe = te.recipe(**off)
    assert {name: getattr(recipe, name) for name in names.values()} == {
        name: ours == setting for ours, name in names.items()
    }


@pytest.mark.parametrize(("rule", "mode"), [(Rule.ADAPTIVE, "MSE"), (Rule.ADAPTIVE_ABS, "MAE")])
def test_adaptive_rules_become_4over6(rule: Rule, mode: str, recipe_class: Any) -> None:
    if not hasattr(recipe_class, "nvfp4_4over6"):
        with pytest.raises(ValueError, match="install 2.20 or newer"):
            te.recipe(rule, hadamard=False)
        return
    recipe = te.recipe(rule, hadamard=False)
    settings = (recipe.nvfp4_4over6, recipe.nvfp4_4over6_e4m3_use_256, recipe.nvfp4_4over6_err_mode)
    assert settings == ("all", "all", mode) and recipe.disable_rht


@pytest.mark.parametrize("rule", [Rule.STATIC4, Rule.ADAPTIVE_MAX])
def test_rules_that_te_does_not_have_raise(rule: Rule) -> None:
    with pytest.raises(ValueError, match=f"no rule '{rule.value}'; use one of .*static6.*adaptive.*adaptive-abs"):
        te.recipe(rule, hadamard=False)


def test_an_adaptive_rule_with_the_hadamard_transform_raises() -> None:
    with pytest.raises(ValueError, match="cannot combine rule 'adaptive' with the Hadamard transform"):
        te.recipe(Rule.ADAPTIVE)


# products on a Blackwell GPU


@pytest.mark.sm100
@pytest.mark.parametrize("shape", [(1, 16, 32), (37, 48, 192), (128, 256, 1024)])
@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_the_native_product_equals_the_reference(rule: Rule, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    a = reference.quantize(gaussian(rows, depth).to(CUDA), rule)
    b = reference.quantize(gaussian(columns, depth, seed=1).to(CUDA), rule)
    bias = gaussian(columns, seed=2).to(CUDA)
    left, right = reference.exact(a, torch.float64), reference.exact(b, torch.float64)
    tensor_scale = left.tensor_scale.double() * right.tensor_scale.double()
    bound = (depth + 1) * FLOAT32_ROUNDING * (left.values.abs() @ right.values.abs().t()) * tensor_scale
    expected = reference.matmul(a, b).double()
    tolerance = 2 * bound + BFLOAT16_ROUNDING * (expected.abs() + bound)
    product = scaled_mm.matmul(scaled_mm.operand(a), scaled_mm.operand(b))
    assert ((product.double() - expected).abs() <= tolerance).all()
    biased = scaled_mm.matmul(scaled_mm.operand(a), scaled_mm.operand(b), bias)
    assert torch.equal(biased, product + bias)


@pytest.mark.sm100
@pytest.mark.parametrize("shape", [(1, 16, 32), (37, 48, 192), (128, 256, 1024)])
@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_the_product_of_transformer_engine_equals_the_reference(rule: Rule, shape: tuple[int, int, int]) -> None:
    if (reason := te.product_unavailable(CUDA)) is not None:
        pytest.skip(reason)
    rows, columns, depth = shape
    a = reference.quantize(gaussian(rows, depth).to(CUDA), rule)
    b = reference.quantize(gaussian(columns, depth, seed=1).to(CUDA), rule)
    bias = gaussian(columns, seed=2).to(CUDA)
    product = te.matmul(scaled_mm.operand(a), scaled_mm.operand(b), bias)
    expected = reference.matmul(a, b, bias.bfloat16()).double()
    assert (product.double() - expected).norm() < 2 * BFLOAT16_ROUNDING * expected.norm()
