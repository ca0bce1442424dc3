"""The GPUs of this machine: properties, the reason why torch sees none, and the links between pairs of them."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from longvideo.machine.host import Unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

SMI = "nvidia-smi"
SMI_SECONDS = 20
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
NVLINK = re.compile(r"NV(\d+)")
"""Cell of `nvidia-smi topo -m` with the number of NVLinks between two GPUs; all other words describe PCIe."""


@dataclass(frozen=True)
class GPU:
    """A GPU that torch sees. total_bytes, free_bytes: its memory, and the free part now."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int | Unknown
    compute_capability: str


@dataclass(frozen=True)
class Link:
    """The connection of two GPUs.

    first, second: their indices. direct: whether each can read the other's memory without the host. num_nvlinks: 0 if
    they are connected only by PCIe.
    """

    first: int
    second: int
    direct: bool
    num_nvlinks: int | Unknown


def gpus() -> list[GPU]:
    """Return the GPUs that torch sees. Reading the free memory creates a CUDA context on each of them."""
    result = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = _free_bytes(torch.device("cuda", index))
        capability = f"{properties.major}.{properties.minor}"
        result.append(GPU(index, properties.name, properties.total_memory, free, capability))
    return result


def why_none() -> str | None:
    """Return the reason why torch sees no GPU; None if it sees one."""
    if torch.cuda.device_count():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with CUDA to use a GPU"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
    else:
        reason = "CUDA is available, but finds no GPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return reason if hidden is None else f"{reason}; CUDA_VISIBLE_DEVICES is {hidden!r}"


def driver() -> str | Unknown:
    """Return the version of NVIDIA's driver."""
    answer = _run_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return answer if isinstance(answer, Unknown) else answer.split()[0] if answer.split() else Unknown("no GPU listed")


def links() -> list[Link]:
    """Return the connections of all pairs of GPUs that torch sees."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    counts = _nvlinks()
    result = []
    for first, second in combinations(range(count), 2):
        direct = all(torch.cuda.can_device_access_peer(*pair) for pair in ((first, second), (second, first)))
        result.append(Link(first, second, direct, _between(counts, first, second)))
    return result


def read_topology(text: str) -> dict[tuple[int, int], int]:
    """Return the number of NVLinks between GPUs by their numbers. text: the output of `nvidia-smi topo -m`."""
    lines = [TERMINAL_CODES.sub("", line).split("\t") for line in text.splitlines()]
    rows = [[cell.strip() for cell in cells] for cells in lines]
    header = next((row for row in rows if row[0] == "" and "GPU0" in row), [])
    counts = {}
    for row in rows:
        for name, cell in zip(header[1:], row[1:], strict=False):
            if row[0].startswith("GPU") and name.startswith("GPU") and name != row[0] and name[3:].isdigit():
                linked = NVLINK.fullmatch(cell)
                counts[int(row[0][3:]), int(name[3:])] = int(linked[1]) if linked else 0
    return counts


def _nvlinks() -> dict[tuple[str, str], int] | Unknown:
    """Return the number of NVLinks between GPUs by their UUIDs, because torch may number GPUs differently."""
    listed, topology = _run_smi("--query-gpu=index,uuid", "--format=csv,noheader"), _run_smi("topo", "-m")
    if isinstance(listed, Unknown):
        return listed
    if isinstance(topology, Unknown):
        return topology
    # lines like "0, GPU-2f0e..."
    uuids = {int(index): uuid.strip() for index, _, uuid in (line.partition(",") for line in listed.splitlines())}
    numbered = read_topology(topology)
    return {(uuids[a], uuids[b]): count for (a, b), count in numbered.items() if a in uuids and b in uuids}


def _between(counts: Mapping[tuple[str, str], int] | Unknown, first: int, second: int) -> int | Unknown:
    if isinstance(counts, Unknown):
        return counts
    one, other = (f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in (first, second))
    count = counts.get((one, other))
    return Unknown(f"`{SMI} topo -m` does not list GPU {first} and GPU {second}") if count is None else count


def _free_bytes(device: torch.device) -> int | Unknown:
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError as error:  # exclusive to another process, or too little memory for another context
        return Unknown(str(error).partition("\n")[0])


def _run_smi(*arguments: str) -> str | Unknown:
    """Return the output of nvidia-smi."""
    try:
        result = subprocess.run([SMI, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return Unknown(f"there is no {SMI} on the PATH")
    except subprocess.TimeoutExpired:
        return Unknown(f"{SMI} did not finish within {SMI_SECONDS} s")
    except OSError as error:
        return Unknown(f"{SMI} cannot be run: {error.strerror}")
    if result.returncode:
        output = " ".join((result.stdout + result.stderr).split())
        return Unknown(f"`{SMI} {' '.join(arguments)}` ended with code {result.returncode}: {output}")
    return result.stdout
