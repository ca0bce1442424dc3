"""GPUs that this machine does not have, for tests of memory."""

from __future__ import annotations

import pytest
import torch

from longvideo.infer.fit import refusal
from longvideo.kernels.backends import Backend
from tests.infer.workloads import SetFree


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Give the machine GPUs with this much free memory, in GB; return the devices whose free memory was read."""

    def set_free(*free: float) -> list[torch.device]:
        devices: list[torch.device] = []

        def mem_get_info(device: torch.device) -> tuple[int, int]:
            devices.append(device)
            return int(free[device.index] * 1e9), 10**12

        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        for function in ("product_backend", "convolution_backend"):
            monkeypatch.setattr(refusal, function, lambda _name, _device: Backend(None, reason="no FP8 units"))
        monkeypatch.setattr(
            refusal, "cuda_devices", lambda: [torch.device("cuda", index) for index in range(len(free))]
        )
        return devices

    return set_free
