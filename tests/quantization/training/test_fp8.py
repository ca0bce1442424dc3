"""Layers that train in FP8: their products, their scales, and the magnitudes that delayed scaling keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvideo.kernels.fp8.reference import quantize_tensor
from longvideo.quantization.training import fp8
from longvideo.quantization.training.fp8 import HISTORY, FP8Scaling, FP8TrainingLinear, next_step
from longvideo.quantization.training.phase import TrainingPhase
from tests.golden import relative_error

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def layer(scaling: FP8Scaling = FP8Scaling.CURRENT) -> FP8TrainingLinear:
    torch.manual_seed(0)
    return FP8TrainingLinear.from_linear(nn.Linear(48, 32), scaling=scaling)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    """Return a tensor rounded to FP8, in float64."""
    rounded = quantize_tensor(x, x.abs().amax() if amax is None else amax, dtype)
    return rounded.values.double() * rounded.scale.double()


def run(own: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    own.zero_grad()
    leaf = x.clone().requires_grad_()
    output = own(leaf)
    output.backward(grad)
    (weight,) = (parameter for parameter in own.parameters() if parameter.ndim == 2)
    assert leaf.grad is not None and weight.grad is not None
    return output.detach(), leaf.grad, weight.grad


def test_values_are_the_nearest_of_the_format_and_saturate() -> None:
    x = torch.tensor([1.0, -0.53, 1e-9, 0.0, 2.0])
    rounded = quantize_tensor(x, torch.tensor(1.0), E4M3)
    assert rounded.scale == 1 / 448
    assert rounded.values.tolist() == [448.0, -240.0, 0.0, 0.0, 448.0]
    assert quantize_tensor(x, torch.tensor(1.0), E5M2).values.tolist()[::4] == [57344.0, 57344.0]
    assert quantize_tensor(torch.zeros(3), torch.tensor(0.0), E4M3).scale == 1


@pytest.mark.parametrize("rows", [20, 33])
def test_products_are_those_of_rounded_operands(rows: int) -> None:
    own, x, grad = layer(), numbers(rows, 48, seed=1), numbers(rows, 32, seed=2) * 1e-6
    output, grad_x, grad_weight = run(own, x, grad)
    weight, bias = own.weight.detach(), own.bias.detach()
    torch.testing.assert_close(output.double(), exact(x, E4M3) @ exact(weight, E4M3).t() + bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_x.double(), exact(grad, E5M2) @ exact(weight, E4M3), atol=1e-11, rtol=1e-5)
    torch.testing.assert_close(grad_weight.double(), exact(grad, E5M2).t() @ exact(x, E4M3), atol=1e-10, rtol=1e-5)
    assert own.bias.grad is not None and torch.equal(own.bias.grad, grad.sum(0))


def test_the_error_against_float32_is_that_of_the_formats() -> None:
    x, grad = numbers(64, 48, seed=1), numbers(64, 32, seed=2)
    plain = nn.Linear(48, 32)
    plain.load_state_dict(layer().state_dict())
    for got, expected, bound in zip(run(layer(), x, grad), run(plain, x, grad), (0.04, 0.08, 0.08), strict=True):
        assert 1e-3 < relative_error(got, expected) < bound


def test_delayed_scaling_uses_the_largest_magnitude_of_earlier_steps() -> None:
    own, grad = layer(FP8Scaling.DELAYED), numbers(20, 32, seed=2)
    steps = [numbers(20, 48, seed=seed) * factor for seed, factor in ((3, 1.0), (4, 4.0), (5, 0.5))]
    for number, x in enumerate(steps):
        output, grad_x, _ = run(own, x, grad * 2**number)
        largest = torch.stack([earlier.abs().amax() for earlier in steps[: number or 1]]).amax()
        expected = exact(x, E4M3, largest) @ exact(own.weight.detach(), E4M3).t() + own.bias.detach()
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        gradient = exact(grad * 2**number, E5M2, grad.abs().amax() * 2 ** max(0, number - 1))
        torch.testing.assert_close(grad_x.double(), gradient @ exact(own.weight.detach(), E4M3), atol=1e-5, rtol=1e-5)
        own.amaxes.copy_(next_step(own.amaxes))
    assert own.amaxes[0, 1:4].tolist() == [float(x.abs().amax()) for x in reversed(steps)]


def test_magnitudes_stay_in_float32_in_a_model_in_bf16() -> None:
    own = layer(FP8Scaling.DELAYED)
    own.amaxes[:] = 1 + 2**-20
    own.bfloat16()
    assert own.weight.dtype == torch.bfloat16 and own.amaxes.dtype == torch.float32
    assert (own.amaxes == 1 + 2**-20).all()


def test_a_magnitude_leaves_the_history_after_its_steps() -> None:
    amaxes = torch.zeros(3, 1 + HISTORY)
    amaxes[:, 0] = 7.0
    for _ in range(HISTORY):
        amaxes = next_step(amaxes)
        assert amaxes.max() == 7.0 and not amaxes[:, 0].any()
    assert not next_step(amaxes).any()


def test_magnitudes_are_kept_over_passes_and_not_from_validation_or_infinity() -> None:
    own, grad = layer(FP8Scaling.DELAYED), numbers(20, 32, seed=2)
    with torch.no_grad():
        own(numbers(20, 48, seed=1))
    assert not own.amaxes.any()
    small, large = numbers(20, 48, seed=1), 3 * numbers(20, 48, seed=3)
    for x in (large, small):
        run(own, x, grad)
    assert own.amaxes[0, 0] == large.abs().amax() and own.amaxes[2, 0] == grad.abs().amax()
    run(own, torch.full((20, 48), torch.inf), grad)
    assert torch.isfinite(own.amaxes).all()


@pytest.mark.parametrize("scaling", FP8Scaling)
def test_recomputed_and_compiled_layers_give_the_same_bits_and_magnitudes(scaling: FP8Scaling) -> None:
    x, grad = numbers(20, 48, seed=1), numbers(20, 32, seed=2)
    results = []
    for kind in ("plain", "recomputed", "compiled"):
        own = layer(scaling)
        leaf = x.clone().requires_grad_()
        if kind == "recomputed":
            output = checkpoint(own, leaf, use_reentrant=False)
        else:
            output = own(leaf) if kind == "plain" else torch.compile(own, backend="aot_eager", fullgraph=True)(leaf)
        assert isinstance(output, Tensor)
        output.backward(grad)
        assert leaf.grad is not None and own.weight.grad is not None
        results.append((output.detach(), leaf.grad, own.weight.grad, own.amaxes))
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))
    assert results[0][3].any() == (scaling is FP8Scaling.DELAYED)


def test_the_forward_pass_alone_can_be_plain_and_both() -> None:
    x, grad = numbers(20, 48, seed=1), numbers(20, 32, seed=2)
    results = {}
    for phase in TrainingPhase:
        own = layer()
        own.phase = phase
        results[phase] = run(own, x, grad)
    rounded, mixed, plain = (
        results[phase] for phase in (TrainingPhase.BOTH, TrainingPhase.BACKWARD, TrainingPhase.NEITHER)
    )
    torch.testing.assert_close(mixed[0], plain[0])
    assert torch.equal(mixed[1], rounded[1]) and torch.equal(mixed[2], rounded[2])
    assert relative_error(rounded[0], plain[0]) > 1e-3


def test_autocast_rounds_inputs_but_not_weights_and_keeps_the_exact_sums() -> None:
    own, x = layer(), numbers(20, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = own(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, own(x.bfloat16()))


def test_sizes_that_the_units_cannot_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="the layer has 40 inputs and 32 outputs; expected multiples of 16"):
        FP8TrainingLinear(40, 32, scaling=FP8Scaling.CURRENT)


@pytest.mark.parametrize("delayed", [True, False])
def test_the_operators_are_described_as_they_are(delayed: bool) -> None:
    x, weight = numbers(20, 48, seed=1).requires_grad_(), numbers(32, 48, seed=2).requires_grad_()
    amaxes, history = (x.detach().abs().amax(), weight.detach().abs().amax()), torch.zeros(1 + HISTORY)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fp8._product, (x, weight, *amaxes, history, delayed, True, True), test_utils=checks)
    _, values = fp8._product(x.detach(), weight.detach(), *amaxes, history, delayed, True, True)
    arguments = (numbers(20, 32, seed=3), weight.detach(), values, *amaxes, history, delayed)
    torch.library.opcheck(fp8._product_backward, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 40])
@pytest.mark.parametrize("scaling", FP8Scaling)
def test_a_gpu_gives_the_products_of_the_cpu(scaling: FP8Scaling, rows: int) -> None:
    x, grad = numbers(rows, 48, seed=1).bfloat16(), numbers(rows, 32, seed=2).bfloat16()
    own = layer(scaling)
    expected = run(own, x, grad)
    moved = FP8TrainingLinear.from_linear(layer().cuda(), scaling=scaling)
    for got, value in zip(run(moved, x.cuda(), grad.cuda()), expected, strict=True):
        assert relative_error(got.cpu().float(), value.float()) < 4e-3
    assert torch.equal(moved.amaxes.cpu(), own.amaxes)
