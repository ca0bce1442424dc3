"""One loop for every objective: batch, loss, backward, clip, step, average; log, sample, save, stop in time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longvideo.errors import ConfigError, UserError
from longvideo.train.checkpoint import Checkpoint, CheckpointFolder
from longvideo.train.ema import ExponentialMovingAverage
from longvideo.train.engine import Engine
from longvideo.train.objective import BatchSource, Objective
from longvideo.train.optimizer import OptimizerConfig, RateSegment, rate_schedule
from longvideo.train.precision import PRECISIONS
from longvideo.train.run_log import RunLog, StepReport, environment, peak_memory_gib

RESUME = ("auto", "never")


@dataclass(frozen=True)
class TrainerConfig:
    """How any objective is run. A `*_every` of 0 means only at the end."""

    precision: str = "auto"
    ema_decay: float = 0.999
    log_every: int = 20
    sample_every: int = 0
    save_every: int = 1000
    keep_checkpoints: int = 2
    max_skipped_steps: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        if self.log_every < 1 or self.keep_checkpoints < 1:
            raise ConfigError(
                f"trainer.log_every={self.log_every} and trainer.keep_checkpoints={self.keep_checkpoints}"
                " must be at least 1"
            )


class Recipe(Protocol):
    """What is trained and on what, and what is made of it on the way. Built by `train.vae` and `train.ar`."""

    @property
    def objective(self) -> Objective: ...

    @property
    def source(self) -> BatchSource: ...

    @property
    def segments(self) -> Sequence[RateSegment]: ...

    def start(self, step: int) -> None:
        """Get ready to give the batch of `step`."""
        ...

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Draw what the model (averaged weights in place) makes into `folder`; return validation numbers."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model (averaged weights in place) as a model folder."""
        ...


class Diverged(UserError):
    """Too many steps had a gradient that is not finite."""


class Trainer:
    """Runs a recipe inside a run folder: checkpoints/, samples/, model/, metrics.jsonl and environment.json."""

    def __init__(
        self, recipe: Recipe, folder: Path, *, config: TrainerConfig, optimizer: OptimizerConfig, device: torch.device
    ):
        self.recipe = recipe
        self.folder = folder
        self.config = config
        self.engine = Engine(recipe.objective, optimizer, precision=config.precision, device=device)
        self.ema = ExponentialMovingAverage(self.engine.named, config.ema_decay)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", keep=config.keep_checkpoints)
        self.total_steps = sum(segment.steps for segment in recipe.segments)
        self.learning_rate: Callable[[int], float] = rate_schedule(optimizer, recipe.segments)
        self.device = device

    def run(self, *, resume: str = "auto", deadline: float = math.inf) -> bool:
        """Train to the last step, or until `time.monotonic()` passes `deadline`; return whether all steps are done.

        Either way a checkpoint and a model folder are left behind. Raises ConfigError when `resume` is "never" and
        the run folder holds checkpoints, Diverged when the loss has no finite gradient any more.
        """
        step = self.restore(resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "environment.json").write_text(json.dumps(environment(self.device), indent=1))
        log = RunLog(self.folder, tensorboard=self.config.tensorboard, start_step=step)
        log.note(f"{'resuming' if step else 'starting'} at step {step} of {self.total_steps} in {self.folder}")
        self.recipe.start(step)
        saved, sampled = step, step
        window = Window(self.device)
        starts = segment_starts(self.recipe.segments)
        while step < self.total_steps and time.monotonic() < deadline:
            if step in starts and step > saved:
                # the first step of a stage may compile for longer than the time that is left
                with window.paused():
                    self.save(step)
                saved = step
            self.one_step(step, window)
            step += 1
            if step % self.config.log_every == 0 or step == self.total_steps:
                self.report(step, window, log)
            if self.config.sample_every and step % self.config.sample_every == 0:
                with window.paused():
                    self.sample(step, log)
                sampled = step
            if self.config.save_every and step % self.config.save_every == 0:
                with window.paused():
                    self.save(step)
                saved = step
        if step > saved:
            self.save(step)
        if step > sampled or not (self.folder / "model").exists():
            self.sample(step, log)
        done = step >= self.total_steps
        log.note(f"{'finished' if done else 'stopped in time'} at step {step} of {self.total_steps}")
        return done

    def one_step(self, step: int, window: Window) -> None:
        batch = self.recipe.source.batch(step)
        loss, metrics = self.engine.loss(batch)
        self.engine.backward(loss)
        norm = self.engine.clip()
        self.engine.step(self.learning_rate(step), norm)
        self.ema.update(step)
        window.add({"loss": loss, "grad": norm, **metrics}, size=self.recipe.source.size(step))

    def report(self, step: int, window: Window, log: RunLog) -> None:
        steps, size = window.steps, window.size
        values = window.means()
        seconds = window.seconds() / steps
        log.step(
            StepReport(
                step=step,
                total_steps=self.total_steps,
                loss=values.pop("loss"),
                gradient_norm=values.pop("grad"),
                learning_rate=self.learning_rate(step - 1),
                seconds=seconds,
                rate=size / (steps * seconds),
                unit=self.recipe.source.unit,
                memory_gib=peak_memory_gib(self.device),
                metrics=values,
            )
        )
        window.clear()
        skipped = int(self.engine.skipped)
        if skipped > self.config.max_skipped_steps:
            raise Diverged(
                f"{skipped} steps up to step {step} had a gradient that is not finite (allowed:"
                f" {self.config.max_skipped_steps}); resume from the last checkpoint with a lower learning rate"
            )

    def sample(self, step: int, log: RunLog) -> None:
        """Export the averaged weights, and show what they make."""
        began = time.monotonic()
        with self.ema.applied(), torch.no_grad():
            self.recipe.export(self.folder / "model")
            values = self.recipe.sample(step, self.folder / "samples")
        if values:
            log.record({"step": step, **values})
        numbers = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.note(f"sample {step} | {numbers or 'no numbers'} | {time.monotonic() - began:.1f} s")

    def save(self, step: int) -> None:
        self.checkpoints.save(
            Checkpoint(
                step=step,
                weights=self.engine.weights(),
                optimizer=self.engine.optimizer_state(),
                ema=self.ema.state(),
                state={"skipped": int(self.engine.skipped)},
            )
        )

    def restore(self, resume: str) -> int:
        """Load the newest checkpoint when `resume` is "auto"; return the step to go on from."""
        if resume not in RESUME:
            raise ConfigError(f"--resume {resume} is unknown; use one of {', '.join(RESUME)}")
        if resume == "never" and self.checkpoints.steps():
            raise ConfigError(f"{self.folder} holds a run already; use --resume auto or another --out")
        checkpoint = self.checkpoints.load_newest() if resume == "auto" else None
        if checkpoint is None:
            return 0
        self.engine.load(checkpoint.weights, checkpoint.optimizer)
        self.engine.skipped.fill_(float(checkpoint.state["skipped"]))
        self.ema.load(checkpoint.ema)
        return checkpoint.step


class Window:
    """Sums of metrics since the last log line, kept on the device, and the time they took."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.clear()

    def add(self, metrics: dict[str, Tensor], *, size: int) -> None:
        rows = [_as_ratio(value) for value in metrics.values()]
        if self.sums is None:
            self.names, self.sums = list(metrics), torch.stack(rows)
        else:
            self.sums += torch.stack(rows)
        self.steps += 1
        self.size += size

    def means(self) -> dict[str, float]:
        """Fetch the means; this is where the host waits for the device."""
        assert self.sums is not None
        sums = self.sums.tolist()
        return {name: total / weight for name, (total, weight) in zip(self.names, sums, strict=True) if weight > 0}

    def seconds(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent in the block: it goes into samples or checkpoints, not into steps."""
        synchronize(self.device)
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused

    def clear(self) -> None:
        self.sums: Tensor | None = None
        self.steps = 0
        self.size = 0
        self.began = time.monotonic()


def segment_starts(segments: Sequence[RateSegment]) -> set[int]:
    """Return the first steps of all segments."""
    return {sum(segment.steps for segment in segments[:number]) for number in range(len(segments))}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _as_ratio(value: Tensor) -> Tensor:
    value = value.detach().float()
    return value if value.ndim else torch.stack((value, torch.ones_like(value)))
