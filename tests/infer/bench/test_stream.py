"""The measurement of streaming: its figures, its refusal of a wrong stream, and the picture of what GPUs do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longvideo.cli.main import main
from longvideo.infer.bench import comparison, gpu_timeline, stream
from longvideo.infer.bench.gpu_timeline import Span
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.streaming.transformer import StreamingTransformer


def measured(folder: Path, **options: Any) -> stream.StreamReport:
    pipeline = StreamingPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    return stream.measure(pipeline, steps=1, guidance=None, chunks=2, on_stage=lambda _stage: None, **options)


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


def test_nothing_is_timed_on_a_wrong_result(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    velocity = StreamingTransformer.velocity
    monkeypatch.setattr(StreamingTransformer, "velocity", lambda *args, **options: 1.5 * velocity(*args, **options))
    out = tmp_path / "stream.json"
    command = ["bench", "stream", "--model", str(model_folder), "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert main(command) == 2
    assert "the check failed, so nothing is timed: velocities of the fast path" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_writes_what_it_shows(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stream.json"
    command = ["bench", "stream", "--model", str(model_folder), "--steps", "1", "--device", "cpu", "--chunks", "2"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["steps"] == 1 and report["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr()
    assert f"{report['end_to_end_fps']:.1f} frames/s" in printed.out
    assert printed.err.count("running on cpu in ") == 1
    compare = [sys.executable, ".ci/compare_stream.py", str(out), str(out)]
    assert subprocess.run(compare, cwd=Path(__file__).parents[3], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tiny", "--preset", "tiny"], "--model and --preset exclude each other"),
        (
            ["--preset", "wan2.2-ti2v-5b", "--size", "large"],
            "--size is 'large'; expected HEIGHTxWIDTH in pixels, such as 704x1280",
        ),
        (
            ["--preset", "tiny", "--size", "128x224"],
            "the preset tiny has a fixed size, 128x224, and a fixed window, 24; leave",
        ),
        (["--preset", "tiny", "--device", "cpu", "--window", "32"], "leave --size and --window out"),
        (["--model", "tiny", "--size", "704x1280"], "--size and --window are options of a preset; a model has its own"),
        (["--preset", "tiny", "--device", "cpu", "--precision", "fp8"], "FP8 products need a GPU"),
        (["--preset", "tiny", "--device", "cpu", "--timeline", "a.png"], "--timeline a.png needs a GPU"),
        (["--preset", "tiny", "--steps", "0"], "steps is 0; expected a whole number from 1 to 1000"),
        (["--preset", "tiny", "--out", "nowhere/a.json"], "nowhere is not a folder; create it first"),
        (["--preset", "tiny", "--out", "/dev/null"], "it is a device, a pipe or a socket"),
        (["--preset", "wan", "--device", "cpu"], "preset is 'wan'; expected one of"),
        (
            ["--preset", "wan2.2-ti2v-5b", "--size", "700x1280", "--device", "cpu"],
            "height=700, width=1280; expected multiples of 32",
        ),
        (["--device", "cpu", "--decode-share", "0.5"], "cpu both denoises and decodes"),
        (["--device", "cuda:9"], "device 'cuda:9' does not exist: this machine has"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stream", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error.split("error:")[-1].strip()


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


def test_the_time_line_has_a_row_for_each_busy_stream(tmp_path: Path) -> None:
    spans = [Span(0, 7, 0.0, 8.0, "attention"), Span(1, 9, 2.0, 10.0, "convolutions"), Span(1, 3, 0.0, 0.01, "other")]
    gpu_timeline.draw(spans, tmp_path / "line.png", begin=0.0, end=10.0, title="a chunk")
    picture = Image.open(tmp_path / "line.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(maxcolors=2**16) or []}
    drawn = {kind: color for kind, _, color in gpu_timeline.KINDS}
    assert {drawn["attention"], drawn["convolutions"]} <= colors
    assert picture.height == 2 * gpu_timeline.MARGIN + 4 * gpu_timeline.ROW
    assert gpu_timeline.share_by_kind(spans) == {
        "GPU 0": {"attention": 0.8},
        "GPU 1": {"convolutions": 0.8, "other": 0.001},
    }


def test_passes_of_one_rank_are_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "passes.json"
    assert main(["bench", "parallel", "--preset", "tiny", "--kv-cache", "nvfp4", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["ranks"] == 1 and report["cache_bytes"] > 0 and report["error"] < comparison.VELOCITY_BOUNDS["bf16"]
    assert f"step {report['step_ms']:.1f} ms" in capsys.readouterr().out
