"""`longvideo decode`: saved latents become the same frames as while they were generated, in every form of output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.latents import LatentsHeader, save_latents
from longvideo.cli.main import main
from longvideo.data.encoded import EncodedDataset
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.vae.autoencoder import Autoencoder
from tests.checkpoint.test_decoders import save as save_decoder
from tests.checkpoint.test_decoders import tiny_weights
from tests.cli.test_generate import probe, restore_signals
from tests.data import footage
from tests.files.test_writing import no_file_longer_than
from tests.folders import file_names

FP32 = ("--device", "cpu", "--decoder-precision", "fp32")
CHANNELS = 8  # of the model of `model_folder`


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(file: Path, z: Tensor, model: Path | str | None, **notes: float) -> Path:
    save_latents(file, z, LatentsHeader(model=None if model is None else str(model), **notes))  # type: ignore[arg-type]
    return file


def decode(latents: Path, output: Path, *options: str) -> int:
    return main(["decode", str(latents), "-o", str(output), *FP32, *options])


@pytest.fixture(scope="module")
def autoencoder(model_folder: Path) -> Autoencoder:
    return ModelFolder.open(model_folder).load_vae(dtype=torch.float32)


def pixels(autoencoder: Autoencoder, z_CTHW: Tensor) -> np.ndarray:
    """Return the frames [T, H, W, 3] of a whole video, 0 to 255, not rounded."""
    with torch.no_grad():
        video_BCTHW, _ = autoencoder.decode(autoencoder.denormalize(z_CTHW[None].float()))
    return video_BCTHW[0].permute(1, 2, 3, 0).clamp(-1, 1).add(1).mul(127.5).numpy()


def assert_are_frames_of(autoencoder: Autoencoder, z_CTHW: Tensor, frames: np.ndarray) -> None:
    """Assert that float32 frames are multiples of 1/255, and the nearest ones to the pixels."""
    assert frames.dtype == np.float32 and frames.min() >= 0 and frames.max() <= 1
    levels = np.round(frames * 255)
    assert np.array_equal(levels.astype(np.uint8).astype(np.float32) / np.float32(255), frames)
    expected = pixels(autoencoder, z_CTHW)
    assert levels.shape == expected.shape and np.abs(levels - expected).max() < 0.51


@pytest.mark.parametrize("seconds", ["0.04", "0.2", "1.5", "3"])  # 1, 5, 36 and 72 frames; a chunk has 32, the first 29
def test_latents_of_a_video_decode_to_its_frames_bit_for_bit(
    seconds: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, file, again = tmp_path / "a.mp4", tmp_path / "a.safetensors", tmp_path / "b.mp4"
    options = ["--model", str(model_folder), "--seconds", seconds, "--latents", str(file), "-o", str(video)]
    assert main(["generate", "a red ball", *FP32, *options]) == 0
    num_frames = probe(video)[0]
    assert num_frames == round(float(seconds) * 24)
    printed = capsys.readouterr().out
    num_latents = 1 + -(-(num_frames - 1) // 4)
    assert printed.count("\n") == 2 and f"a.safetensors: {num_latents} latent frames" in printed
    with safe_open(file, framework="pt") as stored:
        z = stored.get_tensor("latents")
        assert z.shape == (1, CHANNELS, num_latents, 2, 4) and z.dtype == torch.float32
        notes = {"model": str(model_folder), "fps": "24", "chunk_frames": "8", "num_frames": str(num_frames)}
        assert stored.metadata() == notes
    # H.264 of the same frames is the same file
    assert decode(file, again) == 0
    assert again.read_bytes() == video.read_bytes()
    assert file_names(tmp_path) == ["a.mp4", "a.safetensors", "b.mp4"]


def test_arrays_have_the_frames_of_the_pipeline_divided_by_255(
    pipeline: StreamingPipeline, model_folder: Path, tmp_path: Path
) -> None:
    chunks = list(pipeline.stream_chunks("a red ball", seconds=2, seed=3))
    frames = np.concatenate([chunk.frames[0] for chunk in chunks])
    assert np.array_equal(frames, np.concatenate(list(pipeline.stream("a red ball", seconds=2, seed=3))))
    z = torch.cat([chunk.record.latents for chunk in chunks if chunk.is_complete], dim=2)
    file = saved(tmp_path / "z.safetensors", z, model_folder, chunk_frames=8, num_frames=48 + 13)
    for name in ("a.npy", "a.safetensors"):
        assert decode(file, tmp_path / name) == 0
    expected = frames.astype(np.float32) / np.float32(255)
    whole = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert whole.dtype == np.float32 and whole.shape == (61, 32, 64, 3)
    assert np.array_equal(whole[: len(frames)], expected)
    with safe_open(tmp_path / "a.safetensors", framework="np") as stored:
        assert np.array_equal(stored.get_tensor("frames"), whole) and stored.metadata() == {"fps": "24"}


@pytest.mark.parametrize("form", ["safetensors", "pt", "npy"])
@pytest.mark.parametrize("num_latents", [1, 3, 11])
def test_a_file_without_notes_decodes_with_the_model(
    form: str, num_latents: int, autoencoder: Autoencoder, model_folder: Path, tmp_path: Path
) -> None:
    z, file = latents(CHANNELS, num_latents, 2, 4), tmp_path / f"z.{form}"
    if form == "npy":
        np.save(file, z.numpy())
    elif form == "pt":
        torch.save(z, file)
    else:
        save_file({"latents": z}, file)
    assert decode(file, tmp_path / "a.npy", "--model", str(model_folder)) == 0
    assert_are_frames_of(autoencoder, z, np.load(tmp_path / "a.npy"))


def test_several_videos_get_numbers(
    autoencoder: Autoencoder, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z = latents(3, CHANNELS, 3, 4, 2).bfloat16()
    file = saved(tmp_path / "step_5.latents.safetensors", z, model_folder)
    assert decode(file, tmp_path / "out.npy") == 0
    for index in range(3):
        assert_are_frames_of(autoencoder, z[index], np.load(tmp_path / f"out_{index}.npy"))
    assert decode(file, tmp_path / "videos") == 0
    assert file_names(tmp_path / "videos") == ["step_5_0.mp4", "step_5_1.mp4", "step_5_2.mp4"]
    assert decode(file, tmp_path / "videos", "--num", "2") == 2
    assert "step_5_0.mp4 exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert decode(file, tmp_path / "videos", "--num", "2", "--overwrite", "--fps", "12.5") == 0
    assert [probe(tmp_path / "videos" / f"step_5_{index}.mp4") for index in range(3)] == [
        (9, 12.5, (64, 32)),
        (9, 12.5, (64, 32)),
        (9, 24.0, (64, 32)),
    ]


def test_a_folder_of_clips_becomes_a_file_for_each(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "footage").mkdir()
    manifest, clips = footage.footage(tmp_path / "footage"), tmp_path / "clips"
    options = ["--chunks", "1", "--device", "cpu", "--workers", "0", "--out", str(clips)]
    assert main(["data", "encode", str(manifest), "--model", str(model_folder), *options]) == 0
    dataset = EncodedDataset.open(clips)
    assert decode(clips, tmp_path / "out", "--num", "2") == 0
    assert file_names(tmp_path / "out") == ["clip_0.mp4", "clip_1.mp4"]
    assert probe(tmp_path / "out" / "clip_1.mp4")[:2] == (29, float(dataset.info.fps))
    assert decode(clips, tmp_path / "a.npy") == 0
    arrays = list(tmp_path.glob("a_*.npy"))
    assert len(arrays) == len(dataset) > 2
    autoencoder = ModelFolder.open(model_folder).load_vae(dtype=torch.float32)
    assert_are_frames_of(autoencoder, dataset.latents(2, 0, 8), np.load(tmp_path / "a_2.npy"))


def test_a_small_decoder_of_wan_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = save_decoder(tmp_path / "taew2_2.pth", tiny_weights())
    file = saved(tmp_path / "z.safetensors", latents(48, 3, 2, 3), "/of/another/machine", fps=12)
    assert decode(file, tmp_path / "a.mp4", "--decoder", str(decoder)) == 0
    assert probe(tmp_path / "a.mp4") == (9, 12.0, (32, 48))
    assert "decoding on cpu by TAEW2.2 in float32" in capsys.readouterr().err
    assert decode(file, tmp_path / "b.mp4") == 2
    assert "was made by '/of/another/machine', which is not on this machine; use --model" in capsys.readouterr().err
    odd = saved(tmp_path / "odd.safetensors", latents(16, 3, 2, 3), None)
    assert decode(odd, tmp_path / "b.mp4", "--decoder", str(decoder)) == 2
    assert "odd.safetensors states no model; use --model" in capsys.readouterr().err
    assert decode(file, tmp_path / "b.mp4", "--decoder", "missing.pth") == 2
    assert "decoder is 'missing.pth', which is not a file; expected wan, small or a file" in capsys.readouterr().err
    assert decode(file, tmp_path / "b.mp4", "--decoder", str(decoder), "--decoder-precision", "fp8-emulated") == 2
    assert "has no FP8 form" in capsys.readouterr().err


def test_a_model_that_latents_name_is_never_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Wan-AI/Wan2.2-TI2V-5B", "hf:Wan-AI/Wan2.2-TI2V-5B"):
        file = saved(tmp_path / "z.safetensors", latents(CHANNELS, 1, 2, 4), name)
        assert decode(file, tmp_path / "a.mp4") == 2
        assert f"was made by '{name}', which is not on this machine; use --model" in capsys.readouterr().err


def test_a_model_that_does_not_open_is_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    file = saved(tmp_path / "z.safetensors", latents(CHANNELS, 1, 2, 4), tmp_path / "model")
    assert decode(file, tmp_path / "a.mp4") == 2
    assert re.search(r"z\.safetensors was made by '.*model', which does not open: .*; use --model$", line(capsys))


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on standard error."""
    (text,) = capsys.readouterr().err.splitlines()
    return text


@pytest.mark.parametrize(
    ("shape", "notes", "options", "message"),
    [
        ((5, 3, 2, 4), {}, (), r"has latents of 5 channels; expected \[C, T, H, W\] with C=8 for .*; use the model or"),
        ((3, 8, 2, 4), {}, (), r"their axes seem to be \[T, C, H, W\], transpose them"),
        ((8, 3, 2, 4), {"num_frames": 10}, (), "states num_frames=10, but its 3 latent frames are 9 frames"),
        ((8, 3, 2, 4), {"num_frames": 5}, (), "states num_frames=5, but its 3 latent frames are 9 frames"),
        ((8, 3, 2, 4), {}, ("--fps", "0"), "fps is 0.0; expected a number above 0 and at most 1000"),
        ((8, 3, 2, 4), {}, ("--fps", "nan"), "fps is nan; expected a number above 0"),
        ((8, 3, 2, 4), {}, ("--num", "0"), "Invalid value for '--num'"),
        ((8, 3, 2, 4), {}, ("--base", "tiny"), "there is --base, but no --model"),
        ((8, 3, 2, 4), {}, ("--decoder", "small"), "has no small decoder"),
        ((8, 3, 2, 4), {}, ("--decoder", "missing.pth"), "decoder is 'missing.pth', which is not a file"),
        ((8, 3, 2, 4), {}, ("--decoder-precision", "int8"), "decoder_precision is 'int8'; expected one of"),
        ((8, 3, 2, 4), {}, ("--device", "foo"), "'foo' is not a device"),
        ((8, 3, 2, 4), {}, ("-o", "a.avi"), "cannot write a.avi: expected a name that ends in .mp4, .mkv, .webm, .gif"),
        ((8, 3, 2, 4), {}, ("-o", "a.png"), "cannot write a.png: expected one place for the number of the frame"),
        ((8, 3, 2, 4), {}, ("-o", "missing/a.npy"), "cannot write missing/a.npy: .*missing is not a folder"),
        ((8, 3, 2, 4), {}, ("-o", "z.safetensors", "--overwrite"), "cannot write z.safetensors: it has the latents"),
    ],
)  # fmt: skip
def test_bad_inputs_are_one_line_and_write_nothing(
    shape: tuple[int, ...],
    notes: dict[str, float],
    options: tuple[str, ...],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "z.safetensors", latents(*shape), model_folder, **notes)
    before = (tmp_path / "z.safetensors").read_bytes()
    assert decode(Path("z.safetensors"), Path("videos"), *options) == 2
    assert re.search(message, line(capsys))
    assert file_names(tmp_path) == ["z.safetensors"] and (tmp_path / "z.safetensors").read_bytes() == before


def test_nan_is_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z = latents(2, CHANNELS, 3, 2, 4)
    z[1, 0, 2, 0, 0] = float("nan")
    assert decode(saved(tmp_path / "z.safetensors", z, model_folder), tmp_path / "a.mp4") == 2
    assert "z.safetensors contains NaN or infinity" in line(capsys) and file_names(tmp_path) == ["z.safetensors"]


@pytest.mark.parametrize("name", ["a.mp4", "a.npy", "a.safetensors"])
def test_a_full_disk_is_one_line(
    name: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path / "z.safetensors", latents(CHANNELS, 9, 2, 4), model_folder)
    with no_file_longer_than(1500):
        assert decode(file, tmp_path / name) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and re.search(f"cannot write .*{name}: file too large; no ", errors[0])
    assert file_names(tmp_path) == ["z.safetensors"]


def test_a_full_disk_during_generation_leaves_the_video_alone(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, file = tmp_path / "a.mp4", tmp_path / "z.safetensors"
    options = ["--model", str(model_folder), "--seconds", "20", "--latents", str(file), "-o", str(video)]
    with no_file_longer_than(100_000):
        assert main(["generate", "a red ball", *FP32, *options]) == 2
    assert "a.mp4: file too large; the" in capsys.readouterr().err
    assert file_names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("name", ["z.pt", "missing/z.safetensors"])
def test_a_file_of_latents_that_cannot_be_written_is_refused(
    name: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model_folder), "--latents", str(tmp_path / name), "-o", str(tmp_path / "a.mp4")]
    assert main(["generate", "a red ball", *options]) == 2
    assert re.search(f"cannot write .*{name}: (expected a name that ends in .safetensors|.* is not a f)", line(capsys))
    assert file_names(tmp_path) == []


def test_after_a_signal_the_latents_are_those_of_the_video(model_folder: Path, tmp_path: Path) -> None:
    video, file = tmp_path / "a.mp4", tmp_path / "z.safetensors"
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", "3600", *FP32]
    process = subprocess.Popen(
        [*command, "--model", str(model_folder), "--latents", str(file), "-o", str(video)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=restore_signals,
    )
    assert process.stderr is not None
    for text in process.stderr:
        if text.startswith("chunk 3/"):
            break
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr
    assert file_names(tmp_path) == ["a.mp4", "z.safetensors"]
    frames = probe(video)[0]
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["num_frames"] == str(frames)
        assert stored.get_tensor("latents").shape[2] == 1 + (frames - 1) // 4


def test_a_signal_leaves_the_frames_of_a_video_and_no_array(model_folder: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "z.safetensors", latents(CHANNELS, 40_000, 2, 4), model_folder)
    for name, left in (("a.mp4", ["a.mp4"]), ("a.npy", [])):
        process = subprocess.Popen(
            [sys.executable, "-m", "longvideo.cli.main", "decode", str(file), *FP32, "-o", str(tmp_path / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=restore_signals,
        )
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith(f"{name}: frame 93/"):
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT and "Traceback" not in stderr
        assert file_names(tmp_path) == sorted([*left, "z.safetensors"])
        if left:
            frames = probe(tmp_path / name)[0]
            assert frames >= 61 and f"a.mp4: {frames} of 159997 frames" in stdout
        (tmp_path / name).unlink(missing_ok=True)
