"""The GPUs of this machine: what they have, why there is none, and how pairs of them reach each other."""

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
"""Cell of `nvidia-smi topo -m`: how many NVLinks two GPUs have; any other word stands for a way over PCIe."""


@dataclass(frozen=True)
class GPU:
    """One that torch sees. free_bytes: what is free now."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int | Unknown
    compute_capability: str


@dataclass(frozen=True)
class Link:
    """Between two GPUs, by their indices.

    direct: whether each can read the other's memory without the host. num_nvlinks: 0 where PCIe alone connects them.
    """

    first: int
    second: int
    direct: bool
    num_nvlinks: int | Unknown


def gpus() -> list[GPU]:
    """Return the GPUs that torch sees. Asking what is free gives this process a CUDA context on each."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = _free_bytes(torch.device("cuda", index))
        capability = f"{properties.major}.{properties.minor}"
        found.append(GPU(index, properties.name, properties.total_memory, free, capability))
    return found


def why_none() -> str | None:
    """Return why torch sees no GPU, None where it sees one."""
    if torch.cuda.device_count():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; a GPU takes another build of it"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
    else:
        reason = "CUDA starts and finds no GPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return reason if hidden is None else f"{reason}; CUDA_VISIBLE_DEVICES is {hidden!r}"


def driver() -> str | Unknown:
    """Return the version of NVIDIA's driver."""
    answer = _ask("--query-gpu=driver_version", "--format=csv,noheader")
    return answer if isinstance(answer, Unknown) else answer.split()[0] if answer.split() else Unknown("no GPU listed")


def links() -> list[Link]:
    """Return how every pair of the GPUs that torch sees is connected."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    counts = _nvlinks()
    found = []
    for first, second in combinations(range(count), 2):
        direct = all(torch.cuda.can_device_access_peer(*pair) for pair in ((first, second), (second, first)))
        found.append(Link(first, second, direct, _between(counts, first, second)))
    return found


def read_topology(text: str) -> dict[tuple[int, int], int]:
    """Return the number of NVLinks between GPUs, numbered as there, of what `nvidia-smi topo -m` prints."""
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
    """Return the number of NVLinks between GPUs by their UUIDs, since torch may number them otherwise."""
    listed, topology = _ask("--query-gpu=index,uuid", "--format=csv,noheader"), _ask("topo", "-m")
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
    return Unknown(f"`{SMI} topo -m` says nothing of GPU {first} and GPU {second}") if count is None else count


def _free_bytes(device: torch.device) -> int | Unknown:
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError as error:  # it is in use by one process alone, or has no room for another context
        return Unknown(str(error).partition("\n")[0])


def _ask(*arguments: str) -> str | Unknown:
    """Return what nvidia-smi answers."""
    try:
        done = subprocess.run([SMI, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return Unknown(f"there is no {SMI} on the PATH")
    except subprocess.TimeoutExpired:
        return Unknown(f"{SMI} gave no answer within {SMI_SECONDS} s")
    except OSError as error:
        return Unknown(f"{SMI} cannot be run: {error.strerror}")
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return Unknown(f"`{SMI} {' '.join(arguments)}` ended with code {done.returncode}: {said}")
    return done.stdout
