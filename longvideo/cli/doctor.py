"""`longvideo doctor`: what this machine has and can run, whether its numbers are right, and whether a model fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.model_options import (
    AttentionFormat,
    Base,
    DecodeDevice,
    DecodeShare,
    Device,
    Entry,
    Guidance,
    KVCacheFormat,
    ModelChoice,
    Precision,
)
from longvideo.errors import UserError

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.cli.doctor_report import Question
    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import NumberFormats

EXIT_FAILED = 1


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Does it fit? `tiny`, or a folder or file; nothing is downloaded.")
    ] = None,
    base: Base = None,
    entry: Entry = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Do these shapes fit? `wan2.2-ti2v-5b` or `tiny`, guidance 1; needs no weights."),
    ] = None,
    guidance: Guidance = None,
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    self_test: Annotated[bool, typer.Option("--self-test", help="Run small numeric checks on the device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show what this machine has, what would run each operation and why nothing else, and whether a model fits.

    `longvideo doctor` lists GPUs and how they reach each other, memory, disks and versions. Where there is no GPU, and
    where something cannot be told, it says why.

    `longvideo doctor --self-test` runs small numeric checks too: a round trip, kernels against the definition, a
    product, a gradient, the 4-bit cache.

    `longvideo doctor --model FOLDER --precision fp8` also says what streaming takes of each GPU, part by part, whether
    that is free, and which options would help where it is not. The options are those of `longvideo generate`; no weight
    is read.

    `longvideo doctor --preset wan2.2-ti2v-5b --decode-device cuda:1` does so before there are weights. A machine
    without a GPU answers both: how much memory GPUs would need.

    Ends with code 1 when a check fails or a model does not fit into the GPUs of this machine, with 0 otherwise.
    """
    from longvideo.infer.fit.placement import pick_device
    from longvideo.infer.fit.refusal import cuda_devices
    from longvideo.quantization.number_formats import NumberFormats

    formats = NumberFormats(precision, kv_cache, attention)
    if model is not None and preset is not None:
        raise UserError("--model and --preset exclude each other")
    question = None
    if model is not None or preset is not None:
        choice = None if model is None else ModelChoice(model, base, None, entry)
        placement = _placement(device, decode_device, decode_share)
        question = _question(choice, preset, guidance, formats, placement)
    elif formats != NumberFormats() or any(x is not None for x in (base, entry, guidance, decode_device, decode_share)):
        raise UserError("options of a model were given and no model; name one with --model or --preset")
    # without a GPU, --device names one of another machine: the operations of this one are those of its CPU
    elsewhere = question is not None and not self_test and not cuda_devices()
    where = pick_device(None if elsewhere else device)
    from longvideo.cli.doctor_report import MachineReport

    report = MachineReport.of(where, question, self_test=self_test)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


def _question(
    choice: ModelChoice | None,
    preset: str | None,
    guidance: float | None,
    formats: NumberFormats,
    placement: Placement,
) -> Question:
    """Check what `longvideo generate` checks before it loads a model; of a GPU that is elsewhere, not its hardware."""
    from longvideo.cli.doctor_report import Question
    from longvideo.infer.fit.formats import check_hardware, check_shapes
    from longvideo.infer.fit.memory import Workload
    from longvideo.infer.fit.refusal import cuda_devices
    from longvideo.infer.fit.shapes import folder_shapes, preset_shapes
    from longvideo.infer.options import SamplingOptions

    SamplingOptions(guidance=guidance)
    folder = None if choice is None else _open(choice)
    shapes = preset_shapes(str(preset)) if folder is None else folder_shapes(folder)
    name = str(preset) if choice is None else choice.name
    check_shapes(shapes, formats, name=name)
    if placement.device.type == "cpu" or cuda_devices():
        check_hardware(formats, device=placement.device)
    workload = Workload(shapes=shapes.with_guidance(guidance), formats=formats, placement=placement)
    return Question(name, None if folder is None else folder.path, workload)


def _open(choice: ModelChoice) -> ModelFolder:
    for name in (choice.name, choice.base or ""):
        if "/" in name and not Path(name).expanduser().exists():
            raise UserError(f"there is no {name}, and doctor downloads nothing; --preset takes shapes alone")
    return choice.open()


def _placement(device: str | None, decode_device: str | None, decode_share: float | None) -> Placement:
    """Return a placement on devices of this machine; if it has no GPU, on devices of a machine with GPUs."""
    from longvideo.infer.fit.placement import Placement, named_device
    from longvideo.infer.fit.refusal import cuda_devices

    if cuda_devices():
        return Placement.choose(device, decode_device, decode_share)
    own = named_device("cuda:0" if device is None else device)
    other = own if decode_device is None else named_device(decode_device)
    return Placement(own, other, 0.0 if decode_share is None else decode_share)
