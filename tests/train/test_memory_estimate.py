"""The memory estimate of a teacher-forcing step, against peaks that were measured on H200 GPUs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from longvideo.checkpoint.modules import OnMeta
from longvideo.config.loading import find_config, load_config
from longvideo.distributed import Mesh, ParallelConfig, divide_batch
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.train.clips.config import ClipTraining
from longvideo.train.clips.plan import plan_step
from longvideo.train.cost import copied_rows, estimate_memory
from longvideo.training.memory import GIB, ROWS_MASKED, BlockMemory, MemoryEstimate, engine_memory

SHAPE = PRESETS["wan2.2-ti2v-5b"]
SPEC = ChunkSpec(grid_height=22, grid_width=40)
SMALL = ChunkSpec(grid_height=11, grid_width=20)
NUM_PARAMETERS = 4_999_787_712


def estimate(
    monkeypatch: pytest.MonkeyPatch,
    *,
    chunks: int,
    launched: bool = False,
    ranks: int = 1,
    passes: int = 1,
    averaged: bool = True,
    compiled: bool = True,
    nvfp4: bool = False,
    masked: bool = False,
    zero_stage: int = 1,
    checkpoint: bool = True,
    layers: int = 30,
    spec: ChunkSpec = SPEC,
) -> MemoryEstimate:
    if launched:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shape = replace(SHAPE, num_layers=layers)
    with OnMeta():
        num_parameters = sum(p.numel() for p in CausalTransformer(shape).parameters())
    engine = engine_memory(
        num_parameters,
        ParallelConfig(zero_stage=zero_stage),
        ranks=ranks,
        bf16=launched,
        passes=passes,
        averaged=averaged,
    )
    copies = ROWS_MASKED / 2 if masked else copied_rows(chunks, ranks)
    blocks = BlockMemory(2, checkpoint=checkpoint, compiled=compiled, nvfp4=nvfp4, copies=copies)
    return estimate_memory(shape, spec, engine, blocks, chunks=chunks, clips=1, sequence=ranks, autocast=not launched)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"chunks": 2}, 96.8),
        ({"chunks": 4}, 103.9),
        ({"chunks": 4, "nvfp4": True}, 105.4),
        ({"chunks": 4, "compiled": False}, 110.6),
        ({"chunks": 4, "masked": True}, 103.6),
        ({"chunks": 4, "averaged": False}, 85.3),
        ({"chunks": 8}, 123.2),
        ({"chunks": 4, "launched": True}, 121.3),
        ({"chunks": 4, "launched": True, "nvfp4": True}, 121.3),
        ({"chunks": 4, "launched": True, "passes": 2}, 132.8),
        ({"chunks": 12, "launched": True, "ranks": 2}, 86.6),
        ({"chunks": 12, "launched": True, "ranks": 2, "compiled": False}, 98.2),
        ({"chunks": 12, "launched": True, "ranks": 2, "masked": True}, 82.2),
        ({"chunks": 12, "launched": True, "ranks": 2, "nvfp4": True}, 90.6),
        ({"chunks": 12, "launched": True, "ranks": 2, "compiled": False, "zero_stage": 3}, 101.5),
        ({"chunks": 4, "checkpoint": False, "layers": 4}, 50.5),
        ({"chunks": 4, "checkpoint": False, "layers": 4, "nvfp4": True}, 46.0),
        ({"chunks": 2, "checkpoint": False, "compiled": False, "spec": SMALL}, 127.7),
    ],
)
def test_measured_peaks_are_estimated_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], measured: float
) -> None:
    """Wan2.2-TI2V-5B at 704 x 1280; docs/training.md has the commands."""
    assert estimate(monkeypatch, **settings).total / GIB == pytest.approx(measured, rel=0.1)


def test_sharing_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    held = [
        engine_memory(NUM_PARAMETERS, ParallelConfig(zero_stage=stage), ranks=4, bf16=True, passes=2, averaged=True)
        for stage in range(4)
    ]
    assert [round(engine.optimizer / GIB, 1) for engine in held] == [93.1, 37.3, 23.3, 23.3]
    assert [round(engine.weights / GIB, 1) for engine in held] == [9.3, 9.3, 9.3, 2.3]


def test_the_line_has_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    line = estimate(monkeypatch, chunks=4).line()
    assert re.fullmatch(
        r"about 106\.5 GiB on each device at the peak \(gradients\): weights 18\.6, optimizer 55\.9,"
        r" gradients 18\.6, activations 15\.5, one block 7\.7",
        line,
    )


def test_outliers_take_the_memory_of_the_inputs_of_a_block() -> None:
    """With recomputation those of one block: a number of 16 bits for each input of its eight layers of tokens."""
    words = ("stages=[{chunks: 12, batch: 1, steps: 1}]", "parallel.sequence=4", "products.format=nvfp4")
    clamped = (*words, "products.parts.outlier_quantile=0.99")
    plain, with_outliers = (
        plan_step(config, config.stages[0], 4).memory
        for config in (load_config(ClipTraining, [find_config("wan/ar")], list(each)) for each in (words, clamped))
    )
    tokens = 12 * 2 * 7040 / 4
    assert with_outliers.block - plain.block == pytest.approx(tokens * (7 * 3072 + 14336) * 2)
    assert with_outliers.activations == plain.activations


@pytest.mark.parametrize(
    ("preset", "ranks", "gib"),
    [("wan/ar_nvfp4", 4, 81.1), ("wan/ar_nvfp4", 8, 71.8), ("wan/ar_64s", 8, 102.9), ("wan/ar_64s", 64, 91.7)],
)
def test_the_presets_in_nvfp4_fit_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, preset: str, ranks: int, gib: float
) -> None:
    """On GPUs of 80 and of 140 GiB: clips of 96 and of 384 latent frames."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config = load_config(ClipTraining, [find_config(preset)])
    (stage,) = config.stages
    mesh = Mesh(ranks, 0, config.parallel.sequence)
    # a replica has at least the four clips that the preset's comment names
    clips, passes = divide_batch(max(stage.batch, mesh.replicas * 4), mesh, config.parallel.micro_batch)
    engine = engine_memory(
        NUM_PARAMETERS, config.parallel, ranks=ranks, bf16=True, passes=passes, averaged=config.trainer.ema_decay > 0
    )
    masked = config.objective.attention == "masked"
    copies = ROWS_MASKED / 2 if masked else copied_rows(stage.chunks, mesh.sequence)
    blocks = BlockMemory(2, checkpoint=config.objective.checkpoint, compiled=True, nvfp4=True, copies=copies)
    total = estimate_memory(
        SHAPE, SPEC, engine, blocks, chunks=stage.chunks, clips=clips, sequence=mesh.sequence, autocast=False
    ).total
    assert config.products.format == "nvfp4" and clips == 1
    assert total / GIB == pytest.approx(gib, abs=0.1)
