"""The two losses of distribution matching distillation, one chunk at a time.

The computations without a gradient, which are the rollout and the estimates of teacher and critic, are done first for
a whole clip. Then every chunk has a pass with a gradient of its own, so memory does not grow with the clip, and the
gradient of a chunk cannot reach another.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.distill.dmd import critic_error, dmd_gradient, guided, sample_score_sigma, student_loss, x0_of
from longvideo.distill.roles import Role
from longvideo.distill.self_forcing import Rollout, SelfForcing
from longvideo.distill.walk import VideoRequest, Walk
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.rollout import CLEAN_CONTEXT, ContextLevel
from longvideo.training.objective import Objective, by_noise_level, seeded

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class DmdConfig(Bounded):
    """The distribution matching loss.

    guidance: scale of the teacher's classifier-free guidance; by default the model's own.
    sigma_min: smallest noise level at which teacher and critic are compared.
    sigma_max: largest noise level at which teacher and critic are compared.
    shift: shift of the noise levels, by default the model's own; a smaller one compares finer detail.
    sigma_per_chunk: whether each chunk has its own noise level, rather than each sample.
    epsilon: number added to the denominator of the gradient, see `dmd_gradient`.
    checkpoint: whether to recompute blocks in the backward pass.
    """

    guidance: float | None = bounded(None, least=0)
    sigma_min: float = bounded(0.02, above=0, below=1)
    sigma_max: float = bounded(0.98, above=0, below=1)
    shift: float | None = bounded(None, above=0)
    sigma_per_chunk: bool = False
    epsilon: float = bounded(1e-3, above=0)
    checkpoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min <= self.sigma_max < 1:
            raise ConfigError(
                f"dmd.sigma_min is {self.sigma_min} and dmd.sigma_max is {self.sigma_max}; expected increasing numbers"
                " between 0 and 1"
            )


@dataclass(frozen=True)
class StudentPart:
    """One chunk of a clip, to train the student on.

    gradients: distribution matching gradient at each chunk of the clip. index: number of the chunk.
    """

    clip: VideoRequest
    rollout: Rollout
    gradients: list[Tensor]
    index: int


@dataclass(frozen=True)
class CriticPart:
    """One chunk of a clip that the student generated, to train the critic on.

    noises, sigmas: noise and noise levels of each chunk of the clip. index: number of the chunk.
    """

    clip: VideoRequest
    rollout: Rollout
    noises: list[Tensor]
    sigmas: list[Tensor]
    index: int


class NoisyCopies:
    """Noisy copies of clips, at which teacher and critic are compared: their noise levels, and the clean estimates.

    guidance, shift: those of the model, which `config` can replace. context: noise level at which teacher and critic,
    which share a backbone, see earlier chunks.
    """

    def __init__(
        self,
        rollouts: SelfForcing,
        config: DmdConfig,
        *,
        guidance: float,
        shift: float,
        seed: int,
        context: ContextLevel = CLEAN_CONTEXT,
    ) -> None:
        self.rollouts, self.config, self.seed, self.context = rollouts, config, seed, context
        self.shift = shift if config.shift is None else config.shift
        self.guidance = guidance if config.guidance is None else config.guidance
        self.schedule = FlowSchedule(self.shift)
        self._generator = torch.Generator()

    def draw(self, clip: VideoRequest, purpose: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return noise [B, C, T, H, W] and levels [B, T] for every chunk; given frames have level 0."""
        count = clip.num_chunks if self.config.sigma_per_chunk else 1
        levels = []
        for sample in clip.samples:
            generator = seeded(self._generator, self.seed, purpose, clip.step, sample, "sigma")
            low, high = self.config.sigma_min, self.config.sigma_max
            levels.append(sample_score_sigma((count,), generator, shift=self.shift, low=low, high=high))
        levels_BN = torch.stack(levels).expand(-1, clip.num_chunks).to(self.rollouts.roles.device)
        frames = self.rollouts.spec.chunk_frames
        sigmas = [levels_BN[:, i, None] * clip.weight(i, frames) for i in range(clip.num_chunks)]
        return [self.rollouts.noise(clip, i, f"{purpose} look") for i in range(clip.num_chunks)], sigmas

    @torch.no_grad()
    def gradients(self, clip: VideoRequest, rollout: Rollout) -> list[Tensor]:
        """Return the distribution matching gradient at every chunk of a clip."""
        noises, sigmas = self.draw(clip, "student")
        noisy = [self.schedule.add_noise(x, e, s) for x, e, s in zip(rollout.latents, noises, sigmas, strict=True)]
        teacher = self._estimates(Role.TEACHER, clip, rollout, noisy, sigmas)
        if self.guidance != 1:
            unconditional = self._estimates(Role.TEACHER, clip, rollout, noisy, sigmas, negative=True)
            teacher = [guided(c, u, self.guidance) for c, u in zip(teacher, unconditional, strict=True)]
        critic = self._estimates(Role.CRITIC, clip, rollout, noisy, sigmas)
        return [
            dmd_gradient(
                rollout.latents[i],
                teacher[i],
                critic[i],
                clip.weight(i, self.rollouts.spec.chunk_frames),
                epsilon=self.config.epsilon,
            )
            for i in range(clip.num_chunks)
        ]

    def _estimates(
        self,
        role: Role,
        clip: VideoRequest,
        rollout: Rollout,
        noisy: list[Tensor],
        sigmas: list[Tensor],
        *,
        negative: bool = False,
    ) -> list[Tensor]:
        """Return a network's clean estimate of every chunk, computed with the clean chunks before it."""
        walk = self.rollouts.walk(role, clip, negative=negative)
        estimates = []
        for index in range(clip.num_chunks):
            velocity = walk.velocity(noisy[index], sigmas[index])
            estimates.append(x0_of(noisy[index], velocity, sigmas[index]))
            if index + 1 < clip.num_chunks:
                walk.finish(*self.to_keep(clip, rollout, index))
        return estimates

    def to_keep(self, clip: VideoRequest, rollout: Rollout, index: int) -> tuple[Tensor, Tensor]:
        """Return the latents and noise levels whose keys and values teacher and critic keep of a finished chunk."""
        level, latents = self.context, rollout.latents[index]
        weight = clip.weight(index, self.rollouts.spec.chunk_frames)
        if level.sigma:
            noise = self.rollouts.noise(clip, index, "context")
            latents = self.schedule.add_noise(latents, noise, level.sigma * weight)
        return latents, level.model_sigma * weight


class RoleObjective(Objective):
    """An objective whose parameters are those of one role; the parameters of the backbone do not belong to it."""

    def __init__(self, rollouts: SelfForcing, copies: NoisyCopies, role: Role) -> None:
        super().__init__()
        # the backbone must not be a submodule, because an engine would cast, shard and save it
        self.role, self.rollouts, self.copies = role, rollouts, copies
        self._walk: Walk | None = None
        for name, weight in rollouts.roles.trained(role).items():
            self.register_parameter(name.replace(".", "/"), weight)

    def walk(self, clip: VideoRequest, index: int) -> Walk:
        """Return the walk through a clip, whose parts come in order; the last part releases it and its cache."""
        walk = self.rollouts.walk(self.role, clip) if index == 0 else self._walk
        assert walk is not None
        self._walk = walk if index + 1 < clip.num_chunks else None
        return walk


class StudentObjective(RoleObjective):
    """Move the student's samples to where the teacher considers them more likely than the critic does."""

    def __init__(self, rollouts: SelfForcing, copies: NoisyCopies) -> None:
        super().__init__(rollouts, copies, Role.STUDENT)

    def parts(self, clips: Sequence[VideoRequest]) -> list[StudentPart]:
        """Roll clips out, compute their gradients, and divide them into chunks."""
        parts = []
        for clip in clips:
            rollout = self.rollouts.roll_out(clip, "student")
            gradients = self.copies.gradients(clip, rollout)
            parts += [StudentPart(clip, rollout, gradients, index) for index in range(clip.num_chunks)]
        return parts

    def forward(self, batch: StudentPart) -> tuple[Tensor, dict[str, Tensor]]:
        clip, rollout, index = batch.clip, batch.rollout, batch.index
        walk = self.walk(clip, index)
        if index:
            walk.finish(*rollout.kept[index - 1])
        step, x = rollout.exits[index], rollout.inputs[index]
        velocity = walk.velocity(
            x, self.rollouts.model_sigma(clip, index, step), checkpoint=self.copies.config.checkpoint
        )
        x0 = self.rollouts.result(clip, index, x, velocity, step)
        gradient = batch.gradients[index]
        return student_loss(x0, gradient), {"dmd_gradient": gradient.square().mean().sqrt()}


class CriticObjective(RoleObjective):
    """Learn the velocity of the student's samples by flow matching."""

    def __init__(self, rollouts: SelfForcing, copies: NoisyCopies) -> None:
        super().__init__(rollouts, copies, Role.CRITIC)

    def parts(self, clips: Sequence[VideoRequest]) -> list[CriticPart]:
        """Roll clips out, draw noisy copies of them, and divide them into chunks."""
        parts = []
        for clip in clips:
            rollout = self.rollouts.roll_out(clip, "critic")
            noises, sigmas = self.copies.draw(clip, "critic")
            parts += [CriticPart(clip, rollout, noises, sigmas, index) for index in range(clip.num_chunks)]
        return parts

    def forward(self, batch: CriticPart) -> tuple[Tensor, dict[str, Tensor]]:
        clip, index = batch.clip, batch.index
        walk = self.walk(clip, index)
        if index:
            walk.finish(*self.copies.to_keep(clip, batch.rollout, index - 1))
        x0, noise, sigma = batch.rollout.latents[index], batch.noises[index], batch.sigmas[index]
        noisy = self.copies.schedule.add_noise(x0, noise, sigma)
        velocity = walk.velocity(noisy, sigma, checkpoint=self.copies.config.checkpoint)
        weight = clip.weight(index, x0.shape[2])
        error = critic_error(velocity, x0, noise) * weight
        # the first chunk of a clip may have fewer frames with a loss; each frame has the same weight
        frames = clip.num_chunks * x0.shape[2] - int(clip.first_latent is not None)
        loss = clip.num_chunks * error.sum() / (clip.batch * frames)
        return loss, by_noise_level("critic", error.detach(), sigma, weight)
