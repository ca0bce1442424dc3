"""`longvideo bench`: how fast the parts are, against what the hardware allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.model_options import AttentionFormat, KVCacheFormat, Precision
from longvideo.cli.output import OUTPUT
from longvideo.errors import UserError
from longvideo.files import check_target, write_json

if TYPE_CHECKING:
    import torch

    from longvideo.infer.fit.shapes import ModelShapes

app = typer.Typer(no_args_is_help=True, help="Time the parts against what the hardware allows.")

PRESET_HELP = "Whose shapes: `wan2.2-ti2v-5b` or `tiny`.  [default: the former on a GPU]"
MOST_SIZE_DIGITS = 11
DEVICE_HELP = "`cuda`, `cuda:1` or `cpu`; the GPU if there is one."


@app.callback()
def bench() -> None:
    """Time the parts against what the hardware allows."""


@app.command()
def kernels(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Time each NVFP4 kernel, and say what share of the device's copy bandwidth it reaches.

    Every kernel is compared with its definition first, bit for bit; nothing is timed on a wrong result. The bytes are
    those that any implementation has to read and write; quantising takes two passes over its input, the first for the
    largest magnitude.

    Example: `longvideo bench kernels --out kernels.json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.kernels import time_kernels
    from longvideo.infer.fit.placement import pick_device
    from longvideo.machine.host import machine

    _check_output(out)
    where = pick_device(device)
    name, shapes = _shapes(preset, where)
    _print_backends(where)
    bandwidth, timings = time_kernels(shapes.transformer, shapes.spec, device=where)
    table = Table("kernel", "size", "time", "bytes", "floor", "share", title=f"copy: {bandwidth / 1e12:.3f} TB/s")
    for timing in timings:
        table.add_row(
            timing.kernel,
            timing.size,
            f"{timing.ms:.3f} ms",
            f"{timing.needed_bytes / 2**20:.1f} MiB",
            f"{timing.floor_ms:.3f} ms",
            f"{timing.share:.0%}",
        )
    Console(width=120).print(table)
    if out is not None:
        report = {
            "machine": machine(where),
            "preset": name,
            "copy_bytes_per_s": bandwidth,
            "kernels": [{**asdict(timing), "share": timing.share} for timing in timings],
        }
        write_json(out, report)


@app.command()
def step(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Time one denoising step in every number format: bf16, 4-bit weights, 4-bit weights and inputs, 4-bit cache.

    The weights are random. A step is one forward pass of the transformer over one chunk with a full window, batch 1,
    no guidance, nothing compiled.

    Example: `longvideo bench step --out step.json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.step import time_steps
    from longvideo.infer.fit.placement import pick_device
    from longvideo.machine.host import machine

    _check_output(out)
    where = pick_device(device)
    name, shapes = _shapes(preset, where)
    _print_backends(where)
    console = Console(width=120)
    with console.status("") as status:
        timings = time_steps(shapes.transformer, shapes.spec, device=where, on_case=status.update)
    table = Table(
        "precision", "cache", "step", "of bf16", "weights", "cache", "peak on the GPU", title=f"{name}, {where}"
    )
    for timing in timings:
        table.add_row(
            timing.precision,
            timing.kv_cache,
            f"{timing.ms:.1f} ms",
            f"{timing.ms / timings[0].ms:.3f}",
            *(f"{size / 1e9:.3f} GB" for size in (timing.model_bytes, timing.cache_bytes, timing.peak_bytes)),
        )
    console.print(table)
    if out is not None:
        report = {"machine": machine(where), "preset": name, "steps": [asdict(timing) for timing in timings]}
        write_json(out, report)


@app.command()
def load(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Load a packed transformer with random weights: time, and the peak of the device's memory.

    Writes the packed weights, 2.9 GB for `wan2.2-ti2v-5b`, to the folder for temporary files first.

    Example: `longvideo bench load --out load.json`
    """
    from dataclasses import asdict

    from longvideo.infer.bench.loading import time_loading
    from longvideo.infer.fit.placement import pick_device
    from longvideo.machine.host import machine

    _check_output(out)
    where = pick_device(device)
    name, shapes = _shapes(preset, where)
    _print_backends(where)
    timing = time_loading(shapes.transformer, device=where)
    sizes = (timing.file_bytes, timing.model_bytes, timing.peak_bytes)
    stored, held, peak = (f"{size / 1e9:.3f} GB" for size in sizes)
    typer.echo(f"{name}, {where}: {timing.seconds:.2f} s, {stored} stored, {held} of weights, peak on the GPU {peak}")
    if out is not None:
        report = {"machine": machine(where), "preset": name, **asdict(timing)}
        write_json(out, report)


@app.command()
def encode(
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Of 8 latent frames, in the clip.")] = 12,
    ranks: Annotated[int, typer.Option(min=1, help="That share the clip; a divisor of its latent frames.")] = 2,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Time how long ranks that share a clip take to encode it, each its own part with the frames before it that matter.

    The weights are random, and the parts are timed one after the other on one device; they are compared with the clip
    encoded whole.

    Example: `longvideo bench encode --ranks 4`
    """
    from dataclasses import asdict

    import torch

    from longvideo.infer.bench.encoding import time_encoding
    from longvideo.infer.fit.placement import pick_device
    from longvideo.machine.host import machine

    _check_output(out)
    where = pick_device(device)
    name, shapes = _shapes(preset, where)
    latents = chunks * shapes.spec.chunk_frames
    if latents % ranks:
        raise UserError(f"--ranks {ranks} does not divide {latents} latent frames")
    _print_backends(where)
    size = (shapes.settings.height, shapes.settings.width)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    timing = time_encoding(shapes.autoencoder, latents=latents, ranks=ranks, size=size, device=where, dtype=dtype)
    typer.echo(f"{name}, {where}, {dtype}: {latents} latent frames of {size[0]} x {size[1]} pixels, halo {timing.halo}")
    typer.echo(f"whole: {timing.whole_seconds:.2f} s")
    for rank, (seconds, frames) in enumerate(zip(timing.part_seconds, timing.part_frames, strict=True)):
        typer.echo(f"rank {rank}: {seconds:.2f} s for {frames} frames")
    typer.echo(f"saved: {timing.saved_seconds:.2f} s; relative error against the whole {timing.relative_error:.1e}")
    if out is not None:
        report = {"machine": machine(where), "preset": name, "saved_seconds": timing.saved_seconds, **asdict(timing)}
        write_json(out, report)


@app.command()
def stream(
    model: Annotated[
        str | None, typer.Option(help="`tiny`, a model folder or a Hugging Face id, instead of --preset.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"{PRESET_HELP} Random weights.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps a chunk.  [default: 2, or the model's own]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: 1, or the model's own]")] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels, with the preset wan2.2-ti2v-5b.  [default: 704x1280]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Latent frames attended to, with the same preset.  [default: 32]")
    ] = None,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks to measure, after those that fill the window.")] = 20,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    decode_device: Annotated[
        str | None, typer.Option(help="Where latents become pixels, for instance a second GPU.  [default: --device]")
    ] = None,
    decode_share: Annotated[
        float | None, typer.Option(help="Of the work of --decode-device, what --device does instead.  [default: 0]")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Encode and write the video to this .mp4 or .mkv too.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw what the GPUs do meanwhile to this .png.")] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Time streaming: a step, the decoding of a chunk, and whole chunks until their last byte is written.

    First, what the fast path makes is compared with the plain path; no figure is printed on a wrong result. Everything
    is warm when it is timed, and the window is full.

    `longvideo bench stream --steps 2 --out stream.json`, `longvideo bench stream --model tiny`

    `longvideo bench stream --precision fp8 --attention fp8 --decode-device cuda:1 --decode-share 0.1`
    """
    import dataclasses

    import torch
    from rich.console import Console
    from rich.table import Table

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.bench.random_models import random_models
    from longvideo.infer.bench.stream import measure
    from longvideo.infer.fit.formats import check_formats, check_hardware, check_shapes
    from longvideo.infer.fit.memory import Workload
    from longvideo.infer.fit.placement import check_decode_share, pick_device, pick_dtype
    from longvideo.infer.fit.refusal import check_memory
    from longvideo.infer.fit.shapes import preset_shapes
    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.writer import VideoWriter, check_output
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.training.run_log import environment

    if model is not None and preset is not None:
        raise UserError("--model and --preset exclude each other")
    if model is not None and (size is not None or window is not None):
        raise UserError("--size and --window are options of a preset; a model has its own")
    formats = NumberFormats(precision, kv_cache, attention)
    SamplingOptions(steps, guidance)
    where = pick_device(device)
    decode_where = where if decode_device is None else pick_device(decode_device)
    check_decode_share(decode_share, where, decode_where)
    _check_output(out, timeline)
    if timeline is not None and (where.type != "cuda" or timeline.suffix != ".png"):
        raise UserError(f"--timeline {timeline} needs a GPU to be drawn of and a name that ends in .png")
    if video is not None:
        check_output(video, overwrite=True)
    console = Console(width=120, stderr=True)
    release_large_blocks()
    with console.status("loading") as status:
        if model is not None:
            folder = ModelFolder.open(model)
            check_formats(folder, formats, device=where)
            pipeline = StreamingPipeline.load(
                folder, device=where, decode_device=decode_where, decode_share=decode_share, formats=formats
            )
        else:
            name, _ = _shapes(preset, where)
            shapes = preset_shapes(name, size=None if size is None else _size(size), window_frames=window)
            check_shapes(shapes, formats, name=name)
            check_hardware(formats, device=where)
            check_memory(
                Workload(
                    shapes=dataclasses.replace(shapes.with_guidance(guidance), text_encoder=None),
                    formats=formats,
                    device=where,
                    decode_device=decode_where,
                    decode_share=decode_share or 0.0,
                    dtype=pick_dtype(where),
                    loaded_in=torch.float32,  # random weights are drawn so
                )
            )
            pipeline = StreamingPipeline(
                random_models(
                    shapes,
                    device=where,
                    decode_device=decode_where,
                    decode_share=decode_share or 0.0,
                    formats=formats,
                )
            )
        console.print(pipeline.start_line(), soft_wrap=True, highlight=False, markup=False)
        writer = VideoWriter(video, fps=pipeline.fps, overwrite=True) if video else None
        try:
            report = measure(
                pipeline,
                steps=steps,
                guidance=guidance,
                chunks=chunks,
                sink=writer,
                timeline=timeline,
                on_stage=status.update,
            )
        finally:
            if writer is not None:
                writer.close()
    models = pipeline.models
    table = Table("what", "measured", title=f"{model or name}, {where}, decoding on {decode_where}")
    for row in report.rows():
        table.add_row(*row)
    Console(width=120).print(table)
    if out is not None:
        facts = {
            "environment": environment(where),
            "model": model or name,
            "decode_device": str(decode_where),
            "decode_share": models.decode_share,
            "size": [models.settings.height, models.settings.width],
            "window_frames": models.spec.window_frames,
            "formats": dataclasses.asdict(formats),
            **dataclasses.asdict(report),
            "denoise_fps": report.denoise_fps,
            "decode_fps": report.decode_fps,
            "chunk_s_p50": report.chunk_percentile(50),
            "chunk_s_p95": report.chunk_percentile(95),
        }
        write_json(out, facts)


@app.command()
def parallel(
    preset: Annotated[str | None, typer.Option(help=f"{PRESET_HELP} Random weights.")] = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file too.")] = None,
) -> None:
    """Time passes of ranks that share every chunk: its tokens, and in self-attention its heads, the cache included.

    Without a launcher one rank does all. What several make is compared with the plain path on one first.

    `torchrun --no-python --nproc-per-node 2 longvideo bench parallel --precision fp8`
    """
    import dataclasses

    import torch.distributed as dist

    from longvideo.infer.bench.random_models import random_models
    from longvideo.infer.bench.stream import measure_passes
    from longvideo.infer.fit.formats import check_hardware, check_shapes, start_line
    from longvideo.infer.fit.placement import pick_device, pick_dtype
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.streaming.parallel import launched_ranks
    from longvideo.training.run_log import environment

    _check_output(out)
    formats = NumberFormats(precision, kv_cache, attention)
    with launched_ranks(None) as (own_device, group):
        where = pick_device(own_device)
        name, shapes = _shapes(preset, where)
        check_shapes(shapes, formats, name=name)
        check_hardware(formats, device=where)
        if group is None or not dist.get_rank():
            typer.echo(start_line(formats, packed=False, device=where, dtype=pick_dtype(where)), err=True)
        models = random_models(shapes, device=where, decode_device=where, formats=formats)
        report = measure_passes(models, group=group, on_stage=lambda stage: None)
        if group is not None and dist.get_rank():
            return
        typer.echo(
            f"{name}, {report.ranks} ranks, {where.type}: step {report.step_ms:.1f} ms, clean pass"
            f" {report.clean_pass_ms:.1f} ms, of each rank cache {report.cache_bytes / 1e9:.2f} GB and peak"
            f" {report.peak_bytes / 1e9:.2f} GB, error {report.error:.1e}"
        )
        if out is not None:
            facts = {"environment": environment(where), "model": name, "formats": dataclasses.asdict(formats)}
            write_json(out, {**facts, **dataclasses.asdict(report)})


def _size(size: str) -> tuple[int, int]:
    height, cross, width = size.partition("x")
    if not cross or not (height.isdecimal() and width.isdecimal() and len(size) <= MOST_SIZE_DIGITS):
        raise UserError(f"--size {size!r} is not a size; write it like 704x1280")
    return int(height), int(width)


def _shapes(preset: str | None, device: torch.device) -> tuple[str, ModelShapes]:
    from longvideo.infer.fit.shapes import preset_shapes

    name = preset or ("wan2.2-ti2v-5b" if device.type == "cuda" else "tiny")
    return name, preset_shapes(name)


def _check_output(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            check_target(file)


def _print_backends(device: torch.device) -> None:
    """Print which kernels and products are timed."""
    from longvideo.kernels.backends import kernels_on, product_backend

    products = product_backend("nvfp4", device)
    typer.echo(f"running on {device} | kernels: {kernels_on(device)} | products nvfp4: {products}", err=True)
