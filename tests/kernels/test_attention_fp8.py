"""Attention on E4M3 operands: the error of its definition against float32, and of cuDNN's kernel against both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.attention.cudnn_fp8 import CudnnFP8Attention, unavailable
from longvideo.kernels.attention.reference import E4M3, E4M3_MAX, attend_fp8, to_e4m3
from tests.golden import relative_error

BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 2, 256, 512, 4, 128
# scale that keeps the outputs of `operands`, up to 5, in the range of E4M3
SCALE_OUT = 32.0


def operands(*, spread: float = 1.0, mean: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return Gaussian float32 q, k, v. spread: standard deviation of the logits. mean: mean of the channels of v."""
    generator = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(BATCH, QUERIES, HEADS, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, BATCH, KEYS, HEADS, HEAD_DIM, generator=generator)
    return q, k, v + mean * torch.randn(HEADS, HEAD_DIM, generator=generator)


def attend_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def test_rounding_all_operands_costs_less_than_8_percent() -> None:
    full = operands()
    q, k, v = (to_e4m3(x) for x in full)
    assert relative_error(attend_fp8(q, k, v, out_dtype=torch.float32), attend_float32(*full)) < 0.08


def test_rounding_probabilities_alone_costs_less_than_3_percent() -> None:
    q, k, v = (to_e4m3(x) for x in operands())
    got = attend_fp8(q, k, v, out_dtype=torch.float32)
    assert 0.01 < relative_error(got, attend_float32(q, k, v)) < 0.03


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, E4M3])
def test_one_key_gives_its_value(out_dtype: torch.dtype) -> None:
    q, k, v = (to_e4m3(x) for x in operands())
    got = attend_fp8(q, k[:, :1], v[:, :1], out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert torch.equal(got.float(), v[:, :1].float().expand(-1, QUERIES, -1, -1))


def test_the_scale_keeps_probabilities_below_the_smallest_e4m3() -> None:
    q = torch.ones(1, 1, 1, HEAD_DIM).to(E4M3)
    k = torch.stack((torch.zeros(HEAD_DIM), torch.full((HEAD_DIM,), -0.6875)))[None, :, None].to(E4M3)
    v = torch.stack((torch.zeros(HEAD_DIM), torch.ones(HEAD_DIM)))[None, :, None].to(E4M3)
    expected = attend_float32(q, k, v)
    assert 0 < expected.max() < torch.finfo(E4M3).smallest_normal / 16
    assert attend_fp8(q, k, v, scale_p=1.0, out_dtype=torch.float32).count_nonzero() == 0
    assert relative_error(attend_fp8(q, k, v, out_dtype=torch.float32), expected) < 2**-4


def test_an_output_beyond_e4m3_saturates() -> None:
    q, k, v = (to_e4m3(x) for x in operands())
    got = attend_fp8(q, k[:, :1], v[:, :1].float().abs() + 1, scale_out=1e4, out_dtype=E4M3)
    assert torch.equal(got.float(), torch.full(got.shape, E4M3_MAX))


def test_a_cpu_gets_the_reason() -> None:
    assert unavailable(torch.device("cpu")) == "FP8 attention needs a CUDA GPU, got device 'cpu'"
    with pytest.raises(ValueError, match="no FP8 attention on device 'cpu'.*needs a CUDA GPU"):
        CudnnFP8Attention(batch=1, query_tokens=1, key_tokens=1, heads=1, head_dim=HEAD_DIM, device=torch.device("cpu"))


@pytest.fixture
def cuda() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := unavailable(device):
        pytest.skip(reason)
    return device


def on(device: torch.device, *, capacity: int = KEYS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return E4M3 q, k, v on a device; k and v are views of storages with more tokens, which are NaN."""
    q, k, v = (to_e4m3(x).to(device) for x in operands(spread=2.0, mean=0.5, seed=seed))
    storage_k, storage_v = torch.full((2, BATCH, capacity, HEADS, HEAD_DIM), float("nan")).to(device, E4M3)
    storage_k[:, :KEYS].copy_(k)
    storage_v[:, :KEYS].copy_(v)
    return q, storage_k[:, :KEYS], storage_v[:, :KEYS]


def planned(q: Tensor, k: Tensor, v: Tensor) -> tuple[CudnnFP8Attention, Tensor]:
    """Return attention for these tensors, and an output filled with NaN."""
    attention = CudnnFP8Attention(
        batch=BATCH,
        query_tokens=QUERIES,
        key_tokens=KEYS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        device=q.device,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        scale_out=SCALE_OUT,
    )
    return attention, torch.full(q.shape, float("nan"), device=q.device).to(attention.out_dtype)


def defined(attention: CudnnFP8Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_fp8(q, k, v, scale_out=1 / attention.out_scale, out_dtype=attention.out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [KEYS, 3 * KEYS])
def test_cudnn_computes_the_definition(cuda: torch.device, capacity: int) -> None:
    q, k, v = on(cuda, capacity=capacity)
    attention, out = planned(q, k, v)
    attention(q, k, v, out)
    # blockwise maxima give 1.6e-2 with an E4M3 output; a uniform softmax gives 0.38
    assert relative_error(out.float(), defined(attention, q, k, v).float()) < 3e-2
    assert relative_error(out.float() * attention.out_scale, attend_float32(q, k, v)) < 5e-2


@pytest.mark.gpu
def test_a_recorded_call_reads_new_operands(cuda: torch.device) -> None:
    q, k, v = on(cuda, capacity=2 * KEYS)
    attention, out = planned(q, k, v)
    attention(q, k, v, out)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        attention(q, k, v, out)
    for kept, fresh in zip((q, k, v), on(cuda, seed=1), strict=True):
        kept.copy_(fresh)
    recorded.replay()
    eager = torch.empty_like(out)
    attention(q, k, v, eager)
    assert torch.equal(out.float(), eager.float())
    assert relative_error(out.float(), defined(attention, q, k, v).float()) < 3e-2


@pytest.mark.gpu
def test_a_call_refuses_other_tensors(cuda: torch.device) -> None:
    q, k, v = on(cuda)
    attention, out = planned(q, k, v)
    with pytest.raises(ValueError, match="k has shape"):
        attention(q, k[:, 1:], v, out)
    with pytest.raises(ValueError, match="q is torch.bfloat16"):
        attention(q.bfloat16(), k, v, out)


@pytest.mark.gpu
@pytest.mark.parametrize(("centered", "least", "most"), [(False, 0.02, 1.0), (True, 0.0, 0.01)])
def test_what_many_values_have_in_common_has_to_be_taken_off(
    cuda: torch.device, centered: bool, least: float, most: float
) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    keys, scale_out = 28160, 16.0
    q, k = (torch.randn(1, tokens, 8, HEAD_DIM, generator=generator, device=cuda) for tokens in (1024, keys))
    v = torch.randn(1, keys, 8, HEAD_DIM, generator=generator, device=cuda)
    v += torch.randn(1, 1, 8, HEAD_DIM, generator=generator, device=cuda)
    mean = v.mean(1, keepdim=True) if centered else torch.zeros_like(v[:, :1])
    attention = CudnnFP8Attention(
        batch=1, query_tokens=1024, key_tokens=keys, heads=8, head_dim=HEAD_DIM, device=cuda, scale_out=scale_out
    )
    out = torch.empty_like(q, dtype=attention.out_dtype)
    attention(to_e4m3(q), to_e4m3(k), to_e4m3(v - mean), out)
    got = out.float() * attention.out_scale + mean
    # 0.31 and 0.002 on an H200, whose FP8 products add with 13 bits of mantissa
    assert least < relative_error(got, attend_float32(q, k, v)) < most
