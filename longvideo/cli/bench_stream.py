"""`longvideo bench stream` and `longvideo bench parallel`: time streaming on one or two devices, and on ranks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.checkpoint.choices import adapter_choices
from longvideo.cli.bench_options import Output, Preset, check_outputs, named_shapes, preset_name
from longvideo.cli.model_options import (
    AdapterNames,
    AttentionFormat,
    DecodeDevice,
    DecoderFormat,
    DecoderName,
    DecodeShare,
    Device,
    DeviceChoice,
    KVCacheFormat,
    LowMemory,
    ModelChoice,
    OffloadWeights,
    Precision,
    one_decoder,
)
from longvideo.errors import UserError
from longvideo.files import write_json

if TYPE_CHECKING:
    from longvideo.infer.bench.stream import StreamReport
    from longvideo.infer.fit.memory import Workload
    from longvideo.infer.fit.shapes import ModelShapes
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.quantization.number_formats import NumberFormats


def stream(
    model: Annotated[
        str | None, typer.Option(help="`tiny`, a model folder or a Hugging Face id, instead of --preset.")
    ] = None,
    adapter: AdapterNames = None,
    preset: Preset = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of solver steps for each chunk.  [default: 2, or the model's own]")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: 1, or the model's own]")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Picture size in pixels, WIDTHxHEIGHT; only with wan2.2-ti2v-5b.  [default: 1280x704]"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Window in latent frames; only with wan2.2-ti2v-5b.  [default: 32]"),
    ] = None,
    chunks: Annotated[
        int, typer.Option(min=2, help="Number of chunks to measure, after those that fill the window.")
    ] = 20,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="Encode the prompt with a text encoder: `cuda`, `cpu`, `fp8` or `nvfp4`; on a GPU before anything else"
            " is loaded.  [default: with a preset, features are random]"
        ),
    ] = None,
    low_memory: LowMemory = False,
    offload_weights: OffloadWeights = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="Hold the process to this memory on each GPU, of which the CUDA context takes 1 GB."
        ),
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Also encode the video and write it to this .mp4 or .mkv.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw what the GPUs do during three more chunks to this .png.")
    ] = None,
    out: Output = None,
) -> None:
    """Time streaming: a step, the decoding of a chunk, and whole chunks until their last byte is written.

    First, the results of the fast path are compared with those of the plain path; nothing is timed on a wrong result.
    The times are those of a warm pipeline with a full window.

    `longvideo bench stream --steps 2 --output stream.json`, `longvideo bench stream --model tiny`

    `longvideo bench stream --precision fp8 --attention fp8 --decoder-precision fp8 --decode-device cuda:1`

    `longvideo bench stream --decoder taew2_2 --low-memory --text-encoder nvfp4 --memory-limit 16`

    With a preset, `--decoder` is `wan`, `taew2_2`, `taew2_2_super`, `mg-lightvae` or `mg-lightvae-v2`, with random
    weights.
    """
    from contextlib import nullcontext

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.reserved_memory import ReservedMemory
    from longvideo.infer.bench.stream import measure
    from longvideo.infer.fit.memory import Workload
    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.writer import OutputFile, VideoWriter
    from longvideo.quantization.number_formats import NumberFormats

    if model is not None and preset is not None:
        raise UserError("--model and --preset exclude each other; use one of them")
    if model is not None and (size is not None or window is not None):
        raise UserError("--size and --window are options of a preset; a model has its own; leave them out")
    adapters = adapter_choices(adapter or [])
    if model is None and adapters:
        raise UserError("--adapter is an option of a model; use --model, or leave it out")
    sampling = SamplingOptions(steps, guidance)
    formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
    placement = DeviceChoice(device, decode_device, decode_share, text_encoder, low_memory, offload_weights).place()
    check_outputs(out, timeline)
    if timeline is not None and (placement.device.type != "cuda" or timeline.suffix != ".png"):
        raise UserError(f"--timeline {timeline} needs a GPU and a file name that ends in .png")
    if video is not None:
        OutputFile(video, overwrite=True).check()
    name = model or preset_name(preset, placement.device)
    release_large_blocks()
    memory = ReservedMemory((placement.device, placement.decode_device), memory_limit)
    workload = None
    console = Console(width=120, stderr=True)
    with console.status("loading") as status:
        if model is not None:
            pipeline = ModelChoice(model, adapters=adapters).load(placement, formats, one_decoder(decoder))
        else:
            shapes = _preset_shapes(name, size, window, guidance, one_decoder(decoder))
            if text_encoder is None:
                shapes = replace(shapes, text_encoder=None)
            frees_text = placement.text_device.type == "cuda"
            workload = Workload(shapes=shapes, formats=formats, placement=placement, frees_text=frees_text)
            pipeline = _random_pipeline(name, workload)
        console.print(pipeline.start_line(), soft_wrap=True, highlight=False, markup=False)
        writer = VideoWriter(video, fps=pipeline.fps, overwrite=True) if video else None
        with writer or nullcontext():
            report = measure(
                pipeline,
                steps=sampling.steps,
                guidance=sampling.guidance,
                chunks=chunks,
                memory=memory,
                sink=writer,
                timeline=timeline,
                on_stage=status.update,
            )
    title = f"{name}, {placement.device}, decoding on {placement.decode_device}"
    table = Table("quantity", "value", title=title)
    for row in report.rows():
        table.add_row(*row)
    Console(width=120).print(table)
    if out is not None:
        facts = {"memory_limit_gb": memory_limit, "estimated_bytes": None if workload is None else _estimate(workload)}
        write_json(out, {**_facts(name, pipeline, formats, report), **facts})


def parallel(
    preset: Preset = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    out: Output = None,
) -> None:
    """Time the passes of ranks that share every chunk: its tokens, and in self-attention its heads and their cache.

    Without a launcher one rank does everything. The results are compared with those of the plain path on one rank
    first; nothing is timed on a wrong result.

    `torchrun --no-python --nproc-per-node 2 longvideo bench parallel --precision fp8`
    """
    import torch.distributed as dist

    from longvideo.infer.bench.passes import measure_passes
    from longvideo.infer.bench.random_models import random_models
    from longvideo.infer.fit.formats import check_hardware, check_shapes, start_line
    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.streaming.decoders import OWN_DECODER
    from longvideo.streaming.parallel import launched_ranks
    from longvideo.training.run_log import environment

    check_outputs(out)
    formats = NumberFormats.parse(precision, kv_cache, attention)
    with launched_ranks(None) as (own_device, group):
        placement = Placement.choose(own_device)
        name, shapes = named_shapes(preset, placement.device)
        check_shapes(shapes, formats, name=name)
        check_hardware(formats, placement)
        is_first = group is None or dist.get_rank() == 0
        if is_first:
            typer.echo(start_line(formats, placement, packed=False, decoder=OWN_DECODER), err=True)
        report = measure_passes(random_models(shapes, placement, formats=formats), group=group)
        if not is_first:
            return
        typer.echo(
            f"{name}, {report.ranks} ranks, {placement.device.type}: step {report.step_ms:.1f} ms, clean pass"
            f" {report.clean_pass_ms:.1f} ms; each rank: cache {report.cache_bytes / 1e9:.2f} GB, peak"
            f" {report.peak_bytes / 1e9:.2f} GB; error {report.error:.1e}"
        )
        if out is not None:
            facts = {"environment": environment(placement.device), "model": name, "formats": asdict(formats)}
            write_json(out, {**facts, **asdict(report)})


def _random_pipeline(name: str, workload: Workload) -> StreamingPipeline:
    """Return a pipeline with random weights. Raises UserError where it cannot run on the devices."""
    from longvideo.infer.bench.random_models import random_models
    from longvideo.infer.fit.formats import check_hardware, check_shapes
    from longvideo.infer.fit.refusal import check_memory
    from longvideo.infer.pipeline import StreamingPipeline

    shapes, formats, placement = workload.shapes, workload.formats, workload.placement
    check_shapes(shapes, formats, decode_share=placement.decode_share, name=name)
    check_hardware(formats, placement)
    check_memory(workload)
    return StreamingPipeline(random_models(shapes, placement, formats=formats))


def _estimate(workload: Workload) -> dict[str, int]:
    """Return the estimated peak of each GPU in bytes."""
    from longvideo.infer.fit.memory import estimate

    peaks: dict[str, int] = {}
    for part in estimate(workload):
        if part.device.type == "cuda":
            peaks[str(part.device)] = peaks.get(str(part.device), 0) + part.bytes
    return peaks


def _preset_shapes(
    name: str, size: str | None, window: int | None, guidance: float | None, decoder: str | None
) -> ModelShapes:
    from longvideo.checkpoint.picture_size import PictureSize
    from longvideo.infer.fit.shapes import preset_shapes

    shapes = preset_shapes(name, size=None if size is None else PictureSize.parse(size), window_frames=window)
    return shapes.with_guidance(guidance).with_decoder(decoder)


def _facts(name: str, pipeline: StreamingPipeline, formats: NumberFormats, report: StreamReport) -> dict[str, Any]:
    """Return what the JSON file holds."""
    from longvideo.training.run_log import environment

    models = pipeline.models
    return {
        "environment": environment(models.device),
        "model": name,
        "decode_device": str(models.decode_device),
        "decode_share": models.placement.decode_share,
        "low_memory": models.placement.low_memory,
        "offload_weights": models.placement.offload_weights,
        "size": [models.settings.height, models.settings.width],
        "window_frames": models.spec.window_frames,
        "formats": asdict(formats),
        "decoder": models.decoder_label,
        "adapters": models.adapters,
        **asdict(report),
        "denoise_fps": report.denoise_fps,
        "decode_fps": report.decode_fps,
        "chunk_s_p50": report.chunk_percentile(50),
        "chunk_s_p95": report.chunk_percentile(95),
    }
