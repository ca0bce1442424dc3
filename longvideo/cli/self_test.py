"""The backend of every operation on a device and why the others do not run, and numeric checks of the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longvideo.infer.fit.placement import pick_dtype
from longvideo.kernels import backends
from longvideo.kernels.fp8 import te as te_fp8
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4 import te as te_nvfp4
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import ProductBackend, choose_w4a4

H264_ENCODER = "libx264"
KERNEL_OPERATIONS = (
    "norms and rotation between a transformer's products",
    "norms and pixels between a decoder's convolutions",
    "product of fp8 weights and inputs",
    "quantize, dequantize",
    "rebuild keys and values of a 4-bit cache",
    "product of 4-bit weights",
    "product of 4-bit weights and inputs",
    "training in NVFP4",
)
EMULATED_FP8 = {"reference": "it is slow, and only for tests on a CPU: fp8-emulated"}

Finding = tuple[bool, str]
"""Whether a check passed, and the measured value with the expected one."""


@dataclass(frozen=True)
class Operation:
    """An operation and its backend.

    backend: name of the backend that runs the operation; "none" if no backend can. The backend "reference" is plain
    torch, the definition. rejected: reason why each other backend does not run it.
    """

    name: str
    backend: str
    rejected: dict[str, str]


@dataclass(frozen=True)
class Check:
    """The result of a numeric check. measured: the measured value and the expected one."""

    name: str
    passed: bool
    measured: str


def operations(device: torch.device) -> list[Operation]:
    """Return every operation with its backend on a device."""
    attention = backends.attention_backend("fp8", device)
    return [
        _attention(device),
        _operation("attention in fp8", attention, EMULATED_FP8),
        *_kernels(device),
        _video_encoding(),
    ]


def self_test(device: torch.device) -> list[Check]:
    """Run small numeric checks on a device. A check that cannot run has not passed."""
    checks = dict(CHECKS)
    if te_fp8.unavailable(device) is None:
        checks["layer of TransformerEngine in FP8"] = _te_layer_in_fp8
    if te_nvfp4.product_unavailable(device) is None:
        checks["product of 4-bit operands by TransformerEngine"] = partial(_product, backend="te")
        checks["layer of TransformerEngine in NVFP4"] = _te_layer_in_nvfp4
    return [_checked(name, check, device) for name, check in checks.items()]


def _kernels(device: torch.device) -> list[Operation]:
    """Return the operations that use Triton's kernels on CUDA, alone or together with other backends."""
    if device.type != "cuda":
        same = similar = {"triton": f"Triton kernels need a CUDA device, not {device.type}"}
    elif (reason := backends.missing_triton()) is not None:
        return [Operation(name, "none", {"triton": reason}) for name in KERNEL_OPERATIONS]
    else:
        same, similar = {"reference": "triton is faster and gives the same bits"}, {"reference": "slower"}
    kernels = backends.Backend(backends.kernels_on(device))
    emulated = {"emulated": "the FP4 units are faster"}
    answers = (
        (kernels, similar),
        (kernels, similar),
        (backends.product_backend("fp8", device), EMULATED_FP8),
        (kernels, same),
        (kernels, same),
        (backends.product_backend("nvfp4-weights", device), same),
        (backends.product_backend("nvfp4", device), emulated),
        (backends.training_backend(device), emulated),
    )
    return [_operation(name, *answer) for name, answer in zip(KERNEL_OPERATIONS, answers, strict=True)]


def _operation(name: str, backend: backends.Backend, others: dict[str, str]) -> Operation:
    """Return an operation. others: backends that run only if the device has no units, and why they do not run."""
    if backend.reason is None:
        return Operation(name, str(backend.name), others)
    rejected = {str(backend.native): backend.reason}
    if backend.is_emulated:
        return Operation(name, f"emulated by {backend.name}", rejected)
    return Operation(name, "none", rejected | others)


def _attention(device: torch.device) -> Operation:
    dtype = pick_dtype(device)
    choice = backends.torch_attention(device, dtype)
    if choice.name is None:
        return Operation("attention in bf16", "none", choice.rejected)
    suffix = "" if dtype == torch.bfloat16 else ", in fp32"
    return Operation("attention in bf16", choice.name + suffix, choice.rejected)


def _video_encoding() -> Operation:
    name = "H.264 of videos"
    try:
        import av
        from av.codec.codec import Codec, UnknownCodecError
    except ImportError as error:
        return Operation(name, "none", {"PyAV": f"{error}; pip install av"})
    try:
        Codec(H264_ENCODER, "w")
    except UnknownCodecError:
        reason = f"PyAV {av.__version__} was built without it; pip install --force-reinstall av"
        return Operation(name, "none", {H264_ENCODER: reason})
    return Operation(name, f"{H264_ENCODER} of PyAV {av.__version__}", {})


def _checked(name: str, check: Callable[[torch.device], Finding], device: torch.device) -> Check:
    try:
        return Check(name, *check(device))
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _round_trip(device: torch.device) -> Finding:
    x = _gaussian(device, 128, 256)
    operations = backends.nvfp4_operations(device)
    error = float((operations.dequantize(operations.quantize(x)) - x).norm() / x.norm())
    return 0.08 < error < 0.095, f"relative error {error:.4f}, expected 0.087"


def _kernels_equal_reference(device: torch.device) -> Finding:
    operations, differing = backends.nvfp4_operations(device), 0
    for rule in Rule:
        x = _gaussian(device, 64, 256).bfloat16()
        result, expected = operations.quantize(x, rule), reference.quantize(x, rule)
        differing += int((result.codes != expected.codes).sum())
        differing += int((result.scales.view(torch.uint8) != expected.scales.view(torch.uint8)).sum())
    return differing == 0, f"{differing} codes and scales differ"


def _product(device: torch.device, *, backend: ProductBackend | None = None) -> Finding:
    x, weight = _gaussian(device, 64, 256), _gaussian(device, 96, 256, seed=1)
    layer = torch.nn.Linear(256, 96, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(choose_w4a4(device, backend=backend))
    result = packed(x.bfloat16()).double()
    operands = (reference.quantize(x.bfloat16()), packed.quantized_weight)
    a, b = (reference.dequantize(operand).double() for operand in operands)
    error = float((result - a @ b.t()).norm() / (a @ b.t()).norm())
    # two roundings to bfloat16, each with a relative error of at most 2^-9 on average
    return error < 2.0**-8, f"relative error {error:.1e}, expected below 3.9e-03"


def _gradient(device: torch.device) -> Finding:
    layer = torch.nn.Linear(64, 64, device=device)
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(choose_w4a4(device, backend="emulated"))
    x = _gaussian(device, 16, 64).requires_grad_()
    packed(x).square().sum().backward()
    norm = 0.0 if x.grad is None else float(x.grad.norm())
    return norm > 0, f"norm {norm:.3g}, expected above 0"


def _te_layer_in_fp8(device: torch.device) -> Finding:
    # weights and inputs have 3 fractional bits, gradients 2
    return _errors_of_te_layer(device, te_fp8.current_recipe(), within=(0.05, 0.08))


def _te_layer_in_nvfp4(device: torch.device) -> Finding:
    return _errors_of_te_layer(device, te_nvfp4.recipe(), within=(0.16, 0.25))


def _errors_of_te_layer(device: torch.device, recipe: Any, *, within: tuple[float, float]) -> Finding:
    """Compare a layer's products with those in bf16. within: bounds of the relative error, forward and of gradients."""
    from longvideo.quantization.training.te_linear import TETrainingLinear

    plain = torch.nn.Linear(256, 128, device=device, dtype=torch.bfloat16)
    x, gradient, results = _gaussian(device, 64, 256), _gaussian(device, 64, 128, seed=1), list[list[torch.Tensor]]()
    for layer in (TETrainingLinear(plain, recipe), plain):
        leaf = x.bfloat16().requires_grad_()
        output = layer(leaf)
        gradients = torch.autograd.grad(output, (leaf, plain.weight), gradient.bfloat16())
        results.append([output.detach().float(), *(part.float() for part in gradients)])
    errors = [float((own - exact).norm() / exact.norm()) for own, exact in zip(*results, strict=True)]
    passed = all(0.001 < error < bound for error, bound in zip(errors, (within[0], within[1], within[1]), strict=True))
    measured = ", ".join(f"{error:.4f}" for error in errors)
    return passed, f"relative errors {measured}, expected below {within[0]}, and {within[1]} of gradients"


def _cache(device: torch.device) -> Finding:
    from longvideo.kernels.kv_dequant.format import QuantizedSlots

    operations = backends.kv_operations(device)
    slots = QuantizedSlots.allocate(slots=2, batch=1, tokens=32, heads=2, head_dim=64, device=device)
    keys, values = _gaussian(device, 2, 1, 32, 2, 64).unbind(0)
    operations.write_slot(slots, 1, keys, values)
    workspace = torch.zeros(2, 1, 2, 32, 2, 64, device=device)
    no_rotation = torch.ones(2, 32, 32, device=device), torch.zeros(2, 32, 32, device=device)
    which = torch.tensor([1], dtype=torch.int32, device=device)
    operations.rebuild(slots, which, *no_rotation, workspace[0], workspace[1])
    error = float((workspace[0, :, 1] - keys).norm() / keys.norm())
    return error < 0.1, f"relative error {error:.4f}, expected 0.087"


CHECKS: dict[str, Callable[[torch.device], Finding]] = {
    "round trip of a Gaussian matrix": _round_trip,
    "kernels give the reference's bits": _kernels_equal_reference,
    "product of 4-bit operands": _product,
    "gradient through a packed layer": _gradient,
    "keys through a 4-bit cache": _cache,
}


def _gaussian(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
