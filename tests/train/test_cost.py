"""What a step costs, against counting operations and against a run that was measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longvideo.distributed import Mesh
from longvideo.flow.schedule import FlowSchedule
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec
from longvideo.train.cost import clip_flops
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


def test_arithmetic_of_the_measured_run() -> None:
    spec = ChunkSpec(grid_height=22, grid_width=40)
    assert clip_flops(PRESETS["wan2.2-ti2v-5b"], spec, 12) == pytest.approx(13.07e15, rel=0.01)
