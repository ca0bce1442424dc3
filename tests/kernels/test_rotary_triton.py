"""Norm, rotation and the write to the cache: the kernel against its definition, which equals the model."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from longvideo.kernels.rotary import reference
from longvideo.model.rope import Rope, rotate
from longvideo.model.transformer import RMSNorm
from tests.golden import relative_error

BATCH, TOKENS, SLOTS = 2, 5, 3
EPS = 1e-6
NAN = float("nan")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(heads: int, head_dim: int, device: str) -> Inputs:
    """Return q, k and v as parts of one product, the weights of the norms, and cosines and sines."""
    generator = torch.Generator().manual_seed(0)
    product = 3 * torch.randn(BATCH, TOKENS, 3, heads, head_dim, generator=generator)
    gains = 1 + torch.randn(2, heads * head_dim, generator=generator)
    angle = 6.3 * torch.rand(TOKENS, head_dim // 2, generator=generator)
    q, k, v = product.to(device, torch.bfloat16).unbind(2)
    gamma_q, gamma_k = gains.to(device)
    return q, k, v, gamma_q, gamma_k, angle.cos().to(device), angle.sin().to(device)


def outputs(heads: int, head_dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    cache = torch.full((2, BATCH, SLOTS, TOKENS, heads, head_dim), NAN, device=device, dtype=dtype)
    return torch.full((BATCH, TOKENS, heads, head_dim), NAN, device=device, dtype=dtype), cache[0], cache[1]


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 32), (3, 16)])
@pytest.mark.parametrize("slot", [0, 2])
def test_the_kernel_equals_the_definition(heads: int, head_dim: int, slot: int, device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.rotary import triton as kernels

    operands, where = inputs(heads, head_dim, device), torch.tensor(slot, device=device)
    got, expected = outputs(heads, head_dim, device, torch.bfloat16), outputs(heads, head_dim, device, torch.float32)
    kernels.norm_rotate_keep(*operands, where, *got, eps=EPS)
    reference.norm_rotate_keep(*operands, where, *expected, eps=EPS)
    assert relative_error(got[0].float(), expected[0]) < 3e-3
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert relative_error(mine[:, slot].float(), theirs[:, slot]) < 3e-3
        others = [index for index in range(SLOTS) if index != slot]
        assert mine[:, others].isnan().all()
    assert torch.equal(got[2][:, slot], operands[2])
    mean = operands[2].float().mean((0, 1)).contiguous()
    kernels.norm_rotate_keep(*operands, where, *got, eps=EPS, mean_NK=mean)
    assert relative_error(got[2][:, slot].float(), operands[2].float() - mean) < 3e-3


def test_definition_is_what_the_model_does() -> None:
    heads, head_dim = 4, 32
    q, k, v, gamma_q, gamma_k, cos, sin = inputs(heads, head_dim, "cpu")
    rotated, keys, values = outputs(heads, head_dim, "cpu", torch.float32)
    reference.norm_rotate_keep(q, k, v, gamma_q, gamma_k, cos, sin, torch.tensor(1), rotated, keys, values, eps=EPS)
    for x, gamma, got in ((q, gamma_q, rotated), (k, gamma_k, keys[:, 1])):
        norm = RMSNorm(heads * head_dim, EPS)
        norm.weight.data = gamma
        normed = norm(x.float().flatten(-2)).unflatten(-1, (heads, -1))
        expected = rotate(normed, Rope(cos[None, :, None], sin[None, :, None]))
        assert relative_error(got, expected.detach()) < 1e-6
    assert torch.equal(values[:, 1], v.float())


def test_shapes_that_do_not_match_are_refused() -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.rotary import triton as kernels

    q, k, v, gamma_q, gamma_k, cos, sin = inputs(4, 32, "cpu")
    slot = torch.tensor(0)
    rotated, keys, values = outputs(4, 32, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="keys is"):
        kernels.norm_rotate_keep(q, k, v, gamma_q, gamma_k, cos, sin, slot, rotated, keys[:, :, 1:], values, eps=EPS)
    with pytest.raises(ValueError, match="v is"):
        kernels.norm_rotate_keep(q, k, v[:, 1:], gamma_q, gamma_k, cos, sin, slot, rotated, keys, values, eps=EPS)
