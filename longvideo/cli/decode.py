"""`longvideo decode`: turn saved latents into videos or frames."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.model_options import DecoderFormat, DecoderName, Device, ModelChoice, one_decoder
from longvideo.cli.output import OUTPUT
from longvideo.cli.printing import STDERR, STDOUT, printable, without_reader
from longvideo.cli.progress import items_progress
from longvideo.cli.stopping import Stopped, exit_code, stop_signals
from longvideo.errors import UserError
from longvideo.files import check_target

if TYPE_CHECKING:
    import numpy as np

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.saved_latents import SavedLatents
    from longvideo.infer.writer import OutputFile


def decode(
    latents: Annotated[
        Path,
        typer.Argument(
            metavar="LATENTS",
            help="File with one tensor [C, T, H, W] or [B, C, T, H, W], `.safetensors`, `.pt` or `.npy`; or a folder of"
            " encoded clips.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that made the latents: `tiny`, a folder or file, or a Hugging Face id.  [default: the one that"
            " LATENTS names]"
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model with the parts that are missing in --model.")] = None,
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    device: Device = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of the video.  [default: that of LATENTS, else of the model, else 24]"),
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Largest number of videos to decode.  [default: all]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
    output: Annotated[
        Path,
        typer.Option(
            *OUTPUT,
            help="Video file, .mp4, .mkv, .webm, .gif or .webp; or pictures, such as `frames/%05d.png`; or array of"
            " float32 frames [T, H, W, 3] in [0, 1], .npy or .safetensors; or a name without suffix, for a folder of"
            " .mp4 files.",
        ),
    ] = Path("out.mp4"),
) -> None:
    """Decode saved latents to videos or frames.

    Latents are normalized, as a transformer makes them; the first latent frame is the opening frame of the video.
    Several videos get the names `out_0.mp4`, `out_1.mp4` and so on. `longvideo generate --latents` and training write
    files of latents.

    `longvideo decode ball.safetensors -o ball.mp4`

    `longvideo decode ball.safetensors --decoder taew2_2.pth -o ball.mp4`

    `longvideo decode latents.npy --model Wan2.2-TI2V-5B -o frames.npy`

    `longvideo decode encoded --num 4 -o clips`
    """
    from longvideo.infer.fit.formats import check_hardware, decoding_line
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.frame_files import check_suffix, is_video
    from longvideo.infer.saved_latents import LatentsDecoder, decode_videos, open_saved
    from longvideo.infer.writer import OutputFile, check_fps
    from longvideo.quantization.number_formats import NumberFormats

    formats = NumberFormats.parse(decoder=decoder_precision)
    if fps is not None:
        check_fps(fps)
    placement = Placement.choose(device)
    check_hardware(formats, placement)
    if base is not None and model is None:
        raise UserError("there is --base, but no --model; name the model that made the latents")
    saved = open_saved(latents, num=num)
    outputs = output_files(saved, output)
    for file in outputs:
        if output.suffix or file.parent.is_dir():  # a missing folder is created later
            check_suffix(file)
            if is_video(file):
                OutputFile(file, overwrite).check()
            else:
                check_target(file, overwrite=overwrite)
            _check_differs(file, saved)
    chosen = LatentsDecoder.choose(saved, open_model(saved, model, base), one_decoder(decoder), placement)
    num_frames = chosen.check(saved, formats, placement)
    try:
        with stop_signals():
            decoder_model, formats = chosen.load(placement, formats)
            print(decoding_line(formats, placement, decoder=decoder_model.name), file=sys.stderr)
            videos = decode_videos(saved, decoder_model, chunk_frames=chosen.chunk_frames(saved), num_frames=num_frames)
            scale, (_, _, height, width) = chosen.config.scale_factor_spatial, saved.shape
            shape = (num_frames, scale * height, scale * width, 3)
            if not output.suffix:
                create_folder(output)
            fps = fps or saved.header.fps or chosen.settings.fps
            for (_, frames), path in zip(videos, outputs, strict=True):
                _write(OutputFile(path, overwrite), frames, shape, fps=fps)
    except Stopped as stop:
        raise typer.Exit(exit_code(stop.number)) from None


def output_files(saved: SavedLatents, output: Path) -> list[Path]:
    """Return the file of each video."""
    is_folder = output.is_dir() or not output.suffix
    folder, suffix = (output, ".mp4") if is_folder else (output.parent, output.suffix)
    stem = saved.stem if is_folder else output.stem
    files = [folder / f"{stem}_{video.name}{suffix}" for video in saved.videos]
    if len(saved.videos) == 1 and (not is_folder or not saved.videos[0].name):
        files = [folder / f"{stem}{suffix}"]
    return files


def _check_differs(file: Path, saved: SavedLatents) -> None:
    """Raise UserError for the file of the latents."""
    if file.exists() and file.samefile(saved.path):
        raise UserError(f"cannot write {file}: it has the latents; choose another name")


def create_folder(path: Path) -> None:
    """Create a folder, and those above it. Raises UserError for errors of the disk."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def open_model(saved: SavedLatents, model: str | None, base: str | None) -> ModelFolder | None:
    """Open the model with a name, or else the one that the latents name; None if it is not on this machine."""
    from longvideo.checkpoint.locations import is_local

    if model is not None:
        return ModelChoice(model, base).open()
    header = saved.header
    if header.model is None or not all(is_local(name) for name in (header.model, header.base or header.model)):
        return None  # nothing is downloaded because a file names it
    try:
        return ModelChoice(header.model, header.base).open()
    except UserError as error:
        raise UserError(
            f"{saved.path} was made by {header.model!r}, which does not open: {error}; use --model"
        ) from error


def _write(
    file: OutputFile, frames: Generator[np.ndarray, None, None], shape: tuple[int, int, int, int], *, fps: float
) -> None:
    """Write a file of frames and print one line about it. A signal finishes a video before Stopped is raised."""
    from longvideo.infer.frame_files import is_video, write_array

    path = file.path
    total, interruption, num_frames = shape[0], None, shape[0]
    with closing(frames), _progress(path.name, frames, total) as chunks:
        if is_video(path):
            with file.open(fps=fps) as writer:
                try:
                    for part in chunks:
                        writer.write(part)
                except Stopped as stop:
                    interruption = stop
            num_frames, num_bytes = writer.num_frames, writer.num_bytes
        else:
            write_array(path, chunks, shape, fps=fps)
            num_bytes = path.stat().st_size
    with without_reader(STDOUT):
        print(_summary(path, num_frames, total, num_bytes, fps), flush=True)
    if interruption:
        raise interruption


def _summary(path: Path, num_frames: int, total: int, num_bytes: int, fps: float) -> str:
    if num_frames == 0:
        return "no frame was decoded; nothing was written"
    count = f"{num_frames} frames" if num_frames == total else f"{num_frames} of {total} frames"
    return printable(f"{path}: {count}, {num_frames / fps:.2f} s at {fps:g} frames/s, {num_bytes / 2**20:.2f} MiB")


@contextmanager
def _progress(name: str, frames: Iterator[np.ndarray], total: int) -> Generator[Iterator[np.ndarray]]:
    """Yield the same chunks of frames, and show how many frames are decoded: a bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield _with_lines(name, frames, total)
        return
    from rich.console import Console

    with items_progress(Console(stderr=True)) as bars:
        task = bars.add_task(printable(name), total=total)
        yield _with_bar(frames, lambda count: bars.advance(task, count))


def _with_lines(name: str, frames: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    count = 0
    for part in frames:
        count += len(part)
        with without_reader(STDERR):
            print(printable(f"{name}: frame {count}/{total}"), file=sys.stderr, flush=True)
        yield part


def _with_bar(frames: Iterator[np.ndarray], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for part in frames:
        with without_reader(STDERR):
            advance(len(part))
        yield part
