"""Check that streaming fits into the GPUs of this machine, and find the options with which it fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from longvideo.errors import UserError
from longvideo.infer.fit.memory import MemoryPart, Workload, estimate
from longvideo.infer.fit.placement import numbered
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.number_formats import FP8_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Remedy:
    """Options of the command line with which streaming fits. needed: bytes of each GPU with these options."""

    options: tuple[str, ...]
    needed: dict[torch.device, int]

    def sizes(self) -> str:
        """Return the bytes as text, with their devices if there are several."""
        alone = len(self.needed) == 1
        sizes = (gigabytes(size) if alone else f"{gigabytes(size)} on {x}" for x, size in self.needed.items())
        return " and ".join(sizes)


@dataclass(frozen=True)
class Fit:
    """Memory of GPUs that streaming needs, and their free memory.

    parts: parts of the memory of GPUs; CPUs are left out. free: free bytes of each GPU, if this machine has it.
    options: options of the command line that reduce the memory. remedy: the smallest set of them that is enough; None
    if all together are not, and if no GPU is insufficient.
    """

    parts: tuple[MemoryPart, ...]
    free: dict[torch.device, int]
    options: tuple[str, ...] = ()
    remedy: Remedy | None = None

    @property
    def needed(self) -> dict[torch.device, int]:
        """Bytes that streaming needs on each GPU."""
        return _totals(self.parts)

    @property
    def insufficient(self) -> list[torch.device]:
        """The GPUs of this machine with less free memory than streaming needs."""
        return [device for device, needed in self.needed.items() if needed > self.free.get(device, needed)]


def assess(workload: Workload) -> Fit:
    """Compare the memory that a workload needs with the free memory of each GPU.

    For GPUs that this machine does not have, only the needed memory is computed.
    """
    parts = _gpu_parts(workload)
    present = [device for device in _totals(parts) if device in cuda_devices()]
    if present:
        torch.cuda.empty_cache()  # memory that torch has cached in this process counts as free
    fit = Fit(tuple(parts), {device: _free_bytes(device) for device in present})
    if not fit.insufficient:
        return fit
    changes = _changes(workload)
    options = tuple(change.option for change in changes)
    return replace(fit, options=options, remedy=_remedy(changes, workload))


def check_memory(workload: Workload) -> None:
    """Raise UserError, with the parts and a remedy, where a GPU has less free memory than streaming needs.

    CPUs are not checked.
    """
    fit = assess(workload)
    if not fit.insufficient:
        return
    if fit.remedy is not None:
        advice = f"with {' '.join(fit.remedy.options)} it needs {fit.remedy.sizes()}"
    else:
        advice = no_remedy(fit.options)
    raise UserError("; ".join([*(_shortage(fit, device) for device in fit.insufficient), advice]))


def check_decoding_memory(parts: Sequence[MemoryPart]) -> None:
    """Raise UserError, with the parts, where a GPU has less free memory than the decoding of saved latents needs."""
    for device, needed in _totals(parts).items():
        if device in cuda_devices() and needed > (free := _free_bytes(device)):
            shortage = _shortage(Fit(tuple(parts), {device: free}), device, work="decoding")
            raise UserError(f"{shortage}; use another --device, or --decoder with a small decoder")


def no_remedy(options: Sequence[str]) -> str:
    """Return the advice where no options make streaming fit. options: options that reduce the memory."""
    if not options:
        return "use a GPU with more memory"
    return f"it does not fit with {' '.join(options)} either; use a GPU with more memory"


def gigabytes(size: int) -> str:
    """Return a size as text in GB (10^9 bytes), with one decimal."""
    return f"{size / 1e9:.1f} GB"


def cuda_devices() -> list[torch.device]:
    """Return the GPUs of this machine."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Change:
    """An option of the command line, and the fields of `NumberFormats` or `Placement` that it changes."""

    option: str
    formats: dict[str, str] = field(default_factory=dict)
    devices: dict[str, torch.device | bool] = field(default_factory=dict)

    def applied(self, workload: Workload) -> Workload:
        """Return the workload with this option. What is on a device already is then not counted as used."""
        return replace(
            workload,
            resident={},
            formats=replace(workload.formats, **self.formats),
            placement=replace(workload.placement, **self.devices),
        )


def _changes(workload: Workload) -> list[_Change]:
    """Return the options that reduce the memory of a workload, from the one with the smallest loss."""
    config, formats, changes = workload.shapes.transformer, workload.formats, []
    has_text = workload.shapes.text_encoder is not None and workload.placement.text_device.type == "cuda"
    if has_text and formats.text_encoder == "bf16":
        changes.append(_Change("--text-encoder cpu", devices={"text_on_cpu": True}))
    packs = not any(width % GROUP for width in (config.dim, config.ffn_dim))
    if not workload.shapes.packed and formats.precision in (None, "bf16", *FP8_FORMATS) and packs:
        changes.append(_Change("--precision nvfp4-weights", formats={"precision": "nvfp4-weights"}))
    if formats.kv_cache != "nvfp4" and config.attention_head_dim % GROUP == 0:
        changes.append(_Change("--kv-cache nvfp4", formats={"kv_cache": "nvfp4"}))
    device, decode_device = numbered(workload.placement.device), numbered(workload.placement.decode_device)
    if device == decode_device and (other := _other_device(device)) is not None:
        changes.append(_Change(f"--decode-device {other}", devices={"decode_device": other}))
        changes.append(_Change(f"--device {other}", devices={"device": other, "decode_device": other}))
    return changes


def _remedy(changes: Sequence[_Change], workload: Workload) -> Remedy | None:
    """Return the first change that is enough, or the smallest set of changes that is; None if no set is."""
    for choice in (subset for count in range(1, len(changes) + 1) for subset in combinations(changes, count)):
        smaller = workload
        for change in choice:
            smaller = change.applied(smaller)
        needed = _totals(_gpu_parts(smaller))
        if all(size <= _free_bytes(device) for device, size in needed.items()):
            return Remedy(tuple(change.option for change in choice), needed)
    return None


def _gpu_parts(workload: Workload) -> list[MemoryPart]:
    if all(device.type != "cuda" for device in (workload.placement.device, workload.placement.decode_device)):
        return []
    return [part for part in estimate(workload) if part.device.type == "cuda"]


def _other_device(device: torch.device) -> torch.device | None:
    """Return another GPU, the one with the most free memory; None if there is no other."""
    return max((other for other in cuda_devices() if other != device), key=_free_bytes, default=None)


def _free_bytes(device: torch.device) -> int:
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError as error:  # no memory for another context, or one process uses it exclusively
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the free memory of {device} is unknown ({reason}); use another GPU, or end the processes on this one"
        ) from error


def _totals(parts: Sequence[MemoryPart]) -> dict[torch.device, int]:
    places = dict.fromkeys(part.device for part in parts)
    return {place: sum(part.bytes for part in parts if part.device == place) for place in places}


def _shortage(fit: Fit, device: torch.device, *, work: str = "streaming") -> str:
    own = sorted((part for part in fit.parts if part.device == device), key=lambda part: -part.bytes)
    parts = ", ".join(f"{part.name} {part.bytes / 1e9:.1f}" for part in own)
    free, needed = gigabytes(fit.free[device]), gigabytes(fit.needed[device])
    return f"{device} has {free} free; {work} needs about {needed}: {parts}"
