"""Prompts of the student: from ShapeWorld, from a file, or from encoded clips.

The videos of a step are a function of seed, step and sample alone, however they are divided.

Shapes: B batch, P prompts, J text positions, D text width, C channels, H W latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded, share, steps_field
from longvideo.distill.walk import VideoRequest
from longvideo.distributed import Mesh, common_passes, divide_batch
from longvideo.errors import ConfigError, UserError, shown
from longvideo.model.conditioning import batch_texts
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Split, sample_scene
from longvideo.text.encoder import TextEncoder, clean_prompt
from longvideo.text.prompt_file import read_prompt_file
from longvideo.training.objective import seeded, stage_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from longvideo.data.encoded import EncodedDataset

SHAPEWORLD = "shapeworld"
ENCODED_AT_ONCE = 16
"""Number of prompts that are encoded together."""


@dataclass(frozen=True)
class ChunkScript:
    """One video.

    prompts: prompt of every chunk. cuts: whether each chunk opens a shot. image: number of the clip whose first frame
    is given, or None.
    """

    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    image: int | None = None


class Scripts(ABC):
    """A source of scripts, and the text encoder's output for them."""

    @abstractmethod
    def draw(self, step: int, number: int, num_chunks: int, /) -> ChunkScript:
        """Return the script of a video of a step. number: count of videos from the beginning of the run."""

    @abstractmethod
    def features(self, prompts: Sequence[str]) -> Tensor:
        """Return [P, J, D] on the training device."""

    def first_latent(self, image: int) -> Tensor:
        """Return the first latent frame of a clip, [C, 1, H, W], for scripts with an image."""
        raise NotImplementedError


@dataclass(frozen=True)
class ShapeWorldConfig(Bounded):
    """Prompts of ShapeWorld.

    pair_fraction: share of prompts with two objects.
    cut_fraction: share of steps whose videos have a second shot.
    omit: share of captions that leave out the sizes, and of those that leave out the background.
    """

    pair_fraction: float = share(0.45)
    cut_fraction: float = share(0.0)
    omit: float = share(0.1)


class ShapeWorldScripts(Scripts):
    """Scenes of a split, with a new phrasing each time; all videos of a step are cut at the same chunk."""

    def __init__(self, config: ShapeWorldConfig, encoder: TextEncoder, *, seed: int, split: Split = "train") -> None:
        self.config, self.encoder, self.seed, self.split = config, encoder, seed, split
        self._generator = torch.Generator()

    def draw(self, step: int, number: int, num_chunks: int) -> ChunkScript:
        generator = seeded(self._generator, self.seed, "cut", step)
        is_cut, place = torch.rand(2, generator=generator).tolist()
        cut = 1 + int(place * (num_chunks - 1)) if num_chunks > 1 and is_cut < self.config.cut_fraction else None
        generator = seeded(self._generator, self.seed, "script", number)
        prompts = []
        for _ in range(1 if cut is None else 2):
            scene_seed, phrasing = torch.randint(2**31, (2,), generator=generator).tolist()
            pair = bool(torch.rand((), generator=generator) < self.config.pair_fraction)
            scene = sample_scene(scene_seed, split=self.split, num_sprites=2 if pair else 1)
            prompts.append(caption(scene, phrasing, omit=self.config.omit))
        shots = [int(cut is not None and chunk >= cut) for chunk in range(num_chunks)]
        return ChunkScript(tuple(prompts[s] for s in shots), tuple(chunk in (0, cut) for chunk in range(num_chunks)))

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder(*self.encoder.tokenize(prompts))


class FileScripts(Scripts):
    """Scripts of a file, in a new order for each epoch; features are computed once, before training."""

    def __init__(
        self,
        scripts: Sequence[Sequence[str]],
        features: Mapping[str, Tensor],
        *,
        seed: int,
        text_len: int,
        device: torch.device,
    ) -> None:
        """features: [J or fewer, D] of every prompt, on the CPU."""
        self.scripts, self._features, self.text_len, self.device = scripts, features, text_len, device
        self.order = Order(len(scripts), seed)

    def draw(self, _step: int, number: int, num_chunks: int) -> ChunkScript:
        shots = self.scripts[self.order.item(number)]
        numbers = [chunk * len(shots) // num_chunks for chunk in range(num_chunks)]
        cuts = tuple(chunk == 0 or numbers[chunk] != numbers[chunk - 1] for chunk in range(num_chunks))
        return ChunkScript(tuple(shots[number] for number in numbers), cuts)

    def features(self, prompts: Sequence[str]) -> Tensor:
        features = [self._features[clean_prompt(prompt)] for prompt in prompts]
        padded = [torch.nn.functional.pad(x, (0, 0, 0, self.text_len - len(x))) for x in features]
        return torch.stack(padded).to(self.device)


class ClipScripts(Scripts):
    """Captions and cuts of encoded clips, and, for a share of them, the first frame too."""

    def __init__(
        self,
        clips: EncodedDataset,
        *,
        numbers: Sequence[int],
        image_fraction: float,
        seed: int,
        device: torch.device,
    ) -> None:
        """numbers: of the clips to use."""
        self.clips, self.numbers = clips, numbers
        self.image_fraction, self.seed, self.device = image_fraction, seed, device
        self.order = Order(len(numbers), seed)
        self._generator = torch.Generator()

    def draw(self, step: int, number: int, num_chunks: int) -> ChunkScript:
        index = self.numbers[self.order.item(number)]
        clip = self.clips.clips[index]
        generator = seeded(self._generator, self.seed, "image", step)
        has_image = bool(torch.rand((), generator=generator) < self.image_fraction)
        return ChunkScript(
            clip.captions[:num_chunks],
            (True, *(bool(cut) for cut in clip.cuts[1:num_chunks])),
            image=index if has_image else None,
        )

    def features(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.clips.text(prompt) for prompt in prompts]).to(self.device)

    def first_latent(self, image: int) -> Tensor:
        return self.clips.latents(image, 0, 1).to(self.device)


class NoiseScripts(Scripts):
    """Noise instead of text, for a dry run."""

    def __init__(self, text_len: int, text_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (text_len, text_dim), dtype, device

    def draw(self, _step: int, number: int, num_chunks: int) -> ChunkScript:
        return ChunkScript((f"video {number}",) * num_chunks, (True, *([False] * (num_chunks - 1))))

    def features(self, prompts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(prompts), *self.shape, generator=generator).to(self.device, self.dtype)


class Order:
    """Order of `count` items: all of them once in each epoch, in an order drawn for that epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._generator = torch.Generator()
        self._epoch: tuple[int, list[int]] = (-1, [])

    def item(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        if epoch != self._epoch[0]:
            generator = seeded(self._generator, self.seed, "order", epoch)
            self._epoch = (epoch, torch.randperm(self.count, generator=generator).tolist())
        return self._epoch[1][place]


@dataclass(frozen=True)
class DistillStage(Bounded):
    """A run of steps on videos of one length.

    frames: number of latent frames of a video.
    batch: number of videos in a step, over all ranks.
    steps: number of steps.
    learning_rate: peak that replaces the student's; 0 freezes its weights.
    """

    frames: int = bounded(32, least=1)
    batch: int = bounded(8, least=1)
    steps: int = steps_field(5000)
    learning_rate: float | None = bounded(None, least=0)


class RolloutSource:
    """Batches for the trainer: every share is a `VideoRequest`, whose samples have their cuts in common."""

    unit = "frame"

    def __init__(
        self,
        scripts: Scripts,
        stages: Sequence[DistillStage],
        *,
        negative_prompt: str,
        cut_prefix: str,
        chunk_frames: int,
        device: torch.device,
    ) -> None:
        self.scripts, self.stages = scripts, stages
        self.negative_prompt, self.cut_prefix = negative_prompt, cut_prefix
        self.chunk_frames, self.device = chunk_frames, device

    def size(self, step: int) -> int:
        stage = stage_at(self.stages, step)
        return stage.batch * stage.frames

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        """Return the backward passes of a step: one for each chunk of each share."""
        return common_passes(
            divide_batch(stage.batch, mesh, micro_batch)[1] * (stage.frames // self.chunk_frames)
            for stage in self.stages
            if stage.steps
        )

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[VideoRequest]:
        stage = stage_at(self.stages, step)
        size, passes = divide_batch(stage.batch, mesh, micro_batch)
        first = mesh.replica * size * passes
        starts = range(first, first + size * passes, size)
        return [self.clip(step, range(start, start + size), stage.frames // self.chunk_frames) for start in starts]

    def clip(self, step: int, samples: Sequence[int], num_chunks: int) -> VideoRequest:
        before = self._videos_before(step)
        scripts = [self.scripts.draw(step, before + sample, num_chunks) for sample in samples]
        return self.assemble(scripts, step, samples)

    def _videos_before(self, step: int) -> int:
        videos = 0
        for stage in self.stages:
            videos += min(step, stage.steps) * stage.batch
            step = max(step - stage.steps, 0)
        return videos + step * self.stages[-1].batch

    def assemble(self, scripts: Sequence[ChunkScript], step: int, samples: Sequence[int]) -> VideoRequest:
        if len({(script.cuts, script.image is None) for script in scripts}) > 1:
            raise ConfigError(
                "videos that are computed together must be cut at the same chunks, and these are not;"
                " use parallel.micro_batch=1"
            )
        texts = batch_texts(
            [script.prompts for script in scripts],
            scripts[0].cuts,
            cut_prefix=self.cut_prefix,
            negative_prompt=self.negative_prompt,
        )
        images = [script.image for script in scripts if script.image is not None]
        return VideoRequest(
            features_PJD=self.scripts.features(texts.texts),
            prompt_NB=texts.rows_NB.to(self.device),
            cuts=scripts[0].cuts,
            samples=tuple(samples),
            step=step,
            first_latent=torch.stack([self.scripts.first_latent(i) for i in images]) if images else None,
        )


def check_whole_chunks(frames: int, chunk_frames: int) -> None:
    """Raise ConfigError unless a length is a whole number of chunks."""
    if frames % chunk_frames:
        raise ConfigError(
            f"videos have {frames} latent frames; expected a multiple of {chunk_frames}, the model's chunk; use"
            f" {max(frames // chunk_frames, 1) * chunk_frames}"
        )


def read_scripts(file: Path, negative_prompt: str) -> list[tuple[str, ...]]:
    """Read a file of prompts; return the prompts of the shots of each video.

    Raises UserError as `read_prompt_file` does, and for a line with another negative prompt than `negative_prompt`.
    """
    lines = read_prompt_file(file)
    for number, line in enumerate(lines, 1):
        for text in line.negative_prompts:
            if text != negative_prompt:
                raise UserError(
                    f"{file}:{number} has the negative prompt {shown(text)}; expected {shown(negative_prompt)}, as"
                    " all videos of a distillation share one; set `negative_prompt` for all of them"
                )
    return [line.shots for line in lines]


@torch.no_grad()
def encode_all(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the features of all prompts without their padding, bf16, on the CPU."""
    features = {}
    distinct = list(dict.fromkeys(map(clean_prompt, prompts)))
    for start in range(0, len(distinct), ENCODED_AT_ONCE):
        texts = distinct[start : start + ENCODED_AT_ONCE]
        ids, mask = encoder.tokenize(texts)
        for text, row, length in zip(texts, encoder(ids, mask), mask.sum(1).tolist(), strict=True):
            features[text] = row[:length].bfloat16().cpu()
    return features
