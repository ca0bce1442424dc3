"""Layers that train in NVFP4: their products, their gradients and their random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import Rule
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.quantization.training import operators
from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe
from longvideo.quantization.training.seeds import RoundingSeeds
from tests.golden import relative_error

CPU = torch.device("cpu")


def linear(inputs: int = 48, outputs: int = 32, *, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype)


def inputs(rows: int = 20, width: int = 48) -> Tensor:
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(1))


def training_layer(recipe: TrainingRecipe, seed: int = 0) -> NVFP4TrainingLinear:
    return NVFP4TrainingLinear.from_linear(linear(), recipe=recipe, seeds=torch.tensor([seed, seed + 1000]))


@pytest.mark.parametrize("tiles", [True, False])
def test_training_products_are_those_of_rounded_operands(tiles: bool) -> None:
    """Without randomness, the forward and both backward products equal the slow definition."""
    recipe = TrainingRecipe(tiles=tiles, gradients=GradientRounding.NEAREST, hadamard_points=0)
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
    across = random_hadamard(nn.functional.pad(x.flatten(0, 1), (0, 0, 0, 8)).t().contiguous())
    spun = random_hadamard(nn.functional.pad(grad.flatten(0, 1), (0, 0, 0, 8)).t().contiguous())
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


def test_the_backward_pass_alone_rounds_its_operands_as_before() -> None:
    """In the phase `BACKWARD` the output is that of a plain layer and the gradients are those of the phase `BOTH`."""
    layer, x = training_layer(TrainingRecipe()), inputs().requires_grad_()
    grad = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2))
    results = {}
    for phase in TrainingPhase:
        layer.zero_grad()
        x.grad, layer.phase = None, phase
        output = layer(x)
        output.backward(grad)
        assert x.grad is not None and layer.weight.grad is not None
        results[phase] = (output.detach(), x.grad, layer.weight.grad)
    rounded, mixed, plain = (
        results[phase] for phase in (TrainingPhase.BOTH, TrainingPhase.BACKWARD, TrainingPhase.NEITHER)
    )
    torch.testing.assert_close(mixed[0], plain[0])
    assert torch.equal(mixed[1], rounded[1]) and torch.equal(mixed[2], rounded[2])
    assert relative_error(rounded[0], plain[0]) > 0.01 and relative_error(mixed[1], plain[1]) > 0.01


@pytest.mark.parametrize("keep", [True, False])
def test_the_operators_of_training_are_described_as_they_are(keep: bool) -> None:
    x, weight, seeds = inputs().flatten(0, 1), linear().weight.detach(), torch.tensor([1, 2])
    if keep:
        x, weight = x.requires_grad_(), weight.requires_grad_()
    recipe, none = TrainingRecipe().encode(), torch.empty(0)
    torch.library.opcheck(operators.product, (x, weight, none, seeds, recipe, True, keep))
    if keep:
        _, *kept = operators.product(x.detach(), weight.detach(), none, seeds, recipe, True, True)
        arguments = (torch.randn(40, 32), weight.detach(), none, *kept, seeds, recipe, True)
        torch.library.opcheck(operators._product_backward, arguments)
