"""`longvideo bench`: measure the parts of streaming, and compare them with what the hardware allows."""

from __future__ import annotations

from typing import Annotated

import typer

from longvideo.cli.bench_options import Output, Preset, check_outputs, named_shapes, print_backends
from longvideo.cli.bench_plan import plan
from longvideo.cli.bench_recipes import recipes
from longvideo.cli.bench_stream import parallel, stream
from longvideo.cli.model_options import Device
from longvideo.errors import UserError
from longvideo.files import write_json

app = typer.Typer(no_args_is_help=True, help="Time the parts against what the hardware allows.")


@app.callback()
def bench() -> None:
    """Time the parts against what the hardware allows."""


@app.command()
def kernels(preset: Preset = None, device: Device = None, out: Output = None) -> None:
    """Time each NVFP4 kernel, and compute what share of the device's copy bandwidth it reaches.

    Every kernel is compared with its definition first, bit for bit; nothing is timed on a wrong result. The bytes are
    those that any implementation has to read and write; quantizing reads its input twice, the first time for the
    largest magnitude.

    Example: `longvideo bench kernels --output kernels.json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.kernels import time_kernels
    from longvideo.machine.devices import pick_device
    from longvideo.machine.host import machine

    check_outputs(out)
    torch_device = pick_device(device)
    name, shapes = named_shapes(preset, torch_device)
    print_backends(torch_device)
    bandwidth, timings = time_kernels(shapes.transformer, shapes.spec, device=torch_device)
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
            "machine": machine(torch_device),
            "preset": name,
            "copy_bytes_per_s": bandwidth,
            "kernels": [{**asdict(timing), "share": timing.share} for timing in timings],
        }
        write_json(out, report)


@app.command()
def step(preset: Preset = None, device: Device = None, out: Output = None) -> None:
    """Time one denoising step in every number format: bf16, 4-bit weights, 4-bit weights and inputs, 4-bit caches.

    The weights are random. A step is one forward pass of the transformer over one chunk with a full window, batch 1,
    without guidance, not compiled.

    Example: `longvideo bench step --output step.json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.step import time_steps
    from longvideo.machine.devices import pick_device
    from longvideo.machine.host import machine

    check_outputs(out)
    torch_device = pick_device(device)
    name, shapes = named_shapes(preset, torch_device)
    print_backends(torch_device)
    console = Console(width=120)
    with console.status("") as status:
        timings = time_steps(shapes.transformer, shapes.spec, device=torch_device, on_case=status.update)
    table = Table(
        "precision", "cache", "step", "of bf16", "weights", "cache", "peak on the GPU", title=f"{name}, {torch_device}"
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
        report = {"machine": machine(torch_device), "preset": name, "steps": [asdict(timing) for timing in timings]}
        write_json(out, report)


@app.command()
def load(preset: Preset = None, device: Device = None, out: Output = None) -> None:
    """Time the loading of a packed transformer with random weights, and measure the peak of the device's memory.

    The packed weights, 2.9 GB for `wan2.2-ti2v-5b`, are first written to the folder for temporary files.

    Example: `longvideo bench load --output load.json`
    """
    from dataclasses import asdict

    from longvideo.infer.bench.loading import time_loading
    from longvideo.machine.devices import pick_device
    from longvideo.machine.host import machine

    check_outputs(out)
    torch_device = pick_device(device)
    name, shapes = named_shapes(preset, torch_device)
    print_backends(torch_device)
    timing = time_loading(shapes.transformer, device=torch_device)
    sizes = (timing.file_bytes, timing.model_bytes, timing.peak_bytes)
    on_disk, in_memory, peak = (f"{size / 1e9:.3f} GB" for size in sizes)
    typer.echo(
        f"{name}, {torch_device}: {timing.seconds:.2f} s; files {on_disk}, weights {in_memory}, peak on the GPU {peak}"
    )
    if out is not None:
        report = {"machine": machine(torch_device), "preset": name, **asdict(timing)}
        write_json(out, report)


@app.command()
def encode(
    preset: Preset = None,
    chunks: Annotated[int, typer.Option(min=1, help="Length of the clip in chunks of 8 latent frames.")] = 12,
    ranks: Annotated[
        int, typer.Option(min=1, help="Number of ranks that share the clip; a divisor of its latent frames.")
    ] = 2,
    device: Device = None,
    out: Output = None,
) -> None:
    """Time how long ranks that share a clip take to encode it, each its own part and the frames before it that matter.

    The weights are random, and the parts are timed one after the other on one device; they are compared with the clip
    encoded whole.

    Example: `longvideo bench encode --ranks 4`
    """
    from dataclasses import asdict

    import torch

    from longvideo.infer.bench.encoding import time_encoding
    from longvideo.machine.devices import pick_device
    from longvideo.machine.host import machine

    check_outputs(out)
    torch_device = pick_device(device)
    name, shapes = named_shapes(preset, torch_device)
    latents = chunks * shapes.spec.chunk_frames
    if latents % ranks:
        raise UserError(f"--ranks is {ranks}; expected a divisor of {latents} latent frames, such as 1")
    print_backends(torch_device)
    size = (shapes.settings.height, shapes.settings.width)
    dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    timing = time_encoding(
        shapes.autoencoder, latents=latents, ranks=ranks, size=size, device=torch_device, dtype=dtype
    )
    typer.echo(
        f"{name}, {torch_device}, {dtype}: {latents} latent frames of {size[0]} x {size[1]} pixels, halo {timing.halo}"
    )
    typer.echo(f"whole: {timing.whole_seconds:.2f} s")
    for rank, (seconds, frames) in enumerate(zip(timing.part_seconds, timing.part_frames, strict=True)):
        typer.echo(f"rank {rank}: {seconds:.2f} s for {frames} frames")
    typer.echo(f"saved: {timing.saved_seconds:.2f} s; relative error against the whole {timing.relative_error:.1e}")
    if out is not None:
        report = {
            "machine": machine(torch_device),
            "preset": name,
            "saved_seconds": timing.saved_seconds,
            **asdict(timing),
        }
        write_json(out, report)


@app.command()
def decoder(
    preset: Preset = None,
    device: Device = None,
    out: Output = None,
) -> None:
    """Time each stage of the decoder for one latent frame, in bf16 and in FP8, and measure the error of FP8.

    The weights are random and keep activations near unit size. Every value of every FP8 convolution is compared with
    its definition first, twice; nothing is timed on a wrong result. Needs a GPU with FP8 units.

    Example: `longvideo bench decoder --output decoder.json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from longvideo.infer.bench.decoder import time_decoder
    from longvideo.kernels.backends import convolution_backend
    from longvideo.machine.devices import pick_device
    from longvideo.machine.host import machine

    check_outputs(out)
    torch_device = pick_device(device)
    backend = convolution_backend("fp8", torch_device)
    if backend.name is None:
        raise UserError(str(backend.reason))
    name, shapes = named_shapes(preset, torch_device)
    scale = shapes.autoencoder.scale_factor_spatial
    size = shapes.settings.height // scale, shapes.settings.width // scale
    timing = time_decoder(shapes.autoencoder, size, device=torch_device)
    title = f"{name}, one latent frame: {timing.bf16_ms:.1f} ms in bf16, {timing.fp8_ms:.1f} ms in FP8"
    table = Table("stage, channels", "frames, height, width", "bf16", "FP8", "error", "checked values", title=title)
    for stage in timing.stages:
        shape = " x ".join(map(str, stage.shape))
        times = f"{stage.bf16_ms:.2f} ms", f"{stage.fp8_ms:.2f} ms"
        table.add_row(stage.stage, shape, *times, f"{stage.error:.1e}", f"{stage.checked:,}")
    Console(width=120).print(table)
    typer.echo(f"pixels of {backend} against bf16: {timing.psnr:.1f} dB")
    if out is not None:
        write_json(out, {"machine": machine(torch_device), "preset": name, **asdict(timing)})


app.command()(stream)
app.command()(parallel)
app.command()(recipes)
app.command()(plan)
