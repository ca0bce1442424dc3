"""Roll the student out on its own chunks and record the inputs of some steps (Self Forcing, arXiv 2506.08009).

No gradient is kept here. A solver step of every chunk is drawn; the student's loss runs that step again, chunk by
chunk, with a gradient. A chunk ends at that step, or, where `finishes` is set, at the last one.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.distill.dmd import guided, x0_of
from longvideo.distill.roles import Role, Roles
from longvideo.distill.walk import VideoRequest, Walk
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.flow.unipc import UniPC
from longvideo.training.objective import seeded

if TYPE_CHECKING:
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.spec import ChunkSpec

CacheFill = Literal["clean", "last_step"]


@dataclass(frozen=True)
class RolloutConfig(Bounded):
    """How the student generates.

    steps: number of solver steps of a chunk.
    exits: solver step that a chunk ends at: drawn once for a clip (`shared`), drawn for each chunk (`chunk`), or always
        the `last`. A drawn one trains all steps, so that the student also generates in fewer of them; but the critic
        then sees a mixture of results, and only that mixture is matched. The `last` one matches what generation makes.
    cache_fill: what later chunks see of a finished one: keys and values of a clean pass (`clean`), or those of its last
        step (`last_step`), which saves that pass in generation; by default as the model generates.
    """

    steps: int = bounded(4, least=1, most=NUM_TRAIN_TIMESTEPS)
    exits: Literal["shared", "chunk", "last"] = "shared"
    cache_fill: CacheFill | None = None

    def distilled(self, settings: ModelSettings) -> ModelSettings:
        """Return the settings with which the student of a model with these settings generates."""
        clean_pass = settings.clean_pass if self.cache_fill is None else self.cache_fill == "clean"
        return replace(settings, steps=self.steps, guidance=1.0, clean_pass=clean_pass)


@dataclass
class Rollout:
    """Result of a rollout, for each chunk.

    exits: number of the drawn solver step. latents: [B, C, T, H, W], the clean latents. inputs: [B, C, T, H, W], input
    of the drawn step. kept: latents and noise levels whose keys and values later chunks see.
    """

    exits: list[int]
    latents: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class SelfForcing:
    """The student's rollout, and the drawn step of every chunk again."""

    def __init__(
        self,
        roles: Roles,
        config: RolloutConfig,
        *,
        spec: ChunkSpec,
        shape: tuple[int, int, int, int],
        shift: float,
        seed: int,
        clean_pass: bool = True,
        guidance: float = 1.0,
        finishes: bool = False,
    ) -> None:
        """shape: [C, T, H, W] of a chunk's latents.

        clean_pass: whether the student runs clean passes. guidance: scale of the student's classifier-free guidance.
        finishes: whether a chunk runs all solver steps, rather than end at the drawn one.
        """
        self.roles, self.config, self.spec, self.shape, self.seed = roles, config, spec, shape, seed
        self.clean_pass, self.guidance, self.finishes = clean_pass, guidance, finishes
        self.solver = UniPC(config.steps, shift)
        self._generator = torch.Generator()

    def noise(self, clip: VideoRequest, index: int, purpose: str) -> Tensor:
        """Draw noise for a chunk, on the CPU: a function of seed, step and sample, however a batch is divided."""
        noise = torch.empty(clip.batch, *self.shape)
        for row, sample in zip(noise, clip.samples, strict=True):
            row.normal_(generator=seeded(self._generator, self.seed, purpose, clip.step, sample, str(index)))
        return noise.to(self.roles.device)

    def exits(self, clip: VideoRequest, purpose: str) -> list[int]:
        """Draw the step at which each chunk ends; all ranks draw the same one, so that none waits for another."""
        if self.config.exits == "last":
            return [self.solver.num_steps - 1] * clip.num_chunks
        count = clip.num_chunks if self.config.exits == "chunk" else 1
        generator = seeded(self._generator, self.seed, purpose, clip.step, "exit")
        drawn = torch.randint(self.solver.num_steps, (count,), generator=generator).tolist()
        return drawn if count == clip.num_chunks else drawn * clip.num_chunks

    @torch.no_grad()
    def roll_out(self, clip: VideoRequest, purpose: str) -> Rollout:
        """Generate a clip. purpose: use of the clip, so that critic and student get different ones."""
        walks = [self.walk(Role.STUDENT, clip, negative=negative) for negative in self.branches]
        rollout = Rollout(self.exits(clip, purpose))
        for index, drawn in enumerate(rollout.exits):
            last = self.solver.num_steps - 1 if self.finishes else drawn
            trajectory = self.solver.start(self.noise(clip, index, purpose))
            for step in range(last + 1):
                x = clip.hold(index, trajectory.sample)
                trajectory.sample = x
                sigma = self.model_sigma(clip, index, step)
                velocity, *unconditional = (walk.velocity(x, sigma) for walk in walks)
                if unconditional:
                    velocity = guided(velocity, *unconditional, self.guidance)
                if step == drawn:
                    rollout.inputs.append(x)
                if step < last:
                    trajectory.step(velocity)
            latents = self.result(clip, index, x, velocity, last)
            rollout.latents.append(latents)
            rollout.kept.append((latents, torch.zeros_like(sigma)) if self.clean_pass else (x, sigma))
            if index + 1 < clip.num_chunks:
                for walk in walks:
                    walk.finish(*rollout.kept[index])
        return rollout

    @property
    def branches(self) -> tuple[bool, ...]:
        """Whether the prompt is the negative one, for each prediction of a step."""
        return (False,) if self.guidance == 1 else (False, True)

    def walk(self, role: Role, clip: VideoRequest, *, negative: bool = False) -> Walk:
        network = self.roles.switch(role)
        return Walk(network, clip, self.spec, self.roles.new_cache(role, clip.batch), negative=negative)

    def model_sigma(self, clip: VideoRequest, index: int, step: int) -> Tensor:
        """Return the noise levels [B, T] that the network is given at a step."""
        level = self.solver.timesteps[step] / NUM_TRAIN_TIMESTEPS
        return level * clip.weight(index, self.spec.chunk_frames)

    def result(self, clip: VideoRequest, index: int, x_BCTHW: Tensor, velocity_BCTHW: Tensor, step: int) -> Tensor:
        """Return the clean latents of a chunk that ends at a step."""
        sigma = self.solver.sigmas[step] * clip.weight(index, self.spec.chunk_frames)
        return clip.hold(index, x0_of(x_BCTHW, velocity_BCTHW, sigma))
