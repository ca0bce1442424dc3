"""`longvideo generate --prompts`: a video for each line of a file, divided among the ranks of a launcher."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from longvideo.cli.printing import STDOUT, printable, without_reader
from longvideo.cli.stopping import Stopped, exit_code, stop_signals
from longvideo.cli.video_progress import VideoTally, new_display, summary, with_warnings
from longvideo.errors import UserError
from longvideo.infer.options import SamplingOptions
from longvideo.infer.script import Script

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.cli.model_options import DeviceChoice, ModelChoice
    from longvideo.infer.generation import Models
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.video_folder import ListedVideo, VideoFolder
    from longvideo.quantization.number_formats import NumberFormats

BatchFormat = Literal["mp4", "mkv", "webm", "gif", "webp", "png"]
"""Suffixes of video files, and "png" for a folder of numbered pictures for each video."""


@dataclass(frozen=True)
class VideoBatch:
    """The videos that a user chose.

    file: prompts, as `longvideo.text.prompt_file` reads them. seconds: length of a video whose line has none.
    negative_prompt: that of a video whose line has none. options: sampling; the seed is that of the first line, and
    each further line has the next one unless it states its own. format: of the files. settings: what else
    decides how the videos look, to continue only with the same.
    """

    file: Path
    output: Path
    format: BatchFormat
    seconds: float
    negative_prompt: str
    options: SamplingOptions
    settings: Mapping[str, Any]
    overwrite: bool

    def read(self) -> list[ListedVideo]:
        """Return the videos. Raises UserError, with the line, for one that cannot be generated."""
        from longvideo.infer.video_folder import ListedVideo
        from longvideo.text.prompt_file import read_prompt_file

        if self.output.suffix:
            raise UserError(
                f"the output is {self.output}; expected a name without suffix, for a folder; --format states the format"
                " of its videos"
            )
        videos = []
        for index, line in enumerate(read_prompt_file(self.file)):
            seconds = self.seconds if line.seconds is None else float(line.seconds)
            seed = self.options.seed + index if line.seed is None else line.seed
            negative_prompts = line.negative_prompts or (self.negative_prompt,) * len(line.shots)
            name = f"{index:05d}" if self.format == "png" else f"{index:05d}.{self.format}"
            video = ListedVideo(name, index + 1, line.shots, negative_prompts, seconds, seed)
            try:
                script_of(video)
                SamplingOptions(seed=seed)
            except UserError as error:
                raise UserError(f"{self.file}:{video.line}: {error}") from error
            videos.append(video)
        return videos

    def begin(self, folder: ModelFolder, video_folder: VideoFolder) -> int:
        """Check all videos, then create or continue their list; return the number of videos to generate."""
        from longvideo.infer.prompt_rules import PromptRules
        from longvideo.infer.script import ChunkTiming, plan_chunks
        from longvideo.infer.writer import check_rate

        videos = self.read()
        check_rate(folder.settings.fps, f".{self.format}")
        timing = ChunkTiming.of(folder.settings, folder.latents_config)
        rules = PromptRules(folder.load_prompt_tokenizer(), folder.settings, guidance=self.options.guidance)
        for video in videos:
            try:
                script = script_of(video)
                plan_chunks(script, timing)
                rules.check_script(script)
            except UserError as error:
                raise UserError(f"{self.file}:{video.line}: {error}") from error
        settings = {"format": self.format, **self.settings}
        done = video_folder.begin(videos, settings, overwrite=self.overwrite)
        print(printable(f"{self.output}: {done} of {len(videos)} videos are finished"), file=sys.stderr, flush=True)
        return len(videos) - done


def script_of(video: ListedVideo) -> Script:
    """Return the script of a video. Raises UserError for a length that is out of range."""
    script = Script.from_prompts(video.prompt, seconds=video.seconds)
    pairs = zip(script.shots, video.negative_prompt, strict=True)
    return Script(tuple(replace(shot, negative_prompt=negative_prompt) for shot, negative_prompt in pairs))


def refuse_options(**others: object) -> None:
    """Raise UserError if an option was given that --prompts excludes."""
    for name, value in others.items():
        if value:
            option = "prompts on the command line" if name == "prompts" else f"--{name.replace('_', '-')}"
            raise UserError(f"--prompts and {option} exclude each other; use one of them")


def generate_listed_videos(
    batch: VideoBatch,
    choice: ModelChoice,
    formats: NumberFormats,
    decoder_name: str | None,
    devices: DeviceChoice,
) -> None:
    """Generate the videos of a batch, with other ranks if a launcher started them."""
    from longvideo.distributed import build_mesh
    from longvideo.infer.host_memory import release_large_blocks
    from longvideo.infer.loading import load_models
    from longvideo.infer.video_folder import VideoFolder
    from longvideo.streaming.parallel import launched_ranks

    try:
        with stop_signals(), closing(VideoFolder(batch.output)) as videos:
            with launched_ranks(devices.device) as (own_device, _):
                mesh = build_mesh(1)
                with mesh.one_voice():
                    placement = replace(devices, device=own_device).place()
                    folder = choice.open()
                    waiting = mesh.on_main(lambda: batch.begin(folder, videos))
            if not waiting:
                return
            videos.join()
            release_large_blocks()
            scripts = [script_of(video) for video in videos.unfinished()]
            options = {"formats": formats, "decoder_name": decoder_name, "scripts": scripts}
            load = partial(load_models, folder, placement, **options)
            _generate_videos(batch, load, videos, ranks=mesh.world)
    except Stopped as stop:
        raise typer.Exit(exit_code(stop.number)) from None


def _generate_videos(batch: VideoBatch, load: Callable[[], Models], videos: VideoFolder, *, ranks: int) -> None:
    """Generate waiting videos until all are finished. A signal ends the current one, which stays waiting.

    load: loads the model. videos: a folder that this process has joined. ranks: number of processes that print.
    """
    from longvideo.infer.pipeline import StreamingPipeline

    with new_display(ranks=ranks) as display:
        display.set_stage("loading")
        pipeline = StreamingPipeline(load())
        if ranks == 1:
            print(pipeline.start_line(), file=sys.stderr)
        while (video := videos.claim()) is not None:
            is_done = False
            try:
                line = _generate(batch, video, pipeline, display.show)
                is_done = True
            finally:
                videos.set_status(video, "done" if is_done else "waiting")
            with without_reader(STDOUT):
                print(printable(line), flush=True)


def _generate(
    batch: VideoBatch, video: ListedVideo, pipeline: StreamingPipeline, show: Callable[[VideoTally], None]
) -> str:
    """Write a video and return the line about it.

    After a signal a file holds the chunks that were finished, and there is no folder of pictures.
    """
    from longvideo.infer.picture_folder import PictureFolder
    from longvideo.infer.writer import VideoWriter, count_playable_frames

    path, script = batch.output / video.file, script_of(video)
    plan = pipeline.plan(script)
    if count_playable_frames(path) == plan.num_frames:
        return f"{path}: {plan.num_frames} frames, complete before"  # the process was killed before it changed the list
    steps, guidance = batch.options.steps, batch.options.guidance
    tally = VideoTally(time.perf_counter(), plan.num_chunks, plan.num_frames, name=video.file)
    chunks = with_warnings(
        lambda: pipeline.stream(script, steps=steps, guidance=guidance, seed=video.seed), name=video.file
    )
    output = PictureFolder(path) if batch.format == "png" else VideoWriter(path, fps=pipeline.fps, overwrite=True)
    with closing(chunks), output as writer:
        for frames in chunks:
            writer.write(frames)
            tally.add(len(frames))
            show(tally)
    return summary(writer, tally, pipeline.fps)
