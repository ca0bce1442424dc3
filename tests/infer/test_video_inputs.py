"""What the options of a video leave open comes from the model, and the noise of a continued video from its past."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.infer.history import Past
from longvideo.infer.options import SamplingOptions
from longvideo.infer.video_inputs import VideoInputs

SETTINGS = replace(ModelFolder.open("tiny").settings, steps=3, guidance=2.5)


@pytest.mark.parametrize(("options", "steps", "guidance"), [((None, None), 3, 2.5), ((5, 1.0), 5, 1.0)])
def test_options_that_are_left_out_are_those_of_the_model(
    options: tuple[int | None, float | None], steps: int, guidance: float
) -> None:
    inputs = VideoInputs.of(iter(()), SETTINGS, SamplingOptions(*options), seeds=[0])
    assert len(inputs.solver.timesteps) == steps and inputs.guidance == guidance


def test_every_sample_has_the_noise_of_its_seed_unless_a_past_has_generators() -> None:
    inputs = VideoInputs.of(iter(()), SETTINGS, SamplingOptions(), seeds=[7, 8])
    assert [generator.initial_seed() for generator in inputs.generators] == [7, 8]
    past = Past((), (), True, (torch.Generator().manual_seed(9),))
    inputs = VideoInputs.of(iter(()), SETTINGS, SamplingOptions(), seeds=[7], past=past)
    assert inputs.generators == past.generators
