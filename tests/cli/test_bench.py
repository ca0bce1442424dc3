"""`longvideo bench`: its reports, its refusal to time a wrong stream, and bad options."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longvideo.cli.main import main
from longvideo.infer.bench import comparison
from longvideo.infer.bench.decoder import time_decoder
from longvideo.infer.bench.kernels import KernelMismatch
from longvideo.kernels.vae import reference
from longvideo.kernels.vae.format import FP8Kernel
from longvideo.streaming.transformer import StreamingTransformer
from longvideo.vae.config import AutoencoderConfig


def test_the_report_has_every_kernel_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("longvideo.infer.bench.timing.CPU_REPEATS", 1)
    monkeypatch.setattr("longvideo.infer.bench.timing.CPU_COPY_BYTES", 2**16)
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--device", "cpu", "--out", str(out)]) == 0
    assert "rebuild keys and values of a layer" in capsys.readouterr().out
    rows = {(row["kernel"], row["size"]): row for row in json.loads(out.read_text())["kernels"]}
    # 224 x 256 inputs of 2 bytes, read twice, and codes and scales of 9/16 of a byte
    assert rows["quantize adaptive", "224 x 256"]["needed_bytes"] == 224 * 256 * (4 + 9 / 16)
    # keys and values of two chunks of 224 tokens, 8 heads of 32
    assert rows["rebuild keys and values of a layer", "2 of 3 chunks"]["needed_bytes"] == 4 * 224 * 256 * (2 + 9 / 16)
    assert all(row["ms"] > 0 and row["share"] > 0 for row in rows.values())


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--preset", "huge"]) == 2
    assert "preset is 'huge'; expected one of wan2.2-ti2v-5b, tiny" in capsys.readouterr().err


def test_loading_holds_the_packed_weights_and_no_more(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    assert main(["bench", "load", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    # 15.4 MiB in bfloat16; the file has a header on top of the tensors
    assert report["model_bytes"] <= report["file_bytes"] < 1.05 * report["model_bytes"] < 6 * 2**20


def test_ranks_that_do_not_divide_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "encode", "--preset", "tiny", "--device", "cpu", "--chunks", "1"]
    assert main([*arguments, "--ranks", "3"]) == 2
    assert "--ranks is 3; expected a divisor of 8" in capsys.readouterr().err
    out = tmp_path / "encode.json"
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["part_frames"] == [13, 29] and "saved" in capsys.readouterr().out


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
    assert subprocess.run(compare, cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_stream_in_little_memory_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stream.json"
    command = ["bench", "stream", "--preset", "tiny", "--steps", "1", "--device", "cpu", "--chunks", "2"]
    saving = ["--text-encoder", "nvfp4", "--low-memory", "--offload-weights"]
    assert main([*command, *saving, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["low_memory"], report["offload_weights"], report["memory_limit_gb"]) == (True, True, None)
    assert report["formats"]["text_encoder"] == "nvfp4"
    assert report["estimated_bytes"] == report["process_bytes"] == {}  # that of a CPU is neither estimated nor counted
    line = "text encoder with weights in nvfp4 | low memory | weights in host memory"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--memory-limit", "24"], "--memory-limit is 24, but there is no GPU; leave it out"),
        (["--model", "tiny", "--preset", "tiny"], "--model and --preset exclude each other"),
        (
            ["--preset", "wan2.2-ti2v-5b", "--size", "large"],
            "size is 'large'; expected WIDTHxHEIGHT in pixels, such as 1280x704",
        ),
        (
            ["--preset", "tiny", "--size", "224x128"],
            "the preset tiny has a fixed size, 224x128, and a fixed window, 24; leave",
        ),
        (["--preset", "tiny", "--device", "cpu", "--window", "32"], "leave --size and --window out"),
        (["--model", "tiny", "--size", "1280x704"], "--size and --window are options of a preset; a model has its own"),
        (["--preset", "tiny", "--device", "cpu", "--precision", "fp8"], "FP8 products need a GPU"),
        (["--preset", "tiny", "--device", "cpu", "--timeline", "a.png"], "--timeline a.png needs a GPU"),
        (["--preset", "tiny", "--steps", "0"], "steps is 0; expected a whole number from 1 to 1000"),
        (["--preset", "tiny", "--out", "nowhere/a.json"], "nowhere is not a folder; create it first"),
        (["--preset", "tiny", "--out", "/dev/null"], "it is a device, a pipe or a socket"),
        (["--preset", "wan", "--device", "cpu"], "preset is 'wan'; expected one of"),
        (
            ["--preset", "wan2.2-ti2v-5b", "--size", "1280x700", "--device", "cpu"],
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


@pytest.mark.parametrize("kv_cache", ["nvfp4", "nvfp4-mixed"])
def test_passes_of_one_rank_are_measured(kv_cache: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "passes.json"
    assert main(["bench", "parallel", "--preset", "tiny", "--kv-cache", kv_cache, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["ranks"] == 1 and report["cache_bytes"] > 0 and report["error"] < comparison.VELOCITY_BOUNDS["bf16"]
    assert f"step {report['step_ms']:.1f} ms" in capsys.readouterr().out


def test_the_decoder_needs_fp8_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decoder", "--device", "cpu"]) == 2
    assert "FP8 convolutions need a GPU of compute capability 8.9 or newer, got device 'cpu'" in capsys.readouterr().err


def test_stages_of_the_decoder_are_checked_timed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longvideo.infer.bench.timing.CPU_REPEATS", 1)
    config = replace(AutoencoderConfig.tiny(), decoder_base_dim=16)
    timing = time_decoder(config, (2, 3), device=torch.device("cpu"))
    names = [stage.stage for stage in timing.stages]
    assert names[0] == "entry 24" and names[-1] == "exit 16" and names.count("upsampling 32") == 3
    for stage in timing.stages:
        in_fp8 = stage.stage.startswith(("residual", "upsampling"))
        assert (stage.checked > 0) == in_fp8
        assert (0 < stage.error < 0.05) == in_fp8
    assert 30 < timing.psnr < 60


def test_a_wrong_convolution_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(AutoencoderConfig.tiny(), decoder_base_dim=16)
    right = reference.convolve

    def wrong(inputs: Tensor, frames: int, kernel: FP8Kernel, out: Tensor) -> None:
        right(inputs, frames, kernel, out)
        out[0, 0, 0, 0, 0] += 1

    monkeypatch.setattr(reference, "convolve", wrong)
    with pytest.raises(KernelMismatch, match="ResidualStage, .*: 1 of 192 values differ"):
        time_decoder(config, (2, 3), device=torch.device("cpu"))
