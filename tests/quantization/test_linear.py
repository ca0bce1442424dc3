"""Packed layers: their results, their gradients, and LoRA on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longvideo.kernels.nvfp4 import reference
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A4, W4A16, EmulatedW4A4, InputPair, Product

CPU = torch.device("cpu")


def linear(inputs: int = 48, outputs: int = 32, *, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype)


def inputs(rows: int = 20, width: int = 48) -> Tensor:
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(1))


def test_w4a16_multiplies_by_the_dequantized_weight() -> None:
    layer = linear()
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(W4A16(reference))
    weight = reference.dequantize(reference.quantize(layer.weight.detach()))
    torch.testing.assert_close(packed(inputs()), nn.functional.linear(inputs(), weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w4a4_is_the_product_of_both_dequantized_operands(dtype: torch.dtype) -> None:
    layer, x = linear(dtype=dtype), inputs().to(dtype)
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(EmulatedW4A4(reference))
    quantized_x, quantized_w = reference.quantize(x), reference.quantize(layer.weight.detach())
    exact_x, exact_w = (reference.dequantize(q).double() for q in (quantized_x, quantized_w))
    assert layer.bias is not None
    expected = exact_x @ exact_w.t() + layer.bias.double()
    bound = 48 * 2.0**-24 * (exact_x.abs() @ exact_w.abs().t())
    if dtype == torch.bfloat16:
        # one rounding of the unscaled product and one of the result
        bound += 2.0**-8 * ((exact_x @ exact_w.t()).abs() + expected.abs()) + 1e-6
    assert ((packed(x).double() - expected).abs() <= bound + 1e-6).all()
    if dtype == torch.float32:
        torch.testing.assert_close(reference.matmul(quantized_x, quantized_w, layer.bias), packed(x))


def test_the_gradient_of_the_input_is_that_of_the_dequantized_weight() -> None:
    packed = NVFP4Linear.from_linear(linear())
    for product in (W4A16(reference), EmulatedW4A4(reference)):
        packed.set_product(product)
        x, grad = inputs().requires_grad_(), torch.randn(2, 20, 32)
        packed(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ reference.dequantize(packed.quantized_weight))


@pytest.mark.parametrize("product", [W4A16(reference), EmulatedW4A4(reference)])
def test_a_branch_adds_its_product_with_the_unrounded_input_and_its_gradient(product: Product) -> None:
    packed, draws = NVFP4Linear.from_linear(linear()), torch.Generator().manual_seed(2)
    packed.set_product(product)
    x, grad = inputs().requires_grad_(), torch.randn(2, 20, 32, generator=draws)
    plain = packed(x)
    plain.backward(grad)
    assert x.grad is not None
    own_grad, x.grad = x.grad, None
    down, up = torch.randn(3, 48, generator=draws), torch.randn(32, 3, generator=draws)
    packed.add_branch(down, up)
    result = packed(x)
    result.backward(grad)
    torch.testing.assert_close(result, plain + x @ (up @ down).T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, own_grad + grad @ (up @ down), rtol=1e-5, atol=1e-4)
    if isinstance(product, W4A4):
        rounded = product.prepare(x.detach())
        torch.testing.assert_close(packed(InputPair(rounded, x.detach())), result, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="needs the unrounded input"):
            packed(rounded)


def test_a_layer_without_a_product_cannot_be_run() -> None:
    with pytest.raises(RuntimeError, match="set_product"):
        NVFP4Linear.from_linear(linear())(inputs())


def test_a_weight_with_nan_is_refused_by_name() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight .*NaN"):
        NVFP4Linear.from_linear(layer, name="blocks.0.ffn.0.weight")


def test_a_width_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="a multiple of 16"):
        NVFP4Linear.from_linear(linear(inputs=24))
