"""Settings for GPUs of common sizes: the estimated peak of the 5B on one GPU in each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longvideo.infer.fit.memory import Workload, estimate
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.shapes import preset_shapes
from longvideo.quantization.number_formats import NumberFormats

PRESET = "wan2.2-ti2v-5b"
GPU_SIZES = (12, 16, 24, 32, 48, 80)
"""Memory of common GPUs, GB."""
FEWER_BITS = "--precision nvfp4-weights --kv-cache nvfp4"
FP8 = "--precision fp8 --attention fp8"
ALL_FP8 = f"{FP8} --decoder-precision fp8"
TINY_DECODER, LOW, OFFLOADED, PACKED_TEXT = (
    "--decoder taew2_2",
    "--low-memory",
    "--low-memory --offload-weights",
    "--text-encoder nvfp4",
)
SETTINGS = (
    "",
    LOW,
    ALL_FP8,
    f"{ALL_FP8} {LOW}",
    f"--kv-cache nvfp4 {OFFLOADED}",
    FEWER_BITS,
    f"{FEWER_BITS} {LOW}",
    f"{FEWER_BITS} --decoder-precision fp8 {LOW} {PACKED_TEXT}",
    TINY_DECODER,
    f"{TINY_DECODER} {FP8} {PACKED_TEXT}",
    f"{TINY_DECODER} {OFFLOADED}",
    f"{TINY_DECODER} {FEWER_BITS} {LOW} {PACKED_TEXT}",
    f"{TINY_DECODER} --kv-cache nvfp4 {OFFLOADED} {PACKED_TEXT}",
)
"""Options of `longvideo generate`, and with the name of a public decoder in place of its file."""


@dataclass(frozen=True)
class SettingPeak:
    """Estimated peaks of a setting.

    options: its options. generate_bytes: peak where all prompts are known, so that the text encoder is freed.
    serve_bytes: peak where the text encoder stays.
    """

    options: str
    generate_bytes: int
    serve_bytes: int


def setting_peaks() -> list[SettingPeak]:
    """Return the estimated peaks of the settings, for the 5B at its own size with a window of 32 latent frames."""
    return [
        SettingPeak(options, *(_peak(_workload(options, frees_text=frees_text)) for frees_text in (True, False)))
        for options in SETTINGS
    ]


def fitting_sizes(needed: int) -> list[int]:
    """Return the sizes of GPUs, GB, with at least `needed` bytes."""
    return [size for size in GPU_SIZES if needed <= size * 10**9]


def _workload(options: str, *, frees_text: bool) -> Workload:
    value, device = _parse(options).get, torch.device("cuda", 0)
    formats = NumberFormats.parse(
        value("--precision"),
        value("--kv-cache", "bf16"),
        value("--attention", "bf16"),
        value("--decoder-precision", "auto"),
        value("--text-encoder"),
    )
    low_memory, offloaded = (value(option) is not None for option in ("--low-memory", "--offload-weights"))
    placement = Placement(device, device, low_memory=low_memory, offload_weights=offloaded)
    shapes = preset_shapes(PRESET).with_decoder(value("--decoder"))
    return Workload(shapes=shapes, formats=formats, placement=placement, frees_text=frees_text)


def _parse(options: str) -> dict[str, str]:
    """Return the values of options by their names; that of an option without a value is empty."""
    words = (option.partition(" ") for option in options.removeprefix("--").split(" --") if option)
    return {f"--{name}": value for name, _, value in words}


def _peak(workload: Workload) -> int:
    return sum(part.bytes for part in estimate(workload))
