"""Memory and disks equal those of the system, the limit of a container included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from longvideo.machine import host
from longvideo.machine.host import Disk, HostMemory, Unknown, bytes_on_disk, disks, host_memory

MEMINFO = "MemTotal:       64000 kB\nMemFree:         1000 kB\nMemAvailable:   48000 kB\nHugePages_Total:       0\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_is_that_of_the_host_without_a_limit(tmp_path: Path) -> None:
    assert host_memory(system(tmp_path, {})) == HostMemory(64000 * 1024, 48000 * 1024)


def test_a_limit_of_version_2_holds_wherever_above_the_process_it_is_set(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": "20000000\n",
        "sys/fs/cgroup/pod/memory.current": "9000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 5000000\ninactive_file 3000000\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": "9000000\n",
    }
    assert host_memory(system(tmp_path, files)) == HostMemory(20_000_000, 20_000_000 - (9_000_000 - 3_000_000))


def test_a_limit_of_version_1_is_found_in_a_container(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/"
    files = {
        "proc/self/cgroup": "8:pids:/docker/1f\n4:memory:/docker/1f\n",
        folder + "memory.limit_in_bytes": "30000000\n",
        folder + "memory.usage_in_bytes": "10000000\n",
        folder + "memory.stat": "inactive_file 1\ntotal_inactive_file 4000000\n",
    }
    assert host_memory(system(tmp_path, files)) == HostMemory(30_000_000, 24_000_000)


def test_a_limit_above_the_memory_of_the_host_is_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "10000000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    assert host_memory(system(tmp_path, files)) == HostMemory(64000 * 1024, 48000 * 1024)


def test_a_system_that_does_not_tell_is_unknown(tmp_path: Path) -> None:
    result = host_memory(tmp_path)
    assert isinstance(result, Unknown) and result.unknown.startswith(f"there is no {tmp_path / 'proc/meminfo'}")


def test_disks_are_those_of_the_folders_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = disks()
    here = result["the current folder"]
    assert isinstance(here, Disk) and here.path == str(tmp_path)
    assert here.total_bytes == shutil.disk_usage(tmp_path).total and 0 < here.free_bytes <= here.total_bytes
    assert result.keys() == {"the current folder", "temporary files"}
    (tmp_path / "hub").mkdir()
    assert disks().keys() == {*result, "the Hugging Face cache"}


def test_a_missing_folder_for_temporary_files_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(host.tempfile, "gettempdir", gettempdir)
    assert disks()["temporary files"] == Unknown("No usable temporary directory found in ['/tmp']")


def test_a_folder_takes_the_bytes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_bytes(bytes(24))
    assert bytes_on_disk(tmp_path) == 1024
    assert bytes_on_disk(tmp_path / "config.json") == 24


def test_the_record_of_a_measurement_has_the_versions() -> None:
    facts = host.machine(torch.device("cpu"))
    assert facts["torch"] == torch.__version__ and facts["device"] == "cpu"
    assert int(facts["cores"]) >= 1
