"""Sum, norm and modulation in one pass: the kernel against its definition, and the definition against the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.kernels.norm import reference
from longvideo.model.transformer import ModulatedNorm, RMSNorm, add_gated
from tests.golden import relative_error

BATCH, FRAMES, LENGTH = 2, 3, 12
EPS = 1e-6
NAN = float("nan")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return h, update, gate, multiplier, shift; the last three are parts of one table."""
    generator = torch.Generator().manual_seed(0)
    h, update = 3 * torch.randn(2, BATCH, LENGTH, dim, generator=generator)
    gate, multiplier, shift = torch.randn(BATCH, FRAMES, 3, dim, generator=generator).to(device).unbind(2)
    return h.to(device, dtype), update.to(device, dtype), gate, multiplier, shift


@pytest.mark.parametrize("dim", [64, 48])
@pytest.mark.parametrize("modulated", [True, False])
def test_the_kernel_equals_the_definition(dim: int, modulated: bool, device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.norm import triton as kernels

    h, update, gate, multiplier, shift = inputs(dim, device, torch.bfloat16)
    factors = (gate, multiplier, shift) if modulated else (None, multiplier[0, 0], shift[0, 0])
    results = []
    for operations in (kernels, reference):
        total, out = h.clone(), torch.full_like(h, NAN)
        operations.add_norm(total, update, *factors, out, eps=EPS)
        results.append((total, out))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[0][1].float(), results[1][1].float()) < 2e-3
    total = h.clone()
    kernels.add_norm(total, update, factors[0], None, None, None, eps=EPS)
    assert torch.equal(total, results[1][0])
    with_bias, expected = h.clone(), h.clone()
    kernels.add_norm(with_bias, update, factors[0], None, None, None, eps=EPS, bias_D=shift[0, 0])
    reference.add_norm(expected, update, factors[0], None, None, None, eps=EPS, bias_D=shift[0, 0])
    assert relative_error(with_bias.float(), expected.float()) < 2e-3 and not torch.equal(with_bias, total)


@pytest.mark.parametrize("dim", [64, 48])
def test_rounded_rows_equal_the_definition(dim: int, device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.norm import triton as kernels

    h, update, gate, multiplier, shift = inputs(dim, device, torch.bfloat16)
    expected = torch.empty_like(h, dtype=torch.float32)
    reference.add_norm(h.clone(), update, gate, multiplier, shift, expected, eps=EPS)
    for operations in (kernels, reference):
        out = torch.zeros_like(h, dtype=torch.float8_e4m3fn)
        scales = torch.full((BATCH, LENGTH), NAN, device=device)
        operations.add_norm(h.clone(), update, gate, multiplier, shift, out, scales, eps=EPS)
        assert torch.allclose(scales, expected.abs().amax(-1) / 448, rtol=1e-4)
        # half a step with three bits of mantissa, or half the smallest step
        error = (out.float() * scales[..., None] - expected).abs()
        assert (error <= expected.abs() / 16 * 1.001 + scales[..., None] * 2**-10).all()


def test_a_token_of_zeros_has_scale_one(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.norm import triton as kernels

    h = torch.zeros(1, 2, 16, device=device, dtype=torch.bfloat16)
    zero = torch.zeros(16, device=device)
    for operations in (kernels, reference):
        out, scales = torch.ones_like(h).to(torch.float8_e4m3fn), torch.full((1, 2), NAN, device=device)
        operations.add_norm(h, None, None, zero, zero, out, scales, eps=EPS)
        assert (scales == 1).all() and (out.float() == 0).all()


def test_rms_norm_of_strided_tokens_equals_the_definition(device: str) -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.norm import triton as kernels

    h, update, _, multiplier, _ = inputs(48, device, torch.bfloat16)
    x = torch.cat((h, update), dim=-1)[..., :48]
    got, expected = torch.full_like(h, NAN), torch.empty_like(h, dtype=torch.float32)
    kernels.rms_norm(x, multiplier[0, 0], got, eps=EPS)
    reference.rms_norm(x, multiplier[0, 0], expected, eps=EPS)
    assert relative_error(got.float(), expected) < 3e-3


def test_definition_is_what_the_model_does() -> None:
    h, update, gate, multiplier, shift = inputs(48, "cpu", torch.float32)
    expected = add_gated(h, update, gate[:, :, None])
    normed = ModulatedNorm(48, EPS)(expected, shift[:, :, None], multiplier[:, :, None] - 1)
    out = torch.empty_like(h)
    reference.add_norm(h, update, gate, multiplier, shift, out, eps=EPS)
    assert relative_error(h, expected) < 1e-6 and relative_error(out, normed) < 1e-6
    norm = RMSNorm(48, EPS)
    norm.weight.data = multiplier[0, 0]
    reference.rms_norm(h, multiplier[0, 0], out, eps=EPS)
    assert relative_error(out, norm(h).detach()) < 1e-6


def test_shapes_that_do_not_match_are_refused() -> None:
    pytest.importorskip("triton")
    from longvideo.kernels.norm import triton as kernels

    h, update, gate, multiplier, shift = inputs(48, "cpu", torch.float32)
    out = torch.empty_like(h)
    with pytest.raises(ValueError, match="update is"):
        kernels.add_norm(h, update[:, 1:], gate, multiplier, shift, out, eps=EPS)
    with pytest.raises(ValueError, match="multiplier is"):
        kernels.add_norm(h, update, gate, multiplier[:, 1:], shift, out, eps=EPS)
    with pytest.raises(ValueError, match="scales"):
        kernels.add_norm(h, update, gate, multiplier, shift, out.to(torch.float8_e4m3fn), eps=EPS)
