"""`longvideo doctor`: describe a machine, check its numeric results, and estimate whether a model fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.model_options import (
    AttentionFormat,
    Base,
    DecodeDevice,
    DecoderFormat,
    DecoderName,
    DecodeShare,
    Device,
    DeviceChoice,
    Entry,
    Guidance,
    KVCacheFormat,
    LowMemory,
    ModelChoice,
    OffloadWeights,
    Precision,
    TextEncoderChoice,
    one_decoder,
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
        str | None, typer.Option(help="Model to estimate: `tiny`, or a folder or file; nothing is downloaded.")
    ] = None,
    base: Base = None,
    entry: Entry = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Shapes to estimate without weights, with guidance 1: `wan2.2-ti2v-5b` or `tiny`."),
    ] = None,
    guidance: Guidance = None,
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    text_encoder: TextEncoderChoice = None,
    low_memory: LowMemory = False,
    offload_weights: OffloadWeights = False,
    self_test: Annotated[bool, typer.Option("--self-test", help="Run small numeric checks on the device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
) -> None:
    """Describe this machine and the backend of each operation, and estimate whether a model fits.

    `longvideo doctor` lists GPUs and their connections, memory, disks, versions, and for each operation the backend and
    why the others do not run. If there is no GPU, or a value is unknown, it prints the reason. It also lists settings
    with which the 5B fits into GPUs of 12 to 80 GB.

    `longvideo doctor --self-test` also runs small numeric checks: a round trip, kernels against their definition, a
    product, a gradient, the 4-bit cache.

    `longvideo doctor --model FOLDER --precision fp8` also estimates the memory that streaming needs on each GPU, part
    by part, and compares it with the free memory. If that is not enough, it names options that help. The options are
    those of `longvideo generate`, which frees the text encoder of a GPU, and `longvideo serve`, which keeps it; no
    weight is read.

    `longvideo doctor --preset wan2.2-ti2v-5b --decode-device cuda:1` estimates without weights. On a machine without a
    GPU, both print the memory that GPUs need.

    The exit code is 1 if a check fails or a model does not fit into the GPUs of this machine, else 0.
    """
    from longvideo.infer.fit.refusal import cuda_devices
    from longvideo.machine.devices import pick_device
    from longvideo.quantization.number_formats import NumberFormats

    formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
    if model is not None and preset is not None:
        raise UserError("--model and --preset exclude each other; use one of them")
    question = None
    if model is not None or preset is not None:
        choice = None if model is None else ModelChoice(model, base, None, entry)
        devices = DeviceChoice(device, decode_device, decode_share, text_encoder, low_memory, offload_weights)
        placement = _placement(devices)
        question = _question(choice, preset, guidance, formats, placement, one_decoder(decoder))
    elif formats != NumberFormats() or any(
        option not in (None, False)
        for option in (
            base,
            entry,
            guidance,
            decode_device,
            decode_share,
            decoder,
            text_encoder,
            low_memory,
            offload_weights,
        )
    ):
        raise UserError("there are options of a model, but no model; name one with --model or --preset")
    # without a GPU, --device is that of another machine; the operations are those of this machine's CPU
    elsewhere = question is not None and not self_test and not cuda_devices()
    torch_device = pick_device(None if elsewhere else device)
    from longvideo.cli.doctor_report import MachineReport

    report = MachineReport.of(torch_device, question, self_test=self_test)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


def _question(
    choice: ModelChoice | None,
    preset: str | None,
    guidance: float | None,
    formats: NumberFormats,
    placement: Placement,
    decoder: str | None,
) -> Question:
    """Make the checks of `longvideo generate` before it loads a model.

    The hardware of a GPU is checked only if this machine has GPUs.
    """
    from longvideo.checkpoint.decoders import choose_decoder
    from longvideo.cli.doctor_report import Question
    from longvideo.infer.fit.formats import check_hardware, check_shapes
    from longvideo.infer.fit.memory import Workload
    from longvideo.infer.fit.refusal import cuda_devices
    from longvideo.infer.fit.shapes import folder_shapes, preset_shapes
    from longvideo.infer.options import SamplingOptions

    SamplingOptions(guidance=guidance)
    folder = None if choice is None else _open(choice)
    if folder is None:
        shapes = preset_shapes(str(preset)).with_decoder(decoder)
    else:
        shapes = folder_shapes(folder, choose_decoder(folder, decoder, device=placement.decode_device))
    name = str(preset) if choice is None else choice.name
    check_shapes(shapes, formats, decode_share=placement.decode_share, name=name)
    if placement.device.type == "cpu" or cuda_devices():
        check_hardware(formats, placement)
    workload = Workload(shapes=shapes.with_guidance(guidance), formats=formats, placement=placement)
    return Question(name, None if folder is None else folder.path, workload)


def _open(choice: ModelChoice) -> ModelFolder:
    """Open a model without downloading it. Raises UserError for one that is not on this machine."""
    for name in (choice.name, choice.base or ""):
        if "/" in name and not Path(name).expanduser().exists():
            raise UserError(
                f"there is no folder or file {name!r}; use a local model (doctor downloads nothing) or --preset"
            )
    return choice.open()


def _placement(choice: DeviceChoice) -> Placement:
    """Return a placement on devices of this machine; if it has no GPU, on devices of a machine with GPUs."""
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.fit.refusal import cuda_devices
    from longvideo.machine.devices import named_device

    if cuda_devices():
        return choice.place()
    own = named_device("cuda:0" if choice.device is None else choice.device)
    other = own if choice.decode_device is None else named_device(choice.decode_device)
    share = 0.0 if choice.decode_share is None else choice.decode_share
    return Placement(
        own,
        other,
        share,
        text_on_cpu=choice.text_encoder == "cpu",
        low_memory=choice.low_memory,
        offload_weights=choice.offload_weights,
    )
