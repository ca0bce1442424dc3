"""Numbers of configurations are taken with their meaning, or refused by their whole key before anything is loaded."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from longvideo.checkpoint.settings import ModelSettings
from longvideo.config.fields import BOUNDS
from longvideo.config.loading import find_config, load_config
from longvideo.distill.config import Distillation
from longvideo.errors import ConfigError
from longvideo.train.clips.config import ClipTraining
from longvideo.train.shapeworld.recipe import ArTraining
from longvideo.train.vae.recipe import VaeTraining
from longvideo.training.optimizer import OptimizerConfig

SCHEMAS: dict[str, type] = {
    "tiny/vae": VaeTraining,
    "tiny/ar_opening": ArTraining,
    "wan/ar": ClipTraining,
    "tiny/dmd": Distillation,
}


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("tiny/vae", "optimizer.beta1=1.5", "optimizer.beta1 is 1.5; expected a number of at least 0 and below 1"),
        ("tiny/vae", "model.dim_mult=[1, 0]", r"model.dim_mult\[1\] is 0; expected a number of at least 1"),
        (
            "tiny/ar_opening",
            "trainer.ema_decay=1.5",
            "trainer.ema_decay is 1.5; expected a number of at least 0 and below 1",
        ),
        ("tiny/ar_opening", "trainer.log_every=-1", "trainer.log_every is -1; expected a number of at least 1"),
        (
            "tiny/ar_opening",
            "trainer.keep_checkpoints=0",
            "trainer.keep_checkpoints is 0; expected a number of at least 1",
        ),
        ("tiny/ar_opening", "stages[0].batch=0", r"stages\[0\].batch is 0; expected a number of at least 1"),
        (
            "tiny/ar_opening",
            "stages[0].learning_rate=.nan",
            r"stages\[0\].learning_rate is nan; expected a finite number",
        ),
        ("tiny/ar_opening", "trainer.spike_factor=1", "trainer.spike_factor is 1.0; expected 0"),
        ("wan/ar", "parallel.timeout_minutes=0", "parallel.timeout_minutes is 0.0; expected a number above 0"),
        ("wan/ar", "recycling.modulation=.inf", "recycling.modulation is inf; expected a finite number"),
        (
            "tiny/dmd",
            "critic_optimizer.gradient_clip=-1",
            "critic_optimizer.gradient_clip is -1.0; expected a number of at least 0",
        ),
        ("tiny/dmd", "samples.steps=[4, 0]", r"samples.steps\[1\] is 0; expected a number from 1 to 1000"),
        (
            "tiny/dmd",
            "critic_first=640",
            "critic_first is 640; with student_every=2 the student",
        ),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_its_key(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_config(SCHEMAS[name], [find_config(name)], [override])


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("tiny/vae", "optimizer.gradient_clip=0"),
        ("tiny/vae", "trainer.ema_decay=0"),
        ("tiny/ar_opening", "stages[0].learning_rate=0"),
        ("tiny/ar_opening", "rollout.prompts=0"),
        ("tiny/ar_opening", "rollout.shown=0"),
        ("tiny/ar_opening", "optimizer.warmup_steps=1000000"),
        ("wan/ar", "validation.batches=0"),
        ("tiny/dmd", "samples.prompts=0"),
    ],
)
def test_a_zero_that_means_something_is_taken(name: str, override: str) -> None:
    load_config(SCHEMAS[name], [find_config(name)], [override])


def test_a_class_refuses_the_same_numbers_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="beta2 is 1; expected a number of at least 0 and below 1"):
        OptimizerConfig(beta2=1)


@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_every_number_of_a_training_configuration_declares_its_bounds(schema: type) -> None:
    assert not list(undeclared(schema, ""))


def undeclared(schema: type, key: str) -> typing.Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and kind is not ModelSettings:  # which checks its own
                yield from undeclared(typing.cast("type", kind), f"{key}{field.name}.")
        if kinds & {int, float, list[int]} and BOUNDS not in field.metadata:
            yield f"{key}{field.name}"
