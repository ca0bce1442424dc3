"""Number formats of a pipeline: weights packed before or while loading, the 4-bit cache, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.errors import UserError
from longvideo.infer.fit.formats import start_line
from longvideo.infer.fit.placement import Placement
from longvideo.infer.loading import load_models
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.number_formats import KV_CACHES, NumberFormats

PROMPT = "a red ball bounces"
FLOAT32 = Placement.choose("cpu", dtype=torch.float32)


def load(folder: Path, **formats: str) -> StreamingPipeline:
    # the folder holds float32; a cast before packing would round twice
    own = NumberFormats.parse(formats.pop("precision", None), **formats)
    return StreamingPipeline(load_models(ModelFolder.open(folder), FLOAT32, formats=own))


def video(pipeline: StreamingPipeline) -> np.ndarray:
    return np.concatenate(list(pipeline.stream(PROMPT, seconds=3, steps=2))).astype(int)


def num_packed(pipeline: StreamingPipeline) -> int:
    return sum(isinstance(module, NVFP4Linear) for module in pipeline.models.transformer.modules())


@pytest.fixture(scope="module")
def packed_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "model"
    assert main(["quantize", str(model_folder), str(target)]) == 0
    return target


def test_packing_before_and_while_loading_give_the_same_video(model_folder: Path, packed_folder: Path) -> None:
    for precision in ("nvfp4", "nvfp4-weights"):
        before, now = (load(folder, precision=precision) for folder in (packed_folder, model_folder))
        assert num_packed(before) == num_packed(now) == 20
        assert np.array_equal(video(before), video(now))


def test_a_packed_folder_runs_in_four_bits_by_default(packed_folder: Path) -> None:
    assert np.array_equal(video(load(packed_folder)), video(load(packed_folder, precision="nvfp4")))


def test_every_format_changes_the_video_a_little(model_folder: Path) -> None:
    exact = video(load(model_folder))
    for formats in (
        {"kv_cache": "nvfp4"},
        {"kv_cache": "nvfp4-mixed"},
        {"precision": "fp8-emulated", "attention": "fp8-emulated"},
        {"precision": "nvfp4-weights"},
        {"precision": "nvfp4", "kv_cache": "nvfp4"},
    ):
        pipeline = load(model_folder, **formats)
        difference = np.abs(video(pipeline) - exact).mean()
        assert 0 < difference < 12, (formats, difference)
    assert pipeline.formats.kv_cache == "nvfp4"


def test_the_first_chunk_does_not_need_the_cache(model_folder: Path) -> None:
    first, *others = (next(load(model_folder, kv_cache=kind).stream(PROMPT, seconds=1)) for kind in KV_CACHES)
    assert len(others) == 2 and all(np.array_equal(first, other) for other in others)


def test_a_mixed_cache_differs_once_a_chunk_is_not_the_newest_one(model_folder: Path) -> None:
    # the window has three chunks, without sink and pin; the first three are 29, 32 and 12 frames long
    exact, mixed, packed = (video(load(model_folder, kv_cache=kind)) for kind in ("bf16", "nvfp4-mixed", "nvfp4"))
    assert np.array_equal(mixed[:61], exact[:61]) and not np.array_equal(packed[:61], exact[:61])
    assert 0 < np.abs(mixed[61:] - exact[61:]).mean() < np.abs(packed[61:] - exact[61:]).mean()


def test_formats_that_cannot_run_are_refused(packed_folder: Path) -> None:
    for precision in ("bf16", "fp8-emulated"):
        with pytest.raises(
            UserError, match=f"precision is {precision}, but the weights of .* are packed in 4 bits; use nvfp4"
        ):
            load(packed_folder, precision=precision)


def test_the_start_line_names_backends_and_what_is_emulated() -> None:
    formats = NumberFormats("nvfp4", "nvfp4")
    line = start_line(formats, FLOAT32, packed=False, decoder="TAEW2.2")
    assert line.startswith("running on cpu in float32 | products nvfp4: emulated by reference and oneDNN (FP4 products")
    assert "KV cache: in 4 bits, rebuilt by reference" in line and line.endswith(
        "decoding on cpu by TAEW2.2 in float32"
    )
    mixed = start_line(NumberFormats("nvfp4", "nvfp4-mixed"), FLOAT32, packed=False, decoder="TAEW2.2")
    assert "KV cache: in 4 bits, rebuilt by reference, sink and newest chunk in float32 | " in mixed
    stored = start_line(NumberFormats(), FLOAT32, packed=True, decoder="TAEW2.2")
    assert "products nvfp4: emulated" in stored and "KV cache: in float32 | attention float32: torch SDPA" in stored
