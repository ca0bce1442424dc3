"""A small 4-bit student with its teacher, and the objective on clips for them."""

from __future__ import annotations

from typing import Literal

import torch

from longvideo.distill.qad import QadConfig, QadObjective
from longvideo.distill.quantized_student import StudentAndTeacher, train_adapter
from longvideo.distill.roles import LoraSettings, Role
from longvideo.distill.self_forcing import RolloutConfig, SelfForcing
from longvideo.flow.schedule import FlowSchedule
from longvideo.model.cache import ChunkCache, KVCache
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.products import choose_w4a4
from longvideo.quantization.straight_through import train_packed
from tests.distill import videos
from tests.quantization import small

LORA = LoraSettings(rank=4, alpha=8.0)


def plain_model() -> CausalTransformer:
    """Return a model whose weights bfloat16 represents."""
    model = small.model().requires_grad_(False)
    return model.bfloat16().float()


def networks(
    train: Literal["weights", "lora", "nothing rounded"] = "weights",
    *,
    cache_type: type[ChunkCache] = KVCache,
    device: str = "cpu",
) -> StudentAndTeacher:
    teacher, student = (plain_model().to(device) for _ in range(2))
    if train == "weights":
        trained = train_packed(student, choose_w4a4(torch.device(device)))
    elif train == "lora":
        trained = train_adapter(student, LORA, packed=False, seed=0)
    else:
        student.requires_grad_(True)
        trained = dict(student.blocks.named_parameters())
    caches = {Role.STUDENT: cache_type, Role.TEACHER: KVCache}
    return StudentAndTeacher(student, teacher, trained=trained, caches=caches, spec=videos.SPEC)


def objective(
    own: StudentAndTeacher, config: QadConfig | None = None, *, guidance: float = 1.0, clean_pass: bool = True
) -> QadObjective:
    rollouts = SelfForcing(
        own,
        RolloutConfig(steps=3, exits="chunk"),
        spec=videos.SPEC,
        shape=videos.SHAPE,
        shift=3.0,
        seed=0,
        clean_pass=clean_pass,
        guidance=guidance,
        finishes=True,
    )
    return QadObjective(own, rollouts, config or QadConfig(), schedule=FlowSchedule(3.0))
