"""The placement of a pipeline: defaults, device indices, data types, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longvideo.errors import UserError
from longvideo.infer.fit.placement import Placement, pick_dtype
from tests.infer.workloads import CPU, FIRST, SECOND


def test_without_a_decode_device_one_device_does_everything() -> None:
    assert Placement.choose("cpu") == Placement(CPU, CPU, 0.0, None)


def test_without_an_index_cuda_is_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in (None, "cuda", torch.device("cuda")):
        assert Placement.choose(device) == Placement(SECOND, SECOND)
    assert Placement.choose("cuda", "cuda:0", 0.25) == Placement(SECOND, FIRST, 0.25)
    with pytest.raises(
        UserError, match="device 'cuda:2' does not exist: .* has 2 CUDA devices; use cpu or one of cuda:0"
    ):
        Placement.choose("cuda:2")


def test_each_device_has_its_own_data_type_unless_one_is_chosen() -> None:
    mixed = Placement(CPU, FIRST)
    assert (mixed.denoise_dtype, mixed.decoder_dtype("auto")) == (pick_dtype(CPU), torch.bfloat16)
    exact = Placement(CPU, FIRST, dtype=torch.float32)
    assert exact.denoise_dtype == exact.decoder_dtype("auto") == torch.float32
    assert exact.decoder_dtype("bf16") == exact.decoder_dtype("fp8") == torch.bfloat16
    assert mixed.decoder_dtype("fp32") == torch.float32


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), True, "a"])
def test_a_share_outside_its_range_is_refused(share: Any) -> None:
    with pytest.raises(UserError, match=f"decode_share is {share!r}; expected a number from 0 to below 1"):
        Placement(FIRST, SECOND, share)


@pytest.mark.parametrize(("device", "decode_device"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_device_does_not_share_with_itself(device: str, decode_device: str) -> None:
    with pytest.raises(UserError, match=f"decode_share is 0.2, but {device} both denoises and decodes"):
        Placement(torch.device(device), torch.device(decode_device), 0.2)
    assert Placement(torch.device(device), torch.device(decode_device)).decode_share == 0
    assert Placement(FIRST, SECOND, 0.2).decode_share == 0.2


def test_the_text_encoder_is_on_the_cpu_by_choice() -> None:
    assert Placement.choose("cpu").text_device == CPU
    assert Placement(FIRST, FIRST).text_device == FIRST
    assert Placement(FIRST, FIRST, text_on_cpu=True).text_device == CPU
    assert not Placement.choose("cpu", text_encoder="fp8").text_on_cpu
    with pytest.raises(UserError, match="text_encoder is cuda, but the model runs on cpu; leave text_encoder out"):
        Placement.choose("cpu", text_encoder="cuda")
