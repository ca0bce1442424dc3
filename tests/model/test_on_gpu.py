"""Attention and its gradients on a GPU equal those of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longvideo.kernels.attention.sdpa import HOPPER, preferred_attention
from longvideo.model.attention import Blockwise, Masked
from longvideo.model.cache import visible_chunks
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import rope_from_positions
from tests.golden import relative_error
from tests.model import small

pytestmark = pytest.mark.gpu
HEADS, HEAD_DIM = 2, 32


@pytest.mark.parametrize("pattern", [Masked, Blockwise])
def test_training_attention_and_its_gradient_equal_the_dense_mask(pattern: type) -> None:
    spec = dataclasses.replace(small.SPEC, grid_height=5, grid_width=7, window_frames=6, sink_frames=2)
    layout, visible = TokenLayout.teacher_forcing(spec, 5), visible_chunks(spec, [False] * 5)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 2, layout.chunk_L.numel(), HEADS, HEAD_DIM, generator=generator)

    def run(device: str, chosen: type) -> tuple[torch.Tensor, torch.Tensor]:
        placed = layout.to(device)
        q, k, v, upstream = (x.to(device) for x in inputs.unbind(0))
        tracked = [x.requires_grad_() for x in (q, k, v)]
        out = chosen(placed, visible)(0, *tracked, rope_from_positions(placed.position_BL3, HEAD_DIM))
        (out * upstream).sum().backward()
        gradients = [x.grad for x in tracked if x.grad is not None]
        assert len(gradients) == 3
        return out.detach().cpu(), torch.stack(gradients).cpu()

    for got, expected in zip(run("cuda", pattern), run("cpu", Masked), strict=True):
        assert relative_error(got, expected) < 2e-3  # fp32 products may run in tf32 there


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < HOPPER, reason="needs Hopper or newer"
)
def test_preferred_attention_runs_on_cudnn_and_has_the_gradients_of_the_cpu() -> None:
    from torch.profiler import ProfilerActivity, profile

    layout = TokenLayout.teacher_forcing(dataclasses.replace(small.SPEC, grid_height=8, grid_width=8), 3)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 1, layout.chunk_L.numel(), HEADS, 128, generator=generator)

    def run(device: str, dtype: torch.dtype) -> torch.Tensor:
        q, k, v, upstream = (x.to(device, dtype) for x in inputs.unbind(0))
        for x in (q, k, v):
            x.requires_grad_()
        rope = rope_from_positions(layout.position_BL3.to(device), 128)
        (Blockwise(layout)(0, q, k, v, rope) * upstream).sum().backward()
        return torch.stack([x.grad.cpu().float() for x in (q, k, v) if x.grad is not None])

    expected = run("cpu", torch.float32)
    with preferred_attention(torch.device("cuda")), profile(activities=[ProfilerActivity.CUDA]) as recorded:
        got = run("cuda", torch.bfloat16)
    assert any("cudnn" in event.name for event in recorded.events() or [])
    assert relative_error(got, expected) < 0.02


@torch.no_grad()
def test_forward_in_fp32_equals_the_cpu() -> None:
    model, spec = small.model(), small.SPEC
    layout, text = TokenLayout.block_causal(spec, 2), small.features(2)
    latents, sigma = small.latents(2), torch.rand(1, 2 * spec.chunk_frames)

    def run(device: str) -> torch.Tensor:
        placed, on_device = layout.to(device), model.to(device)
        context, rope = on_device.encode_text(text.to(device)), on_device.rope(placed)
        attention = Blockwise(placed)
        return on_device(latents.to(device), sigma.to(device), context, rope=rope, attention=attention).cpu()

    expected = run("cpu")
    assert relative_error(run("cuda"), expected) < 1e-3
