"""A video that is generated in little memory is the same video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.quantization.offloading import HostWeights

PROMPTS = ["a red ball bounces", "a blue square spins"]
SAVING: list[dict[str, Any]] = [
    {"low_memory": True},
    {"offload_weights": True},
    {"low_memory": True, "offload_weights": True},
]


def video(folder: Path, **options: Any) -> np.ndarray:
    pipeline = StreamingPipeline.from_pretrained(folder, **options)
    first, second = (np.concatenate(list(pipeline.stream(PROMPTS, seconds=3, steps=2, guidance=2.0))) for _ in range(2))
    assert np.array_equal(first, second)  # also from the buffers of the video before
    return first


@pytest.mark.parametrize("precision", ["bf16", "nvfp4-weights"])
@pytest.mark.parametrize("saving", SAVING, ids=str)
def test_it_has_the_same_bits(model_folder: Path, saving: dict[str, Any], precision: str) -> None:
    options = {"device": "cpu", "dtype": torch.float32, "precision": precision}
    assert np.array_equal(video(model_folder, **options, **saving), video(model_folder, **options))


def test_a_session_jumps_back_in_little_memory(model_folder: Path) -> None:
    videos = []
    for saving in (dict[str, Any](), SAVING[-1]):
        pipeline = StreamingPipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32, **saving)
        with pipeline.session(PROMPTS[0], steps=1) as session:
            first = [next(session).frames for _ in range(4)]
            session.seek(1)
            videos.append(np.concatenate([*first, *(next(session).frames for _ in range(2))], axis=1))
    assert np.array_equal(*videos)


def test_weights_are_in_host_memory_and_the_line_states_it(model_folder: Path) -> None:
    pipeline = StreamingPipeline.from_pretrained(model_folder, device="cpu", **SAVING[-1])
    assert isinstance(pipeline.models.transformer.block_weights, HostWeights)
    assert pipeline.start_line().endswith(" | low memory | weights in host memory")


@pytest.mark.gpu
@pytest.mark.parametrize("saving", SAVING, ids=str)
def test_a_gpu_makes_the_same_video(saving: dict[str, bool]) -> None:
    assert np.array_equal(video(Path("tiny"), device="cuda", **saving), video(Path("tiny"), device="cuda"))
