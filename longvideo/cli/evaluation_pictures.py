"""`longvideo eval sheet` and `longvideo eval curves`: pictures of what a model generates and of how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longvideo.cli.evaluation_output import check_target_below
from longvideo.cli.model_options import (
    AttentionFormat,
    DecoderFormat,
    DecoderName,
    Device,
    KVCacheFormat,
    ModelChoice,
    Precision,
    one_decoder,
    warn_of_missing_quotes,
)
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.errors import UserError


def sheet(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="One prompt for each clip.  [default: six prompts of ShapeWorld]"),
    ] = None,
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id.")] = "tiny",
    seconds: Annotated[float, typer.Option(help="Length of each clip.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's own]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's own]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, the same for every clip.")] = 0,
    device: Device = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    name: Annotated[
        str | None,
        typer.Option(help="File name of the pictures, without suffix.  [default: the last part of the model's name]"),
    ] = None,
    webp: Annotated[bool, typer.Option("--webp", help="Write NAME.webp, in full color, instead of NAME.gif.")] = False,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for the two pictures.")] = Path("runs/sheet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing pictures.")] = False,
) -> None:
    """Draw a contact sheet and a looping GIF of the clips that a model generates for some prompts.

    Writes `NAME.png`, a row of frames for each clip, and `NAME.gif`, all clips side by side.

    Example: `longvideo eval sheet --model tiny --output docs/images --overwrite`
    """
    import numpy as np
    from rich.console import Console

    from longvideo.evaluation.showcase import PROMPTS, write_showcase
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.script import check_prompt, check_seconds
    from longvideo.quantization.number_formats import NumberFormats

    SamplingOptions(steps, guidance, seed)
    check_seconds(seconds, "each video")
    warn_of_missing_quotes(prompts or [], command="longvideo eval sheet")
    texts = list(prompts or PROMPTS)
    for prompt in texts:
        check_prompt(prompt, "a prompt")
    name = name or Path(model).resolve().name
    targets = out / f"{name}.png", out / f"{name}{'.webp' if webp else '.gif'}"
    for target in targets:
        check_target_below(target, overwrite=overwrite)
    formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision)
    pipeline = ModelChoice(model).load(Placement.choose(device), formats, one_decoder(decoder))
    typer.echo(pipeline.start_line(), err=True)
    streams = [pipeline.stream(prompt, seconds=seconds, steps=steps, guidance=guidance, seed=seed) for prompt in texts]
    # before the work: a folder that cannot be created is an error at once
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with items_progress(console) as progress:
        clips = [np.concatenate(list(stream)) for stream in progress.track(streams, description="clips")]
    write_showcase(clips, texts, targets, fps=pipeline.fps)
    console.print(f"written: {', '.join(map(str, targets))}", soft_wrap=True)


def curves(
    metrics: Annotated[
        list[Path], typer.Argument(metavar="METRICS", help="metrics.jsonl of one or more training runs.")
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to draw; repeat the option for more.  [default: loss]")
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Draw the runs one after another, for runs that each resume from the previous one."
        ),
    ] = False,
    title: Annotated[str, typer.Option(help="Title above the picture.  [default: the names of the metrics]")] = "",
    low: Annotated[float | None, typer.Option(help="Lower end of the y axis.  [default: fits the values]")] = None,
    high: Annotated[float | None, typer.Option(help="Upper end of the y axis.  [default: fits the values]")] = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="PNG file to write.")] = Path("curves.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture if it exists.")] = False,
) -> None:
    """Draw metrics of training runs as curves over the steps.

    Example: `longvideo eval curves runs/vae/metrics.jsonl --metric psnr --metric object --output vae.png`
    """
    from longvideo.evaluation.curves import draw_curves, read_metrics
    from longvideo.evaluation.sheet import write_picture

    if out.suffix != ".png":
        raise UserError(f"--output {out} does not end in .png; the picture is a PNG file")
    if low is not None and high is not None and not low < high:
        raise UserError(
            f"--low {low:g} is not below --high {high:g}; use a lower end that is smaller than the upper end"
        )
    check_target_below(out, overwrite=overwrite)
    names = metric or ["loss"]
    picture = draw_curves(
        [read_metrics(path) for path in metrics],
        names,
        title=title or ", ".join(names),
        join=join,
        y_range=(low, high),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_picture(picture, out)
