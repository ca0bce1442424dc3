"""`longvideo generate`: generate a video from prompts, and write it to a file chunk by chunk."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.checkpoint.choices import adapter_choices
from longvideo.cli.generate_prompts import BatchFormat, VideoBatch, generate_listed_videos, refuse_options
from longvideo.cli.model_options import (
    AdapterNames,
    AttentionFormat,
    Base,
    DecodeDevice,
    DecoderFormat,
    DecoderName,
    DecodeShare,
    Device,
    DeviceChoice,
    Entry,
    Guidance,
    KVCacheFormat,
    LowMemory,
    ModelChoice,
    ModelName,
    OffloadWeights,
    Precision,
    SettingsPreset,
    Size,
    TextEncoderChoice,
    one_decoder,
    warn_of_missing_quotes,
)
from longvideo.cli.output import OUTPUT
from longvideo.cli.printing import STDOUT, without_reader
from longvideo.cli.stopping import Stopped, exit_code, stop_signals
from longvideo.cli.video_progress import VideoTally, new_display, summary, with_warnings
from longvideo.errors import UserError
from longvideo.infer.options import SamplingOptions, check_beginning
from longvideo.infer.script import Script
from longvideo.machine.launcher import is_main_process
from longvideo.machine.preloading import preload

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from longvideo.checkpoint.latents import LatentsHeader, LatentsWriter
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.generation import GeneratedChunk
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.writer import OutputFile
    from longvideo.quantization.number_formats import NumberFormats

DEFAULT_SECONDS = 10.0
OUTPUT_HELP = "Video file, .mp4, .mkv, .webm, .gif or .webp; or pictures, such as `frames/%05d.png`."


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Description of the video. Each further prompt is a shot after a cut."),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with a list of shots, each with `prompt`, `seconds`, `cut` and `negative_prompt` instead"
            " of prompts."
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="File with a prompt in each line, or `.jsonl` with shots, instead of prompts: a video for each line,"
            " in the folder `-o`.",
        ),
    ] = None,
    batch_format: Annotated[
        BatchFormat | None,
        typer.Option(
            "--format",
            help="Format of the videos of `--prompts`; `png` is a folder of pictures for each.  [default: mp4]",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help=f"Length of the whole video; its shots have equal lengths.  [default: {DEFAULT_SECONDS:g}]"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of solver steps for each chunk; more are slower and finer.  [default: the model's own]"
        ),
    ] = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="What to keep out of the video, for shots that state none; needs guidance other than 1.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same seed gives the same video.")] = 0,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture for the first frame; it is scaled and cropped to the size of the video."),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Video to continue, in any format of FFmpeg. The output begins after its last frame and does not"
            " contain it."
        ),
    ] = None,
    video_seconds: Annotated[
        float | None,
        typer.Option(
            help="Length of the end of --video that is used, in whole chunks.  [default: as much as the model attends"
            " to]"
        ),
    ] = None,
    model: ModelName = "tiny",
    base: Base = None,
    preset: SettingsPreset = None,
    entry: Entry = None,
    size: Size = None,
    adapter: AdapterNames = None,
    device: Device = None,
    decode_device: DecodeDevice = None,
    decode_share: DecodeShare = None,
    precision: Precision = None,
    kv_cache: KVCacheFormat = "bf16",
    attention: AttentionFormat = "bf16",
    decoder: DecoderName = None,
    decoder_precision: DecoderFormat = "auto",
    text_encoder: TextEncoderChoice = None,
    low_memory: LowMemory = False,
    offload_weights: OffloadWeights = False,
    latents: Annotated[
        Path | None,
        typer.Option(help="File for the latents of the video, .safetensors, which `longvideo decode` decodes again."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
    output: Annotated[Path, typer.Option(*OUTPUT, help=OUTPUT_HELP)] = Path("out.mp4"),
) -> None:
    """Generate a video from prompts, chunk by chunk.

    The file grows chunk by chunk and can be played at any time. After Ctrl-C, SIGTERM or SIGHUP it holds the chunks
    that were finished.

    `longvideo generate "a red ball bounces on grass" -o ball.mp4`

    `longvideo generate "a red ball bounces" "a blue square spins" --seconds 20 -o two_shots.mp4`

    `longvideo generate --script shots.yaml -o film.mp4`, where `shots.yaml` holds

    `- {prompt: a red ball bounces, seconds: 4}`

    `- {prompt: a small red ball bounces at night, seconds: 6, cut: false}`

    A shot starts at the chunk boundary nearest to its requested time; a chunk has 1.33 s at 24 frames per second. With
    `cut: false` the scene continues, and only the text changes.

    Several GPUs share the denoising of every chunk:

    `torchrun --no-python --nproc-per-node 2 longvideo generate -o film.mp4 ...`

    With `--prompts` every GPU generates other videos. Line 1 becomes `00000.mp4`, or has the suffix that `--format`
    names (`png`: the folder `00000`), and the seed of each further line is one more. `videos.jsonl` lists them; the
    same command continues after a stop. A line of a `.jsonl` is
    `{"prompts": ["first shot", "second shot"], "negative_prompt": "blurry", "seconds": 10, "seed": 3}`, where the last
    three may be missing.

    `torchrun --no-python --nproc-per-node 8 longvideo generate --prompts prompts.txt -o videos`
    """
    start = time.perf_counter()
    preload("longvideo.infer.writer", "longvideo.infer.loading", "longvideo.infer.pipeline")
    from longvideo.infer.writer import OutputFile
    from longvideo.quantization.number_formats import NumberFormats

    choice = ModelChoice(model, base, preset, entry, size, adapter_choices(adapter or []))
    devices = DeviceChoice(device, decode_device, decode_share, text_encoder, low_memory, offload_weights)
    decoder_name = one_decoder(decoder)
    warn_of_missing_quotes(prompts or [], command="longvideo generate")
    options = SamplingOptions(steps, guidance, seed)
    formats = NumberFormats.parse(precision, kv_cache, attention, decoder_precision, text_encoder)
    if prompts_file is not None:
        beginning = {"image": image, "video": video, "video_seconds": video_seconds}
        refuse_options(prompts=prompts, script=script, latents=latents, **beginning)
        settings = {**asdict(choice), "steps": steps, "guidance": guidance, "decoder": decoder_name, **asdict(formats)}
        length = DEFAULT_SECONDS if seconds is None else seconds
        batch = VideoBatch(
            prompts_file, output, batch_format or "mp4", length, negative_prompt, options, settings, overwrite
        )
        generate_listed_videos(batch, choice, formats, decoder_name, devices)
        return
    if batch_format is not None:
        raise UserError("--format needs --prompts; the name of the output states its format, such as -o out.webm")
    video_file = OutputFile(output, overwrite)
    check_beginning(image, video, video_seconds)
    if video is not None and latents is not None:
        raise UserError("--latents and --video exclude each other: latents are decoded from the beginning of a video")
    own_script = _read_script(prompts or [], script, seconds, negative_prompt)
    chosen = VideoChoice(own_script, options, image, video, video_seconds)
    if is_main_process():  # other ranks may get here after rank 0 has created the file
        video_file.check()
        if latents is not None:
            _check_latents_file(latents, overwrite=overwrite)
    from longvideo.checkpoint.latents import LatentsWriter
    from longvideo.streaming.parallel import launched_ranks

    try:
        with stop_signals(), launched_ranks(devices.device) as (own_device, group):
            placement = replace(devices, device=own_device).place()
            load = partial(_load, choice, chosen, placement, formats, decoder_name, group)
            if group is not None and group.rank() > 0:
                _take_part(chosen, load)
                return
            with nullcontext() if latents is None else LatentsWriter(latents) as latents_writer:
                _write(chosen, load, video_file, latents_writer, start=start)
    except Stopped as stop:
        raise typer.Exit(exit_code(stop.number)) from None


@dataclass(frozen=True)
class VideoChoice:
    """The video that a user chose.

    image: file of its first frame. footage, footage_seconds: `video` and `video_seconds` of the pipeline.
    """

    script: Script
    options: SamplingOptions
    image: Path | None
    footage: Path | None
    footage_seconds: float | None

    def stream(self, pipeline: StreamingPipeline) -> Generator[GeneratedChunk, None, None]:
        """Return the chunks as `StreamingPipeline.stream_chunks` does."""
        steps, guidance, seed = self.options.steps, self.options.guidance, self.options.seed
        return pipeline.stream_chunks(
            self.script,
            steps=steps,
            guidance=guidance,
            seed=seed,
            image=self.image,
            video=self.footage,
            video_seconds=self.footage_seconds,
        )


def _write(
    video: VideoChoice,
    load: Callable[[], tuple[StreamingPipeline, LatentsHeader]],
    video_file: OutputFile,
    latents: LatentsWriter | None,
    *,
    start: float,
) -> None:
    """Generate the video and write it, and its latents if there is a writer for them.

    start: time at which the command started, on `time.perf_counter`.
    A signal stops the generation; the file is finished before Stopped is raised.
    """
    interruption = None
    with new_display() as display:
        display.set_stage("loading")
        pipeline, header = load()
        print(pipeline.start_line(), file=sys.stderr)
        chunks = with_warnings(lambda: video.stream(pipeline))
        plan = pipeline.plan(video.script, continues=video.footage is not None)
        tally = VideoTally(start, plan.num_chunks, plan.num_frames)
        display.set_stage("generating the first chunk")
        with video_file.open(fps=pipeline.fps) as writer:
            try:
                with closing(chunks):
                    for chunk in chunks:
                        if latents is not None:
                            latents.add(_new_latents(chunk))
                        writer.write(chunk.frames[0])
                        tally.add(len(chunk.frames[0]))
                        display.show(tally)
            except Stopped as stop:
                interruption = stop
    with without_reader(STDOUT):
        print(summary(writer, tally, pipeline.fps), flush=True)
    if latents is not None and writer.num_frames:
        scale = pipeline.models.decoder.config.scale_factor_temporal
        num_latents = 1 + -(-(writer.num_frames - 1) // scale)
        latents.finish(num_latents, replace(header, num_frames=writer.num_frames))
        with without_reader(STDOUT):
            print(f"{latents.path}: {num_latents} latent frames", flush=True)
    if interruption:
        raise interruption


def _new_latents(chunk: GeneratedChunk) -> Tensor:
    """Return the latents of the frames that a part of a video adds. The first chunk has two parts."""
    latents = chunk.record.latents
    if chunk.step.index > 0 or chunk.step.num_frames == 1:
        return latents
    return latents[:, :, 1:] if chunk.is_complete else latents[:, :, :1]


def _take_part(video: VideoChoice, load: Callable[[], tuple[StreamingPipeline, LatentsHeader]]) -> None:
    """Compute this rank's share of a video that rank 0 writes."""
    pipeline, _ = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 0 prints the warnings
        chunks = video.stream(pipeline)
    with closing(chunks):
        for _ in chunks:
            pass


def _check_latents_file(path: Path, *, overwrite: bool) -> None:
    """Raise UserError for a file of latents that cannot be written. Nothing on the disk is changed."""
    from longvideo.files import check_target

    if path.suffix.lower() != ".safetensors":
        raise UserError(f"cannot write {path}: expected a name that ends in .safetensors")
    check_target(path, overwrite=overwrite)


def _read_script(prompts: list[str], script: Path | None, seconds: float | None, negative_prompt: str) -> Script:
    if script is None:
        length = DEFAULT_SECONDS if seconds is None else seconds
        return Script.from_prompts(prompts, seconds=length, negative_prompt=negative_prompt)
    if prompts:
        raise UserError("prompts and --script exclude each other; use one of them")
    if seconds is not None:
        raise UserError(f"--seconds and --script exclude each other: {script} sets the length of each shot")
    return Script.from_prompts(Script.from_yaml(script), seconds=None, negative_prompt=negative_prompt)


def _load(
    choice: ModelChoice,
    video: VideoChoice,
    placement: Placement,
    formats: NumberFormats,
    decoder_name: str | None,
    group: ProcessGroup | None,
) -> tuple[StreamingPipeline, LatentsHeader]:
    """Check everything that can be checked without weights, then load them.

    Return the pipeline, and the notes about its model for a file of latents.
    """
    from longvideo.checkpoint.latents import LatentsHeader
    from longvideo.checkpoint.locations import lasting_name, locate
    from longvideo.data.pictures import read_image
    from longvideo.files import check_file
    from longvideo.infer.footage import FootageReader
    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.loading import load_models
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.prompt_rules import PromptRules
    from longvideo.infer.script import ChunkTiming, plan_chunks

    if video.image is not None:
        read_image(video.image)
    if video.footage is not None:
        check_file(video.footage, "video")
    folder = choice.open()
    timing = ChunkTiming.of(folder.settings, folder.latents_config)
    if video.footage is not None:
        reader = FootageReader.of(folder.settings, folder.spec, folder.latents_config)
        reader.check(video.footage, seconds=video.footage_seconds)
        timing = timing.after_footage
    plan_chunks(video.script, timing)
    tokenizer = folder.load_prompt_tokenizer()
    PromptRules(tokenizer, folder.settings, guidance=video.options.guidance).check_script(video.script)
    release_large_blocks()
    header = LatentsHeader(
        model=lasting_name(folder.path),
        base=None if choice.base is None else lasting_name(locate(choice.base)),
        fps=folder.settings.fps,
        chunk_frames=folder.settings.chunk_frames,
        adapters=", ".join(one.short_description for one in folder.adapters) or None,
    )
    options = {"formats": formats, "decoder_name": decoder_name, "group": group}
    return StreamingPipeline(load_models(folder, placement, scripts=[video.script], **options)), header
