"""The Triton kernels of the 4-bit KV cache give the bits of the definition, in the interpreter or on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.kernels.kv_dequant import reference
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.kernels.nvfp4 import reference as nvfp4
from longvideo.kernels.nvfp4.format import NVFP4Tensor, Rule

pytest.importorskip("triton")
from longvideo.kernels.kv_dequant import triton as kernels

SLOTS = 4
NAN = float("nan")
# few and large programs, since the interpreter needs milliseconds for each
GROUPS = 256


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def keys_and_values(
    batch: int, tokens: int, heads: int, head_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Return keys with large means of their channels, and values of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, tokens, heads, head_dim, generator=generator)
    means = 5 * torch.randn(heads, head_dim, generator=generator)
    return (keys + means).to(dtype), (values * 1e-2).to(dtype)


def filled_slots(batch: int, tokens: int, heads: int, head_dim: int) -> QuantizedSlots:
    slots = QuantizedSlots.allocate(slots=SLOTS, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim)
    for slot in range(SLOTS):
        reference.write_slot(slots, slot, *keys_and_values(batch, tokens, heads, head_dim, seed=slot))
    return slots


def rotation(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(SLOTS, tokens, head_dim // 2, generator=torch.Generator().manual_seed(9)) * 6.3
    return angle.cos(), angle.sin()


def workspace(*shape: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    keys, values = torch.full((2, *shape), NAN, dtype=dtype, device=device).unbind(0)
    return keys, values


def pair_on(pair: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


def on(slots: QuantizedSlots, device: str) -> QuantizedSlots:
    return QuantizedSlots(*(getattr(slots, name).to(device) for name in slots.__dataclass_fields__))


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    """Assert equality, in which NaN equals NaN."""
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 5, 3), (2, 8, 4)])
def test_rebuilt_slots_have_the_bits_of_the_definition(
    head_dim: int, dtype: torch.dtype, batch: int, tokens: int, heads: int, device: str
) -> None:
    slots, turns = filled_slots(batch, tokens, heads, head_dim), rotation(tokens, head_dim)
    which = torch.tensor([2, 0], dtype=torch.int32)
    shape = (batch, SLOTS, tokens, heads, head_dim)
    expected, got = workspace(*shape, dtype=dtype), workspace(*shape, dtype=dtype, device=device)
    reference.rebuild(slots, which, *turns, *expected)
    kernels.rebuild(on(slots, device), which.to(device), *pair_on(turns, device), *got, block_tokens=8, block_heads=2)
    for a, b in zip(got, expected, strict=True):
        assert_same_numbers(a, b)
        assert a[:, [2, 0]].isfinite().all() and a[:, [1, 3]].isnan().all()


def test_a_launch_as_on_the_gpu_fills_all_slots(device: str) -> None:
    """The default blocks have 8 heads and 16 tokens per program, more than the tensors."""
    slots, turns = filled_slots(1, 3, 2, 64), rotation(3, 64)
    which = torch.arange(SLOTS, dtype=torch.int32)
    expected, got = (workspace(1, SLOTS, 3, 2, 64, dtype=torch.bfloat16, device=d) for d in ("cpu", device))
    reference.rebuild(slots, which, *turns, *expected)
    kernels.rebuild(on(slots, device), which.to(device), *pair_on(turns, device), *got)
    for a, b in zip(got, expected, strict=True):
        assert_same_numbers(a, b)


def test_a_workspace_may_be_part_of_a_larger_one(device: str) -> None:
    slots, turns = filled_slots(2, 5, 2, 32), rotation(5, 32)
    which = torch.tensor([1, 3], dtype=torch.int32)
    expected = workspace(2, SLOTS, 5, 2, 32, dtype=torch.bfloat16)
    reference.rebuild(slots, which, *turns, *expected)
    larger = torch.full((2, SLOTS + 1, 2, 7, 2, 32), NAN, dtype=torch.bfloat16, device=device)
    keys, values = larger[:, :SLOTS, :, :5].unbind(2)
    kernels.rebuild(on(slots, device), which.to(device), *pair_on(turns, device), keys, values, block_tokens=8)
    assert_same_numbers(keys, expected[0])
    assert_same_numbers(values, expected[1])
    assert larger[:, :, :, 5:].isnan().all() and larger[:, SLOTS].isnan().all()


def test_no_slots_rebuild_nothing(device: str) -> None:
    slots, turns = filled_slots(1, 2, 1, 32), rotation(2, 32)
    got = workspace(1, SLOTS, 2, 1, 32, dtype=torch.bfloat16, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    kernels.rebuild(on(slots, device), none, *pair_on(turns, device), *got)
    assert got[0].isnan().all() and got[1].isnan().all()


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("shape", [(1, 7, 3, 32), (2, 5, 2, 128)])
def test_written_slots_have_the_bits_of_the_definition(
    rule: Rule, shape: tuple[int, int, int, int], device: str
) -> None:
    batch, tokens, heads, head_dim = shape
    keys, values = keys_and_values(*shape)
    slots = on(filled_slots(*shape), device)
    before = on(slots, "cpu") if device == "cuda" else clone(slots)
    kernels.write_slot(slots, 2, keys.to(device), values.to(device), rule, block_groups=GROUPS)
    slots = on(slots, "cpu")

    mean = keys.float().mean(1)
    torch.testing.assert_close(slots.key_mean[2].float(), mean, rtol=2**-8, atol=1e-6)
    smoothed = keys.float() - slots.key_mean[2].float().unsqueeze(1)
    for kind, x in ((reference.KEYS, smoothed), (reference.VALUES, values.float())):
        expected = nvfp4.quantize(x, rule, amax=x.abs().amax((1, 2, 3), keepdim=True))
        assert torch.equal(slots.tensor_scale[kind, 2], expected.tensor_scale.flatten())
        assert torch.equal(slots.scales.view(torch.uint8)[kind, 2], expected.scales.view(torch.uint8))
        assert torch.equal(slots.codes[kind, 2], expected.codes)
    others = [0, 1, 3]
    assert torch.equal(slots.codes[:, others], before.codes[:, others])
    assert torch.equal(slots.scales.view(torch.uint8)[:, others], before.scales.view(torch.uint8)[:, others])
    assert torch.equal(slots.tensor_scale[:, others], before.tensor_scale[:, others])
    assert torch.equal(slots.key_mean[others], before.key_mean[others])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes the mean in another order than the CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slot_written_on_the_same_device_is_the_same(dtype: torch.dtype) -> None:
    expected = filled_slots(2, 6, 2, 64)
    got = clone(expected)
    chunk = keys_and_values(2, 6, 2, 64, seed=20, dtype=dtype)
    reference.write_slot(expected, 1, *chunk)
    kernels.write_slot(got, 1, *chunk, block_groups=GROUPS)
    for name in ("codes", "tensor_scale", "key_mean"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert torch.equal(got.scales.view(torch.uint8), expected.scales.view(torch.uint8))


def test_nan_spoils_one_sample_only(device: str) -> None:
    keys, values = keys_and_values(2, 4, 2, 32)
    values[1, 3, 1, 31] = NAN
    slots = on(filled_slots(2, 4, 2, 32), device)
    kernels.write_slot(slots, 0, keys.to(device), values.to(device), block_groups=GROUPS)
    assert slots.tensor_scale[:, 0].isnan().tolist() == [[False, False], [False, True]]


def test_a_slot_returns_what_was_written_to_it(device: str) -> None:
    """Without rotation, quantized and rebuilt keys and values are near the originals."""
    shape = (1, 6, 2, 64)
    keys, values = (x.to(device) for x in keys_and_values(*shape))
    slots = on(filled_slots(*shape), device)
    kernels.write_slot(slots, 3, keys, values, block_groups=GROUPS)
    cos, sin = torch.ones(SLOTS, 6, 32, device=device), torch.zeros(SLOTS, 6, 32, device=device)
    got = workspace(1, SLOTS, *shape[1:], dtype=torch.bfloat16, device=device)
    which = torch.tensor([3], dtype=torch.int32, device=device)
    kernels.rebuild(slots, which, cos, sin, *got, block_tokens=8, block_heads=2)
    smoothed = keys.float() - keys.float().mean(1, keepdim=True)
    for rebuilt, original, spread in ((got[0], keys, smoothed), (got[1], values, values)):
        error = (rebuilt[:, 3].float() - original.float()).norm() / spread.float().norm()
        assert error < 0.12


def test_what_does_not_fit_is_refused(device: str) -> None:
    slots = on(filled_slots(1, 4, 2, 32), device)
    keys, values = (x.to(device) for x in keys_and_values(1, 4, 2, 32))
    with pytest.raises(ValueError, match="values are"):
        kernels.write_slot(slots, 0, keys, values[:, :2])
    with pytest.raises(ValueError, match="contiguous"):
        kernels.write_slot(slots, 0, keys.transpose(1, 2).contiguous().transpose(1, 2), values)
    cos, sin = (x.to(device) for x in rotation(4, 32))
    space = workspace(1, SLOTS, 4, 2, 32, dtype=torch.bfloat16, device=device)
    which = torch.tensor([0], device=device)
    with pytest.raises(ValueError, match="expected int32"):
        kernels.rebuild(slots, which, cos, sin, *space)
    with pytest.raises(ValueError, match="cos is"):
        kernels.rebuild(slots, which.int(), cos[:, :3], sin, *space)
    with pytest.raises(ValueError, match="workspace of values"):
        kernels.rebuild(slots, which.int(), cos, sin, space[0], space[1][..., :16])
    odd = on(QuantizedSlots.allocate(slots=SLOTS, batch=1, tokens=4, heads=2, head_dim=96), device)
    with pytest.raises(ValueError, match="power of two"):
        kernels.rebuild(odd, which.int(), cos, sin, *space)


def test_codes_rebuilt_by_the_kernel_are_those_of_nvfp4(device: str) -> None:
    """Values are only dequantized, so both modules must give the same bits."""
    slots = filled_slots(1, 3, 2, 32)
    got = workspace(1, SLOTS, 3, 2, 32, dtype=torch.float32, device=device)
    which = torch.tensor([1], dtype=torch.int32, device=device)
    kernels.rebuild(on(slots, device), which, *pair_on(rotation(3, 32), device), *got, block_tokens=4)
    tensor_scale = slots.tensor_scale[reference.VALUES, 1][:, None, None, None]
    expected = nvfp4.dequantize(
        NVFP4Tensor(slots.codes[reference.VALUES, 1], slots.scales[reference.VALUES, 1], tensor_scale)
    )
    assert_same_numbers(got[1][:, 1], expected)


def clone(slots: QuantizedSlots) -> QuantizedSlots:
    return QuantizedSlots(*(getattr(slots, name).clone() for name in slots.__dataclass_fields__))
