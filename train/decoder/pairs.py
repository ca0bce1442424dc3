"""Pairs of latents and of the pixels that the full decoder makes of them, kept on the training device.

Shapes: N clips, C channels, T latent frames, F pixel frames, H W latent grid or pixels. In this package a latent frame
belongs to four pixel frames, also the first of a video, which has only the last of its four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.config.fields import bounded, share
from longvideo.errors import ConfigError
from longvideo.train.bank import ClipBank, GroupConfig
from longvideo.training.objective import seeded
from longvideo.training.precision import TrainingPrecision, autocast

if TYPE_CHECKING:
    from longvideo.data.encoded import EncodedDataset
    from longvideo.train.shapeworld.latent_bank import LatentBank
    from longvideo.vae.autoencoder import Autoencoder


@dataclass(frozen=True)
class PairConfig(GroupConfig):
    """Pairs of latents and decoded pixels on the device, of which a group is replaced now and then.

    clips: number of clips that the bank holds.
    initial_clips: number of clips that are decoded before the first step.
    group: number of clips that are decoded at once.
    refresh_every: number of steps between two groups.
    chunks: number of chunks of a clip.
    cut_fraction: share of ShapeWorld's clips with one or two cuts, all of them between chunks.
    opening_fraction: share of encoded clips that are taken from their beginning.
    height, width: size in pixels of the part of an encoded clip that is taken; by default the whole picture.
    noise: largest standard deviation of Gaussian noise that is added to a clip's latents before they are decoded. Each
        clip gets a deviation from 0 to this one. The latents of generated videos differ from those of encoded ones.
    generated_fraction: share of the groups of clips that the model itself generates from captions of ShapeWorld, with
        its own number of steps; by default half of them if it is a whole model of ShapeWorld and `data` is not given.
    """

    clips: int = bounded(512, least=1)
    initial_clips: int = bounded(256, least=1)
    group: int = bounded(16, least=1)
    refresh_every: int = bounded(16, least=1)
    chunks: int = bounded(3, least=1)
    cut_fraction: float = share(0.35)
    opening_fraction: float = share(0.3)
    height: int | None = bounded(None, least=1)
    width: int | None = bounded(None, least=1)
    noise: float = bounded(0.15, least=0)
    generated_fraction: float | None = bounded(None, least=0, most=1)


class LatentFootage(Protocol):
    """Groups of clips as latents.

    num_frames: latent frames of a clip. latent_size: height and width of the latents.
    """

    num_frames: int
    latent_size: tuple[int, int]

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        """Return latents [N, C, T, H, W], normalized, and whether each clip begins a video, [N]. content: number."""
        ...


class WorldFootage:
    """Clips of ShapeWorld that are rendered and encoded on the device; all of them begin a video."""

    def __init__(self, bank: LatentBank) -> None:
        self.bank = bank
        self.num_frames = bank.config.chunks * bank.chunk_frames
        self.latent_size = (bank.latents.shape[3], bank.latents.shape[4])

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        latents = self.bank.encode(self.bank.plan(content))
        return latents, torch.ones(len(latents), dtype=torch.bool, device=latents.device)


class EncodedFootage:
    """Parts of the clips that `longvideo data encode` wrote: some frames, and the whole picture or some of it."""

    def __init__(
        self, dataset: EncodedDataset, config: PairConfig, *, scale: int, seed: int, device: torch.device
    ) -> None:
        """scale: pixels along the side of a latent pixel."""
        self.dataset = dataset
        self.num_frames = config.chunks * dataset.chunk_frames
        self.latent_size = _latent_size(dataset, config, scale)
        self.opening_fraction = config.opening_fraction
        self.group = config.group
        self.seed = seed
        self.device = device
        if not dataset.clips:
            raise ConfigError(f"{dataset.path} has no clips; encode at least one")
        if config.chunks > dataset.num_chunks:
            raise ConfigError(
                f"bank.chunks is {config.chunks}; expected at most {dataset.num_chunks}, the length of the clips in"
                f" {dataset.path}"
            )

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        generator = seeded(torch.Generator(), self.seed, "encoded clips", content)

        def index(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        (height, width), (whole_height, whole_width) = self.latent_size, self.dataset.latent_size
        clips, opening = [], []
        for _ in range(self.group):
            clip = index(len(self.dataset))
            later = index(self.dataset.clips[clip].num_frames - self.num_frames + 1)
            first = 0 if torch.rand((), generator=generator) < self.opening_fraction else later
            top, left = index(whole_height - height + 1), index(whole_width - width + 1)
            frames_CTHW = self.dataset.latents(clip, first, first + self.num_frames)
            clips.append(frames_CTHW[..., top : top + height, left : left + width])
            opening.append(first == 0)
        return torch.stack(clips).to(self.device), torch.tensor(opening, device=self.device)


class PairBank(ClipBank):
    """Latents and pixels of clips.

    latents: [N, T, C, H, W] float16, normalized. pixels: decoded by the full decoder and clamped to [-1, 1], [N, F, H,
    W, 3] float16; the first three frames of a clip are empty. opening: whether a clip begins a video, [N].
    """

    def __init__(
        self,
        footage: LatentFootage,
        teacher: Autoencoder,
        config: PairConfig,
        *,
        seed: int,
        precision: TrainingPrecision,
    ) -> None:
        device = teacher.latents_mean.device
        super().__init__(config, device)
        self.footage = footage
        self.teacher = teacher
        self.config = config
        self.seed = seed
        self.precision: TrainingPrecision = precision
        self.generator = torch.Generator(device)
        self.time_scale, scale = teacher.config.scale_factor_temporal, teacher.config.scale_factor_spatial
        (height, width), frames = footage.latent_size, footage.num_frames
        self.latents = torch.zeros(
            config.clips, frames, teacher.config.z_dim, height, width, dtype=torch.float16, device=device
        )
        self.pixels = torch.zeros(
            (config.clips, frames * self.time_scale, height * scale, width * scale, 3),
            dtype=torch.float16,
            device=device,
        )
        self.opening = torch.zeros(config.clips, dtype=torch.bool, device=device)

    @torch.no_grad()
    def write(self, content: int, place: slice) -> None:
        latents_NCTHW, self.opening[place] = self.footage.draw(content)
        generator = seeded(self.generator, self.seed, "latent noise", content)
        deviation = self.config.noise * torch.rand(
            len(latents_NCTHW), 1, 1, 1, 1, generator=generator, device=self.device
        )
        noise = torch.randn(latents_NCTHW.shape, generator=generator, device=self.device)
        self.latents[place] = (latents_NCTHW + deviation * noise).transpose(1, 2)
        video_NCFHW = decode_clips(self.teacher, self.latents[place].transpose(1, 2).float(), precision=self.precision)
        self.pixels[place, self.time_scale - 1 :] = video_NCFHW.permute(0, 2, 3, 4, 1)


@torch.no_grad()
def decode_clips(
    teacher: Autoencoder, latents_NCTHW: Tensor, *, precision: TrainingPrecision, frames_per_call: int = 8
) -> Tensor:
    """Decode normalized latents as a stream: float32 [N, 3, 1 + 4(T - 1), H, W], clamped to [-1, 1]."""
    state, videos = None, []
    for latents in latents_NCTHW.split(frames_per_call, dim=2):
        with autocast(precision, latents.device):
            video, state = teacher.decode(teacher.denormalize(latents), state)
        videos.append(video.float().clamp(-1, 1))
    return torch.cat(videos, dim=2)


def _latent_size(dataset: EncodedDataset, config: PairConfig, scale: int) -> tuple[int, int]:
    sizes = []
    for name, whole in zip(("height", "width"), dataset.latent_size, strict=True):
        pixels = getattr(config, name) or whole * scale
        if pixels % scale or pixels > whole * scale:
            raise ConfigError(
                f"bank.{name} is {pixels}; expected a multiple of {scale} of at most {whole * scale}, the {name} of the"
                f" clips in {dataset.path}"
            )
        sizes.append(pixels // scale)
    return sizes[0], sizes[1]
