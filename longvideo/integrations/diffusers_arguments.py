"""Check the arguments of diffusers' pipelines and convert them to this project's, and frames to diffusers' forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from longvideo.errors import UserError, known
from longvideo.infer.beginning import FirstPicture
from longvideo.infer.footage import FootageSource
from longvideo.infer.frame_files import WHITE
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.options import MAX_STEPS, SamplingOptions, check_beginning, shown, whole_number
from longvideo.infer.script import MAX_SECONDS, Script, check_prompt

if TYPE_CHECKING:
    from collections.abc import Generator


OutputType = Literal["np", "pil", "pt", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("np", "pil", "pt", "latent")
Frames: TypeAlias = "np.ndarray | Tensor | list[list[Image.Image]]"
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"
StepCallback: TypeAlias = "Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks"
NUM_FRAMES = 81
"""Default number of frames, that of diffusers' WanPipeline."""
MAX_VIDEOS = 1024
TENSOR_INPUTS = ("latents",)
"""Names of the tensors that a callback may receive."""
TIME_AXIS = {"np": 1, "pt": 1, "latent": 2}


@dataclass(frozen=True)
class CallOptions:
    """Options of a call of the pipeline, with the names and meanings of diffusers' WanPipeline.

    height, width: pixels; None means the model's own. num_frames: frames of a video; None means 81, or the length of a
    Script. Every number is possible: the last chunk is generated whole, and the frames after the last one are dropped.
    num_inference_steps: steps for each chunk. guidance_scale: scale of guidance, which is used above 1. None means the
    model's own for both. num_videos_per_prompt: videos of each prompt. generator: CPU generators of the noise, one for
    all videos or one for each; None means torch's global one. A generator with the seed of `StreamingPipeline.stream`
    gives the same video. latents: noise of all chunks, [B, C, T, H, W], in place of what is drawn. image: first frame,
    as in `StreamingPipeline.stream`. video, video_seconds: footage that all videos continue, as there.
    output_type: "np" for float32 [B, T, H, W, 3] from 0 to 1, "pt" for [B, T, 3, H, W], "pil" for a list of pictures
    for each video, "latent" for normalized latents [B, C, T, H, W].
    callback_on_step_end: function that is called as `callback(pipeline, step, timestep, {"latents": ...})` after every
    step, with the latents of the chunk in progress, and may return others under "latents". Steps are numbered over all
    chunks; `num_timesteps` is their number. It runs in the thread that denoises. callback_on_step_end_tensor_inputs:
    names of the tensors that it receives, of which "latents" is the only one. max_sequence_length: text positions; None
    means the model's own.
    Raises UserError for an output type, a number or a name that cannot be used, and for an image with a video.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_videos_per_prompt: int = 1
    generator: Generators = None
    latents: Tensor | None = None
    image: FirstPicture | None = None
    video: FootageSource | None = None
    video_seconds: float | None = None
    output_type: OutputType = "np"
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        check_beginning(self.image, self.video, self.video_seconds)
        known("output_type", self.output_type, OUTPUT_TYPES)
        for name in self.tensor_inputs:
            if name not in TENSOR_INPUTS:
                raise UserError(f"callback_on_step_end_tensor_inputs has {shown(name)}; expected only 'latents'")
        whole_number(self.num_videos_per_prompt, "num_videos_per_prompt", 1, MAX_VIDEOS)
        if self.num_inference_steps is not None:
            whole_number(self.num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        SamplingOptions(guidance=self.guidance_scale)

    @property
    def sampling(self) -> SamplingOptions:
        """Steps and guidance, as Python's numbers."""
        return SamplingOptions(self.num_inference_steps, self.guidance_scale)

    @property
    def tensor_inputs(self) -> Sequence[str]:
        """Names of the tensors that the callback receives; a callback object of diffusers has its own."""
        if isinstance(self.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            return self.callback_on_step_end.tensor_inputs
        return self.callback_on_step_end_tensor_inputs

    def after_step(self, pipeline: object, step: int, timestep: int, sample: Tensor) -> Tensor:
        """Call the callback, if there is one, and return the latents with which the next step continues."""
        if self.callback_on_step_end is None:
            return sample
        tensors = dict.fromkeys(self.tensor_inputs, sample)
        result = self.callback_on_step_end(pipeline, step, timestep, tensors)
        if not isinstance(result, dict):
            raise UserError(f"callback_on_step_end returned {shown(result)}; expected its dict of tensors")
        return result.get("latents", sample)


def scripts_of(prompt: object, num_frames: object, *, fps: int) -> list[Script]:
    """Return the script of every prompt.

    prompt: text, a list of texts, or a Script, which has its own length. num_frames: 81 for None. fps: frames per
    second.
    """
    if isinstance(prompt, Script):
        if num_frames is not None:
            raise UserError(
                "num_frames and a Script exclude each other: a script has the length of each shot; leave num_frames out"
            )
        return [prompt]
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts:
        raise UserError(f"prompt is {shown(prompt)}; expected text, a list with a text for each video, or a Script")
    most = round(MAX_SECONDS * fps)
    frames = whole_number(NUM_FRAMES if num_frames is None else num_frames, "num_frames", 1, most)
    for text in texts:
        check_prompt(text, "the prompt")
    return [Script.from_prompts(text, seconds=frames / fps) for text in texts]


def with_negative_prompts(scripts: list[Script], negative_prompt: object) -> list[Script]:
    """Return scripts with a negative prompt: one text for all, a list with a text for each, or None."""
    texts = [negative_prompt or ""] * len(scripts) if isinstance(negative_prompt, str | None) else negative_prompt
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"negative_prompt is {shown(negative_prompt)}; expected text, or a list with a text for each")
    if len(texts) != len(scripts):
        raise UserError(f"there are {len(texts)} negative prompts; expected one for each prompt, or one text for all")
    pairs = zip(scripts, texts, strict=True)
    return [Script.from_prompts(script, seconds=None, negative_prompt=text) for script, text in pairs]


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
