"""`longvideo eval extension`: continue rendered footage, and judge what follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.evaluation_output import check_results_folder, score_table
from longvideo.cli.model_options import Device, ModelChoice
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.files import write_json

if TYPE_CHECKING:
    import numpy as np

    from longvideo.evaluation.extension import ExtensionResult, ExtensionTask
    from longvideo.infer.pipeline import StreamingPipeline

SHOWN_VIDEOS, SHOWN_FRAMES = 12, 4
"""Videos that `extension.png` shows, and frames of each before the seam and after it."""


def extension(
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id.")] = "tiny",
    num: Annotated[int, typer.Option(min=1, help="Number of videos.")] = 40,
    seconds: Annotated[float, typer.Option(help="Length of each continuation, in seconds.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the scenes and the noise.")] = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and pictures.")] = Path("runs/extension"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Measure whether a video that continues footage continues what it shows.

    Renders 4 s of ShapeWorld scenes with one object, continues them under their captions, and judges the generated
    frames. A change is the mean difference of two frames. Prints the change at the seam relative to that inside: from
    the last frame of the footage as the autoencoder returns it, and from that of the file. Writes `results.json`, and
    `extension.png` with frames before and after some seams.

    Example: `longvideo eval extension --num 10 --output runs/extension`
    """
    from rich.console import Console

    from longvideo.evaluation.extension import (
        build_extensions,
        extensions_record,
        seam_ratios,
        summarize_extensions,
        wrong_questions,
    )
    from longvideo.evaluation.sheet import film_strip, write_picture
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.script import check_seconds
    from longvideo.quantization.number_formats import NumberFormats

    SamplingOptions(seed=seed)
    check_seconds(seconds, "each video")
    check_results_folder(out, overwrite=overwrite)
    pipeline = ModelChoice(model).load(Placement.choose(device), NumberFormats(), None)
    typer.echo(pipeline.start_line(), err=True)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    results: list[ExtensionResult] = []
    strips: list[np.ndarray] = []
    with items_progress(console) as progress:
        bar = progress.add_task("videos", total=num)
        for task in build_extensions(num, seed=seed):
            result, strip = _continue_footage(pipeline, task, seconds)
            results.append(result)
            strips.append(strip)
            progress.advance(bar)
    captions = [f"{result.task.prompt} ({', '.join(wrong_questions(result)) or 'all right'})" for result in results]
    sheet = film_strip(strips[:SHOWN_VIDEOS], captions=captions[:SHOWN_VIDEOS], scale=0.6)
    write_picture(sheet, out / "extension.png")
    write_json(out / "results.json", extensions_record(results))
    console.print(score_table(f"{num} videos", {"continued": summarize_extensions(results)}))
    ratios = seam_ratios(results)
    console.print(
        f"change at the seam relative to that inside: {ratios['seam']:.2f}, from the file"
        f" {ratios['seam_from_the_file']:.2f}"
    )
    console.print(f"written: {out}", soft_wrap=True)


def _continue_footage(
    pipeline: StreamingPipeline, task: ExtensionTask, seconds: float
) -> tuple[ExtensionResult, np.ndarray]:
    """Continue the footage of a task and judge it; return the result, and frames before and after the seam."""
    import numpy as np
    import torch

    from longvideo.data.pictures import as_picture
    from longvideo.evaluation.extension import judge_extension
    from longvideo.evaluation.shapeworld import FPS
    from longvideo.evaluation.sheet import spaced_indices
    from longvideo.infer.beginning import BeginningChoice

    models, footage = pipeline.models, task.footage()
    frames = np.concatenate(list(pipeline.stream(task.prompt, seconds=seconds, seed=task.seed, video=footage)))
    context = torch.cat(BeginningChoice(video=footage).encode(pipeline.models).footage, dim=2)
    with torch.inference_mode():
        decoded = models.decoder.plain(context.to(models.decoder.device))[0].cpu().numpy()
    size = (models.settings.height, models.settings.width)
    before = np.stack([as_picture(picture, size=size).numpy() for picture in footage[-FPS:]])
    result = judge_extension(task, before[-1], decoded[-1], frames)
    parts = (part[spaced_indices(len(part), SHOWN_FRAMES)] for part in (before, frames))
    return result, np.concatenate(list(parts))
