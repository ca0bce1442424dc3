"""The solver of generation, with a function that sees the latents after every step, and with given noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.flow.unipc import Trajectory, UniPC

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class ObservedSolver(UniPC):
    """A solver for the chunks of one video, in order."""

    def __init__(
        self, num_steps: int, shift: float, *, after_step: Callable[[int, Tensor], Tensor], noise: Tensor | None = None
    ) -> None:
        """Compute the coefficients.

        after_step: function of the timestep of a step and its result [B, C, T, H, W]; it returns what the next step
        continues with. noise: noise of all chunks, [B, C, T of the video, H, W], in place of the noise that is drawn.
        """
        super().__init__(num_steps, shift)
        self.after_step = after_step
        self._noise, self._next_frame = noise, 0

    def start(self, noise: Tensor) -> Trajectory:
        """Return the integration of the next chunk."""
        if self._noise is not None:
            frames = noise.shape[2]
            noise = self._noise[:, :, self._next_frame : self._next_frame + frames].to(noise)
            self._next_frame += frames
        return _ObservedTrajectory(self, noise)


class _ObservedTrajectory(Trajectory):
    def __init__(self, solver: ObservedSolver, noise: Tensor) -> None:
        super().__init__(solver, noise)
        self._after_step, self._timesteps = solver.after_step, solver.timesteps

    def step(self, velocity: Tensor) -> Tensor:
        timestep = self._timesteps[self.step_index]
        self.sample = self._after_step(timestep, super().step(velocity))
        return self.sample
