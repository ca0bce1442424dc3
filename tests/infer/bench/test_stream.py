"""The measurement of streaming: its figures, and the picture of what GPUs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvideo.infer.bench import gpu_timeline, stream
from longvideo.infer.bench.gpu_timeline import Span
from longvideo.infer.bench.reserved_memory import ReservedMemory
from longvideo.infer.pipeline import StreamingPipeline


def measured(folder: Path, **options: Any) -> stream.StreamReport:
    pipeline = StreamingPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    options = {"steps": 1, "guidance": None, "chunks": 2, "memory": ReservedMemory([]), **options}
    return stream.measure(pipeline, on_stage=lambda _stage: None, **options)


class CountingSink:
    """A sink that counts frames."""

    def __init__(self) -> None:
        self.frames = 0

    def write(self, frames: np.ndarray) -> None:
        self.frames += len(frames)


def test_a_stream_is_measured_to_its_last_frame(model_folder: Path) -> None:
    sink = CountingSink()
    report = measured(model_folder, sink=sink)
    pipeline = StreamingPipeline.from_pretrained(model_folder, device="cpu")
    chunks = pipeline.models.spec.window_chunks + 2
    per_chunk = 4 * pipeline.models.spec.chunk_frames
    assert sink.frames == chunks * per_chunk - 3
    assert len(report.chunk_s) == 2 and report.frames_per_chunk == per_chunk
    assert abs(report.end_to_end_fps - 2 * per_chunk / sum(report.chunk_s)) < 1e-6
    assert report.errors["velocities"] < 1e-4 and report.errors["pixels"] < 1e-2
    assert report.peak_bytes == {} and min(report.step_ms, report.decode_ms, report.first_frame_s) > 0


def test_kernels_are_recognized_by_their_names() -> None:
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolutions",
        "nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT": "products",
        "_add_norm_silu": "decoder, between convolutions",
        "_add_norm": "between products",
        "_rebuild_kernel": "cache in 4 bits",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "something_else": "other",
    }
    assert {name: gpu_timeline.kind_of(name) for name in names} == names


def test_the_time_line_has_a_row_for_each_busy_stream() -> None:
    spans = [Span(0, 7, 0.0, 8.0, "attention"), Span(1, 9, 2.0, 10.0, "convolutions"), Span(1, 3, 0.0, 0.01, "other")]
    picture = gpu_timeline.draw(spans, begin=0.0, end=10.0, title="a chunk")
    colors = {color for _, color in picture.getcolors(maxcolors=2**16) or []}
    drawn = {kind: color for kind, _, color in gpu_timeline.KINDS}
    assert {drawn["attention"], drawn["convolutions"]} <= colors
    assert picture.height == 2 * gpu_timeline.MARGIN + 4 * gpu_timeline.ROW
    assert gpu_timeline.share_by_kind(spans) == {
        "GPU 0": {"attention": 0.8},
        "GPU 1": {"convolutions": 0.8, "other": 0.001},
    }
