"""Quantization-aware distillation: a 4-bit student learns its teacher's velocities (QAD, arXiv 2601.20088).

The student rolls videos out as it generates them. On noisy latents of these, the velocities of student and teacher are
compared; there is no other loss. Both see the same earlier chunks, each through a cache of its own. Every chunk has a
pass with a gradient of its own, so memory does not grow with the clip, and no gradient flows through a cache.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.distill.roles import Role
from longvideo.distill.self_forcing import Rollout
from longvideo.distill.walk import VideoRequest, Walk
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS, FlowSchedule
from longvideo.training.objective import Objective, by_noise_level, ratio, seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.distill.prompts import RolloutSource
    from longvideo.distill.quantized_student import StudentAndTeacher
    from longvideo.distill.self_forcing import SelfForcing
    from longvideo.distributed import Mesh


@dataclass(frozen=True)
class QadConfig(Bounded):
    """Quantization-aware distillation.

    train: what is trained: all `weights` of the blocks, or `lora`, adapters next to packed weights.
    steps: number of solver steps of a chunk; by default the model's own.
    guidance: scale of the student's classifier-free guidance; by default the model's own. Unless it is 1, velocities
        under the negative prompt are compared too.
    levels: noise levels at which velocities are compared: that of a solver step, drawn for each chunk (`solver`), or
        one of the training timesteps, drawn for each chunk and sample (`schedule`).
    weighting: weight of an error: 1 (`none`), or that of the training loss, a bell around noise level 0.5 (`training`).
    checkpoint: whether to recompute blocks in the backward pass.
    validation_batches: number of batches of held-out videos whose loss is computed for every sample; 0 computes none.
        Of a file of prompts and of a folder of clips, the last tenth is held out for it.
    """

    train: Literal["weights", "lora"] = "weights"
    steps: int | None = bounded(None, least=1, most=NUM_TRAIN_TIMESTEPS)
    guidance: float | None = bounded(None, least=0)
    levels: Literal["solver", "schedule"] = "solver"
    weighting: Literal["none", "training"] = "none"
    checkpoint: bool = True
    validation_batches: int = bounded(1, least=0)


@dataclass(frozen=True)
class ComparedChunk:
    """A chunk of a clip on which student and teacher are compared. negative: under the negative prompt."""

    clip: VideoRequest
    index: int
    negative: bool


class ChunkSource:
    """Batches of `QadObjective`: all chunks of a clip in order, once for each branch of guidance.

    branches: whether the prompt is the negative one, for each branch.
    """

    unit = "frame"

    def __init__(self, clips: RolloutSource, branches: Sequence[bool]) -> None:
        self.clips, self.branches = clips, branches

    def size(self, step: int) -> int:
        return self.clips.size(step)

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        return self.clips.passes(mesh, micro_batch) * len(self.branches)

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[ComparedChunk]:
        return [
            ComparedChunk(clip, index, negative)
            for clip in self.clips.shares(step, mesh, micro_batch)
            for negative in self.branches
            for index in range(clip.num_chunks)
        ]


@dataclass
class _Comparison:
    """A clip that is compared.

    inputs, sigmas: noisy latents of each chunk, and the noise levels that the networks are given. targets: the
    teacher's velocities. walk: the student's walk. The last two are those of one branch.
    """

    rollout: Rollout
    inputs: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    walk: Walk | None = None


class QadObjective(Objective):
    """Mean squared difference of the velocities of student and teacher.

    networks: their trained weights are the parameters; no other weights belong to it.
    """

    def __init__(
        self, networks: StudentAndTeacher, rollouts: SelfForcing, config: QadConfig, *, schedule: FlowSchedule
    ) -> None:
        super().__init__()
        self.networks, self.rollouts, self.config, self.schedule = networks, rollouts, config, schedule
        self._generator = torch.Generator()
        self._comparison: _Comparison | None = None
        for name, weight in networks.trained(Role.STUDENT).items():
            self.register_parameter(f"{Role.STUDENT.value}/{name.replace('.', '/')}", weight)

    def begin(self, step: int) -> None:
        """Round the weights that the last step has changed."""
        del step
        self.networks.pack()

    def forward(self, batch: ComparedChunk) -> tuple[Tensor, dict[str, Tensor]]:
        clip, index = batch.clip, batch.index
        compared = self._prepared(batch)
        assert compared.walk is not None
        if index:
            compared.walk.finish(*compared.rollout.kept[index - 1])
        sigma, target = compared.sigmas[index], compared.targets[index]
        velocity = compared.walk.velocity(compared.inputs[index], sigma, checkpoint=self.config.checkpoint)
        if index + 1 == clip.num_chunks:
            compared.walk = None  # frees its cache
        weight = clip.weight(index, sigma.shape[1])
        error, power = ((x.square().mean((1, 3, 4)) * weight) for x in (velocity - target, target))
        weighted = error * self.schedule.loss_weight(sigma) if self.config.weighting == "training" else error
        # the first chunk of a clip may have fewer frames with a loss; each frame has the same weight
        frames = clip.num_chunks * sigma.shape[1] - int(clip.first_latent is not None)
        loss = clip.num_chunks * weighted.sum() / (clip.batch * frames)
        error = error.detach()
        relative = {"qad_relative": ratio(error.sum(), power.sum())}
        return loss, relative | by_noise_level("qad", error, sigma, weight)

    def _prepared(self, batch: ComparedChunk) -> _Comparison:
        """Return the comparison of a clip. Its first part rolls out, and that of each branch computes the targets."""
        compared = self._comparison
        if batch.index == 0 and not batch.negative:
            compared = self._comparison = self._roll_out(batch.clip)
        assert compared is not None
        if batch.index == 0:
            compared.targets = self._targets(batch, compared)
            compared.walk = self.rollouts.walk(Role.STUDENT, batch.clip, negative=batch.negative)
        return compared

    @torch.no_grad()
    def _roll_out(self, clip: VideoRequest) -> _Comparison:
        rollout = self.rollouts.roll_out(clip, "student")
        compared = _Comparison(rollout)
        for index, latents in enumerate(rollout.latents):
            if self.config.levels == "solver":
                compared.inputs.append(rollout.inputs[index])
                compared.sigmas.append(self.rollouts.model_sigma(clip, index, rollout.exits[index]))
            else:
                sigma = self._drawn_sigma(clip, index)
                noise = self.rollouts.noise(clip, index, "compared")
                compared.inputs.append(self.schedule.add_noise(latents, noise, sigma))
                compared.sigmas.append(sigma)
        return compared

    def _drawn_sigma(self, clip: VideoRequest, index: int) -> Tensor:
        """Draw noise levels [B, T], a function of seed, step and sample; given frames have level 0."""
        rollouts = self.rollouts
        levels = []
        for sample in clip.samples:
            generator = seeded(self._generator, rollouts.seed, "level", clip.step, sample, str(index))
            levels.append(self.schedule.sample_sigma((1,), generator))
        return torch.stack(levels).to(rollouts.roles.device) * clip.weight(index, rollouts.spec.chunk_frames)

    @torch.no_grad()
    def _targets(self, batch: ComparedChunk, compared: _Comparison) -> list[Tensor]:
        """Return the teacher's velocity of every chunk, after the student's chunks before it."""
        walk = self.rollouts.walk(Role.TEACHER, batch.clip, negative=batch.negative)
        targets = []
        for index, (x, sigma) in enumerate(zip(compared.inputs, compared.sigmas, strict=True)):
            targets.append(walk.velocity(x, sigma))
            if index + 1 < batch.clip.num_chunks:
                walk.finish(*compared.rollout.kept[index])
        return targets
