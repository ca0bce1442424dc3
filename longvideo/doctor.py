"""What this machine can run: versions, and for every operation which backend would run and why not the others."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longvideo.kernels import backends
from longvideo.kernels.attention import cudnn_fp8
from longvideo.kernels.fp8 import scaled_mm as fp8_scaled_mm
from longvideo.kernels.nvfp4 import reference, scaled_mm, te
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import choose_w4a4

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "deepspeed",
    "transformer-engine",
    "safetensors",
    "av",
    "nvidia-cudnn-frontend",
)


@dataclass(frozen=True)
class Operation:
    """An operation, the backend that would run it, and for each other backend why it would not."""

    name: str
    backend: str
    rejected: dict[str, str]


@dataclass(frozen=True)
class Check:
    """One numeric check: what was measured against what bound."""

    name: str
    passed: bool
    measured: str


def machine(device: torch.device) -> dict[str, str]:
    """Describe processor, memory, GPUs and the versions of packages."""
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "device": str(device),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB,"
            f" compute capability {properties.major}.{properties.minor}"
        )
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def operations(device: torch.device) -> list[Operation]:
    """Say for every operation on a device what would run it."""
    no_triton, no_units = backends.triton_unavailable(device), scaled_mm.unavailable(device)
    no_te = te.unavailable(device)
    kernels = "reference" if no_triton else "triton"
    other = {"triton": no_triton} if no_triton else {"reference": "triton is faster and gives the same bits"}
    slower = "the FP4 units are faster"
    on_cpu = device.type == "cpu"
    no_fp8 = f"it needs a CUDA device, not {device.type}" if on_cpu else fp8_scaled_mm.unavailable(device)
    no_attention = cudnn_fp8.unavailable(device)
    products = "reference" if on_cpu else "none" if no_fp8 else "torch scaled_mm"
    attention = "reference" if on_cpu else "none" if no_attention else "cuDNN frontend"
    return [
        Operation(
            "product of fp8 weights and inputs",
            products,
            {"torch scaled_mm": no_fp8} if no_fp8 else {"reference": "slower"},
        ),
        Operation(
            "attention in fp8", attention, {"cuDNN frontend": no_attention} if no_attention else {"reference": "slower"}
        ),
        Operation("quantise, dequantise", kernels, other),
        Operation("rebuild keys and values of a 4-bit cache", kernels, other),
        Operation("product of 4-bit weights", f"{kernels}, then {_dtype(device)} matmul", other),
        Operation(
            "product of 4-bit weights and inputs",
            "emulated" if no_units else "torch",
            {"torch": no_units} if no_units else {"emulated": slower},
        ),
        Operation(
            "training in NVFP4",
            "emulated" if no_te else "te, where it knows the recipe",
            {"te": no_te} if no_te else {"emulated": slower},
        ),
    ]


def self_test(device: torch.device) -> list[Check]:
    """Run small numeric checks on a device."""
    return [check(device) for check in CHECKS]


def _round_trip(device: torch.device) -> Check:
    x = _gaussian(device, 128, 256)
    operations = backends.nvfp4_operations(device)
    error = float((operations.dequantize(operations.quantize(x)) - x).norm() / x.norm())
    return Check("round trip of a Gaussian matrix", 0.08 < error < 0.095, f"relative error {error:.4f}, wanted 0.087")


def _kernels_equal_reference(device: torch.device) -> Check:
    operations, differing = backends.nvfp4_operations(device), 0
    for rule in Rule:
        x = _gaussian(device, 64, 256).bfloat16()
        got, wanted = operations.quantize(x, rule), reference.quantize(x, rule)
        differing += int((got.codes != wanted.codes).sum())
        differing += int((got.scales.view(torch.uint8) != wanted.scales.view(torch.uint8)).sum())
    return Check("kernels give the reference's bits", differing == 0, f"{differing} codes and scales differ")


def _product(device: torch.device) -> Check:
    x, weight = _gaussian(device, 64, 256), _gaussian(device, 96, 256, seed=1)
    layer = torch.nn.Linear(256, 96, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(choose_w4a4(device))
    got = packed(x.bfloat16()).double()
    operands = (reference.quantize(x.bfloat16()), packed.quantized_weight)
    a, b = (reference.dequantize(operand).double() for operand in operands)
    error = float((got - a @ b.t()).norm() / (a @ b.t()).norm())
    # two roundings to bfloat16, of relative size 2^-9 on average at most
    return Check("product of 4-bit operands", error < 2.0**-8, f"relative error {error:.1e}, wanted below 3.9e-03")


def _gradient(device: torch.device) -> Check:
    layer = torch.nn.Linear(64, 64, device=device)
    packed = NVFP4Linear.from_linear(layer)
    packed.set_product(choose_w4a4(device, backend="emulated"))
    x = _gaussian(device, 16, 64).requires_grad_()
    packed(x).square().sum().backward()
    norm = 0.0 if x.grad is None else float(x.grad.norm())
    return Check("gradient through a packed layer", norm > 0, f"norm {norm:.3g}, wanted more than 0")


def _cache(device: torch.device) -> Check:
    from longvideo.kernels.kv_dequant.format import QuantizedSlots

    operations = backends.kv_operations(device)
    slots = QuantizedSlots.allocate(slots=2, batch=1, tokens=32, heads=2, head_dim=64, device=device)
    keys, values = _gaussian(device, 2, 1, 32, 2, 64).unbind(0)
    operations.write_slot(slots, 1, keys, values)
    workspace = torch.zeros(2, 1, 2, 32, 2, 64, device=device)
    still = torch.ones(2, 32, 32, device=device), torch.zeros(2, 32, 32, device=device)
    which = torch.tensor([1], dtype=torch.int32, device=device)
    operations.rebuild(slots, which, *still, workspace[0], workspace[1])
    error = float((workspace[0, :, 1] - keys).norm() / keys.norm())
    return Check("keys through a 4-bit cache", error < 0.1, f"relative error {error:.4f}, wanted 0.087")


CHECKS: tuple[Callable[[torch.device], Check], ...] = (
    _round_trip,
    _kernels_equal_reference,
    _product,
    _gradient,
    _cache,
)


def _gaussian(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _dtype(device: torch.device) -> str:
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"
