"""A layer that is trained in 4 bits has the output of a packed layer, and the gradients of its rounded operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longvideo.kernels.nvfp4 import reference
from longvideo.quantization.convert import with_precision
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import choose_w4a4
from longvideo.quantization.straight_through import StraightThroughLinear, pack_layers, train_packed
from tests.golden import relative_error
from tests.quantization import small

PRODUCT = choose_w4a4(torch.device("cpu"))


def layer(*, bias: bool = True) -> tuple[StraightThroughLinear, nn.Linear]:
    """Return a layer and a plain one with the same weights in bfloat16."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias)
    plain = nn.Linear(48, 32, bias=bias)
    plain.load_state_dict({name: weight.bfloat16().float() for name, weight in linear.state_dict().items()})
    trained = StraightThroughLinear(linear, PRODUCT)
    trained.pack()
    return trained, plain


def inputs() -> Tensor:
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_that_of_a_packed_layer(bias: bool, dtype: torch.dtype) -> None:
    trained, plain = layer(bias=bias)
    packed = NVFP4Linear.from_linear(plain)
    packed.set_product(PRODUCT)
    x = inputs().to(dtype)
    assert torch.equal(trained(x), packed(x))
    with torch.no_grad():
        assert torch.equal(trained(x), packed(x))


def test_gradients_are_those_of_the_rounded_operands() -> None:
    trained, plain = layer()
    x = inputs().requires_grad_()
    grad = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    trained(x).backward(grad)
    rounded_x, rounded_weight = (reference.dequantize(reference.quantize(y.detach())) for y in (x, plain.weight))
    assert x.grad is not None and trained.weight.grad is not None and trained.bias.grad is not None
    assert relative_error(x.grad, grad @ rounded_weight) < 1e-6
    assert relative_error(trained.weight.grad, grad.flatten(0, 1).T @ rounded_x.flatten(0, 1)) < 1e-6
    assert relative_error(trained.bias.grad, grad.sum((0, 1))) < 1e-6
    # straight-through: the gradient of the rounded operands is not that of the originals
    assert relative_error(trained.weight.grad, grad.flatten(0, 1).T @ x.detach().flatten(0, 1)) > 1e-2


def test_a_changed_weight_counts_after_it_is_packed() -> None:
    trained, _ = layer()
    before = trained(inputs())
    with torch.no_grad():
        trained.weight.mul_(2)
    assert torch.equal(trained(inputs()), before)
    trained.pack()
    assert not torch.equal(trained(inputs()), before)
    with pytest.raises(RuntimeError, match="call its pack"):
        StraightThroughLinear(nn.Linear(16, 16), PRODUCT)(torch.ones(1, 16))


def test_a_model_in_training_computes_what_the_packed_model_computes() -> None:
    """With biases, norms and modulation as they are stored, too."""
    model = small.model()
    parameters = train_packed(model, PRODUCT)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in parameters.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    pack_layers(model)
    exported = small.model().bfloat16()
    exported.load_state_dict({name: x.bfloat16() for name, x in parameters.items()}, strict=False)
    # in float32, so that the test compares all bits of the sums
    exported = with_precision(exported.float(), "nvfp4")
    for name, weight in model.named_parameters():
        if not name.startswith("blocks."):
            weight.data = weight.data.bfloat16().float()
    assert torch.equal(small.velocity(model), small.velocity(exported))
    assert not torch.equal(small.velocity(model), small.velocity(with_precision(small.model(), "nvfp4")))


def test_all_parameters_of_the_blocks_are_trained_and_no_others() -> None:
    model = small.model()
    parameters = train_packed(model, PRODUCT)
    assert set(parameters) == {name for name, _ in small.model().named_parameters() if name.startswith("blocks.")}
    small.trained_velocity(model).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in parameters.values())
    own = {id(weight) for weight in parameters.values()}
    others = [weight for weight in model.parameters() if id(weight) not in own]
    assert others and all(weight.grad is None and not weight.requires_grad for weight in others)
