"""Check that streaming fits into the GPUs of this machine, and find the options with which it fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from longvideo.errors import UserError
from longvideo.infer.fit.memory import MemoryPart, Workload, estimate
from longvideo.infer.fit.placement import numbered
from longvideo.kernels.backends import convolution_backend, product_backend
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.decoders import check_fp8
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Remedy:
    """Options of the command line with which streaming fits.

    prices: what each option costs, for people. needed: bytes of each GPU with these options.
    """

    options: tuple[str, ...]
    prices: tuple[str, ...]
    needed: dict[torch.device, int]

    def explained(self) -> str:
        """Return what the options cost, in words."""
        pairs = zip(self.options, self.prices, strict=True)
        return ", ".join(f"{option.split()[0]} {price}" for option, price in pairs)

    def sizes(self) -> str:
        """Return the bytes as text, with their devices if there are several."""
        alone = len(self.needed) == 1
        sizes = (gigabytes(size) if alone else f"{gigabytes(size)} on {x}" for x, size in self.needed.items())
        return " and ".join(sizes)


@dataclass(frozen=True)
class Fit:
    """Memory of GPUs that streaming needs, and their free memory.

    parts: parts of the memory of GPUs; CPUs are left out. free: bytes of each GPU that are free or that the loaded
    model takes, if this machine has it.
    has_small_decoder: whether the decoder is a tiny one. options: options of the command line that reduce the memory,
    the stronger ones last. remedy: the fastest set of them that is enough; None if
    all together are not, and if no GPU is insufficient.
    """

    parts: tuple[MemoryPart, ...]
    free: dict[torch.device, int]
    has_small_decoder: bool = False
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
    is_small = not isinstance(workload.shapes.decoder_config, AutoencoderConfig)
    fit = Fit(tuple(parts), {device: _available_bytes(device, workload) for device in present}, is_small)
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
        options = " ".join(fit.remedy.options)
        advice = f"with {options} it needs {fit.remedy.sizes()} ({fit.remedy.explained()})"
    else:
        advice = no_remedy(fit)
    shortages = [_shortage(fit, device, is_loaded=device in workload.loaded) for device in fit.insufficient]
    raise UserError("; ".join([*shortages, advice]))


def check_decoding_memory(parts: Sequence[MemoryPart]) -> None:
    """Raise UserError, with the parts, where a GPU has less free memory than the decoding of saved latents needs."""
    for device, needed in _totals(parts).items():
        if device in cuda_devices() and needed > (free := _free_bytes(device)):
            shortage = _shortage(Fit(tuple(parts), {device: free}), device, work="decoding")
            raise UserError(f"{shortage}; use another --device, or --decoder with a small decoder")


def no_remedy(fit: Fit) -> str:
    """Return the advice where no options make streaming fit."""
    advice = (
        "use a GPU with more memory" if fit.has_small_decoder else "use a small --decoder or a GPU with more memory"
    )
    strongest = {option.split()[0]: option for option in fit.options}
    return f"it does not fit with {' '.join(strongest.values())} either; {advice}" if strongest else advice


def gigabytes(size: int) -> str:
    """Return a size as text in GB (10^9 bytes), with one decimal."""
    return f"{size / 1e9:.1f} GB"


def cuda_devices() -> list[torch.device]:
    """Return the GPUs of this machine."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Change:
    """An option of the command line, and the fields of `NumberFormats` or `Placement` that it changes.

    price: what it costs, for people, after the name of the option.
    """

    option: str
    price: str
    formats: dict[str, str] = field(default_factory=dict)
    placement: dict[str, torch.device | bool] = field(default_factory=dict)

    def applied(self, workload: Workload) -> Workload:
        """Return the workload with this option. What is on a device already is then not counted as used."""
        return replace(
            workload,
            resident={},
            formats=replace(workload.formats, **self.formats),
            placement=replace(workload.placement, **self.placement),
        )


def _changes(workload: Workload) -> list[_Change]:
    """Return the options that reduce the memory of a workload, from the one that costs the least time.

    Of those that cost nearly none, the ones that change no result come first.
    """
    return [*_same_results(workload), *_other_devices(workload), *_fewer_bits(workload), *_last_resort(workload)]


def _same_results(workload: Workload) -> Iterator[_Change]:
    placement = workload.placement
    if (
        workload.shapes.text_encoder is not None
        and placement.text_device.type == "cuda"
        and workload.formats.text_encoder == "bf16"
    ):
        yield _Change("--text-encoder cpu", "takes longer for each prompt", placement={"text_on_cpu": True})
    if not placement.low_memory:
        price = "makes denoising and decoding take turns"
        yield _Change("--low-memory", price, placement={"low_memory": True})


def _other_devices(workload: Workload) -> Iterator[_Change]:
    device, decode_device = numbered(workload.placement.device), numbered(workload.placement.decode_device)
    if device != decode_device or (other := _other_device(device)) is None:
        return
    yield _Change(f"--decode-device {other}", "uses a second GPU", placement={"decode_device": other})
    devices: dict[str, torch.device | bool] = {"device": other, "decode_device": other}
    yield _Change(f"--device {other}", "uses another GPU", placement=devices)


def _fewer_bits(workload: Workload) -> Iterator[_Change]:
    config, formats, placement = workload.shapes.transformer, workload.formats, workload.placement
    is_wan = isinstance(workload.shapes.decoder_config, AutoencoderConfig)
    if is_wan and formats.decoder in ("auto", "bf16") and _runs_fp8_decoder(workload):
        price = "rounds the decoder's convolutions to 8 bits"
        yield _Change("--decoder-precision fp8", price, formats={"decoder": "fp8"})
    is_unpacked = not workload.shapes.packed and formats.precision in (None, "bf16")
    if is_unpacked and product_backend("fp8", placement.device).name is not None:
        yield _Change("--precision fp8", "rounds weights and their inputs to 8 bits", formats={"precision": "fp8"})
    if formats.kv_cache != "nvfp4" and config.attention_head_dim % GROUP == 0:
        yield _Change("--kv-cache nvfp4", "rounds the cache to 4 bits", formats={"kv_cache": "nvfp4"})
    packs = not any(width % GROUP for width in (config.dim, config.ffn_dim))
    if not workload.shapes.packed and formats.precision in (None, "bf16", *FP8_FORMATS) and packs:
        price = "rounds weights to 4 bits"
        yield _Change("--precision nvfp4-weights", price, formats={"precision": "nvfp4-weights"})


def _last_resort(workload: Workload) -> Iterator[_Change]:
    if not workload.placement.offload_weights:
        price = "copies the transformer to the GPU in each step"
        yield _Change("--offload-weights", price, placement={"offload_weights": True})


def _runs_fp8_decoder(workload: Workload) -> bool:
    try:
        check_fp8(workload.shapes.decoder_config, workload.shapes.decoder_name)
    except UserError:
        return False
    return convolution_backend("fp8", workload.placement.decode_device).name is not None


def _remedy(changes: Sequence[_Change], workload: Workload) -> Remedy | None:
    """Return the fastest set of changes that is enough; None if no set is.

    A set is slower than another one if the slowest change in which they differ is its own.
    """
    for number in range(1, 2 ** len(changes)):
        choice = [change for index, change in enumerate(changes) if number >> index & 1]
        smaller = workload
        for change in choice:
            smaller = change.applied(smaller)
        needed = _totals(_gpu_parts(smaller))
        if all(size <= _available_bytes(device, workload) for device, size in needed.items()):
            return Remedy(tuple(change.option for change in choice), tuple(change.price for change in choice), needed)
    return None


def _gpu_parts(workload: Workload) -> list[MemoryPart]:
    if all(device.type != "cuda" for device in (workload.placement.device, workload.placement.decode_device)):
        return []
    return [part for part in estimate(workload) if part.device.type == "cuda"]


def _other_device(device: torch.device) -> torch.device | None:
    """Return another GPU, the one with the most free memory; None if there is no other."""
    return max((other for other in cuda_devices() if other != device), key=_free_bytes, default=None)


def _available_bytes(device: torch.device, workload: Workload) -> int:
    return _free_bytes(device) + workload.loaded.get(device, 0)


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


def _shortage(fit: Fit, device: torch.device, *, work: str = "streaming", is_loaded: bool = False) -> str:
    own = sorted((part for part in fit.parts if part.device == device), key=lambda part: -part.bytes)
    parts = ", ".join(f"{part.name} {part.bytes / 1e9:.1f}" for part in own)
    free, needed = gigabytes(fit.free[device]), gigabytes(fit.needed[device])
    place = f"{device} without the loaded model" if is_loaded else f"{device}"
    return f"{place} has {free} free; {work} needs about {needed}: {parts}"
