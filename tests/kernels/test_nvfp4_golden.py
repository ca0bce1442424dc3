"""The adaptive rules give the bits of the public four-over-six code, both the definition and the kernels.

`nvfp4_c.safetensors` holds six tensors and, in its header, the SHA-256 of the codes and swizzled scales that the public
code of LongLive 2.0 computes for them in float32 on a CPU. Many of their group scales are exact ties.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.codes import swizzle_scales
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.rounding import AMAX_SHIFT

FIXTURE = Path(__file__).parents[1] / "fixtures" / "nvfp4_c.safetensors"
INPUTS = load_file(FIXTURE)
with safe_open(FIXTURE, "pt") as file:
    DIGESTS = json.loads(file.metadata()["sha256"])
RULES = {"mse": Rule.ADAPTIVE, "mae": Rule.ADAPTIVE_ABS, "abs_max": Rule.ADAPTIVE_MAX}
TILES = {"1x16": 1, "16x16": GROUP}
# one program per tensor in the interpreter, which is slow; the usual size on a GPU
BLOCK_GROUPS = 64 if torch.cuda.is_available() else 2048
# the interpreter and the compiler exclude each other, so the kernels run in one of them
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def digest(quantized: NVFP4Tensor) -> str:
    parts = (quantized.codes, swizzle_scales(quantized.scales))
    return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()


def test_the_fixture_has_six_tensors_three_rules_and_two_grids() -> None:
    assert len(INPUTS) == 6
    assert set(DIGESTS) == {f"{name}.{rule}.{grid}" for name in INPUTS for rule in RULES for grid in TILES}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("grid", TILES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sorted(INPUTS))
def test_the_definition_has_the_codes_and_scales_of_the_public_code(
    name: str, rule: str, grid: str, device: str
) -> None:
    quantized = reference.quantize(INPUTS[name].to(device), RULES[rule], tile_rows=TILES[grid])
    assert digest(quantized) == DIGESTS[f"{name}.{rule}.{grid}"]


# the interpreter computes with numpy, which warns about overflow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sorted(INPUTS))
def test_the_kernel_has_the_codes_and_scales_of_the_public_code(name: str, rule: str, device: str) -> None:
    kernels = pytest.importorskip("longvideo.kernels.nvfp4.triton")
    quantized = kernels.quantize(INPUTS[name].to(device), RULES[rule], block_groups=BLOCK_GROUPS)
    assert digest(quantized) == DIGESTS[f"{name}.{rule}.1x16"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sorted(INPUTS))
def test_the_kernel_of_tiles_writes_out_the_values_of_the_public_code(name: str, rule: str, device: str) -> None:
    """The codes and scales of the definition, compared above, determine the values."""
    kernels = pytest.importorskip("longvideo.kernels.nvfp4.triton")
    operand = kernels.quantize_tiles_exact(INPUTS[name].to(device), RULES[rule])
    expected = reference.exact(reference.quantize(INPUTS[name], RULES[rule], tile_rows=GROUP))
    assert torch.equal(operand.values.cpu().view(torch.int16), expected.values.view(torch.int16))
    assert torch.equal(operand.tensor_scale.cpu(), expected.tensor_scale)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_rounds_every_largest_magnitude_as_the_definition_does(rule: str) -> None:
    """Each row has its own largest magnitude, so quotients are rounded in every way."""
    kernels = pytest.importorskip("longvideo.kernels.nvfp4.triton")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 16 * GROUP, generator=generator)
    amax = x.abs().amax(1, keepdim=True)
    expected = reference.quantize(x, RULES[rule], amax=amax)
    quantized = kernels.quantize(x.cuda(), RULES[rule], amax=amax.cuda())
    assert torch.equal(quantized.codes.cpu(), expected.codes)
    assert torch.equal(quantized.scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))


def test_one_correction_by_the_remainder_divides_every_number_correctly() -> None:
    """The compiled kernel replaces the division by 0.75; the result is exact for all mantissas of float32."""
    divisor = torch.tensor(Rule.ADAPTIVE.largest_product * AMAX_SHIFT)
    number = torch.arange(2**23, 2**24, dtype=torch.int64).float()
    reciprocal = 1 / divisor
    quotient = number * reciprocal
    remainder = fused(quotient, -divisor, number)
    assert torch.equal(remainder.float().double(), remainder), "the remainder is not a float32 number"
    assert divisor == 0.75
    assert torch.equal(fused(remainder, reciprocal, quotient).float(), number / divisor)


def fused(left: Tensor, right: Tensor, addend: Tensor) -> Tensor:
    """Return a x b + c with an exact product, which float64 holds."""
    return left.double() * right.double() + addend.double()
