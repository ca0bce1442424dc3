"""A LoRA that is added to weights of few bits keeps its update."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint import packed
from longvideo.checkpoint.adapter_files import open_adapter
from longvideo.checkpoint.tensors import Weights
from longvideo.checkpoint.updates import StoredAdapter, merged, report_widened
from longvideo.kernels.nvfp4.format import Rule

LAYER = "blocks.0.ffn.0"


def adapter_of_size(weight: Tensor, share: float) -> tuple[StoredAdapter, Tensor]:
    """Return an adapter and its update. share: norm of the update relative to that of the weight."""
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    up *= share * weight.float().norm() / (up @ down).norm()
    pair = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    return open_adapter(Weights.of(pair)), up @ down


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("share", "most_lost"), [(0.057, 0.05), (0.017, 0.15), (0.006, 0.35)])
def test_an_update_survives_in_a_base_of_8_bits(
    dtype: torch.dtype, share: float, most_lost: float, caplog: pytest.LogCaptureFixture
) -> None:
    weight = (0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))).to(dtype)
    adapter, update = adapter_of_size(weight, share)
    with caplog.at_level(logging.WARNING):
        base = Weights.of({f"{LAYER}.weight": weight, "head.bias": weight[0]})
        result = merged(base, [adapter])
        report_widened(base, [adapter])
    assert result.read("head.bias").dtype == dtype
    sum_of_both = result.read(f"{LAYER}.weight")
    assert sum_of_both.dtype == torch.bfloat16
    exact = weight.float() + update
    assert (sum_of_both.float() - exact).norm() / update.norm() < most_lost
    # rounding to the dtype of the base would lose half of the largest of these updates and all of the smallest
    assert (exact.to(dtype).float() - exact).norm() / update.norm() > 0.5
    assert f"the 1 layers that the adapter updates become bf16; {str(dtype)[6:]} would" in caplog.text


def test_a_packed_base_and_one_of_16_bits(caplog: pytest.LogCaptureFixture) -> None:
    weight = (0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    adapter, update = adapter_of_size(weight, 0.1)
    base = Weights.of({f"{LAYER}.weight": weight})
    with caplog.at_level(logging.WARNING):
        assert merged(base, [adapter]).read(f"{LAYER}.weight").dtype == torch.bfloat16
        report_widened(base, [adapter])
        assert caplog.text == ""
        narrow = packed.pack(base, [LAYER], Rule.ADAPTIVE)
        result = merged(narrow, [adapter])
        report_widened(narrow, [adapter])
    assert result.infos.keys() == {f"{LAYER}.weight"} and result.read(f"{LAYER}.weight").dtype == torch.bfloat16
    assert "updates become bf16; NVFP4 would" in caplog.text
