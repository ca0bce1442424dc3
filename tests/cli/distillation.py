"""The command line of a distillation that takes seconds."""

from __future__ import annotations

from pathlib import Path

PROMPTS = "a red ball moves left\na blue ball\na ball moves\n"
SMALL = (
    "lora.rank=4",
    "lora.alpha=8",
    "student_every=2",
    "dmd.guidance=3",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=constant",
    "critic_optimizer.learning_rate=1e-3",
    "critic_optimizer.schedule=constant",
    "trainer.log_every=1",
    "trainer.sample_every=0",
    "samples.prompts=2",
    "samples.chunks=2",
    "samples.judge=false",
)


def arguments(folder: Path, name: str, *more: str, steps: int = 4, precision: str = "bf16") -> list[str]:
    own = [f"model={folder / 'model'}", f"prompts={folder / 'prompts.txt'}", f"backbone.precision={precision}"]
    stages = f"stages=[{{frames: 16, batch: 2, steps: {steps}}}]"
    return ["distill", "tiny/dmd", *own, *SMALL, stages, *more, "--out", str(folder / name), "--device", "cpu"]
