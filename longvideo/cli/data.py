"""`longvideo data`: create, check, import and encode data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longvideo.cli.model_options import Device
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.errors import UserError
from longvideo.files import check_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import Console

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.data.encoded_format import SkippedClip
    from longvideo.data.encoding import EncodingShare
    from longvideo.data.manifest import ShotEntry
    from longvideo.shapeworld.dataset import SceneScript

HELP = "Create, check, import and encode data sets, which are videos with a manifest of their captions."

app = typer.Typer(no_args_is_help=True, help=HELP)

SIZE_STEP = 16
CLIP_CHUNKS = 4
EXIT_PROBLEMS = 2
NAMED_WORDS = 5
"""Largest number of unknown words that a warning names."""

ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="Manifest of a data set: JSON lines or CSV, see docs/data.md.")
]


@app.callback(help=HELP)
def data() -> None: ...


@app.command()
def shapeworld(
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for manifest.jsonl and videos/.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of videos.")],
    seconds: Annotated[float, typer.Option(help="Length of each video, rounded up to whole chunks.")] = 4.0,
    shots: Annotated[int, typer.Option(min=1, help="Shots in each video, with a cut between them.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first video; each next one has the next seed.")] = 0,
    split: Annotated[
        Literal["train", "heldout"],
        typer.Option(help="Combinations of shape, color and motion: for training, or held out from it."),
    ] = "train",
    height: Annotated[int, typer.Option(min=32, max=2160, help="Height in pixels, a multiple of 16.")] = 128,
    width: Annotated[int, typer.Option(min=32, max=3840, help="Width in pixels, a multiple of 16.")] = 224,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")] = False,
) -> None:
    """Write videos of ShapeWorld (moving colored shapes), with a caption for every shot.

    The manifest has the format that is also used for your own videos: one JSON object per line, with the file of a
    video, its frame rate and length, and its shots with start frame, end frame and caption. Equal options give equal
    files.

    Example: `longvideo data shapeworld --output shapes --clips 100 --seconds 8 --shots 2`
    """
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.script import check_seconds
    from longvideo.model.chunk_frames import WAN_CHUNKS
    from longvideo.shapeworld.dataset import FPS, sample_script

    SamplingOptions(seed=seed)
    check_seconds(seconds, "each video")
    for name, value in (("--height", height), ("--width", width)):
        if value % SIZE_STEP:
            nearest = value // SIZE_STEP * SIZE_STEP
            raise UserError(f"{name} is {value}, expected a multiple of {SIZE_STEP}; use {nearest}")
    if width < height:
        raise UserError(f"--width {width} is less than --height {height}; use a wide frame, as two shapes need it")
    num_chunks = WAN_CHUNKS.chunks_for(seconds * FPS)
    if shots > num_chunks:
        raise UserError(
            f"--shots {shots} is more than the {num_chunks} chunks of --seconds {seconds:g}; use more seconds"
        )
    _check_folder(out, overwrite)
    scripts = [
        sample_script(seed + number, split=split, num_shots=shots, num_chunks=num_chunks) for number in range(clips)
    ]
    write_shapeworld(out, scripts, size=(height, width))


@app.command()
def validate(
    manifest: ManifestArgument,
    frames: Annotated[
        bool, typer.Option("--frames", help="Decode every frame, instead of only reading header and end of the file.")
    ] = False,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of a training clip.")] = CLIP_CHUNKS,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose frame rate and chunks count.  [default: 24 frames per second, 29 frames, then 32 each]"
        ),
    ] = None,
) -> None:
    """Check every line of a manifest and every video, and print all problems.

    Prints each problem with its line of the manifest: errors in JSON and keys, missing files, empty captions, shots out
    of range, unreadable or truncated videos, a length or frame rate that differs from the file, and videos too short
    for a clip. Then prints what training would use of the other videos, how many of them are HDR or interlaced, and how
    many of their clips are left out, because shots cover less than half of a chunk. `longvideo data encode` with the
    same model and number of chunks leaves out the same, and finds no other problem than those of `--frames`. The exit
    code is 0 if there are no problems, and 2 otherwise.

    Example: `longvideo data validate footage/manifest.jsonl --chunks 4 --frames`
    """
    from rich.console import Console

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.data.clips import ClipSpec
    from longvideo.data.validation import validate_manifest

    spec = ClipSpec(chunks)
    if model is not None:
        folder = ModelFolder.open(model)
        spec = ClipSpec.of_model(chunks, folder.settings, folder.vae_config.scale_factor_temporal)
    with items_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("videos checked", total=None)
        report = validate_manifest(
            manifest,
            spec,
            decode=frames,
            on_line=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for problem in report.problems:
        typer.echo(f"{manifest}:{problem.line}: {problem.why}")
    lines_wrong = len({problem.line for problem in report.problems})
    typer.echo(f"{_count(len(report.problems), 'problem')} in {lines_wrong} of {_count(report.lines, 'line')}")
    typer.echo(
        f"{_count(report.videos, 'good video')}, {report.seconds / 3600:.3f} hours, {_count(report.shots, 'shot')}, "
        f"{_count(report.clips, 'clip')} of {_count(chunks, 'chunk')}"
    )
    for notice in report.notices:
        typer.echo(notice)
    if report.problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command("import-longlive")
def import_longlive(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with video/SAMPLE/0.mp4, caption/SAMPLE/0.json, and so on.")
    ],
    out: Annotated[Path, typer.Option(*OUTPUT, help="Manifest to write; the videos are not moved.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the manifest if it exists.")] = False,
) -> None:
    """Write a manifest for a data set in the layout of LongLive 2.0.

    A folder in `video` is a sample, and its numbered files are consecutive shots, so a clip continues from one file to
    the next, with a cut between them. The caption of `video/SAMPLE/3.mp4` is in `caption/SAMPLE/3.json` as
    `{"caption": "..."}`. Shots without a caption or a readable video are left out and listed.

    Example: `longvideo data import-longlive longlive-data --output longlive-data/manifest.jsonl`
    """
    import os
    from collections import Counter
    from dataclasses import replace

    from rich.console import Console

    from longvideo.data.longlive import read_longlive
    from longvideo.data.manifest import write_manifest

    check_target(out, overwrite=overwrite)
    with items_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("samples read", total=None)
        entries, left_out = read_longlive(
            folder, on_sample=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    write_manifest(out, [replace(entry, video=Path(os.path.relpath(entry.video, out.parent))) for entry in entries])
    for file in left_out:
        typer.echo(f"left out {file.file}: {file.kind}: {file.why}")
    counts = Counter(file.kind for file in left_out)
    seconds = sum((entry.num_frames or 0) / (entry.fps or 1) for entry in entries)
    samples = len({entry.sample for entry in entries})
    kinds = "".join(f", {number} with {kind!r}" for kind, number in sorted(counts.items()))
    typer.echo(
        f"{out}: {_count(samples, 'sample')}, {_count(len(entries), 'shot')}, {seconds / 3600:.3f} hours; "
        f"{_count(len(left_out), 'file')} left out{kinds}"
    )


@app.command()
def encode(
    manifest: ManifestArgument,
    model: Annotated[str, typer.Option(help="`tiny`, a model folder, or a Hugging Face id; its encoders are used.")],
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder to write; an unfinished one is continued.")],
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of a clip.")] = CLIP_CHUNKS,
    height: Annotated[int | None, typer.Option(help="Height in pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.  [default: the model's]")] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Largest file, bytes; one file is in memory.")] = 2**30,
    device: Device = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode video; each has up to two decoded clips in memory.")
    ] = 4,
    shard_of: Annotated[
        str,
        typer.Option(metavar="I/N", help="Encode only share I of N, counted from 0, for one of N machines or GPUs."),
    ] = "0/1",
    max_bad: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Unreadable clips of a share to skip before stopping.  [default: 1 % of them, but at least 10]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Encode existing files again.")] = False,
) -> None:
    """Encode all clips of a manifest and their captions, so that training reads latents instead of videos.

    Writes the autoencoder's normalized mean latents and the text encoder's features as bf16 .safetensors files;
    docs/data.md describes the format. If the command is interrupted, run it again: it continues after the complete
    files, and the result is the same to the byte. Unreadable clips are skipped and listed, and more than `--max-bad` of
    them are an error.

    Example: `longvideo data encode footage/manifest.jsonl --model tiny --output encoded --chunks 4`

    On four machines with a shared folder: `longvideo data encode ... --shard-of 0/4`, `1/4`, `2/4` and `3/4`.
    """
    from rich.console import Console

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.data.encoding import EncodingShare, open_output, plan_encoding
    from longvideo.machine.devices import pick_device

    number, shares = _parse_share(shard_of)
    where = pick_device(device)
    folder = ModelFolder.open(model)
    plan = plan_encoding(
        manifest,
        folder,
        out,
        num_chunks=chunks,
        size=(height or folder.settings.height, width or folder.settings.width),
        shard_bytes=shard_bytes,
        shares=shares,
        precision="bf16" if where.type == "cuda" else "fp32",
        model=model,
    )
    share = EncodingShare(plan, number, workers, max_bad)
    with open_output(share, overwrite=overwrite):
        encode_share(share, folder, device=where, console=Console(stderr=True))


def encode_share(share: EncodingShare, folder: ModelFolder, *, device: torch.device, console: Console) -> None:
    """Encode the missing shards of a share. An encoder is loaded only if it is needed."""
    import torch

    from longvideo.data.encoded_format import LATENTS, TEXT
    from longvideo.data.encoding import encode_captions, encode_clips, unknown_words

    plan = share.plan
    text, latents = (share.missing_shards(kind) for kind in (TEXT, LATENTS))

    def on_skip(clip: SkippedClip) -> None:
        console.print(f"left out clip {clip.number}: {clip.why}", highlight=False, soft_wrap=True)

    for notice in plan.notices:
        console.print(notice, highlight=False, soft_wrap=True)
    with items_progress(console) as progress:
        if text:
            bar = progress.add_task("captions encoded", total=sum(len(shard.numbers) for shard in text))
            # as in training: bf16 features on a GPU, fp32 features on a CPU
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            text_encoder = folder.load_text_encoder(device=device, dtype=dtype)
            warn_of_unknown_words(unknown_words(plan, text_encoder), console)
            encode_captions(plan, text, text_encoder, on_caption=lambda: progress.advance(bar))
            del text_encoder
        if latents:
            missing = sum(len(shard.numbers) for shard in latents)
            clip_bar = progress.add_task("clips encoded", total=share.num_clips, completed=share.num_clips - missing)
            autoencoder = folder.load_vae(device=device, dtype=torch.float32)
            encode_clips(share, latents, autoencoder, on_clip=lambda: progress.advance(clip_bar), on_skip=on_skip)
    skipped = len(share.skipped_clips())
    label = f"share {share.number} of {plan.info.shares}: " if plan.info.shares > 1 else ""
    before = "" if text or latents else ", all encoded before"
    console.print(
        f"{plan.out}: {label}{_count(share.num_clips - skipped, 'clip')}{before}, {skipped} damaged and left out",
        highlight=False,
        soft_wrap=True,
    )


def warn_of_unknown_words(words: dict[str, int], console: Console) -> None:
    """Print words of captions that the text encoder has no token for. words: with the number of captions of each."""
    if not words:
        return
    common = sorted(words, key=lambda word: (-words[word], word))[:NAMED_WORDS]
    named = ", ".join(f"{word!r} ({words[word]})" for word in common)
    more = f" and {len(words) - len(common)} more" if len(words) > len(common) else ""
    console.print(
        f"warning: the model's vocabulary does not contain {named}{more}, with their numbers of captions; captions that"
        " differ only in such words are equal for it; use a model whose text encoder was trained on open language",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def write_shapeworld(folder: Path, scripts: Sequence[SceneScript], *, size: tuple[int, int]) -> None:
    """Write a video of each script. The manifest is written last, so a folder with a manifest is complete.

    size: height and width in pixels.
    """
    from rich.console import Console

    from longvideo.data.manifest import VideoEntry, write_manifest
    from longvideo.data.video import write_video
    from longvideo.shapeworld.dataset import FPS, render_script

    console = Console(stderr=True)
    manifest = folder / "manifest.jsonl"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    entries: list[VideoEntry] = []
    with items_progress(console) as progress:
        for i, script in enumerate(progress.track(scripts, description="ShapeWorld videos")):
            video = Path("videos") / f"{i:06d}.mp4"
            write_video(folder / video, render_script(script, height=size[0], width=size[1]), fps=FPS)
            entries.append(VideoEntry(video, FPS, script.num_frames, _shot_entries(script)))
    write_manifest(manifest, entries)
    seconds = scripts[0].num_frames / FPS
    console.print(f"{len(scripts)} videos of {seconds:.2f} s, with captions in {manifest}")


def _parse_share(text: str) -> tuple[int, int]:
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise UserError(f"--shard-of is {text!r}, expected I/N with I from 0 to N - 1; use 0/4, for example")
    return int(share), int(shares)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shot_entries(script: SceneScript) -> tuple[ShotEntry, ...]:
    from longvideo.data.manifest import ShotEntry

    return tuple(ShotEntry(span.start, span.end, span.shot.caption) for span in script.frames())


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; use a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} is not empty; choose another name or add --overwrite")
