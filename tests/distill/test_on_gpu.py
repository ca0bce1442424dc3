"""A step of distillation on a GPU has the gradients of the CPU, and those of code that is not compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from longvideo.distill.backbone import compile_blocks
from longvideo.distill.objectives import CriticObjective, DmdConfig, StudentObjective
from longvideo.distill.qad import ComparedChunk
from longvideo.distill.roles import Role
from longvideo.distill.self_forcing import RolloutConfig
from longvideo.kernels.backends import TransformerPrecision
from longvideo.model.cache import NVFP4KVCache
from longvideo.quantization.convert import with_precision
from tests.distill import quantized, videos
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
    [
        ("bf16", False, False),
        ("bf16", True, False),
        ("bf16", False, True),
        ("nvfp4", True, False),
        ("nvfp4", True, True),
    ],
)
def test_gradients_are_those_of_the_cpu(precision: TransformerPrecision, checkpoint: bool, compiled: bool) -> None:
    expected = gradients("cpu", precision=precision, checkpoint=checkpoint, compiled=False)
    got = gradients("cuda", precision=precision, checkpoint=checkpoint, compiled=compiled)
    whole = (torch.cat([x[name].flatten() for name in expected]) for x in (got, expected))
    # rounding to 4 bits turns the last bit of a sum into a whole step of an input now and then
    assert relative_error(*whole) < (5e-2 if precision == "nvfp4" else 5e-3)
    assert {name.split()[0] for name in expected} == {Role.STUDENT.value, Role.CRITIC.value}


def student_gradients(train: Literal["weights", "lora"], *, compiled: bool) -> Tensor:
    """Return the gradients of a 4-bit student over a clip whose window rolls."""
    own = quantized.networks(train, cache_type=NVFP4KVCache, device="cuda")
    if train == "lora":  # an adapter starts without an effect
        for index, (name, weight) in enumerate(own.trained(Role.STUDENT).items()):
            generator = torch.Generator("cuda").manual_seed(index)
            weight.data.normal_(std=0.1, generator=generator) if name.endswith("lora_B") else None
    if compiled:
        compile_blocks(own.switch(Role.STUDENT), own.switch(Role.TEACHER))
    objective = quantized.objective(own)
    clip = videos.clip((True, False, True, False, False))
    clip = replace(clip, features_PJD=clip.features_PJD.cuda(), prompt_NB=clip.prompt_NB.cuda())
    objective.begin(0)
    for index in range(clip.num_chunks):
        loss, _ = objective(ComparedChunk(clip, index, False))
        loss.backward()
    grads = [weight.grad for weight in own.trained(Role.STUDENT).values()]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_a_compiled_student_in_4_bits_has_the_gradients_of_one_that_is_not(train: Literal["weights", "lora"]) -> None:
    expected = student_gradients(train, compiled=False)
    assert expected.norm() > 0
    # rounding to 4 bits turns the last bit of a sum into a whole step of an input now and then
    assert relative_error(student_gradients(train, compiled=True), expected) < 5e-2
