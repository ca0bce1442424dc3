"""Two engines in one step: the critic is trained in every step, the student in some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.run_checkpoint import ROLES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from longvideo.checkpoint.tensors import Lazy
    from longvideo.distill.objectives import CriticObjective, StudentObjective
    from longvideo.distill.walk import VideoRequest
    from longvideo.training.engine import Engine

STUDENT_METRICS = ("student_loss", "dmd_gradient", "student_grad")


class PairedEngine:
    """An `Engine` that consists of two; `loss` and `grad` are the critic's, which are there in every step.

    critic_rate: learning rate of the critic as a function of the step. student_every: number of steps of the critic for
    each step of the student (5 in DMD2); the student is trained in the steps that it divides. critic_first: number of
    steps at the start that train the critic alone.
    """

    def __init__(
        self,
        student: tuple[StudentObjective, Engine],
        critic: tuple[CriticObjective, Engine],
        *,
        critic_rate: Callable[[int], float],
        student_every: int,
        critic_first: int = 0,
    ) -> None:
        self.student_objective, self.student = student
        self.critic_objective, self.critic = critic
        self.engines: dict[str, Engine] = dict(zip(ROLES, (self.student, self.critic), strict=True))
        self.critic_rate, self.student_every, self.critic_first = critic_rate, student_every, critic_first

    def train_step(self, shares: Sequence[VideoRequest], step: int, learning_rate: float) -> dict[str, Tensor]:
        if self._trains_student(step):
            parts = self.student_objective.parts(shares)
            metrics = self.student.train_step(parts, step // self.student_every, learning_rate)
            of_student = {f"student_{name}" if name in ("loss", "grad") else name: x for name, x in metrics.items()}
        else:
            # the same names, without weight in a mean
            device = self.student_objective.rollouts.roles.device
            of_student = {name: torch.zeros(2, device=device) for name in STUDENT_METRICS}
        parts = self.critic_objective.parts(shares)
        of_critic = self.critic.train_step(parts, step, self.critic_rate(step))
        return of_critic | of_student

    def averaged(self) -> AbstractContextManager[None]:
        return self.student.averaged()

    def num_skipped(self) -> int:
        return self.student.num_skipped() + self.critic.num_skipped()

    def skipped_share(self, steps: int) -> float:
        of_student = sum(map(self._trains_student, range(steps)))
        return max(self.student.skipped_share(of_student), self.critic.skipped_share(steps))

    def is_finite(self) -> bool:
        return self.student.is_finite() and self.critic.is_finite()

    @property
    def arithmetic(self) -> str:
        return self.student.arithmetic

    def shapes(self) -> dict[str, torch.Size]:
        of_roles = {role: engine.shapes() for role, engine in self.engines.items()}
        return {f"{role}/{name}": shape for role, shapes in of_roles.items() for name, shape in shapes.items()}

    def more_shapes(self) -> dict[str, torch.Size]:
        of_roles = {role: engine.more_shapes() for role, engine in self.engines.items()}
        return {f"{role}/{name}": shape for role, shapes in of_roles.items() for name, shape in shapes.items()}

    def whole(self, name: str, kind: str) -> Tensor:
        role, _, own = name.partition("/")
        return self.engines[role].whole(own, kind)

    def put(self, name: str, kind: str, stored: Lazy) -> None:
        role, _, own = name.partition("/")
        self.engines[role].put(own, kind, stored)

    def counts(self) -> dict[str, float]:
        return {f"{role}_{name}": x for role, engine in self.engines.items() for name, x in engine.counts().items()}

    def put_counts(self, counts: Mapping[str, float]) -> None:
        for role, engine in self.engines.items():
            prefix = f"{role}_"
            engine.put_counts({name.removeprefix(prefix): x for name, x in counts.items() if name.startswith(prefix)})

    def _trains_student(self, step: int) -> bool:
        return step >= self.critic_first and step % self.student_every == 0
