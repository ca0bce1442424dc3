"""What this machine has beside GPUs: versions, memory of the host and room on its disks."""

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
"""Of a control group, version 2 and 1: file of its limit, file of its use, and key of memory.stat for that part of its
use which is copies of files, dropped when memory is short (docs.kernel.org: admin-guide/cgroup-v2, cgroup-v1/memory).
"""


@dataclass(frozen=True)
class Unknown:
    """Something that cannot be told here, and why."""

    unknown: str


@dataclass(frozen=True)
class HostMemory:
    """Bytes that this process can have at most, and how many of them are not in use."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Disk:
    """Room on the disk where a folder lies."""

    path: str
    total_bytes: int
    free_bytes: int


def versions(device: torch.device) -> dict[str, str]:
    """Describe processor and system, and the versions of packages. device: the one in use."""
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "device": str(device),
    }
    facts["torch"] = torch.__version__  # says of which CUDA it is, as the package may not
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def machine(device: torch.device) -> dict[str, str]:
    """Describe processor, system, GPUs and versions, for the record of a measurement."""
    facts = versions(device)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB,"
            f" compute capability {properties.major}.{properties.minor}"
        )
    return facts


def host_memory(root: Path = Path("/")) -> HostMemory | Unknown:
    """Return the memory of the host, or of the control group (a container's) that this process must stay in.

    root: where proc and sys are.
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
    """Return the room in the current folder, for temporary files, and in the Hugging Face cache if there is one.

    Permissions and quotas are not looked at.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found: dict[str, Disk | Unknown] = {"the current folder": _disk(Path.cwd())}
    try:
        found["temporary files"] = _disk(Path(tempfile.gettempdir()))
    except FileNotFoundError as error:  # nowhere can a file be written
        found["temporary files"] = Unknown(str(error.strerror))
    if (hub := Path(HF_HUB_CACHE)).is_dir():
        found["the Hugging Face cache"] = _disk(hub)
    return found


def bytes_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)


def _disk(path: Path) -> Disk:
    usage = shutil.disk_usage(path)
    return Disk(str(path), usage.total, usage.free)


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and unused bytes of each control group around this process that has a limit."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    # lines like "0::/a/b" (version 2) and "4:memory:/a/b" (version 1)
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # a container's own group is mounted as the root, where its path on the host does not exist
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
