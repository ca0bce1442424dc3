"""The Triton kernels of the video decoder equal their definition, in the interpreter or on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.kernels.vae import reference
from longvideo.kernels.vae.format import FP8Kernel
from tests.golden import relative_error

pytest.importorskip("triton")
from longvideo.kernels.vae import triton as kernels

NAN = float("nan")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def slots(batch: int, frames: int, *rest: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a buffer with two more frames in front, and the part after them."""
    buffer = torch.full((batch, frames + 2, *rest), NAN, device=device, dtype=dtype)
    return buffer, buffer[:, 2:]


def agrees(got: Tensor, expected: Tensor) -> bool:
    """Return whether a result is the rounded one of float32."""
    return relative_error(got.float(), expected) < (1e-6 if got.dtype == torch.float32 else 2e-3)


# 40 channels are not a power of two, and 600 pixels do not fill a program
@pytest.mark.parametrize(("grid", "channels"), [((2, 10, 30), 40), ((1, 3, 5), 256)])
@pytest.mark.parametrize("operands", ["bias", "x", "bias x", "x in place", "total alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sum_and_norm(
    grid: tuple[int, int, int], channels: int, operands: str, dtype: torch.dtype, device: str
) -> None:
    shape = (2, *grid, channels)
    h, x = (random(*shape, seed=seed, device=device, dtype=dtype) for seed in range(2))
    bias, gamma = (random(channels, seed=seed, device=device, dtype=dtype) for seed in (2, 3))
    h[0, 0, 0, 0], x[0, 0, 0, 0] = 0, 0  # a pixel of length 0 stays 0, without its bias
    results = []
    for operations, kept in ((kernels, dtype), (reference, torch.float32)):
        (buffer, out), (_, total) = (slots(*shape, device=device, dtype=kept) for _ in range(2))
        mine = h.to(kept, copy=True)
        total = mine if operands == "x in place" else total
        operations.add_norm_silu(
            mine,
            bias.to(kept) if "bias" in operands or operands == "total alone" else None,
            x.to(kept) if "x" in operands else None,
            total,
            None if operands == "total alone" else gamma.to(kept),
            None if operands == "total alone" else out,
        )
        assert buffer[:, :2].isnan().all()
        results.append((total, out))
    (total, out), (wanted_total, wanted_out) = results
    assert torch.equal(total, wanted_total.to(dtype))
    assert out.isnan().all() if operands == "total alone" else agrees(out, wanted_out)


@pytest.mark.parametrize(
    ("frames", "times", "offsets"),
    [(2, 1, (1, 1, 1)), (4, 2, (1, 1, 1)), (4, 2, (2, 1, 1)), (2, 1, (1, 2, 1)), (4, 2, (2, 2, 2)), (1, 2, (2, 1, 1))],
)
def test_upsampling(frames: int, times: int, offsets: tuple[int, int, int], device: str) -> None:
    batch, height, width, channels = 2, 3, 5, 24
    sources = -(-frames // times)
    surplus = offsets[0] * offsets[1] * offsets[2]
    folded = random(batch, frames, height + 1, width + 1, 4 * channels, device=device)
    x = random(batch, sources, height, width, surplus * channels, seed=1, device=device)
    bias, gamma = random(channels, seed=2, device=device), random(channels, seed=3, device=device)
    results = []
    for operations, dtype in ((kernels, torch.bfloat16), (reference, torch.float32)):
        buffer, out = slots(batch, frames, 2 * height, 2 * width, channels, device=device, dtype=dtype)
        total = torch.full_like(out, NAN).contiguous()
        operands = (folded.to(dtype), bias.to(dtype), x.to(dtype), offsets, times, total, gamma.to(dtype), out)
        operations.upsample_add_norm_silu(*operands)
        assert buffer[:, :2].isnan().all()
        results.append((total, out))
    assert relative_error(results[0][0].float(), results[1][0]) < 2e-3
    assert agrees(results[0][1], results[1][1])


@pytest.mark.parametrize("patch", [1, 2])
def test_pixels(patch: int, device: str) -> None:
    packed = random(2, 3, 4, 5, 3 * patch**2, device=device)
    packed[0, 0, 0, 0] = 1 / 255  # half way between two steps
    bias = torch.zeros(3 * patch**2, device=device, dtype=torch.bfloat16)
    results = []
    for operations in (kernels, reference):
        out = torch.empty(2, 3, patch * 4, patch * 5, 3, dtype=torch.uint8, device=device)
        operations.to_pixels(packed, bias, patch, out)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert 0 in results[0] and 255 in results[0]


def test_activations_that_do_not_fit_are_refused(device: str) -> None:
    h = random(1, 2, 3, 4, 8, device=device)
    with pytest.raises(ValueError, match=r"x is \[1, 2, 3, 4, 4\]; expected \[1, 2, 3, 4, 8\]"):
        kernels.add_norm_silu(h, None, h[..., :4], None)
    with pytest.raises(ValueError, match="expected contiguous pixels"):
        kernels.add_norm_silu(h, None, None, h.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize("size", [(3, 3, 3), (1, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 48), (144, 272)])
def test_a_convolution_of_e4m3_at_every_pixel(
    size: tuple[int, int, int], channels: int, outputs: int, device: str
) -> None:
    batch, frames, height, width = 2, 2, 7, 9
    inputs = random(batch, frames + size[0], height, width, channels, device=device).to(torch.float8_e4m3fn)
    kernel = FP8Kernel.quantize(random(outputs, channels, *size, seed=1, device=device), bound=448.0)
    results = []
    for operations in (kernels, reference):
        out = torch.full((batch, frames, height - size[1] + 1, width - size[2] + 1, outputs), NAN, device=device)
        operations.convolve(inputs, frames, kernel, out)
        results.append(out)
    got, expected = results
    deviation = expected.square().mean().sqrt()
    # tensor cores keep about 14 bits of each sum
    assert (got - expected).abs().max() < (4e-2 if device == "cuda" else 1e-5) * deviation
    assert relative_error(got, expected) < (5e-3 if device == "cuda" else 1e-6)
    again = torch.empty_like(got)
    kernels.convolve(inputs, frames, kernel, again)
    assert torch.equal(again, got)


def test_a_convolution_refuses_what_does_not_fit(device: str) -> None:
    kernel = FP8Kernel.quantize(random(8, 16, 3, 3, 3, device=device), bound=448.0)
    inputs = torch.zeros(1, 4, 6, 6, 16, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"at least 5 frames, and out \[1, 3, 4, 4, 8\]"):
        kernels.convolve(inputs, 3, kernel, torch.empty(1, 3, 4, 4, 8, device=device))
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.convolve(inputs, 2, kernel, torch.empty(1, 2, 4, 8, 4, device=device).transpose(3, 4))
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        FP8Kernel.quantize(random(8, 12, 3, 3, 3, device=device), bound=1.0)


def framed(*shape: int, device: str) -> tuple[Tensor, Tensor]:
    """Return a buffer of E4M3 with pixels around each frame, and the part inside."""
    batch, frames, height, width, channels = shape
    buffer = torch.full((batch, frames, height + 2, width + 2, channels), 3.0, device=device).to(torch.float8_e4m3fn)
    return buffer, buffer[:, :, 1:-1, 1:-1]


def assert_framed(buffer: Tensor, expected: Tensor) -> None:
    """Check that values differ at most by one step of E4M3, and that nothing is written around a frame."""
    inside = buffer.float()[:, :, 1:-1, 1:-1]
    assert (inside - expected.float()).abs().max() <= expected.float().abs().max() / 8
    assert relative_error(inside, expected.float()) < 4e-3
    frame = buffer.float().clone()
    frame[:, :, 1:-1, 1:-1] = 3
    assert (frame == 3).all()


def test_a_norm_in_e4m3_between_the_zeros_of_a_convolution(device: str) -> None:
    shape = (2, 3, 5, 7, 40)
    h, gamma = random(*shape, device=device), random(40, seed=3, device=device)
    buffer, out = framed(*shape, device=device)
    kernels.add_norm_silu(h, None, None, None, gamma, out, 16.0)
    _, expected = framed(*shape, device=device)
    reference.add_norm_silu(h.float(), None, None, None, gamma.float(), expected, 16.0)
    assert_framed(buffer, expected)
    folded, x = random(2, 3, 4, 5, 160, device=device), random(2, 3, 3, 4, 40, seed=1, device=device)
    bias, total = random(40, seed=2, device=device), random(2, 3, 6, 8, 40, device=device)
    buffer, out = framed(*total.shape, device=device)
    kernels.upsample_add_norm_silu(folded, bias, x, (1, 1, 1), 1, total, gamma, out, 16.0)
    _, expected = framed(*total.shape, device=device)
    own = (folded.float(), bias.float(), x.float(), (1, 1, 1), 1, total.float(), gamma.float())
    reference.upsample_add_norm_silu(*own, expected, 16.0)
    assert_framed(buffer, expected)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e4])
def test_quantizing_with_one_scale(factor: float, device: str) -> None:
    shape = (2, 3, 5, 7, 40)
    x = factor * random(*shape, device=device)
    buffer, out = framed(*shape, device=device)
    _, expected = framed(*shape, device=device)
    scale, expected_scale = kernels.quantize(x, out), reference.quantize(x, expected)
    assert torch.equal(scale, expected_scale)
    assert_framed(buffer, expected) if factor else torch.equal(out.float(), expected.float())
