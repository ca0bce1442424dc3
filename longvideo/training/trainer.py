"""One loop for every objective: batch, loss, backward, clip, step, average; log, sample, save, stop in time."""

from __future__ import annotations

import math
import signal
import time
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longvideo.config.fields import Bounded, bounded, steps_field
from longvideo.distributed import Mesh
from longvideo.errors import ConfigError, UserError
from longvideo.files import WriteError, read_json, write_json
from longvideo.training.checkpoint import Checkpoint, CheckpointFolder
from longvideo.training.optimizer import OptimizerConfig, RateSegment, rate_schedule
from longvideo.training.precision import TrainingPrecision
from longvideo.training.run_folder import CHECKPOINTS, EXPORTED_FILE, MODEL, SAMPLES, private, write_record
from longvideo.training.run_log import RunLog, StepReport, peak_memory_gib
from longvideo.training.stopping import RunStopped, StopSignals
from longvideo.training.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from longvideo.checkpoint.run_checkpoint import RunState
    from longvideo.training.engine import Engine
    from longvideo.training.options import ResumeChoice
    from longvideo.training.recipe import Recipe

MOST_SKIPPED = 0.5
"""Share of the steps of a run that may change nothing, whatever `max_skipped_steps` allows."""
FEWEST_STEPS = 20
"""Number of steps after which a report compares that share; a checkpoint or an export compares it after any step."""


@dataclass(frozen=True)
class TrainerConfig(Bounded):
    """How a run goes, whatever it trains. A `*_every` of 0 means only at the end.

    precision: number format of the products; `auto` is bf16 on CUDA and fp32 on a CPU. Weights are always fp32.
    ema_decay: decay of the averaged weights for each step; the averages are what is exported. 0 exports the weights.
    ema_start: step from which weights are averaged; until then the averages are the weights.
    log_every: number of steps between two lines of the log.
    layers_every: number of steps between two records of every layer that trains in 4 bits: norm of the gradient, share
        of inputs and gradients that become zero in 4 bits, largest inputs, weights and gradients; 0 for no record. Such
        a step is not compiled.
    sample_every: number of steps between two samples, for which the model is exported too.
    save_every: number of steps between two checkpoints.
    keep_checkpoints: number of checkpoints to keep; older ones are removed.
    max_skipped_steps: number of skipped steps above which the run stops; 0 stops at the first one.
    spike_factor: ratio of the loss of a pass, over all ranks, to its running mean above which the step is skipped; 0
        skips none. A step whose gradient is not finite is always skipped.
    tensorboard: whether to write the numbers of the log for TensorBoard too.
    wandb: project of Weights & Biases to report to.
    """

    precision: TrainingPrecision = "auto"
    ema_decay: float = bounded(0.999, least=0, below=1)
    ema_start: int = steps_field(0)
    log_every: int = bounded(20, least=1)
    layers_every: int = bounded(0, least=0)
    sample_every: int = bounded(0, least=0)
    save_every: int = bounded(1000, least=0)
    keep_checkpoints: int = bounded(2, least=1)
    max_skipped_steps: int = bounded(50, least=0)
    spike_factor: float = bounded(0.0, least=0)
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.spike_factor <= 1:
            raise ConfigError(f"trainer.spike_factor is {self.spike_factor}; expected 0 (off) or a number above 1")


class Diverged(UserError):
    """Too many steps had a gradient that is not finite, or the weights or their validation loss are not."""


class Trainer:
    """Runs a recipe inside a run folder that exists: checkpoints/, samples/, model/, metrics.jsonl and others.

    engine: trains the recipe's objective. mesh: all ranks of the run. micro_batch: number of videos of a pass; by
    default one pass has all videos of a rank.
    """

    def __init__(
        self,
        recipe: Recipe[Any, Any],
        engine: Engine,
        folder: Path,
        *,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        device: torch.device,
        mesh: Mesh | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.folder = folder
        self.config = config
        self.mesh = mesh or Mesh()
        self.micro_batch = micro_batch
        self.checkpoints = CheckpointFolder(folder / CHECKPOINTS, keep=config.keep_checkpoints, mesh=self.mesh)
        self.total_steps = sum(segment.steps for segment in recipe.segments)
        self.learning_rate: Callable[[int], float] = rate_schedule(optimizer, recipe.segments)
        self.device = device
        if config.layers_every and recipe.objective.layer_watch is None:
            raise ConfigError(
                f"trainer.layers_every is {config.layers_every}, but no layer trains in emulated 4 bits; use"
                " products.format=nvfp4, or trainer.layers_every=0"
            )

    def run(self, *, resume: ResumeChoice = "auto", deadline: float = math.inf, config_text: str = "") -> bool:
        """Train to the last step, or until `time.monotonic()` passes `deadline`; return whether all steps are done.

        Both leave a checkpoint and a model folder. SIGTERM, SIGINT and SIGHUP leave a checkpoint and raise RunStopped.
        config_text: text for `config.yaml` of the run folder. Raises ConfigError if `resume` is "never" and the run
        folder holds checkpoints, UserError if the deadline passes before the first step, and Diverged if too many steps
        have no finite gradient.
        """
        step = self.restore(resume)
        with private(self.folder, self.mesh):
            return self._begin(step, deadline, config_text)

    def _begin(self, step: int, deadline: float, config_text: str) -> bool:
        changes = write_record(self.folder, config_text, self.device) if self.mesh.is_main else None
        log = RunLog(
            self.folder,
            tensorboard=self.config.tensorboard,
            wandb=self.config.wandb,
            start_step=step,
            enabled=self.mesh.is_main,
        )
        with closing(log):
            log.note(f"{'resuming' if step else 'starting'} at step {step} of {self.total_steps} in {self.folder}")
            if changes is not None:
                log.note(changes)
            self.recipe.start(step)
            with StopSignals() as signals:
                return self._train(step, deadline, log, signals)

    def _train(self, step: int, deadline: float, log: RunLog, signals: StopSignals) -> bool:
        saved = step
        window = Window(self.device, self.mesh)
        starts = segment_starts(self.recipe.segments)
        ending = self.ending(deadline, signals)
        if ending.late and not ending.number and step < self.total_steps:
            # a scheduler that starts the run again would do so forever
            raise UserError(
                "the time of this run was over before its first step, and nothing was trained; raise --max-minutes,"
                " which also counts the time of loading"
            )
        while step < self.total_steps and not ending:
            if step in starts and step > saved:
                # the first step of a stage may compile for longer than the remaining time
                with window.paused():
                    self.save(step)
                saved = step
            with self.watched(step, log):
                self.one_step(step, window)
            step += 1
            if step % self.config.log_every == 0 or step == self.total_steps:
                self.report(step, window, log)
            if self.config.save_every and step % self.config.save_every == 0:
                with window.paused():
                    self.save(step)
                saved = step
            ending = self.ending(deadline, signals)
            if self.config.sample_every and step % self.config.sample_every == 0 and not ending.number:
                with window.paused():
                    self.sample(step, log)
        if window.steps:
            self.report(step, window, log)
        if step > saved:
            self.save(step)
        done = step >= self.total_steps
        if ending.number and not done:
            self.mesh.barrier()
            name = signal.Signals(ending.number).name
            log.note(
                f"stopped by {name} at step {step} of {self.total_steps}, {'saved' if step else 'nothing to save'}"
            )
            raise RunStopped(ending.number, step)
        if self.exported_step() != step:
            self.sample(step, log)
        self.mesh.barrier()
        log.note(f"{'finished' if done else 'stopped in time'} at step {step} of {self.total_steps}")
        return done

    def ending(self, deadline: float, signals: StopSignals) -> Ending:
        """Return whether and why to stop before the next step. All ranks get the same answer."""
        return Ending(*self.mesh.largest([signals.number, int(time.monotonic() >= deadline)]))

    @contextmanager
    def watched(self, step: int, log: RunLog) -> Generator[None]:
        """Record the layers in the steps that `layers_every` names; the host waits for the device in those alone."""
        watch, every = self.recipe.objective.layer_watch, self.config.layers_every
        if watch is None or not every or (step + 1) % every:
            yield
            return
        with watch.watching(), without_compilation(self.device):
            yield
        log.record({"step": step + 1, **watch.values(self.mesh)})

    def one_step(self, step: int, window: Window) -> None:
        """Train one step, and add its metrics to the window."""
        shares = self.recipe.source.shares(step, self.mesh, self.micro_batch)
        metrics = self.engine.train_step(shares, step, self.learning_rate(step))
        window.add(metrics, size=self.recipe.source.size(step))

    def report(self, step: int, window: Window, log: RunLog) -> None:
        """Log the means of a window and empty it; raise Diverged if too many steps were skipped."""
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
        self.check_skipped(step, fewest_steps=FEWEST_STEPS)

    def check_skipped(self, step: int, *, fewest_steps: int = 0) -> None:
        """Raise Diverged if more steps were skipped than allowed, or, after `fewest_steps` steps, more than half."""
        skipped, share = self.engine.num_skipped(), self.engine.skipped_share(step)
        too_many = f"allowed: trainer.max_skipped_steps={self.config.max_skipped_steps}"
        if skipped <= self.config.max_skipped_steps:
            if share <= MOST_SKIPPED or step < fewest_steps:
                return
            too_many = f"{share:.0%} of them, allowed: {MOST_SKIPPED:.0%}"
        raise Diverged(
            f"{skipped} steps up to step {step} had a gradient that is not finite ({too_many}); {self._remedy(step)}"
        )

    def check_weights(self, step: int) -> None:
        """Raise Diverged on all ranks if the weights of `step` must not replace those of a checkpoint or a model.

        They are not finite, or too many steps were skipped, as after a step that made weights far too large.
        """
        if self.mesh.largest([int(not self.engine.is_finite())])[0]:
            raise Diverged(f"weights are not finite after step {step} and are not written; {self._remedy(step)}")
        self.check_skipped(step)

    def check_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Raise Diverged on all ranks if a validation loss is not finite, before the model is exported."""
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if self.mesh.largest([len(bad)])[0]:
            named = ", ".join(bad) or "the validation loss of another rank is not finite"
            raise Diverged(f"{named} after step {step}, and the model is not written; {self._remedy(step)}")

    def _remedy(self, step: int) -> str:
        """Return what to do about ruined weights of `step`. Every rank calls it."""
        steps = self.mesh.on_main(self.checkpoints.steps)
        if not steps:
            return "start again with a lower learning rate"
        if steps[-1] < step:
            return "resume from the last checkpoint with a lower learning rate"
        return "start again with a lower learning rate and another --output"

    def sample(self, step: int, log: RunLog) -> None:
        """Export the averaged weights, and generate samples with them."""
        self.check_weights(step)
        began = time.monotonic()
        with self.engine.averaged(), torch.no_grad():
            values = self.recipe.validate()
            self.check_validation(step, values)
            if self.mesh.is_main:
                self._export(step)
                with without_compilation(self.device):
                    values |= self.recipe.sample(step, self.folder / SAMPLES)
            self.mesh.barrier()
        if values:
            log.record({"step": step, **values})
        numbers = [f"{name} {value:.4g}" for name, value in values.items()]
        log.note(" | ".join([f"sample {step}", *numbers, f"{time.monotonic() - began:.1f} s"]))

    def _export(self, step: int) -> None:
        try:
            self.recipe.export(self.folder / MODEL)
            write_json(self.folder / EXPORTED_FILE, {"step": step})
        except WriteError as error:
            raise WriteError(f"{error}; {self.checkpoints.describe_newest()}") from error

    def exported_step(self) -> int:
        """Return the step of the model folder, or -1 if it is missing or was exported with other settings."""
        file = self.folder / EXPORTED_FILE
        step = -1
        if self.mesh.is_main and file.exists() and (self.folder / MODEL).exists():
            recorded = read_json(file).get("step")
            step = recorded if isinstance(recorded, int) else -1
        return self.mesh.largest([step])[0]

    def save(self, step: int) -> None:
        """Write a checkpoint. Raises Diverged for weights that must not be written, and WriteError, on all ranks."""
        self.check_weights(step)
        with self.mesh.one_voice():
            self.checkpoints.save(step, self.engine, self.recipe.state())

    def restore(self, resume: ResumeChoice) -> int:
        """Load the newest checkpoint when `resume` is "auto"; return the step to resume at."""
        with self.mesh.one_voice():
            checkpoint = self._accepted(resume)
        if strangers := self.checkpoints.strangers():
            self._print(f"{self.checkpoints.folder}: ignored {', '.join(strangers)}, which are not checkpoints")
        if checkpoint is None:
            return 0
        notes = [*checkpoint.load(self.engine), *self.recipe.load(checkpoint, self.mesh)]
        for note in (*_differences(checkpoint.state, self.engine.arithmetic), *notes):
            self._print(note)
        return checkpoint.step

    def _accepted(self, resume: ResumeChoice) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None for a new run; raise the error that all ranks get."""
        if self.total_steps == 0:
            raise ConfigError("the stages have 0 steps in all; expected at least 1")
        if resume == "never":
            if self.mesh.on_main(self.checkpoints.steps):
                raise ConfigError(f"{self.folder} already holds a run; use --resume auto or another --output")
            return None
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None and checkpoint.step > self.total_steps:
            raise ConfigError(
                f"{checkpoint.folder} is of step {checkpoint.step}, but the stages have {self.total_steps} steps;"
                f" give them at least {checkpoint.step}, or use another --output"
            )
        return checkpoint

    def _print(self, text: str) -> None:
        if self.mesh.is_main:
            print(text, flush=True)


def _differences(state: RunState, arithmetic: str) -> Iterator[str]:
    """Yield lines about what makes losses differ from those of an uninterrupted run, or could not be checked."""
    if state.format == 1:
        yield "the checkpoint is of a version without checksums: its files are not checked"
    elif state.arithmetic != arithmetic:
        yield (
            f"the checkpoint was trained in {state.arithmetic}, this run computes in {arithmetic}: losses are"
            " comparable, not equal"
        )


class Ending(NamedTuple):
    """Why a run stops before its last step. number: signal that caused it, or 0. late: whether its time is up."""

    number: int
    late: int

    def __bool__(self) -> bool:
        return bool(self.number or self.late)


def segment_starts(segments: Sequence[RateSegment]) -> set[int]:
    """Return the first steps of all segments."""
    return {sum(segment.steps for segment in segments[:number]) for number in range(len(segments))}


def without_compilation(device: torch.device) -> AbstractContextManager[object]:
    """Disable compilation inside the block, because a rollout has chunks of many shapes and each would be compiled."""
    # on a CPU nothing is compiled, and setting a stance would import the compiler
    return torch.compiler.set_stance("force_eager") if device.type == "cuda" else nullcontext()
