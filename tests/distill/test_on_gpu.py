"""A step of distillation on a GPU has the gradients of the CPU, compiled or not, in 4 bits or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longvideo.distill.backbone import compile_blocks
from longvideo.distill.objectives import CriticObjective, DmdConfig, StudentObjective
from longvideo.distill.roles import Role
from longvideo.distill.self_forcing import RolloutConfig
from longvideo.kernels.backends import TransformerPrecision
from longvideo.quantization.convert import with_precision
from tests.distill import videos
from tests.golden import relative_error
from tests.quantization import small

pytestmark = pytest.mark.gpu


def gradients(device: str, *, precision: TransformerPrecision, checkpoint: bool, compiled: bool) -> dict[str, Tensor]:
    """Return the gradients of both adapters over a clip whose window rolls."""
    model = with_precision(small.model().to(device), precision)
    roles = videos.roles(model, stirred=0.2)
    if compiled:
        compile_blocks(model)
    # one step, so that no difference of the first is made larger by those after it
    rollouts, copies = videos.parts(roles, RolloutConfig(steps=1), DmdConfig(checkpoint=checkpoint))
    clip = videos.clip((True, False, True, False, False))
    clip = replace(clip, features_PJD=clip.features_PJD.to(device), prompt_NB=clip.prompt_NB.to(device))
    kept = {}
    for objective in (StudentObjective(rollouts, copies), CriticObjective(rollouts, copies)):
        for part in objective.parts([clip]):
            loss, _ = objective(part)
            loss.backward()
        for name, weight in roles.trained(objective.role).items():
            assert weight.grad is not None
            kept[f"{objective.role.value} {name}"] = weight.grad.cpu()
    return kept


@pytest.mark.parametrize(
    ("precision", "checkpoint", "compiled"),
    [("bf16", False, False), ("bf16", True, False), ("bf16", False, True), ("nvfp4", True, False)],
)
def test_gradients_are_those_of_the_cpu(precision: TransformerPrecision, checkpoint: bool, compiled: bool) -> None:
    expected = gradients("cpu", precision=precision, checkpoint=checkpoint, compiled=False)
    got = gradients("cuda", precision=precision, checkpoint=checkpoint, compiled=compiled)
    whole = (torch.cat([x[name].flatten() for name in expected]) for x in (got, expected))
    # rounding to 4 bits turns the last bit of a sum into a whole step of an input now and then
    assert relative_error(*whole) < (5e-2 if precision == "nvfp4" else 5e-3)
    assert {name.split()[0] for name in expected} == {Role.STUDENT.value, Role.CRITIC.value}
