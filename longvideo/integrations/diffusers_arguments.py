"""Check the arguments of diffusers' pipelines and convert them to this project's, and frames to diffusers' forms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.frame_files import WHITE
from longvideo.infer.generation import NEGATIVE_PROMPT, GeneratedChunk
from longvideo.infer.options import shown, whole_number
from longvideo.infer.script import MAX_SECONDS, ChunkPlan, ChunkTiming, Script, check_prompt, plan_chunks

if TYPE_CHECKING:
    from collections.abc import Generator

OutputType = Literal["np", "pil", "pt", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("np", "pil", "pt", "latent")
Frames: TypeAlias = "np.ndarray | Tensor | list[list[Image.Image]]"
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"
NUM_FRAMES = 81
"""Default number of frames, that of diffusers' WanPipeline."""
MAX_VIDEOS = 1024
TIME_AXIS = {"np": 1, "pt": 1, "latent": 2}


def shots_of(prompt: object, videos_per_prompt: object) -> list[list[str]]:
    """Return the prompt of every shot of every video of a batch. prompt: text, a list of texts, or a Script."""
    copies = whole_number(videos_per_prompt, "num_videos_per_prompt", 1, MAX_VIDEOS)
    if isinstance(prompt, Script):
        return [[shot.prompt for shot in prompt.shots]] * copies
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts:
        raise UserError(f"prompt is {shown(prompt)}; expected text, a list with a text for each video, or a Script")
    for text in texts:
        check_prompt(text, "the prompt")
    return [[text] for text in texts for _ in range(copies)]


def negative_prompts_of(negative_prompt: object, num_videos: int) -> tuple[str, ...]:
    """Return one negative prompt for all videos of a batch, or one for each."""
    texts = [negative_prompt or NEGATIVE_PROMPT] if isinstance(negative_prompt, str | None) else negative_prompt
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"negative_prompt is {shown(negative_prompt)}; expected text, or a list with a text for each")
    if num_videos % len(texts or [""]) or not texts:
        raise UserError(f"there are {len(texts)} negative prompts; expected one for each prompt, or one text for all")
    return tuple(text for text in texts for _ in range(num_videos // len(texts)))


def generators_of(generator: object, num_videos: int) -> tuple[torch.Generator, ...]:
    """Return the generator of each video; one generator draws the noise of all of them in turn."""
    own = torch.default_generator if generator is None else generator
    several = own if isinstance(own, list | tuple) else [own] * num_videos
    if len(several) != num_videos:
        raise UserError(f"there are {len(several)} generators; expected one, or one for each of {num_videos} videos")
    generators: list[torch.Generator] = []
    for one in several:
        if not isinstance(one, torch.Generator):
            raise UserError(f"generator is {shown(one)}; expected a torch.Generator, or a list of them")
        if one.device.type != "cpu":
            raise UserError(
                f"the generator is on {one.device}; expected one on the CPU, with which all devices draw the same"
                " noise: torch.Generator().manual_seed(0)"
            )
        generators.append(one)
    return tuple(generators)


def plan_of(prompt: object, num_frames: object, timing: ChunkTiming) -> ChunkPlan:
    """Return the chunks of a video. num_frames: 81 for None; a Script has its own length."""
    if isinstance(prompt, Script):
        if num_frames is not None:
            raise UserError(
                "num_frames and a Script exclude each other: a script has the length of each shot; leave num_frames out"
            )
        return plan_chunks(prompt, timing)
    most = round(MAX_SECONDS * timing.fps)
    frames = whole_number(NUM_FRAMES if num_frames is None else num_frames, "num_frames", 1, most)
    return ChunkPlan(timing, (0,), (True,), frames)


def check_noise(latents: Tensor | None, chunk_shape: Sequence[int], num_chunks: int) -> None:
    """Raise UserError for latents that are not the noise of all chunks. chunk_shape: [B, C, T, H, W] of a chunk."""
    batch, channels, frames, height, width = chunk_shape
    expected = [batch, channels, frames * num_chunks, height, width]
    if latents is not None and (not isinstance(latents, Tensor) or list(latents.shape) != expected):
        value = list(latents.shape) if isinstance(latents, Tensor) else shown(latents)
        raise UserError(f"latents are {value}; expected noise of the shape {expected}, that of {num_chunks} chunks")


def frames_of(
    chunks: Generator[GeneratedChunk, None, None], form: OutputType, progress: Any, *, temporal_scale: int
) -> Generator[Frames, None, None]:
    """Yield the frames of chunks in a form of diffusers. progress: bar that is closed at the end."""
    with closing(chunks), progress:
        for chunk in chunks:
            if form != "latent":
                yield _converted(chunk.frames, form)
            elif chunk.is_complete:
                # the first latent frame of a video is one pixel frame
                opening = chunk.step.index == 0
                kept = opening + -(-(chunk.step.num_frames - opening) // temporal_scale)
                yield chunk.record.latents[:, :, :kept]


def joined(parts: list[Any], form: OutputType) -> Frames:
    """Return the parts of a video, in the form that `frames_of` gave them, as one."""
    if form == "np":
        return np.concatenate(parts, axis=TIME_AXIS[form])
    if form == "pil":
        return [[frame for part in parts for frame in part[video]] for video in range(len(parts[0]))]
    return torch.cat(parts, dim=TIME_AXIS[form])


def _converted(frames_BTHWC: np.ndarray, form: OutputType) -> Frames:
    if form == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in frames_BTHWC]
    values = frames_BTHWC.astype(np.float32) / WHITE
    return values if form == "np" else torch.from_numpy(values).permute(0, 1, 4, 2, 3)
