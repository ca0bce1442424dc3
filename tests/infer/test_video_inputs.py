"""What the options of a video leave open comes from the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.infer.options import SamplingOptions
from longvideo.infer.video_inputs import VideoInputs

SETTINGS = replace(ModelFolder.open("tiny").settings, steps=3, guidance=2.5)


@pytest.mark.parametrize(("options", "steps", "guidance"), [((None, None), 3, 2.5), ((5, 1.0), 5, 1.0)])
def test_options_that_are_left_out_are_those_of_the_model(
    options: tuple[int | None, float | None], steps: int, guidance: float
) -> None:
    inputs = VideoInputs.of(iter(()), SETTINGS, SamplingOptions(*options), generators=[torch.Generator()])
    assert len(inputs.solver.timesteps) == steps and inputs.guidance == guidance
