"""`longvideo generate`: prompts in, a video file that grows chunk by chunk out."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from longvideo.cli.model_options import (
    AttentionFormat,
    Base,
    DecodeDevice,
    DecodeShare,
    Device,
    Entry,
    Guidance,
    KVCacheFormat,
    ModelChoice,
    ModelName,
    Precision,
    SettingsPreset,
    warn_of_missing_quotes,
)
from longvideo.cli.output import OUTPUT
from longvideo.cli.printing import STDERR, STDOUT, without_reader
from longvideo.cli.stopping import Stopped, exit_code, stop_signals
from longvideo.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch.distributed import ProcessGroup

    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.script import ChunkPlan, Script
    from longvideo.quantization.number_formats import NumberFormats

DEFAULT_SECONDS = 10.0


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What the video shows. Each further prompt is a shot after a cut."),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(help="YAML list of shots, each with `prompt`, `seconds` and `cut`, instead of prompts."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help=f"Length of the whole video, shared equally by its shots.  [default: {DEFAULT_SECONDS:g}]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps a chunk: more is slower and finer.  [default: the model's own]")
    ] = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another video, the same seed the same one.")] = 0,
    image: Annotated[Path | None, typer.Option(help="Picture to start from, scaled and cropped to the video.")] = None,
    model: ModelName = "tiny",
    base: Base = None,
    preset: SettingsPreset = None,
    entry: Entry = None,
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    output: Annotated[Path, typer.Option(*OUTPUT, help="Video file, .mp4 or .mkv.")] = Path("out.mp4"),
) -> None:
    """Make a video from prompts, chunk by chunk.

    The file grows while it is made and can be played at any time; after Ctrl-C, SIGTERM or SIGHUP it holds what was
    finished.

    `longvideo generate "a red ball bounces on grass" -o ball.mp4`

    `longvideo generate "a red ball bounces" "a blue square spins" --seconds 20 -o two_shots.mp4`

    `longvideo generate --script shots.yaml -o film.mp4`, where `shots.yaml` holds

    `- {prompt: a red ball bounces, seconds: 4}`

    `- {prompt: a small red ball bounces at night, seconds: 6, cut: false}`

    A shot starts at the chunk (1.33 s at 24 frames a second) nearest to where it was asked. With `cut: false` the scene
    goes on and only the text changes.

    Several GPUs share the denoising of every chunk:

    `torchrun --no-python --nproc-per-node 2 longvideo generate -o film.mp4 ...`
    """
    started = time.perf_counter()
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.writer import check_output
    from longvideo.quantization.number_formats import NumberFormats

    choice = ModelChoice(model, base, preset, entry)
    warn_of_missing_quotes(prompts or [], command="longvideo generate")
    shots = _read_shots(prompts or [], script, seconds)
    options = SamplingOptions(steps, guidance, seed)
    formats = NumberFormats(precision, kv_cache, attention)
    if os.environ.get("RANK", "0") == "0":  # another rank may look when the first has begun to write
        check_output(output, overwrite=overwrite)
    from longvideo.streaming.parallel import launched_ranks

    try:
        with stop_signals(), launched_ranks(device) as (own_device, group):
            load = partial(_load, choice, shots, image, own_device, decode_device, decode_share, formats, group)
            if group is not None and group.rank() > 0:
                _take_part(load, shots, options, image)
                return
            _write(load, shots, options, image, output, overwrite=overwrite, started=started)
    except Stopped as stop:
        raise typer.Exit(exit_code(stop.number)) from None


def _write(
    load: Callable[[], tuple[StreamingPipeline, ChunkPlan]],
    shots: Script,
    options: SamplingOptions,
    image: Path | None,
    output: Path,
    *,
    overwrite: bool,
    started: float,
) -> None:
    """Make the video and write it. Stopped, it finishes the file before it passes that on."""
    from longvideo.infer.writer import VideoWriter
    from longvideo.quantization.number_formats import NumberFormats

    stopped = None
    with _display() as display:
        display.say("loading")
        pipeline, plan = load()
        if pipeline.formats != NumberFormats("bf16"):
            print(pipeline.start_line(), file=sys.stderr)
        chunks = _start(pipeline, shots, options, image)
        tally = Tally(started, plan.num_chunks, plan.num_frames)
        display.say("making the first chunk")
        with VideoWriter(output, fps=pipeline.fps, overwrite=overwrite) as writer:
            try:
                with closing(chunks):
                    for frames in chunks:
                        writer.write(frames)
                        tally.add(len(frames))
                        display.show(tally)
            except Stopped as stop:
                stopped = stop
    with without_reader(STDOUT):
        print(_summary(output, writer.num_frames, tally, pipeline.fps), flush=True)
    if stopped:
        raise stopped


def _take_part(
    load: Callable[[], tuple[StreamingPipeline, ChunkPlan]],
    shots: Script,
    options: SamplingOptions,
    image: Path | None,
) -> None:
    """Do a rank's share of a video that another one writes."""
    pipeline, _ = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the one that writes says it
        chunks = pipeline.stream(shots, steps=options.steps, guidance=options.guidance, seed=options.seed, image=image)
    with closing(chunks):
        for _ in chunks:
            pass


@dataclass
class Tally:
    """Counts and times of a run, from the start of the command. The first chunk comes in two parts."""

    started: float
    num_chunks: int
    num_frames: int
    parts: int = 0
    frames: int = 0
    first_frames: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def add(self, frames: int) -> None:
        self.last_at = time.perf_counter()
        if self.parts == 0:
            self.first_at, self.first_frames = self.last_at, frames
        self.parts += 1
        self.frames += frames

    @property
    def seconds_to_first_frame(self) -> float:
        return self.first_at - self.started

    @property
    def frames_a_second(self) -> float | None:
        """Rate since the first frame; None until there is more."""
        return (self.frames - self.first_frames) / (self.last_at - self.first_at) if self.parts > 1 else None

    def line(self) -> str:
        rate = self.frames_a_second
        speed = f"{rate:.1f} frames/s" if rate is not None else "-"
        chunk = max(1, self.parts - 1)
        return f"chunk {chunk}/{self.num_chunks} | {speed} | first frame after {self.seconds_to_first_frame:.1f} s"


class Display(Protocol):
    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def say(self, text: str) -> None: ...

    def show(self, tally: Tally) -> None: ...


class PlainLines:
    """A line a chunk, for logs."""

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def show(self, tally: Tally) -> None:
        with without_reader(STDERR):
            print(tally.line(), file=sys.stderr, flush=True)


class ProgressBar:
    """A bar that stays in its line and vanishes at the end, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with without_reader(STDERR):
            self._progress.stop()

    def say(self, text: str) -> None:
        with without_reader(STDERR):
            self._progress.update(self._task, description=text)

    def show(self, tally: Tally) -> None:
        with without_reader(STDERR):
            self._progress.update(self._task, total=tally.num_frames, completed=tally.frames, description=tally.line())


def _display() -> Display:
    return ProgressBar() if sys.stderr.isatty() else PlainLines()


def _read_shots(prompts: list[str], script: Path | None, seconds: float | None) -> Script:
    from longvideo.infer.script import Script

    if script is None:
        return Script.from_prompts(prompts, seconds=DEFAULT_SECONDS if seconds is None else seconds)
    if prompts:
        raise UserError("give prompts or --script, not both")
    if seconds is not None:
        raise UserError(f"--seconds and --script exclude each other: {script} says how long each shot is")
    return Script.from_yaml(script)


def _load(
    choice: ModelChoice,
    shots: Script,
    image: Path | None,
    device: str | None,
    decode_device: str | None,
    decode_share: float | None,
    formats: NumberFormats,
    group: ProcessGroup | None,
) -> tuple[StreamingPipeline, ChunkPlan]:
    """Check all that can be checked without weights, then load them."""
    from longvideo.data.pictures import read_image
    from longvideo.infer.fit.formats import check_formats
    from longvideo.infer.fit.placement import pick_device
    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.pipeline import StreamingPipeline, chunk_timing
    from longvideo.infer.script import plan_chunks

    if image is not None:
        read_image(image)
    where, _ = (pick_device(name) for name in (device, decode_device))
    folder = choice.open()
    check_formats(folder, formats, device=where)
    plan = plan_chunks(shots, chunk_timing(folder.settings, folder.vae_config))
    release_large_blocks()
    pipeline = StreamingPipeline.load(
        folder,
        device=device,
        decode_device=decode_device,
        decode_share=decode_share,
        formats=formats,
        group=group,
    )
    return pipeline, plan


def _start(
    pipeline: StreamingPipeline, shots: Script, options: SamplingOptions, image: Path | None
) -> Generator[np.ndarray, None, None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        chunks = pipeline.stream(shots, steps=options.steps, guidance=options.guidance, seed=options.seed, image=image)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return chunks


def _summary(output: Path, num_frames: int, tally: Tally, fps: float) -> str:
    if num_frames == 0:
        return "no frames were made; nothing was written"
    rate = tally.frames_a_second
    speed = f", {rate:.1f} frames/s after it" if rate is not None else ""
    first = f"; first frame after {tally.seconds_to_first_frame:.1f} s" if tally.parts else ""
    return (
        f"{output}: {num_frames} frames, {num_frames / fps:.2f} s at {fps:g} frames/s, "
        f"{output.stat().st_size / 2**20:.2f} MiB{first}{speed}"
    )
