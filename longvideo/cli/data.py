"""`longvideo data`: make data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longvideo.errors import UserError

if TYPE_CHECKING:
    from longvideo.data.manifest import ShotEntry
    from longvideo.shapeworld.dataset import SceneScript

app = typer.Typer(no_args_is_help=True, help="Make data sets: videos and a manifest that says what they show.")

MAX_SECONDS = 3600.0
SIZE_STEP = 16


@app.callback()
def data() -> None:
    """Make data sets: videos and a manifest that says what they show."""


@app.command()
def shapeworld(
    out: Annotated[Path, typer.Option(help="Folder to write: manifest.jsonl and videos/.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of videos.")],
    seconds: Annotated[float, typer.Option(help="Least length of each video; rounded up to whole chunks.")] = 4.0,
    shots: Annotated[int, typer.Option(min=1, help="Shots in each video, with a cut between them.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first video; the others count up from it.")] = 0,
    split: Annotated[
        Literal["train", "heldout"], typer.Option(help="heldout: combinations that training never sees.")
    ] = "train",
    height: Annotated[int, typer.Option(min=32, max=2160, help="Pixels, a multiple of 16.")] = 128,
    width: Annotated[int, typer.Option(min=32, max=3840, help="Pixels, a multiple of 16.")] = 224,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is already there.")] = False,
) -> None:
    """Write videos of ShapeWorld, coloured shapes that move in nameable ways, with a caption for every shot.

    The manifest is the format in which you bring your own videos: one JSON object a line with the video's file, its
    frame rate and length, and its shots as start frame, end frame and caption. Equal options give equal files.
    """
    from longvideo.shapeworld.dataset import chunks_for

    if not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"--seconds is {seconds:g}; give more than 0 and at most {MAX_SECONDS:g}")
    for name, value in (("--height", height), ("--width", width)):
        if value % SIZE_STEP:
            raise UserError(f"{name} is {value}, not a multiple of {SIZE_STEP}; use {value // SIZE_STEP * SIZE_STEP}")
    if width < height:
        raise UserError(f"--width {width} is less than --height {height}; two shapes side by side need a wide frame")
    num_chunks = chunks_for(seconds)
    if shots > num_chunks:
        raise UserError(f"{shots} shots do not fit {seconds:g} s, which are {num_chunks} chunks; use more --seconds")
    _check_folder(out, overwrite)
    write_shapeworld(
        out,
        num_clips=clips,
        num_chunks=num_chunks,
        num_shots=shots,
        first_seed=seed,
        split=split,
        size=(height, width),
    )


def write_shapeworld(
    folder: Path,
    *,
    num_clips: int,
    num_chunks: int,
    num_shots: int,
    first_seed: int,
    split: Literal["train", "heldout"],
    size: tuple[int, int],
) -> None:
    """Write a data set; the manifest comes last, so a folder with a manifest is complete."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from longvideo.data.manifest import VideoEntry, write_manifest
    from longvideo.data.video import write_video
    from longvideo.shapeworld.dataset import FPS, render_script, sample_script

    console = Console(stderr=True)
    manifest = folder / "manifest.jsonl"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    entries: list[VideoEntry] = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for i in progress.track(range(num_clips), description="ShapeWorld videos"):
            script = sample_script(first_seed + i, split=split, num_shots=num_shots, num_chunks=num_chunks)
            video = Path("videos") / f"{i:06d}.mp4"
            write_video(folder / video, render_script(script, height=size[0], width=size[1]), fps=FPS)
            entries.append(VideoEntry(video, FPS, script.num_frames, _shot_entries(script)))
    write_manifest(manifest, entries)
    console.print(f"{num_clips} videos of {entries[0].num_frames / FPS:.2f} s, described in {manifest}")


def _shot_entries(script: SceneScript) -> tuple[ShotEntry, ...]:
    from longvideo.data.manifest import ShotEntry

    return tuple(ShotEntry(span.start, span.end, span.shot.caption) for span in script.frames())


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty; choose another folder or add --overwrite")
