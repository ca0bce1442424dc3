"""GPUs, the reason for a missing GPU, and links between GPUs; unknown values have a reason."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from longvideo.machine import gpus
from longvideo.machine.gpus import GPU, Link
from longvideo.machine.host import Unknown

HEADER = "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"
TOPOLOGY = f"""{HEADER}
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-31\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the GPUs of torch by 1 and 0 of the topology, in this order, with direct access to each other."""
    names = ["bbb", "aaa"]
    properties = [
        SimpleNamespace(name="Testing 9000", total_memory=80 * 10**9, major=9, minor=0, uuid=name) for name in names
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one != other)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 10**9 - device.index, 80 * 10**9))


def smi(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str | Exception | int]) -> None:
    """Replace nvidia-smi: its result depends on the first argument and is a text, an error, or an exit code."""

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        answer = answers[command[1]]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return subprocess.CompletedProcess(command, answer, "", "Driver/library version\nmismatch")
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(gpus.subprocess, "run", run)


def test_the_topology_is_read_with_its_colors_and_other_devices() -> None:
    counts = gpus.read_topology(TOPOLOGY)
    assert counts == {(0, 1): 18, (1, 0): 18, (0, 2): 0, (2, 0): 0, (1, 2): 0, (2, 1): 0}
    assert gpus.read_topology("No devices were found") == {}


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_has_its_memory_in_bytes() -> None:
    assert gpus.gpus() == [
        GPU(0, "Testing 9000", 80 * 10**9, 70 * 10**9, "9.0"),
        GPU(1, "Testing 9000", 80 * 10**9, 70 * 10**9 - 1, "9.0"),
    ]
    assert gpus.why_none() is None


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_full_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(_device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert [gpu.free_bytes for gpu in gpus.gpus()] == 2 * [Unknown("CUDA error: out of memory")]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("uuids", "num_nvlinks"), [(["aaa", "bbb", "ccc"], 18), (["ccc", "bbb", "aaa"], 0)])
def test_links_are_found_by_uuid(monkeypatch: pytest.MonkeyPatch, uuids: list[str], num_nvlinks: int) -> None:
    listed = "".join(f"{index}, GPU-{uuid}\n" for index, uuid in enumerate(uuids))
    smi(monkeypatch, {"--query-gpu=index,uuid": listed, "topo": TOPOLOGY})
    assert gpus.links() == [Link(0, 1, True, num_nvlinks)]


@pytest.mark.usefixtures("two_gpus")
def test_one_way_is_not_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one < other)
    smi(monkeypatch, {"--query-gpu=index,uuid": "0, GPU-aaa\n1, GPU-bbb\n", "topo": TOPOLOGY})
    assert gpus.links() == [Link(0, 1, False, 18)]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (FileNotFoundError(), "there is no nvidia-smi on the PATH"),
        (PermissionError(13, "Permission denied"), "nvidia-smi cannot be run: Permission denied"),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "nvidia-smi did not finish within 20 s"),
        (9, "`nvidia-smi topo -m` ended with code 9: Driver/library version mismatch"),
        ("", "`nvidia-smi topo -m` does not list GPU 0 and GPU 1"),
    ],
)
def test_an_unknown_link_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, answer: str | Exception | int, reason: str
) -> None:
    smi(monkeypatch, {"--query-gpu=index,uuid": "0, GPU-aaa\n1, GPU-bbb\n", "topo": answer})
    assert gpus.links() == [Link(0, 1, True, Unknown(reason))]


def test_the_driver_is_that_of_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    smi(monkeypatch, {"--query-gpu=driver_version": "580.65.06\n580.65.06\n"})
    assert gpus.driver() == "580.65.06"
    smi(monkeypatch, {"--query-gpu=driver_version": FileNotFoundError()})
    assert gpus.driver() == Unknown("there is no nvidia-smi on the PATH")


def test_a_cpu_build_of_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = gpus.why_none()
    assert reason is not None and reason.startswith(f"torch {torch.__version__} is built without CUDA")
    assert gpus.gpus() == [] and gpus.links() == []


def test_a_missing_driver_is_torchs_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\n  Please check that you have one")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.why_none() == "Found no NVIDIA driver on your system. Please check that you have one"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert str(gpus.why_none()).endswith("Please check that you have one; CUDA_VISIBLE_DEVICES is ''")


@pytest.mark.gpu
def test_a_real_gpu_has_free_memory_and_a_driver() -> None:
    result = gpus.gpus()
    assert len(result) == torch.cuda.device_count()
    for gpu in result:
        assert isinstance(gpu.free_bytes, int) and 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpus.why_none() is None and isinstance(gpus.driver(), str)


@pytest.mark.multigpu
def test_real_pairs_are_all_there() -> None:
    result, count = gpus.links(), torch.cuda.device_count()
    assert len(result) == count * (count - 1) // 2
    assert all(isinstance(link.num_nvlinks, int) for link in result)
