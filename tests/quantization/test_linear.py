"""Packed layers: their results, their gradients, and LoRA on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization import training
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A4, W4A16, EmulatedW4A4, InputPair, Product
from longvideo.quantization.training import NVFP4TrainingLinear, RoundingSeeds, TrainingRecipe
from tests.golden import relative_error

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


def training_layer(recipe: TrainingRecipe, seed: int = 0) -> NVFP4TrainingLinear:
    return NVFP4TrainingLinear.from_linear(linear(), recipe=recipe, seeds=torch.tensor([seed, seed + 1000]))


@pytest.mark.parametrize("tiles", [True, False])
def test_training_products_are_those_of_rounded_operands(tiles: bool) -> None:
    """Without randomness, the forward and both backward products equal the slow definition."""
    recipe = TrainingRecipe(tiles=tiles, stochastic_gradients=False, hadamard=False)
    layer, x, grad = (
        training_layer(recipe),
        inputs(),
        torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2)),
    )
    x.requires_grad_()
    output = layer(x)
    output.backward(grad)
    flat_x, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
    rows = 16 if tiles else 1
    weight = reference.dequantize(reference.quantize(layer.weight.detach(), Rule.STATIC6, tile_rows=rows))
    turned = layer.weight.detach().t().contiguous()
    backward_weight = reference.dequantize(reference.quantize(turned, Rule.STATIC6, tile_rows=rows)).t()
    assert torch.equal(weight, backward_weight) == tiles
    forward_x = reference.dequantize(reference.quantize(flat_x))
    torch.testing.assert_close(output.flatten(0, 1), forward_x @ weight.t() + layer.bias)
    backward_grad = reference.dequantize(reference.quantize(flat_grad, Rule.STATIC6))
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad.flatten(0, 1), backward_grad @ backward_weight)
    padded = [nn.functional.pad(t, (0, 0, 0, 8)).t().contiguous() for t in (flat_grad, flat_x)]
    across_grad = reference.dequantize(reference.quantize(padded[0], Rule.STATIC6))
    across_x = reference.dequantize(reference.quantize(padded[1]))
    torch.testing.assert_close(layer.weight.grad, across_grad @ across_x.t())
    torch.testing.assert_close(layer.bias.grad, flat_grad.sum(0))


def test_stochastic_gradients_are_unbiased() -> None:
    """The mean of both gradients over many draws approaches that of the same rounded forward operands."""
    layer, x = training_layer(TrainingRecipe()), inputs()
    grad = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2))
    draws = []
    for _ in range(400):
        leaf = x.clone().requires_grad_()
        layer.weight.grad = None
        layer(leaf).backward(grad)
        layer.seeds += 1
        assert leaf.grad is not None and layer.weight.grad is not None
        draws.append((leaf.grad.flatten(), layer.weight.grad.flatten()))
    weight = reference.dequantize(reference.quantize(layer.weight.detach(), Rule.STATIC6, tile_rows=16))
    across = reference.random_hadamard(nn.functional.pad(x.flatten(0, 1), (0, 0, 0, 8)).t().contiguous())
    spun = reference.random_hadamard(nn.functional.pad(grad.flatten(0, 1), (0, 0, 0, 8)).t().contiguous())
    expected = (grad @ weight).flatten(), (spun @ reference.dequantize(reference.quantize(across)).t()).flatten()
    for samples, mean in zip(zip(*draws, strict=True), expected, strict=True):
        stacked = torch.stack(samples)
        z = (stacked.mean(0) - mean) / (stacked.std(0) / len(samples) ** 0.5 + 1e-7)
        # of n standard normal numbers the squares have mean 1 with a standard error of sqrt(2 / n)
        assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5 + 0.02
        assert z.abs().max() < 5


def test_the_same_seeds_give_the_same_gradients() -> None:
    grads = []
    for seed in (0, 0, 1):
        layer, x = training_layer(TrainingRecipe(), seed), inputs().requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


def test_seeds_are_those_of_their_generator_and_all_differ() -> None:
    drawn, again = RoundingSeeds(3, CPU), RoundingSeeds(3, CPU)
    assert drawn.values.unique().numel() == 6
    drawn.draw(torch.Generator().manual_seed(5))
    again.draw(torch.Generator().manual_seed(5))
    assert torch.equal(drawn.values, again.values) and drawn.values.unique().numel() == 6


def test_autocast_rounds_inputs_but_not_weights() -> None:
    recipe = TrainingRecipe()
    layer, x = training_layer(recipe), inputs().bfloat16()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x.float())
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_without_gradients_nothing_is_kept_and_the_product_is_the_same() -> None:
    layer = training_layer(TrainingRecipe())
    with torch.no_grad():
        output = layer(inputs())
    assert torch.equal(output, layer(inputs()).detach())


def test_a_compiled_layer_gives_the_bits_of_the_plain_one() -> None:
    layer, x = training_layer(TrainingRecipe()), inputs().requires_grad_()
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        output = run(x)
        output.square().sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        results.append((output.detach(), x.grad, layer.weight.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_training_in_four_bits_fits_a_linear_map() -> None:
    target, x = linear(), torch.randn(256, 48, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(7)
    seeds = RoundingSeeds(1, CPU)
    layer = NVFP4TrainingLinear.from_linear(nn.Linear(48, 32), recipe=TrainingRecipe(), seeds=seeds.values[0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    with torch.no_grad():
        expected = target(x)
    for _ in range(150):
        optimizer.zero_grad()
        (layer(x) - expected).square().mean().backward()
        optimizer.step()
        seeds.values += 2
    best = NVFP4TrainingLinear.from_linear(target, recipe=TrainingRecipe(), seeds=seeds.values[0])
    rounding_alone = relative_error(best(x).detach(), expected)
    assert relative_error(layer(x).detach(), expected) < 1.25 * rounding_alone < 0.25


@pytest.mark.parametrize("keep", [True, False])
def test_the_operators_of_training_are_described_as_they_are(keep: bool) -> None:
    x, weight, seeds = inputs().flatten(0, 1), linear().weight.detach(), torch.tensor([1, 2])
    if keep:
        x, weight = x.requires_grad_(), weight.requires_grad_()
    settings = ("adaptive", "static6", True, True, True)
    torch.library.opcheck(training._product, (x, weight, seeds, *settings, keep))
    if keep:
        _, *kept = training._product(x.detach(), weight.detach(), seeds, *settings, True)
        arguments = (torch.randn(40, 32), weight.detach(), *kept, seeds, *settings[1:])
        torch.library.opcheck(training._product_backward, arguments)
