"""Each part of a recipe: the layer computes what the parts define, and a part changes only what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from longvideo.kernels.nvfp4 import dge, draws, reference
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.luq import quantize_luq_exact
from longvideo.kernels.nvfp4.ms_eden import quantize_ms_eden
from longvideo.kernels.nvfp4.outliers import split_outliers
from longvideo.kernels.nvfp4.radix4 import Phase, quantize_radix4_exact
from longvideo.quantization.training import backward_products, operators
from longvideo.quantization.training.backward_products import GRADIENTS, OTHERS, SIGNS
from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.recipe import (
    BackwardOperands,
    GradientRounding,
    HadamardProducts,
    HadamardSigns,
    TrainingRecipe,
    WeightEstimator,
)
from tests.quantization.training.parts import DEQUANTIZED, DETERMINISTIC, MS_EDEN, PARTS, without_host_draws

TOKENS, INPUTS, OUTPUTS = 40, 48, 32
SEEDS = torch.tensor([3, 2**40 + 7])
NONE = torch.empty(0)
"""Average of a weight that has none."""


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(recipe: TrainingRecipe, inputs: int = INPUTS, outputs: int = OUTPUTS) -> NVFP4TrainingLinear:
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(gaussian(outputs, inputs, seed=0) * 0.1)
        linear.bias.copy_(gaussian(outputs, seed=6))
    return NVFP4TrainingLinear.from_linear(linear, recipe=recipe, seeds=SEEDS.clone())


def results(layer: NVFP4TrainingLinear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output and the three gradients."""
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    output = layer(leaf)
    output.backward(grad)
    assert leaf.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return {"output": output.detach(), "dgrad": leaf.grad, "wgrad": layer.weight.grad, "bias": layer.bias.grad}


def of_part(recipe: TrainingRecipe) -> dict[str, Tensor]:
    return results(layer_of(recipe), gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2))


# the slow definition


def value(operand: NVFP4Tensor | ExactOperand) -> Tensor:
    exact = reference.exact(operand, torch.float64) if isinstance(operand, NVFP4Tensor) else operand
    return exact.values.double() * exact.tensor_scale.double()


def arranged(x: Tensor, recipe: TrainingRecipe, points: int, seed: Tensor) -> Tensor:
    """Return x with its last dimension padded and transformed, except for MS-EDEN, which transforms it itself."""
    multiple = max(points, 16)
    padded = F.pad(x, (0, -x.shape[-1] % multiple)).contiguous()
    if not points or recipe.gradients is GradientRounding.MS_EDEN:
        return padded
    signs = draws.signs(seed, points, stream=SIGNS) if recipe.hadamard_signs is HadamardSigns.REDRAWN else None
    return random_hadamard(padded, points, signs=signs)


def ms_eden(x: Tensor, seed: Tensor, stream: int) -> Tensor:
    draw = draws.uniform(seed, torch.Size((x.shape[0], x.shape[1] // 16)), stream=stream)
    return value(quantize_ms_eden(x, draws.signs(seed, 128, stream=SIGNS), draw))


def gradient_operand(x: Tensor, recipe: TrainingRecipe, seed: Tensor, phase: Phase) -> Tensor:
    if recipe.gradients is GradientRounding.MS_EDEN:
        return ms_eden(x, seed, GRADIENTS)
    if recipe.gradients is GradientRounding.LUQ:
        return value(quantize_luq_exact(x, draws.uniform(seed, x.shape, stream=GRADIENTS), dtype=torch.float32))
    if recipe.gradients is GradientRounding.RADIX4:
        return value(quantize_radix4_exact(x, phase, dtype=torch.float32))
    own = seed if recipe.gradients is GradientRounding.STOCHASTIC else None
    return value(reference.quantize_exact(x, Rule.STATIC6, seed=own, dtype=torch.float32))


def other_operand(x: Tensor, rule: Rule, recipe: TrainingRecipe, seed: Tensor) -> Tensor:
    if recipe.gradients is GradientRounding.MS_EDEN:
        return ms_eden(x, seed, OTHERS)
    return value(reference.quantize(x, rule))


def backward_source(original: Tensor, forward: NVFP4Tensor, recipe: TrainingRecipe) -> tuple[Tensor, float]:
    """Return the numbers that are rounded for a backward product, and the scale that is left out.

    Without the tensor scale dequantized numbers are exact, so that ties stay ties.
    """
    if recipe.backward_operands is BackwardOperands.ORIGINALS:
        return original, 1.0
    return reference.exact(forward, torch.float32).values, forward.tensor_scale.item()


def slow_definition(weight: Tensor, x: Tensor, grad: Tensor, recipe: TrainingRecipe) -> dict[str, Tensor]:
    """Return output and gradients in float64, each operand written out."""
    clamped, outliers = split_outliers(x, recipe.outlier_quantile)
    tile_rows = 16 if recipe.tiles else 1
    forward_weight = reference.quantize(weight, recipe.weights, tile_rows=tile_rows)
    forward_x = reference.quantize(clamped, recipe.inputs)
    output = (value(forward_x) + outliers.double()) @ value(forward_weight).t()

    points = recipe.hadamard_points if recipe.hadamard_products is HadamardProducts.BOTH else 0
    source, scale = backward_source(weight, forward_weight, recipe)
    if recipe.tiles and not points:
        backward_weight = value(forward_weight).t()
    else:
        turned = arranged(source.t(), recipe, points, SEEDS[0])
        backward_weight = other_operand(turned, recipe.weights, recipe, SEEDS[0]) * scale
    left = gradient_operand(arranged(grad, recipe, points, SEEDS[0]), recipe, SEEDS[0], Phase.EVEN)
    dgrad = left @ backward_weight.t()

    points = recipe.hadamard_points
    source, scale = backward_source(clamped, forward_x, recipe)
    right = other_operand(arranged(source.t(), recipe, points, SEEDS[1]), recipe.inputs, recipe, SEEDS[1]) * scale
    left = gradient_operand(arranged(grad.t(), recipe, points, SEEDS[1]), recipe, SEEDS[1], Phase.ODD)
    wgrad = left @ right.t() + grad.double().t() @ outliers.double()
    if recipe.estimator is WeightEstimator.DGE:
        wgrad = wgrad * dge.weight_derivative(weight, recipe.weights, tile_rows=tile_rows)
    return {"output": output, "dgrad": dgrad, "wgrad": wgrad}


@pytest.mark.parametrize("name", PARTS)
def test_the_layer_computes_the_slow_definition(name: str) -> None:
    layer, x, grad = layer_of(PARTS[name]), gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2)
    got = results(layer, x, grad)
    expected = slow_definition(layer.weight.detach(), x, grad, PARTS[name])
    got["output"] = got["output"] - layer.bias.detach()
    for key, exact in expected.items():
        # the codes are those of the definition, so only float32 sums differ
        assert ((got[key].double() - exact).abs() <= 1e-5 * exact.abs().max()).all(), key


# what a part changes


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("rows", {"output", "dgrad"}),
        ("dequantized", {"wgrad"}),
        ("nearest", {"dgrad", "wgrad"}),
        ("luq", {"dgrad", "wgrad"}),
        ("radix4", {"dgrad", "wgrad"}),
        ("no transform", {"wgrad"}),
        ("64 points", {"wgrad"}),
        ("128 points", {"wgrad"}),
        ("redrawn", {"wgrad"}),
        ("both", {"dgrad"}),
        ("ms-eden", {"dgrad", "wgrad"}),
        ("dge", {"wgrad"}),
        ("outliers", {"output", "wgrad"}),
    ],
)
def test_a_part_changes_only_what_it_should(name: str, changed: set[str]) -> None:
    base, part = of_part(TrainingRecipe()), of_part(PARTS[name])
    assert {key for key in base if not torch.equal(base[key], part[key])} == changed


@pytest.mark.parametrize("name", PARTS)
def test_gradients_stay_near_the_exact_ones(name: str) -> None:
    """Every part approximates the gradient of a linear layer, within the error of its rounding."""
    x, grad = gaussian(128, INPUTS, seed=1), gaussian(128, OUTPUTS, seed=2)
    layer = layer_of(replace(PARTS[name], estimator=WeightEstimator.STRAIGHT_THROUGH))
    got = results(layer, x, grad)
    exact = {"dgrad": grad @ layer.weight.detach(), "wgrad": grad.t() @ x}
    limit = 0.45 if name in ("luq", "radix4") else 0.25
    for key, gradient in exact.items():
        assert (got[key] - gradient).norm() < limit * gradient.norm(), key


@pytest.mark.parametrize("name", PARTS)
def test_an_unrounded_forward_product_keeps_the_gradients_of_a_rounded_one_but_for_the_estimator(name: str) -> None:
    x, grad = gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2)
    expected = of_part(replace(PARTS[name], estimator=WeightEstimator.STRAIGHT_THROUGH))
    layer = layer_of(PARTS[name])
    layer.phase = TrainingPhase.BACKWARD
    got = results(layer, x, grad)
    torch.testing.assert_close(got["output"], F.linear(x, layer.weight.detach(), layer.bias.detach()))
    assert torch.equal(got["dgrad"], expected["dgrad"]) and torch.equal(got["wgrad"], expected["wgrad"])


def test_outliers_lower_the_error_of_heavy_tailed_inputs() -> None:
    x = gaussian(TOKENS, INPUTS, seed=1) * gaussian(TOKENS, INPUTS, seed=5).mul(1.5).exp()
    grad = gaussian(TOKENS, OUTPUTS, seed=2)
    errors = {}
    for name in ("default", "outliers"):
        layer = layer_of(PARTS[name])
        got = results(layer, x, grad)
        weight = value(reference.quantize(layer.weight.detach(), Rule.STATIC6, tile_rows=16))
        exact = x.double() @ weight.t() + layer.bias.detach()
        errors[name] = (got["output"] - exact).norm().item()
    assert errors["outliers"] < 0.7 * errors["default"]


# randomness


@pytest.mark.parametrize("name", PARTS)
def test_a_step_is_a_function_of_its_seeds(name: str) -> None:
    layer, x, grad = layer_of(PARTS[name]), gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2)
    first, again = results(layer, x, grad), results(layer, x, grad)
    assert all(torch.equal(first[key], again[key]) for key in first)
    layer.seeds += 1
    other = results(layer, x, grad)
    assert torch.equal(first["output"], other["output"])
    for key in ("dgrad", "wgrad"):
        assert torch.equal(first[key], other[key]) == (name in DETERMINISTIC), key


def means(recipe: TrainingRecipe, x: Tensor, grad: Tensor, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the means of dgrad and wgrad over seeds, and their standard errors."""
    layer = layer_of(recipe, x.shape[1], grad.shape[1])
    total, squares = {}, {}
    for _ in range(count):
        got = results(layer, x, grad)
        layer.seeds += 1
        for key in ("dgrad", "wgrad"):
            total[key] = total.get(key, 0) + got[key].double()
            squares[key] = squares.get(key, 0) + got[key].double().square()
    mean = {key: part / count for key, part in total.items()}
    return mean, {key: ((squares[key] / count - mean[key].square()).clamp_min(0) / count).sqrt() for key in mean}


def test_the_mean_of_luq_gradients_is_that_of_unrounded_gradients() -> None:
    recipe = TrainingRecipe(gradients=GradientRounding.LUQ, hadamard_points=0)
    x, grad = gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2).mul(2).exp()
    mean, standard_error = means(recipe, x, grad, 600)
    weight = value(reference.quantize(layer_of(recipe).weight.detach(), Rule.STATIC6, tile_rows=16))
    across = value(reference.quantize(F.pad(x.t(), (0, 8))))
    expected = {"dgrad": grad.double() @ weight, "wgrad": F.pad(grad.t(), (0, 8)).double() @ across.t()}
    for key, exact in expected.items():
        z = (mean[key] - exact) / (standard_error[key] + 1e-7)
        # of n standard normal numbers the squares have mean 1 with a standard error of sqrt(2 / n)
        assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5 + 0.05, key
        assert z.abs().max() < 5, key


@pytest.mark.parametrize("source", BackwardOperands)
def test_the_mean_of_ms_eden_gradients_is_within_one_percent(source: BackwardOperands) -> None:
    recipe = replace(MS_EDEN, backward_operands=source, tiles=False)
    x, grad = gaussian(128, 128, seed=1), gaussian(128, 128, seed=2)
    mean, _ = means(recipe, x, grad, 400)
    weight = layer_of(recipe, 128, 128).weight.detach()
    if source is DEQUANTIZED:
        weight, x = value(reference.quantize(weight, Rule.STATIC6)), value(reference.quantize(x))
    exact = {"dgrad": grad.double() @ weight.double(), "wgrad": grad.double().t() @ x.double()}
    for key, gradient in exact.items():
        # an error of 14 % per draw leaves 0.7 % after 400
        assert (mean[key] - gradient).norm() < 0.01 * gradient.norm(), key
        assert abs((mean[key] * gradient).sum() / gradient.square().sum() - 1) < 0.003, key


# use


@pytest.mark.parametrize("name", PARTS)
def test_recomputation_under_autocast_gives_the_same_bits(name: str) -> None:
    layer, x, grad = layer_of(PARTS[name]), gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2)
    grads = []
    for recomputes in (False, True):
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = checkpoint(layer, leaf, use_reentrant=False) if recomputes else layer(leaf)
        assert isinstance(output, Tensor) and output.dtype == torch.bfloat16
        output.backward(grad.bfloat16())
        assert leaf.grad is not None and layer.weight.grad is not None
        grads.append((leaf.grad, layer.weight.grad))
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


@pytest.mark.parametrize("name", PARTS)
def test_a_frozen_weight_gets_no_gradient_and_inputs_the_same(name: str) -> None:
    layer, x, grad = layer_of(PARTS[name]), gaussian(TOKENS, INPUTS, seed=1), gaussian(TOKENS, OUTPUTS, seed=2)
    expected = results(layer, x, grad)
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    leaf = x.detach().requires_grad_()
    output = layer(leaf)
    output.backward(grad)
    assert torch.equal(output.detach(), expected["output"]) and layer.weight.grad is None
    assert leaf.grad is not None and torch.equal(leaf.grad, expected["dgrad"])


@pytest.mark.parametrize("name", PARTS)
def test_no_part_reads_a_number_on_the_host(name: str) -> None:
    """On a GPU that would make the host wait, and a CUDA graph could not record it. A fake tensor has no numbers."""
    recipe = without_host_draws(PARTS[name]).encode()
    x, weight, grad = (
        gaussian(TOKENS, INPUTS, seed=1),
        gaussian(OUTPUTS, INPUTS, seed=0),
        gaussian(TOKENS, OUTPUTS, seed=2),
    )

    def step(x: Tensor, weight: Tensor, grad: Tensor, seeds: Tensor, none: Tensor) -> None:
        _, *kept = operators.product._init_fn(x, weight, none, seeds, recipe, True, True)
        operators._product_backward._init_fn(grad, weight, none, *kept, seeds, recipe, True)

    # once with numbers, since tables that are built in the first call are kept
    step(x, weight, grad, SEEDS, NONE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step(*(mode.from_tensor(tensor) for tensor in (x, weight, grad, SEEDS, NONE)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", PARTS)
def test_the_kernels_give_the_bits_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("longvideo.kernels.nvfp4.triton")
    recipe = without_host_draws(PARTS[name]).encode()
    x, grad = (gaussian(TOKENS, width, seed=width).bfloat16() for width in (INPUTS, OUTPUTS))
    weight, steps = gaussian(OUTPUTS, INPUTS, seed=0), []
    for operations in (reference, kernels):
        for module in (operators, backward_products):
            monkeypatch.setattr(module, "nvfp4_operations", lambda _device, own=operations: own)
        output, *kept = operators.product._init_fn(x, weight, NONE, SEEDS, recipe, True, True)
        steps.append((output, *operators._product_backward._init_fn(grad, weight, NONE, *kept, SEEDS, recipe, True)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*steps, strict=True))


@pytest.mark.parametrize("name", PARTS)
def test_the_operators_are_described_as_they_are(name: str) -> None:
    """A compiled graph relies on the shapes that an operator declares."""
    recipe = PARTS[name].encode()
    x, weight = gaussian(TOKENS, INPUTS, seed=1), gaussian(OUTPUTS, INPUTS, seed=0)
    torch.library.opcheck(
        operators.product, (x.requires_grad_(), weight.requires_grad_(), NONE, SEEDS, recipe, True, True)
    )
    x, weight = x.detach(), weight.detach()
    _, *kept = operators.product(x, weight, NONE, SEEDS, recipe, True, True)
    grad = gaussian(TOKENS, OUTPUTS, seed=2)
    torch.library.opcheck(operators._product_backward, (grad, weight, NONE, *kept, SEEDS, recipe, True))


@pytest.mark.parametrize("name", PARTS)
def test_three_steps_of_training_lower_the_loss(name: str) -> None:
    layer, x = layer_of(PARTS[name]), gaussian(128, INPUTS, seed=1)
    target = x @ gaussian(OUTPUTS, INPUTS, seed=4).t() * 0.1
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        layer.seeds += 1
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True), losses
