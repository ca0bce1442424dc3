"""Versions of software, memory of the host, and free space on the disks of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "deepspeed",
    "transformer-engine",
    "safetensors",
    "av",
    "nvidia-cudnn-frontend",
)
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""For control groups of version 2 and 1: the file of the limit, the file of the memory in use, and the key of
memory.stat for the part of it that caches files and is freed when memory is short (docs.kernel.org:
admin-guide/cgroup-v2, cgroup-v1/memory)."""


@dataclass(frozen=True)
class Unknown:
    """A value that cannot be determined on this machine. unknown: the reason."""

    unknown: str


@dataclass(frozen=True)
class HostMemory:
    """Memory that this process can use at most, and the part that is not in use, bytes."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Disk:
    """Size and free space of the disk of a folder, bytes."""

    path: str
    total_bytes: int
    free_bytes: int


def versions(device: torch.device) -> dict[str, str]:
    """Return descriptions of the system and the versions of packages. device: the device in use."""
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "device": str(device),
    }
    facts["torch"] = torch.__version__  # includes the CUDA version, unlike the version of the package
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def machine(device: torch.device) -> dict[str, str]:
    """Return descriptions of system, GPUs and versions, for the record of a measurement."""
    facts = versions(device)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB,"
            f" compute capability {properties.major}.{properties.minor}"
        )
    return facts


def host_memory(root: Path = Path("/")) -> HostMemory | Unknown:
    """Return the memory of the host, or of the control group (of a container) that limits this process.

    root: folder of proc and sys.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return Unknown(f"there is no {meminfo} on {platform.system()}")
    # lines like "MemTotal:       24684096 kB"
    sizes = {
        key: int(size.split()[0]) * 1024
        for key, _, size in (line.partition(":") for line in meminfo.read_text().splitlines())
    }
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    for limit, unused in _control_groups(root):
        total, available = min(total, limit), min(available, unused)
    return HostMemory(total, available)


def disks() -> dict[str, Disk | Unknown]:
    """Return the disks of the current folder, of temporary files, and of the Hugging Face cache if it exists.

    Permissions and quotas are not considered.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    result: dict[str, Disk | Unknown] = {"the current folder": _disk(Path.cwd())}
    try:
        result["temporary files"] = _disk(Path(tempfile.gettempdir()))
    except FileNotFoundError as error:  # no folder for temporary files is writable
        result["temporary files"] = Unknown(str(error.strerror))
    if (hub := Path(HF_HUB_CACHE)).is_dir():
        result["the Hugging Face cache"] = _disk(hub)
    return result


def bytes_on_disk(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, bytes."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)


def _disk(path: Path) -> Disk:
    usage = shutil.disk_usage(path)
    return Disk(str(path), usage.total, usage.free)


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the unused bytes of each control group with a limit that includes this process."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    # lines like "0::/a/b" (version 2) and "4:memory:/a/b" (version 1)
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # a container's own group is mounted as the root, where the group's path on the host does not exist
        for group in [mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents]:
            yield from _limits(group)
            if group == mount:
                break


def _limits(group: Path) -> Iterator[tuple[int, int]]:
    for limit_file, use_file, inactive in LIMITS:
        if not (group / limit_file).is_file() or not (group / use_file).is_file():
            continue
        limit = (group / limit_file).read_text().strip()
        if limit == "max":
            continue
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        in_use = int((group / use_file).read_text()) - int(stat[inactive])
        yield int(limit), max(0, int(limit) - in_use)
