"""`longvideo eval decoder`: the difference of a decoder from the full one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from longvideo.cli.model_options import DecoderFormat, DecoderName, Device, one_decoder
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.files import check_target, write_json


def decoder(
    latents: Annotated[
        Path,
        typer.Argument(
            metavar="LATENTS", help="File of `longvideo generate --latents`, or a folder of encoded clips; see decode."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model that made the latents.  [default: the one that LATENTS names]")
    ] = None,
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    device: Device = None,
    num: Annotated[int | None, typer.Option(min=1, help="Largest number of videos.  [default: all]")] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Compare a decoder with the model's autoencoder in fp32 on the same latents.

    Prints the peak signal-to-noise ratio of the pixels of each video, and that of its first and last tenth: a decoder
    whose difference grows with time has a lower one at the end.

    `longvideo eval decoder ball.safetensors --decoder-precision bf16`

    `longvideo eval decoder ball.safetensors --decoder runs/decoder/model/decoder.safetensors`
    """
    from dataclasses import asdict, replace
    from math import isfinite

    from rich.console import Console
    from rich.table import Table

    from longvideo.checkpoint.decoders import WAN
    from longvideo.cli.decode import open_model
    from longvideo.infer.decoder_comparison import compare_decoders
    from longvideo.infer.fit.formats import check_hardware, decoding_line
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.saved_latents import LatentsDecoder, open_saved
    from longvideo.machine.host import machine
    from longvideo.quantization.number_formats import NumberFormats

    formats, placement = NumberFormats.parse(decoder=decoder_precision), Placement.choose(device)
    check_hardware(formats, placement)
    if out is not None:
        check_target(out)
    saved = open_saved(latents, num=num)
    folder = open_model(saved, model, None)
    chosen = LatentsDecoder.choose(saved, folder, one_decoder(decoder), placement)
    full = LatentsDecoder.choose(saved, folder, WAN, placement)
    num_frames = chosen.check(saved, formats, placement)
    own, formats = chosen.load(placement, formats)
    reference, _ = full.load(placement, replace(formats, decoder="fp32"))
    typer.echo(decoding_line(formats, placement, decoder=own.name), err=True)
    chunk_frames = chosen.chunk_frames(saved)
    with items_progress(Console(file=sys.stderr)) as progress:
        bar = progress.add_task("chunks", total=len(saved.videos) * (1 + -(-saved.shape[1] // chunk_frames)))
        results = compare_decoders(
            saved,
            own,
            reference,
            chunk_frames=chunk_frames,
            num_frames=num_frames,
            on_part=lambda: progress.advance(bar),
        )
    table = Table("video", "PSNR", "first tenth", "last tenth", title=f"{own.name} against the autoencoder in fp32")
    for result in results:
        values = (result.psnr, result.first_psnr, result.last_psnr)
        table.add_row(result.video or saved.stem, *(f"{value:.2f} dB" for value in values))
    Console(width=100).print(table)
    if out is not None:
        facts = {"machine": machine(placement.decode_device), "decoder": own.name, "precision": formats.decoder}
        videos = [{**asdict(x), "psnr": x.psnr if isfinite(x.psnr) else None} for x in results]
        write_json(out, {**facts, "videos": videos})
