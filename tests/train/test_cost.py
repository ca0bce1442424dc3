"""What a step costs, against counting operations and against a run that was measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longvideo.flow.schedule import FlowSchedule
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec
from longvideo.train.cost import clip_flops, estimate_memory
from longvideo.train.mesh import Mesh
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig
from tests.train.test_sequence_parallel import CHUNKS, CPU, SPEC, VIEWS, small_transformer, whole_batch


def test_operations_are_those_that_are_counted() -> None:
    """Attention run by run multiplies nothing that is hidden, so what is counted is what is needed."""
    objective = TeacherForcing(
        small_transformer(), None, TeacherForcingConfig(), spec=SPEC, schedule=FlowSchedule(5.0), device=CPU
    )
    (batch,) = whole_batch().shares(Mesh(), None, SPEC.chunk_frames)
    with FlopCounterMode(display=False) as forward:
        objective(batch)
    config = objective.transformer.config
    needed = VIEWS * clip_flops(config, SPEC, CHUNKS) / 3
    # not counted as needed: embedding of time and text; not made: the clean copy of the last chunk
    assert forward.get_total_flops() == pytest.approx(needed, rel=0.2)
    visible = torch.eye(CHUNKS, dtype=torch.bool)
    assert clip_flops(config, SPEC, CHUNKS, visible) < clip_flops(config, SPEC, CHUNKS)


def test_memory_of_a_measured_run_is_estimated_within_a_fifth() -> None:
    """Wan2.2-TI2V-5B, 96 latent frames on two H200: 115.9 GiB, commit f406c96."""
    spec = ChunkSpec(grid_height=22, grid_width=40)
    settings = {"num_parameters": 4_999_787_712, "clips": 1, "ranks": 2, "bf16": True, "checkpoint": True}
    shape = PRESETS["wan2.2-ti2v-5b"]
    estimate = estimate_memory(shape, spec, chunks=12, sequence=2, zero_stage=1, **settings)
    assert estimate.total == pytest.approx(115.9, rel=0.2)
    assert clip_flops(shape, spec, 12) == pytest.approx(13.07e15, rel=0.01)
    sharded = estimate_memory(shape, spec, chunks=12, sequence=2, zero_stage=3, **settings)
    assert sharded.total < estimate.total - 10
