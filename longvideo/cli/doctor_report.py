"""The report of `longvideo doctor`, as a dictionary for JSON and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from longvideo import __version__
from longvideo.cli.self_test import Check, Operation, operations
from longvideo.cli.self_test import self_test as run_checks
from longvideo.infer.fit.formats import start_line
from longvideo.infer.fit.memory import Workload
from longvideo.infer.fit.placement import numbered
from longvideo.infer.fit.refusal import Fit, assess, cuda_devices, no_remedy
from longvideo.infer.fit.settings_table import SettingPeak, fitting_sizes, setting_peaks
from longvideo.machine.gpus import GPU, Link, driver, gpus, links, why_none
from longvideo.machine.host import Disk, HostMemory, Unknown, bytes_on_disk, disks, host_memory, versions

T = TypeVar("T")

NAME_WIDTH = 24


@dataclass(frozen=True)
class Question:
    """A model to estimate. name: its name as the user wrote it. folder: its folder; None for a preset."""

    name: str
    folder: Path | None
    workload: Workload


@dataclass(frozen=True)
class Graphics:
    """GPUs that torch finds.

    none_because: why it finds no GPU; None if there is one. links: connections between GPUs. torch_cuda: version of
    CUDA that torch is built with.
    """

    gpus: list[GPU]
    none_because: str | None
    links: list[Link]
    driver: str | Unknown
    torch_cuda: str | None


@dataclass(frozen=True)
class Answer:
    """The memory and the files of a model.

    fits: memory by command: `generate` frees the text encoder of a GPU before it loads the rest, `serve` keeps it.
    file_bytes: size of its folder; None for a preset.
    """

    question: Question
    fits: dict[str, Fit]
    file_bytes: int | None


@dataclass(frozen=True)
class MachineReport:
    """Everything that the command prints.

    versions: versions of packages, processor and system. disks: disks by their use. settings: what fits into GPUs of
    common sizes. answer: None without a model.
    """

    versions: dict[str, str]
    graphics: Graphics
    memory: HostMemory | Unknown
    disks: dict[str, Disk | Unknown]
    operations: list[Operation]
    checks: list[Check]
    settings: list[SettingPeak]
    answer: Answer | None

    @classmethod
    def of(cls, device: torch.device, question: Question | None, *, self_test: bool) -> MachineReport:
        """Examine this machine. device: device of the operations and checks. self_test: whether to run the checks."""
        return cls(
            versions={"longvideo": __version__, **versions(device)},
            graphics=Graphics(gpus(), why_none(), links(), driver(), torch.version.cuda),
            memory=host_memory(),
            disks=disks(),
            operations=operations(device),
            settings=setting_peaks(),
            answer=None if question is None else _answer(question),
            checks=run_checks(device) if self_test else [],
        )

    @property
    def failed(self) -> bool:
        """Whether a check failed, or a GPU of this machine has too little free memory."""
        insufficient = self.answer is not None and any(fit.insufficient for fit in self.answer.fits.values())
        return insufficient or not all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON: sizes in bytes, {"unknown": reason} for unknown values."""
        return {
            "machine": self.versions,
            "graphics": asdict(self.graphics),
            "memory": asdict(self.memory),
            "disks": {use: asdict(disk) for use, disk in self.disks.items()},
            "operations": [asdict(operation) for operation in self.operations],
            "checks": [asdict(check) for check in self.checks],
            "settings": [asdict(setting) for setting in self.settings],
            "model": None if self.answer is None else _answer_dict(self.answer),
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report for a terminal."""
        for name, value in {**self.versions, **_graphics_rows(self.graphics), **self._space_rows()}.items():
            yield f"{name:<{NAME_WIDTH}}{value}"
        for operation in self.operations:
            yield f"\n{operation.name}: {operation.backend}"
            yield from (f"    not {backend}: {reason}" for backend, reason in operation.rejected.items())
        if self.checks:
            yield ""
        for check in self.checks:
            yield f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.measured}"
        yield ""
        yield from _setting_lines(self.settings)
        if self.answer is not None:
            yield ""
            yield from _answer_lines(self.answer, self.memory)

    def _space_rows(self) -> dict[str, str]:
        rows = {
            "memory": _text(self.memory, lambda x: f"{_gb(x.total_bytes)}, {_gb(x.available_bytes)} available"),
        }
        for use, disk in self.disks.items():
            rows[use] = _text(disk, lambda x: f"{_gb(x.free_bytes)} of {_gb(x.total_bytes)} free, {x.path}")
        return rows


def _answer(question: Question) -> Answer:
    workload, folder = question.workload, question.folder
    frees_text = workload.placement.text_device.type == "cuda"
    fits = {"generate": assess(replace(workload, frees_text=frees_text)), "serve": assess(workload)}
    return Answer(question, fits, None if folder is None else bytes_on_disk(folder))


def _setting_lines(settings: list[SettingPeak]) -> Iterator[str]:
    """Yield a table of settings, with the estimated peaks and the sizes of GPUs with that much memory."""
    yield "estimated peak of the 5B, 704 x 1280 pixels, a window of 32 latent frames, on one GPU; GB with enough memory"
    width = max(len(setting.options) for setting in settings) + 2
    for command in ("generate", "serve"):
        yield f"\n{f'longvideo {command}':<{width}}{'peak':>10}  fits"
        for setting in settings:
            peak = setting.generate_bytes if command == "generate" else setting.serve_bytes
            sizes = ", ".join(map(str, fitting_sizes(peak)))
            yield f"{setting.options or '(no option)':<{width}}{_gb(peak):>10}  {sizes or 'none'}"


def _answer_dict(answer: Answer) -> dict[str, Any]:
    question, workload = answer.question, answer.question.workload
    settings = workload.shapes.settings
    return {
        "name": question.name,
        "folder": None if question.folder is None else str(question.folder),
        "file_bytes": answer.file_bytes,
        "height": settings.height,
        "width": settings.width,
        "window_frames": settings.window_frames,
        "guidance": settings.guidance,
        "formats": {**asdict(workload.formats), "precision": workload.precision},
        "decoder": workload.shapes.decoder_name,
        "decode_share": workload.placement.decode_share,
        "low_memory": workload.placement.low_memory,
        "offload_weights": workload.placement.offload_weights,
        **{command: _fit_dict(fit) for command, fit in answer.fits.items()},
        "not_estimated": _cpus(workload),
    }


def _fit_dict(fit: Fit) -> dict[str, Any]:
    remedy = fit.remedy
    return {
        "devices": {
            str(device): {
                "parts": {part.name: part.bytes for part in fit.parts if part.device == device},
                "needed_bytes": needed,
                "free_bytes": fit.free.get(device),
                "fits": device not in fit.insufficient if device in fit.free else None,
            }
            for device, needed in fit.needed.items()
        },
        "remedy": None
        if remedy is None
        else {"options": list(remedy.options), "needed_bytes": {str(x): size for x, size in remedy.needed.items()}},
    }


def _answer_lines(answer: Answer, memory: HostMemory | Unknown) -> Iterator[str]:
    workload = answer.question.workload
    settings, formats = workload.shapes.settings, workload.formats
    yield (
        f"{answer.question.name}: {settings.width} x {settings.height} pixels, a window of {settings.window_frames}"
        f" latent frames, guidance {settings.guidance:g}; precision {workload.precision}, KV cache {formats.kv_cache},"
        f" attention {formats.attention}, decoder {workload.shapes.decoder_name} in {formats.decoder}"
    )
    placement = workload.placement
    devices = (placement.device, placement.decode_device)
    if all(device.type == "cpu" or numbered(device) in cuda_devices() for device in devices):
        yield start_line(formats, placement, packed=workload.shapes.packed, decoder=workload.shapes.decoder_name)
    if answer.file_bytes is not None:
        yield f"files: {_gb(answer.file_bytes, 3)}, {answer.question.folder}"
    for command, fit in answer.fits.items():
        yield from _fit_lines(fit, f"longvideo {command} with {answer.question.name}")
    devices = {numbered(device) for device in devices if device.type == "cuda"}
    if "fp8" in (formats.precision, formats.attention, formats.decoder) and not devices <= set(cuda_devices()):
        yield "\nwhether that GPU supports fp8 is unknown here; run `longvideo doctor` on its machine"
    for cpu in _cpus(workload):
        available = _text(memory, lambda x: f"{_gb(x.available_bytes)} of memory are available")
        yield f"\n{cpu}: the memory of a CPU is not estimated; {available}"


def _fit_lines(fit: Fit, use: str) -> Iterator[str]:
    """Yield the parts of the memory of each GPU. use: the command and the model."""
    for device, needed in fit.needed.items():
        yield f"\n{device} for {use}"
        sizes = {part.name: part.bytes for part in fit.parts if part.device == device}
        for name, size in {**sizes, "total": needed}.items():
            yield f"    {name:<{NAME_WIDTH}}{_gb(size, 3):>12}"
        yield f"    {_verdict(fit, device)}"


def _verdict(fit: Fit, device: torch.device) -> str:
    """Return one line that states whether the model fits into a GPU."""
    needed, free = fit.needed[device], fit.free.get(device)
    if free is None:
        above = math.ceil(needed / 1e8) / 10
        return f"torch finds no GPU on this machine; a GPU with {above:.1f} GB of free memory is needed"
    if device not in fit.insufficient:
        return f"fits: {_gb(free)} are free"
    if fit.remedy is not None:
        options = " ".join(fit.remedy.options)
        advice = f"with {options} it fits into {fit.remedy.sizes()} ({fit.remedy.explained()})"
    else:
        advice = no_remedy(fit)
    return f"does not fit: {_gb(free)} are free, {_gb(needed - free)} are missing; {advice}"


def _graphics_rows(graphics: Graphics) -> dict[str, str]:
    rows = {}
    for gpu in graphics.gpus:
        free = _text(gpu.free_bytes, lambda size: f"{_gb(size)} free", unknown="free memory unknown")
        rows[f"GPU {gpu.index}"] = (
            f"{gpu.name}, {_gb(gpu.total_bytes)}, {free}, compute capability {gpu.compute_capability}"
        )
    if graphics.none_because is not None:
        rows["GPU"] = f"none: {graphics.none_because}"
    for link in graphics.links:
        direct = "directly" if link.direct else "through the host's memory"
        wires = _text(
            link.num_nvlinks, lambda n: f"over {n} NVLinks" if n else "no NVLink", unknown="whether over NVLink"
        )
        rows[f"GPU {link.first} to GPU {link.second}"] = f"{direct}, {wires}"
    rows["NVIDIA driver"] = _text(graphics.driver, str)
    rows["CUDA of torch"] = graphics.torch_cuda or "none"
    return rows


def _cpus(workload: Workload) -> list[str]:
    """Return the devices of a workload that are not estimated."""
    devices = (workload.placement.device, workload.placement.decode_device)
    return list(dict.fromkeys(str(device) for device in devices if device.type == "cpu"))


def _text(value: T | Unknown, describe: Callable[[T], str], *, unknown: str = "unknown") -> str:
    """Return the description of a value, or `unknown` and the reason."""
    return f"{unknown}: {value.unknown}" if isinstance(value, Unknown) else describe(value)


def _gb(size: int, decimals: int = 1) -> str:
    return f"{size / 1e9:.{decimals}f} GB"
