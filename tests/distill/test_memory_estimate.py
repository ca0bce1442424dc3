"""The memory estimate of a distillation step, against peaks that were measured on H200 GPUs."""

from __future__ import annotations

import pytest

from longvideo.distill.memory import adapter_parameters, backbone_bytes, estimate_memory
from longvideo.distill.roles import LoraSettings
from longvideo.distributed import ParallelConfig
from longvideo.model.cache import CACHES
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec
from longvideo.training.memory import GIB, BlockMemory, engine_memory

SHAPE = PRESETS["wan2.2-ti2v-5b"]
SPEC = ChunkSpec(grid_height=22, grid_width=40)
CHUNKS = 4


@pytest.mark.parametrize(
    ("packed", "backbones", "measured"),
    [(True, 1, 19.7), (False, 1, 32.9), (False, 2, 42.2)],
)
def test_measured_peaks_are_estimated_within_a_tenth(packed: bool, backbones: int, measured: float) -> None:
    """Wan2.2-TI2V-5B at 704 x 1280, adapters of rank 128; docs/distillation.md has the commands."""
    count = adapter_parameters(SHAPE, LoraSettings())
    student, critic = (
        engine_memory(count, ParallelConfig(), ranks=1, bf16=False, passes=CHUNKS, averaged=averaged)
        for averaged in (True, False)
    )
    estimate = estimate_memory(
        SHAPE,
        SPEC,
        student + critic,
        BlockMemory(2, checkpoint=True, compiled=False),
        frozen=backbones * backbone_bytes(SHAPE, 2, packed=packed),
        kv_cache="nvfp4" if packed else "bf16",
        clips=1,
        chunks=CHUNKS,
    )
    assert estimate.total / GIB == pytest.approx(measured, rel=0.1)


def test_exact_copies_of_a_mixed_cache_are_counted() -> None:
    sizes = {
        kv_cache: estimate_memory(
            SHAPE,
            SPEC,
            engine_memory(0, ParallelConfig(), ranks=1, bf16=False, passes=CHUNKS, averaged=False),
            BlockMemory(2, checkpoint=True, compiled=False),
            frozen=0.0,
            kv_cache=kv_cache,
            clips=2,
            chunks=CHUNKS,
        ).cache
        for kv_cache in CACHES
    }
    # the sink and the newest of the four chunks of a window
    assert sizes["nvfp4-mixed"] == sizes["nvfp4"] + 2 / 4 * sizes["bf16"]


@pytest.mark.parametrize(("ranks", "stage", "chunks", "measured"), [(1, 1, 4, 25.0), (2, 2, 2, 19.1)])
def test_measured_peaks_of_deepspeed_are_estimated_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, ranks: int, stage: int, chunks: int, measured: float
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    parallel, count = ParallelConfig(zero_stage=stage), adapter_parameters(SHAPE, LoraSettings())
    engine = engine_memory(count, parallel, ranks=ranks, bf16=False, passes=chunks, averaged=True)
    estimate = estimate_memory(
        SHAPE,
        SPEC,
        engine + engine,
        BlockMemory(2, checkpoint=True, compiled=False),
        frozen=backbone_bytes(SHAPE, 2, packed=True),
        kv_cache="nvfp4",
        clips=1,
        chunks=chunks,
    )
    assert estimate.total / GIB == pytest.approx(measured, rel=0.1)


def test_adapters_are_counted() -> None:
    layers = 4 * 2 * 2 * SHAPE.dim + 2 * (SHAPE.dim + SHAPE.ffn_dim)
    assert adapter_parameters(SHAPE, LoraSettings(rank=16)) == 16 * SHAPE.num_layers * layers
