"""`longvideo info`: print the contents of a model, and check that its weights fit its configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.cli.model_options import Entry
from longvideo.cli.printing import printable, shown_size
from longvideo.errors import UserError

if TYPE_CHECKING:
    import torch

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.updates import StoredAdapter

MILLION, BILLION = 1e6, 1e9
DTYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float8_e4m3fn": "fp8",
    "torch.float8_e5m2": "fp8 (E5M2)",
}


@dataclass(frozen=True)
class PartReport:
    """A part of a model, from the headers of its files. problem: why the weights do not fit, or None."""

    name: str
    kind: str
    num_parameters: int
    dtypes: tuple[str, ...]
    num_bytes: int
    num_files: int
    problem: str | None


def info(
    model: Annotated[
        str, typer.Argument(help="`tiny`, a folder or file of any known format, or a Hugging Face id.")
    ] = "tiny",
    base: Annotated[
        str | None, typer.Option(help="Model that provides the parts missing from MODEL, and to which a LoRA is added.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings to show: `wan2.2-ti2v-5b` or `longlive-2.0-5b`.  [default: its own]")
    ] = None,
    entry: Entry = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the format, parts, sizes, geometry and default settings of a model, and its missing parts.

    The format is recognized by content; `longvideo convert --help` lists the known formats. Only headers of weight
    files are read and compared with the configuration, which is fast and needs no memory for weights. The exit code is
    2 if a file is damaged or does not fit.

    `longvideo info Wan2.2-TI2V-5B`

    `longvideo info model_bf16.pt --base Wan2.2-TI2V-5B`
    """
    from longvideo.checkpoint.folder import MissingBase, ModelFolder

    try:
        folder = ModelFolder.open(model, base=base, preset=preset, entry=entry)
    except MissingBase as error:
        _print_adapter(model, error.adapter, as_json=as_json)
        return
    from longvideo.checkpoint.decoders import open_decoder, small_decoder

    file = small_decoder(folder)
    small = None if file is None else open_decoder(file, folder.vae_config).kind
    parts = [describe_part(folder, part) for part in folder.parts]
    geometry = describe_geometry(folder)
    if as_json:
        report = {
            "path": str(folder.path),
            "format": folder.format,
            "notes": dict(folder.notes),
            "parts": [asdict(part) for part in parts],
            "small_decoder": small,
            "missing": list(folder.missing),
            "unused": {str(file): reason for file, reason in folder.unused.items()},
            "settings": asdict(folder.settings),
            "geometry": geometry,
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_tables(folder, parts, geometry)
        if file is not None:
            typer.echo(f"small decoder: {small}, {file.name}")
    for part in parts:
        if part.problem is not None:
            raise UserError(part.problem)


def describe_part(folder: ModelFolder, part: str) -> PartReport:
    """Read the headers of a part, and compare them with the module of its configuration."""
    from longvideo.checkpoint.packed import num_represented

    weights = folder.weights(part)
    problem = None
    try:
        folder.check(part)
    except UserError as error:
        problem = str(error)
    return PartReport(
        name=part,
        kind=folder.kind(part),
        num_parameters=sum(num_represented(name, tensor.num_values) for name, tensor in weights.infos.items()),
        dtypes=tuple(sorted({_stored_as(name, tensor.dtype) for name, tensor in weights.infos.items()})),
        num_bytes=weights.num_bytes,
        num_files=len(weights.files),
        problem=problem,
    )


def _stored_as(name: str, dtype: torch.dtype) -> str:
    from longvideo.checkpoint.packed import PACKED_LEAVES

    return (
        "nvfp4"
        if name.rpartition(".")[2] in PACKED_LEAVES
        else DTYPES.get(str(dtype), str(dtype)).removeprefix("torch.")
    )


def describe_geometry(folder: ModelFolder) -> dict[str, Any]:
    """Return latent sizes, tokens and durations; empty unless the model has a transformer and a vae."""
    if not {"transformer", "vae"} <= set(folder.parts):
        return {}
    settings, spec = folder.settings, folder.spec
    spatial, temporal = folder.vae_config.scale_factor_spatial, folder.vae_config.scale_factor_temporal
    chunk_pixel_frames = spec.chunk_frames * temporal
    return {
        "latent_channels": folder.vae_config.z_dim,
        "latent_height": settings.height // spatial,
        "latent_width": settings.width // spatial,
        "tokens_per_frame": spec.tokens_per_frame,
        "tokens_per_chunk": spec.tokens_per_chunk,
        "first_chunk_pixel_frames": chunk_pixel_frames - temporal + 1,
        "chunk_pixel_frames": chunk_pixel_frames,
        "chunk_seconds": chunk_pixel_frames / settings.fps,
        "window_chunks": spec.window_chunks,
        "window_seconds": spec.window_frames * temporal / settings.fps,
        "sink_chunks": spec.sink_chunks,
    }


def _print_tables(folder: ModelFolder, parts: list[PartReport], geometry: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(f"{printable(str(folder.path))}: {folder.format}", markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("part", "class", "parameters", "dtype", "size", "weights"):
        table.add_column(heading, no_wrap=True)
    for part in parts:
        table.add_row(
            part.name,
            escape(printable(part.kind)),
            _count(part.num_parameters),
            ", ".join(part.dtypes),
            shown_size(part.num_bytes),
            "fit" if part.problem is None else "[red]do not fit[/red]",
        )
    total = sum(part.num_parameters for part in parts), sum(part.num_bytes for part in parts)
    table.add_section()
    table.add_row("all", "", _count(total[0]), "", shown_size(total[1]), "")
    console.print(table)
    console.print(_settings_table(folder, geometry))
    for key, note in folder.notes.items():
        console.print(printable(f"{key}: {note}"), markup=False, highlight=False)
    if folder.missing:
        missing = " and ".join(folder.missing)
        remedy = "use --base with a model that has them"
        if folder.missing == ("vae",):
            remedy = "use --base with a model that has it, or --decoder with a file"
        console.print(f"missing: {missing}; to generate videos, {remedy}", highlight=False)
    for file, reason in folder.unused.items():
        console.print(printable(f"not used: {file.name}, {reason}"), markup=False, highlight=False)


def _count(number: int) -> str:
    return f"{number / BILLION:,.2f} B" if number >= BILLION else f"{number / MILLION:,.2f} M"


def _print_adapter(model: str, adapter: StoredAdapter, *, as_json: bool) -> None:
    facts: dict[str, Any] = {
        "ranks": adapter.ranks,
        "scales": adapter.scales,
        "layers": len(adapter.low_rank),
        "differences": len(adapter.updates) - len(adapter.low_rank),
        "parameters": adapter.num_values,
    }
    if as_json:
        typer.echo(json.dumps({"path": model, "format": "LoRA", **facts}, indent=2))
        return
    facts |= {name: " and ".join(f"{x:g}" for x in facts[name]) or "none" for name in ("ranks", "scales")}
    listed = ", ".join(f"{name} {value}" for name, value in facts.items())
    typer.echo(f"{model}: LoRA; {listed}; use --base with the model that it belongs to")


def _settings_table(folder: ModelFolder, geometry: dict[str, Any]) -> Any:
    from rich.table import Table

    settings = folder.settings
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("picture", f"{settings.width} x {settings.height} pixels, {settings.fps} frames per second")
    if geometry:
        latent = f"{geometry['latent_channels']} x {geometry['latent_height']} x {geometry['latent_width']}"
        tokens = f"{geometry['tokens_per_frame']} tokens per latent frame, {geometry['tokens_per_chunk']} per chunk"
        table.add_row("latent frame", f"{latent} (channels, height, width); {tokens}")
        table.add_row(
            "chunk",
            f"{settings.chunk_frames} latent frames = {geometry['chunk_pixel_frames']} frames"
            f" = {geometry['chunk_seconds']:.2f} s; the first has {geometry['first_chunk_pixel_frames']} frames",
        )
    pin = ", with the first chunk of the shot as pin" if settings.pin_shots else ""
    table.add_row("window", f"{settings.window_frames} latent frames, {settings.sink_frames} of them sink{pin}")
    table.add_row("position offset", f"{settings.offset_per_shot} latent frames per cut")
    table.add_row("text", f"{settings.text_len} positions")
    defaults = f"{settings.steps} steps, guidance {settings.guidance:g}, shift {settings.shift:g}"
    table.add_row("defaults", defaults)
    return table
