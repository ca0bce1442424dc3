"""`longvideo eval`: measure models, and the judge that the measurements use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.evaluation_comparison import compare
from longvideo.cli.evaluation_decoders import decoder
from longvideo.cli.evaluation_extension import extension
from longvideo.cli.evaluation_output import check_results_folder, print_report, score_table
from longvideo.cli.evaluation_pictures import curves, sheet
from longvideo.cli.evaluation_sensitivity import sensitivity
from longvideo.cli.evaluation_videos import (
    SWITCH_CHUNKS,
    generate_videos,
    read_tasks,
    read_videos,
    show_switch,
    shown_chunks,
)
from longvideo.cli.model_options import (
    AttentionFormat,
    DecoderFormat,
    DecoderName,
    Device,
    DeviceChoice,
    KVCacheFormat,
    ModelChoice,
    Precision,
    TextEncoderChoice,
    one_decoder,
)
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.errors import UserError
from longvideo.files import check_target, write_json

if TYPE_CHECKING:
    import numpy as np

    from longvideo.evaluation.shapeworld import Task
    from longvideo.evaluation.switches import SwitchResult
    from longvideo.infer.timeline import SwitchMode

app = typer.Typer(no_args_is_help=True, help="Measure models, and the judge that the measurements use.")

LEAST_SHOT_SECONDS = 1.5
SHOWN_SWITCHES = 6
"""Switches of each mode that `switches.png` shows."""


@app.callback()
def evaluate() -> None:
    """Measure models, and the judge that the measurements use."""


@app.command()
def judge(
    num: Annotated[
        int, typer.Option(min=1, help="Number of scenes, alternately of the training and the held-out split.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    out: Annotated[
        Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file instead of standard output.")
    ] = None,
) -> None:
    """Measure the accuracy of the judge on scenes with known content.

    The judge reads shapes, colors, sizes, motions and backgrounds from the pixels, by classical vision. This command
    renders random ShapeWorld scenes and judges them in three conditions: clean; blurred with noise ("soft"); and also
    faded, tinted and coarsely quantized ("compressed"). It prints the share of correct answers as a table, and writes
    JSON with 95 % intervals.
    """
    from rich.console import Console

    from longvideo.evaluation.accuracy import measure_judge
    from longvideo.infer.options import SamplingOptions

    SamplingOptions(seed=seed)
    if out is not None:
        check_target(out)
    console = Console(stderr=True)
    with items_progress(console) as progress:
        bar = progress.add_task("scenes judged", total=num)
        results = measure_judge(num, seed=seed, on_scene=lambda: progress.advance(bar))
    console.print(score_table("condition", {result.condition: result.scores for result in results}))
    record = [
        {
            "condition": result.condition,
            "num": result.num,
            "scores": {name: score.record() for name, score in result.scores.items()},
            "confusions": result.confusions,
        }
        for result in results
    ]
    if out is None:
        typer.echo("[" + ",\n ".join(json.dumps(row) for row in record) + "]")
    else:
        write_json(out, record)


@app.command()
def shapeworld(
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id.")] = "tiny",
    videos: Annotated[
        Path | None,
        typer.Option(help="Judge the videos of this folder instead; its manifest.jsonl has ShapeWorld captions."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of videos.")] = 100,
    seconds: Annotated[float, typer.Option(help="Length of each shot, in seconds.")] = 4.0,
    shots: Annotated[
        int, typer.Option(min=1, help="Shots in each video; each has its own prompt and begins with a cut.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's own]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's own]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos generated together; more is faster on a GPU.")] = 1,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that judge videos while the next ones are generated.")
    ] = 1,
    device: Device = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    text_encoder: TextEncoderChoice = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and pictures.")] = Path("runs/eval"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Measure how often videos show what their prompts describe.

    Generates videos of held-out scenes, and judges number, color, shape, size, motion and background by classical
    vision. Writes `results.json` (for every video the prompt, what the judge read, and which answers are correct),
    `scores.png` (color, shape and background in each second), and film strips of failures and successes. With several
    shots, "shown" is the share of shots with every object of the prompt in its color and shape, and "cut" the share
    that begin within one chunk of the requested time.

    Example: `longvideo eval shapeworld --num 20 --seconds 20 --output runs/eval20`
    """
    from rich.console import Console

    from longvideo.evaluation.shapeworld import build_tasks, evaluate_videos
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.script import check_seconds

    check_results_folder(out, overwrite=overwrite)
    SamplingOptions(steps, guidance, seed)
    check_seconds(seconds * shots, "each video")
    if seconds < LEAST_SHOT_SECONDS and shots > 1:
        raise UserError(
            f"--seconds {seconds:g} is too short for a shot between cuts; use at least {LEAST_SHOT_SECONDS:g}"
        )
    console = Console(stderr=True)
    if videos is not None:
        tasks = read_tasks(videos)[:num]
        source = read_videos(videos, tasks)
    else:
        from longvideo.quantization.number_formats import NumberFormats

        formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
        placement = DeviceChoice(device, text_encoder=text_encoder).place()
        tasks = build_tasks(num, seconds=seconds, shots=shots, seed=seed)
        pipeline = ModelChoice(model).load(placement, formats, one_decoder(decoder))
        typer.echo(pipeline.start_line(), err=True)
        source = generate_videos(pipeline, tasks, batch=batch, steps=steps, guidance=guidance)
    # before the work: a folder that cannot be created is an error at once
    out.mkdir(parents=True, exist_ok=True)
    with items_progress(console) as progress:
        bar = progress.add_task("videos", total=len(tasks))

        def counted() -> Iterator[tuple[Task, np.ndarray]]:
            for item in source:
                yield item
                progress.advance(bar)

        report = evaluate_videos(counted(), out=out, workers=workers)
    print_report(report, out, console)


@app.command()
def switches(
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id.")] = "tiny",
    change: Annotated[
        str, typer.Option(help="What the new prompt changes: the `color` of the object, or the whole `scene`.")
    ] = "color",
    mode: Annotated[
        list[str] | None,
        typer.Option(help="`keep`, `recache` or `cut`; repeat the option for more.  [default: all three]"),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of prompt switches in each mode.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the scenes and the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's own]")] = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and pictures.")] = Path("runs/switches"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Measure how soon a session shows a new prompt, and whether the scene continues.

    Generates videos of one object, changes the prompt after four chunks, and judges each of the next four. Writes
    `results.json` and `switches.png`, which shows the first switches in every mode. Prints the largest number of chunks
    between the one in progress when the prompt changed and the first that shows the new prompt.

    Example: `longvideo eval switches --change scene --mode cut --output runs/cuts`
    """
    from itertools import product

    from rich.console import Console

    from longvideo.evaluation.sheet import film_strip, spaced_indices, write_picture
    from longvideo.evaluation.switches import build_switches, latest_switch, summarize_switches, switches_record
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.timeline import MODES
    from longvideo.quantization.number_formats import NumberFormats

    SamplingOptions(steps, seed=seed)
    names = mode or list(MODES)
    modes: list[SwitchMode] = [known for known in MODES if known in names]
    if change not in ("color", "scene"):
        raise UserError(f"--change {change!r} is not a change; use color or scene")
    if unknown := [name for name in names if name not in MODES]:
        raise UserError(f"--mode {unknown[0]!r} is not a mode; use {', '.join(MODES)}")
    check_results_folder(out, overwrite=overwrite)
    tasks = build_switches(num, change=change, seed=seed)
    pipeline = ModelChoice(model).load(Placement.choose(device), NumberFormats(), None)
    typer.echo(pipeline.start_line(), err=True)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    results: dict[SwitchMode, list[SwitchResult]] = {name: [] for name in modes}
    strips: list[tuple[int, np.ndarray, str]] = []
    with items_progress(console) as progress:
        bar = progress.add_task("switches", total=num * len(modes))
        for name, (number, task) in product(modes, enumerate(tasks)):
            result, frames = show_switch(pipeline, task, name, steps)
            results[name].append(result)
            if number < SHOWN_SWITCHES:
                few = frames[spaced_indices(len(frames), 2 * SWITCH_CHUNKS)]
                strips.append((number, few, f"{name}: {task.prompts[1]} ({shown_chunks(result)})"))
            progress.advance(bar)
    strips.sort(key=lambda strip: strip[0])
    clips, captions = [clip for _, clip, _ in strips], [text for _, _, text in strips]
    write_picture(film_strip(clips, captions=captions, scale=0.6), out / "switches.png")
    scores = {name: summarize_switches(own) for name, own in results.items()}
    write_json(out / "results.json", {name: switches_record(own, scores[name]) for name, own in results.items()})
    console.print(score_table(f"new {change}, {num} each", scores, list(next(iter(scores.values())))))
    for name, own in results.items():
        late = latest_switch(own)
        most = "some videos never show it" if late is None else f"at most {late}"
        console.print(f"{name}: chunks from the one in progress to the first that shows the new prompt: {most}")
    console.print(f"written: {out}", soft_wrap=True)


app.command()(extension)
app.command()(compare)
app.command()(sheet)
app.command()(curves)
app.command()(decoder)
app.command()(sensitivity)


@app.command()
def quantization(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="One chunk is generated for each prompt.  [default: two prompts of ShapeWorld]"
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id. It must not be packed.")
    ] = "tiny",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic tensors and the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Measure the error of 4-bit formats, and the noise that they add to each layer's output.

    Prints two tables in Markdown. The first has the relative errors of NVFP4 with each of its scaling rules, and of
    MXFP4, on synthetic tensors and on the model's weights, inputs, keys and values. The second has the
    signal-to-quantization-noise ratio of every kind of layer in decibels, with 4-bit weights (W4A16) and with 4-bit
    weights and inputs (W4A4).

    Example: `longvideo eval quantization --model tiny --output errors.json`
    """
    from dataclasses import asdict

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.evaluation.quantization import as_markdown, measure_quantization
    from longvideo.evaluation.showcase import PROMPTS
    from longvideo.flow.unipc import UniPC
    from longvideo.infer.options import SamplingOptions
    from longvideo.machine.devices import pick_device

    SamplingOptions(seed=seed)
    if out is not None:
        check_target(out)
    folder, where = ModelFolder.open(model), pick_device(device)
    if folder.is_packed:
        raise UserError(f"{folder.path} has packed 4-bit weights; use the folder that it was quantized from")
    report = measure_quantization(
        folder.load_transformer(device=where),
        folder.load_text_encoder(device=where),
        spec=folder.spec,
        solver=UniPC(folder.settings.steps, folder.settings.shift),
        prompts=list(prompts or PROMPTS[:2]),
        seed=seed,
    )
    typer.echo(as_markdown(report))
    if out is not None:
        write_json(out, asdict(report))
