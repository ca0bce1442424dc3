"""`longvideo eval`: measure models, and the judge that measures them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.evaluation_videos import SWITCH_CHUNKS, generate_videos, read_tasks, read_videos, show_switch
from longvideo.cli.model_options import AttentionFormat, KVCacheFormat, Precision, warn_of_missing_quotes
from longvideo.cli.output import OUTPUT
from longvideo.errors import UserError
from longvideo.files import check_target, write_json

if TYPE_CHECKING:
    import numpy as np

    from longvideo.evaluation.shapeworld import EvaluationReport, Score, Task
    from longvideo.infer.timeline import SwitchMode

app = typer.Typer(no_args_is_help=True, help="Measure models, and the judge that measures them.")

MAX_SECONDS = 3600.0
LEAST_SHOT_SECONDS = 1.5
SHOWN_SWITCHES = 6
HEADINGS = {
    "count": "number",
    "color": "color",
    "shape": "shape",
    "size": "size",
    "motion": "motion",
    "background": "background",
    "both": "both",
    "shows_prompt": "shown",
    "cut_in_time": "cut",
    "goes_on": "goes on",
}


@app.callback()
def evaluate() -> None:
    """Measure models, and the judge that measures them."""


@app.command()
def judge(
    num: Annotated[int, typer.Option(min=1, help="Number of scenes, train and held-out in turn.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Draws other scenes.")] = 0,
    out: Annotated[
        Path | None, typer.Option(*OUTPUT, help="Write the JSON to this file instead of standard output.")
    ] = None,
) -> None:
    """Measure the judge on scenes whose content is known.

    The judge names shapes, colors, sizes, motions and backgrounds by classical vision from pixels alone. This renders
    random ShapeWorld scenes, hands them to the judge clean, blurred with noise ("soft"), and also faded, tinted and
    coarsely quantised ("compressed"), and prints how often it is right, with 95 % intervals in the JSON.
    """
    from rich.console import Console

    from longvideo.evaluation.accuracy import measure_judge

    if out is not None:
        check_target(out)
    console = Console(stderr=True)
    with _progress(console) as progress:
        bar = progress.add_task("scenes judged", total=num)
        results = measure_judge(num, seed=seed, on_scene=lambda: progress.advance(bar))
    console.print(_table("condition", {result.condition: result.scores for result in results}))
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
    model: Annotated[str, typer.Option(help="`tiny` or a model folder.")] = "tiny",
    videos: Annotated[
        Path | None, typer.Option(help="Judge this folder instead: videos and manifest.jsonl with ShapeWorld captions.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of videos.")] = 100,
    seconds: Annotated[float, typer.Option(help="Seconds of each shot.")] = 4.0,
    shots: Annotated[int, typer.Option(min=1, help="Shots in each video, each with its own prompt and a cut.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Draws other prompts and noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own if not given.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos made together; more is faster on a GPU.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes that judge while the next videos are made.")] = 1,
    device: Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")] = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and pictures.")] = Path("runs/eval"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")] = False,
) -> None:
    """Say how often videos show what their prompts ask for.

    Generates videos of scenes that training never sees, and asks the classical-vision judge for number, color, shape,
    size, motion and background. Writes `results.json` (every video with what was asked, seen and right), `scores.png`
    (color, shape and background in each second), and film strips of failures and successes. With several shots, "shown"
    says how often a shot has every object of its prompt in its color and shape, and "cut" how often it begins within
    one chunk of where it was asked.

    Example: `longvideo eval shapeworld --num 20 --seconds 20 --out runs/eval20`
    """
    from rich.console import Console

    from longvideo.evaluation.shapeworld import build_tasks, evaluate_videos

    _check_output(out, overwrite)
    if not 0 < seconds * shots <= MAX_SECONDS:
        raise UserError(f"{shots} shots of {seconds:g} s: give more than 0 and at most {MAX_SECONDS:g} s in all")
    if seconds < LEAST_SHOT_SECONDS and shots > 1:
        raise UserError(f"--seconds is {seconds:g}; a shot between cuts needs at least {LEAST_SHOT_SECONDS:g} s")
    console = Console(stderr=True)
    if videos is not None:
        tasks = read_tasks(videos)[:num]
        source = read_videos(videos, tasks)
    else:
        from longvideo.infer.pipeline import StreamingPipeline

        tasks = build_tasks(num, seconds=seconds, shots=shots, seed=seed)
        pipeline = StreamingPipeline.from_pretrained(
            model, device=device, precision=precision, kv_cache=kv_cache, attention=attention
        )
        typer.echo(pipeline.start_line(), err=True)
        source = generate_videos(pipeline, tasks, batch=batch, steps=steps, guidance=guidance)
    # before the work, so that a folder that cannot be made costs no time
    out.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress:
        bar = progress.add_task("videos", total=len(tasks))

        def counted() -> Iterator[tuple[Task, np.ndarray]]:
            for item in source:
                yield item
                progress.advance(bar)

        report = evaluate_videos(counted(), out=out, workers=workers)
    _print_report(report, out, console)


@app.command()
def switches(
    model: Annotated[str, typer.Option(help="`tiny` or a model folder.")] = "tiny",
    change: Annotated[
        str, typer.Option(help="What the new prompt changes: `color` of the object, or the `scene`.")
    ] = "color",
    mode: Annotated[
        list[str] | None, typer.Option(help="`keep`, `recache` or `cut`; give it again for more.  [default: all]")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of switches for each mode.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Draws other scenes and noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and pictures.")] = Path("runs/switches"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")] = False,
) -> None:
    """Say how soon a session shows a new prompt, and whether the scene goes on meanwhile.

    Makes videos of one object, changes the prompt after four chunks, and judges each of the four that follow. Writes
    `results.json` and `switches.png`, which shows the first ones in every mode, and says how many chunks pass at most
    from the one being made when the prompt was given to the first that shows it.

    Example: `longvideo eval switches --change scene --mode cut --out runs/cuts`
    """
    from dataclasses import asdict

    from rich.console import Console

    from longvideo.evaluation.sheet import film_strip, spaced_indices, write_picture
    from longvideo.evaluation.switches import build_switches, summarize_switches
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.timeline import MODES

    wanted = mode or list(MODES)
    modes: list[SwitchMode] = [known for known in MODES if wanted.count(known)]
    if change not in ("color", "scene"):
        raise UserError(f"--change {change!r} is unknown; use color or scene")
    if unknown := [name for name in wanted if name not in MODES]:
        raise UserError(f"--mode {unknown[0]!r} is unknown; use {', '.join(MODES)}")
    _check_output(out, overwrite)
    tasks = build_switches(num, change=change, seed=seed)
    pipeline = StreamingPipeline.from_pretrained(model, device=device)
    typer.echo(pipeline.start_line(), err=True)
    out.mkdir(parents=True, exist_ok=True)
    console, record, rows = Console(stderr=True), {}, {}
    strips: list[tuple[int, np.ndarray, str]] = []
    with _progress(console) as progress:
        bar = progress.add_task("switches", total=num * len(modes))
        for name in modes:
            results = []
            for number, task in enumerate(tasks):
                result, frames = show_switch(pipeline, task, name, steps)
                results.append(result)
                if number < SHOWN_SWITCHES:
                    seen = ", ".join(str(chunk) for chunk, shown in enumerate(result.shown, 1) if shown) or "none"
                    few = frames[spaced_indices(len(frames), 2 * SWITCH_CHUNKS)]
                    strips.append((number, few, f"{name}: {task.prompts[1]} (shown in chunks: {seen})"))
                progress.advance(bar)
            rows[name] = summarize_switches(results)
            late = [result.late for result in results]
            record[name] = {
                **{key: score.record() for key, score in rows[name].items()},
                "late_at_most": None if None in late else max(late),
                "never_shown": late.count(None),
                "switches": [asdict(result) for result in results],
            }
    strips.sort(key=lambda strip: strip[0])
    clips, captions = [clip for _, clip, _ in strips], [text for _, _, text in strips]
    write_picture(film_strip(clips, captions=captions, scale=0.6), out / "switches.png")
    write_json(out / "results.json", record)
    console.print(_table(f"new {change}, {num} each", rows, list(next(iter(rows.values())))))
    for row, found in record.items():
        most = "one or more never did" if found["late_at_most"] is None else f"at most {found['late_at_most']}"
        console.print(f"{row}: chunks from the one being made to the first that shows the prompt: {most}")
    console.print(f"written: {out}", soft_wrap=True)


@app.command()
def sheet(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="What each clip shows; six prompts of ShapeWorld if none is given."),
    ] = None,
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id.")] = "tiny",
    seconds: Annotated[float, typer.Option(help="Length of each clip.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="Solver steps; the model's own if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every clip.")] = 0,
    device: Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")] = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    name: Annotated[
        str | None, typer.Option(help="Of the pictures.  [default: the last part of the model's name]")
    ] = None,
    webp: Annotated[bool, typer.Option("--webp", help="Write NAME.webp, in all colors, in place of NAME.gif.")] = False,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for the two pictures.")] = Path("runs/sheet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are already there.")] = False,
) -> None:
    """Draw a contact sheet and a looping GIF of what a model makes of some prompts.

    Writes `NAME.png`, a row of frames for each clip, and `NAME.gif`, all clips side by side.

    Example: `longvideo eval sheet --model tiny --out docs/images --overwrite`
    """
    import numpy as np
    from rich.console import Console

    from longvideo.evaluation.showcase import PROMPTS, write_showcase
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.script import check_prompt

    warn_of_missing_quotes(prompts or [], command="longvideo eval sheet")
    shown = list(prompts or PROMPTS)
    for prompt in shown:
        check_prompt(prompt, "a prompt")
    name = name or Path(model).resolve().name
    targets = out / f"{name}.png", out / f"{name}{'.webp' if webp else '.gif'}"
    for target in targets:
        _check_target(target, overwrite)
    pipeline = StreamingPipeline.from_pretrained(
        model, device=device, precision=precision, kv_cache=kv_cache, attention=attention
    )
    typer.echo(pipeline.start_line(), err=True)
    streams = [pipeline.stream(prompt, seconds=seconds, steps=steps, guidance=guidance, seed=seed) for prompt in shown]
    # before the work, so that a folder that cannot be made costs no time
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with _progress(console) as progress:
        clips = [np.concatenate(list(stream)) for stream in progress.track(streams, description="clips")]
    write_showcase(clips, shown, targets, fps=pipeline.fps)
    console.print(f"written: {', '.join(map(str, targets))}", soft_wrap=True)


@app.command()
def curves(
    metrics: Annotated[list[Path], typer.Argument(metavar="METRICS...", help="metrics.jsonl of one or more runs.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="What to draw, once for each name in the file.  [default: loss]")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Lay the runs end to end, when each goes on from the one before.")
    ] = False,
    title: Annotated[str, typer.Option(help="Line above the picture.")] = "",
    low: Annotated[float | None, typer.Option(help="Lower end of the y axis; fits the values if not given.")] = None,
    high: Annotated[float | None, typer.Option(help="Upper end of the y axis; fits the values if not given.")] = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Picture to write.")] = Path("curves.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture if it exists.")] = False,
) -> None:
    """Draw the curves of training runs.

    Example: `longvideo eval curves runs/vae/metrics.jsonl --metric psnr --metric object --out vae.png`
    """
    from longvideo.evaluation.curves import draw_curves, read_metrics
    from longvideo.evaluation.sheet import write_picture

    if out.suffix != ".png":
        raise UserError(f"--out {out}: the name must end in .png")
    if low is not None and high is not None and not low < high:
        raise UserError(f"--low {low:g} is not below --high {high:g}")
    _check_target(out, overwrite)
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


@app.command()
def quantization(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="A chunk is made for each; two prompts of ShapeWorld if none."),
    ] = None,
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id; not packed.")] = "tiny",
    device: Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the synthetic tensors and the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Write the numbers to this JSON file too.")] = None,
) -> None:
    """Measure what four bits cost: errors of formats and rules, and the noise of each layer's output.

    Prints two tables in Markdown. The first: relative error of NVFP4 by its rules, and of MXFP4, on synthetic tensors,
    the model's weights, inputs, keys and values. The second: signal-to-quantisation-noise ratio of every kind of layer
    with 4-bit weights (W4A16), and with inputs in 4 bits too (W4A4), in decibels.

    Example: `longvideo eval quantization --model tiny --out errors.json`
    """
    from dataclasses import asdict

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.evaluation.quantization import as_markdown, measure_quantization
    from longvideo.evaluation.showcase import PROMPTS
    from longvideo.flow.unipc import UniPC
    from longvideo.infer.fit.placement import pick_device

    if out is not None:
        check_target(out)
    folder, where = ModelFolder.open(model), pick_device(device)
    if folder.is_packed:
        raise UserError(f"{folder.path} is packed already; measure the folder it was made from")
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


def _check_output(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if (out / "results.json").exists() and not overwrite:
        raise UserError(f"--out {out} already holds results.json; choose another folder or add --overwrite")
    _check_target(out / "results.json", overwrite)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written; a folder that is missing is made later."""
    if target.parent.exists():
        check_target(target, overwrite=overwrite)


def _print_report(report: EvaluationReport, out: Path, console) -> None:
    rows = {"first 4 s": report.opening}
    if report.shots:
        rows["every shot"] = report.shots
    console.print(_table("", rows))
    if len(report.curves["color"]) > 1:
        last = len(report.curves["color"])
        for name in ("color", "shape"):
            curve = report.curves[name]
            middle = f", {curve[19]:.0%} at 20 s" if last > 20 else ""
            console.print(f"{name}: {curve[0]:.0%} in the first second{middle}, {curve[-1]:.0%} in second {last}")
    console.print(f"written: {', '.join(str(path) for path in sorted(out.iterdir()))}", soft_wrap=True)


def _progress(console):
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    return Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def _table(corner: str, rows: dict[str, dict[str, Score]], names: list[str] | None = None):
    from rich import box
    from rich.table import Table

    if names is None:
        names = [name for name in HEADINGS if any(name in scores for scores in rows.values())]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (corner, *(HEADINGS.get(name, name) for name in names)):
        table.add_column(heading, no_wrap=True)
    for row, scores in rows.items():
        cells = (f"{scores[name].share:.1%}" if name in scores else "" for name in names)
        table.add_row(row, *cells)
    return table
