"""`longvideo generate`: its output file, Ctrl-C, every kind of bad input, and ranks that share the denoising."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from longvideo.cli.main import main
from longvideo.cli.model_options import warn_of_missing_quotes
from longvideo.data.pictures import read_image
from longvideo.data.video import VideoReader
from longvideo.infer.decode import ChunkDecoder
from longvideo.infer.generation import encode_first_frame
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.streaming.decoder_convolutions import Grid
from tests.data.footage import write
from tests.data.test_real_footage import real_clip
from tests.folders import file_names


def probe(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Decode a file; return its frames, rate and size."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(video=0))
        return frames, float(stream.average_rate or 0), (stream.height, stream.width)


def run(folder: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(folder), "--device", "cpu", *arguments])


def test_two_prompts_make_a_file_of_the_requested_length(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.mp4"
    code = run(model_folder, "a red ball", "a blue square", "--seconds", "4", "-o", str(out))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert probe(out) == (96, 24.0, (32, 64))
    assert "96 frames, 4.00 s at 24 frames/s" in printed.out and printed.out.count("\n") == 1
    lines = [line for line in printed.err.splitlines() if line.startswith("chunk")]
    assert len(lines) == 5 and lines[-1].startswith("chunk 4/4 | ")


def test_a_script_a_picture_and_overwriting(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, picture, out = tmp_path / "shots.yaml", tmp_path / "first.png", tmp_path / "out.mkv"
    script.write_text("- {prompt: a red ball, seconds: 2}\n- {prompt: a blue zebra, seconds: 2.5, cut: false}\n")
    Image.fromarray(np.full((50, 50, 3), 200, np.uint8)).save(picture)
    out.write_text("old")
    code = run(model_folder, "--script", str(script), "--image", str(picture), "--overwrite", "-o", str(out))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert probe(out)[0] == 108
    assert "warning: the model's vocabulary does not contain 'zebra'" in printed.err


def test_animations_and_pictures_have_the_frames_of_the_video(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for name in ("a.mkv", "a.webm", "a.gif", "a.webp", "frames/%03d.png"):
        assert run(model_folder, "a red ball", "--seconds", "1.5", "-o", str(tmp_path / name)) == 0
    exact = np.stack([iio.imread(path) for path in sorted((tmp_path / "frames").iterdir())]).astype(float)
    assert exact.shape == (36, 32, 64, 3)
    for name in ("a.webm", "a.gif", "a.webp"):
        frames = np.stack(list(iio.imiter(tmp_path / name, plugin="pyav" if name == "a.webm" else "pillow")))
        luma = np.array([0.2126, 0.7152, 0.0722])  # some formats halve the resolution of color, not of brightness
        assert np.corrcoef((frames[..., :3] @ luma).ravel(), (exact @ luma).ravel())[0, 1] > 0.9, name


def test_a_video_starts_with_a_frame_of_real_footage(
    pipeline: StreamingPipeline, model_folder: Path, tmp_path: Path
) -> None:
    picture, out = tmp_path / "first.png", tmp_path / "out.mp4"
    real = VideoReader().read(real_clip("bikes.mp4"), start_seconds=3.0, max_frames=1)[0]
    Image.fromarray(real.numpy()).save(picture)
    assert run(model_folder, "a red ball", "--seconds", "1", "--image", str(picture), "-o", str(out)) == 0
    latent = encode_first_frame(pipeline.models, read_image(picture, size=(32, 64)))
    _, _, _, height, width = latent.shape
    decoder = ChunkDecoder(pipeline.models.decoder, Grid(1, 1, height, width))
    expected = decoder.decode(latent, 1)[0, 0].astype(float)
    with av.open(str(out)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    luma = np.array([0.2126, 0.7152, 0.0722])  # the file halves the resolution of color, not of brightness
    assert np.corrcoef((first @ luma).ravel(), (expected @ luma).ravel())[0, 1] > 0.98


def test_a_video_continues_another(
    pipeline: StreamingPipeline, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    footage, out = write(tmp_path / "clip.mp4", 90, fps=30).video, tmp_path / "out.mkv"
    assert run(model_folder, "a red ball", "--seconds", "3", "--video", str(footage), "-o", str(out)) == 0
    printed = capsys.readouterr()
    assert probe(out)[0] == 72
    assert re.findall("chunk ([0-9])/([0-9])", printed.err) == [("1", "3"), ("2", "3"), ("3", "3")]
    assert "warning: the video comes back from the model's autoencoder with a PSNR of" in printed.err
    expected = np.concatenate(list(pipeline.stream("a red ball", seconds=3, video=footage)))
    frames = np.stack(list(iio.imiter(out, plugin="pyav")))
    luma = np.array([0.2126, 0.7152, 0.0722])  # the file halves the resolution of color, not of brightness
    assert np.corrcoef((frames @ luma).ravel(), (expected @ luma).ravel())[0, 1] > 0.98
    options = ("--video", str(footage), "--video-seconds", "9", "--overwrite", "-o", str(out))
    assert run(model_folder, "a red ball", *options) == 2
    assert "video_seconds is 9; expected from 1.21, one chunk, to 2.54" in capsys.readouterr().err


def restore_signals() -> None:
    """Set default handlers. A shell starts background jobs with interrupts ignored, and processes inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_finished_chunks(number: signal.Signals, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", "3600"]
    process = subprocess.Popen(
        [*command, "--model", str(model_folder), "--device", "cpu", "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=restore_signals,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("chunk 3/"):
            break
    playable_while_running = probe(out)[0]
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    frames = probe(out)[0]
    assert frames >= playable_while_running >= 93
    assert f"out.mp4: {frames} frames" in stdout and file_names(tmp_path) == [out.name]


def test_a_closed_terminal_ends_the_command_with_a_complete_file(model_folder: Path, tmp_path: Path) -> None:
    out, (ours, theirs) = tmp_path / "out.mp4", pty.openpty()
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", "3600"]

    def take_terminal() -> None:
        restore_signals()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*command, "--model", str(model_folder), "--device", "cpu", "-o", str(out)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    shown = b""
    while not re.search(
        rb"chunk (?:[3-9]|\d{2,})/", shown
    ):  # the bar is drawn ten times a second, so it may skip chunks
        shown += os.read(ours, 2**16)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert probe(out)[0] >= 93 and out.read_bytes()[-16:-12] == b"\0\0\0\x10"  # the index is at the end
    assert file_names(tmp_path) == [out.name]


def test_a_pipe_without_a_reader_does_not_end_the_video(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", "4"]
    process = subprocess.Popen(
        [*command, "--model", str(model_folder), "--device", "cpu", "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and probe(out)[0] == 96


def test_an_ignored_hangup_stays_ignored(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", "4"]
    process = subprocess.Popen(
        ["nohup", *command, "--model", str(model_folder), "--device", "cpu", "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("chunk 1/"))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and probe(out)[0] == 96


def test_ctrl_c_before_the_first_frame_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import signal, sys, threading, time, os\n"
        "from longvideo.infer import generation\n"
        "from longvideo.cli.main import main\n"
        "def slow(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(10)\n"
        "    yield\n"
        "generation.rollout = slow\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out.mp4"
    out.write_text("old")
    arguments = ["generate", "a red ball", "--model", str(model_folder), "--device", "cpu", "--overwrite"]
    started = time.monotonic()
    command = [sys.executable, "-c", code, *arguments, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=restore_signals)
    assert done.returncode == 130 and "Traceback" not in done.stderr and time.monotonic() - started < 60
    assert "nothing was written" in done.stdout
    assert out.read_text() == "old" and file_names(tmp_path) == ["out.mp4"]


def test_missing_quotes_give_a_warning(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.mp4")
    assert run(model_folder, "a", "red", "ball", "bounces", "--seconds", "6", "-o", out) == 0
    assert 'for one prompt use quotes: longvideo generate "a red ball bounces"\n' in capsys.readouterr().err
    assert run(model_folder, "a red ball", "zoom", "-o", out, "--seconds", "4", "--overwrite") == 0
    assert "quotes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["a", "red ball", "bounces"], ["A", "red ball bounces"], ["a red ball", "on", "ice"]]
)
def test_parts_of_a_sentence_with_quotes_in_its_middle_give_a_warning(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_missing_quotes(words, command="longvideo generate")
    sentence = " ".join(words)
    assert (
        f'{len(words)} prompts, each shown on its own; for one prompt use quotes: longvideo generate "{sentence}"'
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        ["a"],
        ["a red ball bounces"],
        ["a red ball bounces", "a blue cube spins"],
        ["ocean", "a red ball bounces", "fireworks"],
        ["a red ball", "zoom", "a blue cube on the left", "sunset"],
        ["the light turns on", "the end of a day"],
    ],
)
def test_separate_prompts_give_no_warning(prompts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_missing_quotes(prompts, command="longvideo generate")
    assert capsys.readouterr().err == ""


BAD = {
    "no prompt": ([], "there is no prompt"),
    "empty prompt": ([""], "the prompt is empty"),
    "empty second prompt": (["a red ball", "  "], "prompt 2 is empty"),
    "zero seconds": (["a", "--seconds", "0"], "seconds is 0;"),
    "negative seconds": (["a", "--seconds", "-4"], "seconds is -4;"),
    "absurd seconds": (["a", "--seconds", "1e12"], "at most 86400"),
    "seconds that are not a number": (["a", "--seconds", "long"], "long"),
    "byte that is not UTF-8": (["a r\udce9d ball"], "the prompt is not valid text: the byte 0xe9 follows 'a r'"),
    "half an emoji": (["a ball", "\ud83d"], "prompt 2 is not valid text: half a character (U+D83D)"),
    "script without end": (["--script", "/dev/zero"], "has more than 4,194,304 bytes"),
    "too short for its shots": (["a ball", "b c", "--seconds", "1"], "use 1.33 s or more for every shot"),
    "zero steps": (["a", "--steps", "0"], "steps is 0; expected a whole number from 1 to 1000"),
    "too many steps": (["a", "--steps", "5000"], "steps is 5000"),
    "negative guidance": (["a", "--guidance", "-1"], "guidance is -1; expected a number from 0 to 50"),
    "absurd guidance": (["a", "--guidance", "1000"], "guidance is 1000"),
    "negative prompt without guidance": (
        ["a", "--negative-prompt", "b"],
        "guidance is 1; set guidance above 1",
    ),
    "negative prompt of a shot": (
        ["--script", "{tmp}/away.yaml"],
        "the negative prompt has no effect",
    ),
    "two negative prompts": (
        ["--script", "{tmp}/away.yaml", "--negative-prompt", "c", "--guidance", "2"],
        "the script has the negative prompt 'b'; leave the other one, 'c', out",
    ),
    "too many tokens": (["ball " * 40], "the prompt has 41 tokens; expected at most 32; shorten 'ball ball"),
    "negative seed": (["a", "--seed", "-1"], "seed is -1"),
    "unknown model": (["a", "--model", "{tmp}/nothing"], "nothing"),
    "model that is a file": (["a", "--model", "{tmp}/text.png"], "expected a model folder"),
    "unknown device": (["a", "--device", "abacus"], "'abacus' is not a device"),
    "absent device": (["a", "--decode-device", "cuda:64"], "device 'cuda:64' does not exist"),
    "file that is not a picture": (["a", "--image", "{tmp}/text.png"], "text.png is not an image"),
    "picture that is absent": (["a", "--image", "{tmp}/none.png"], "there is no image"),
    "picture and video": (
        ["a", "--image", "{tmp}/text.png", "--video", "{tmp}/old.mp4"],
        "image and video exclude each",
    ),
    "latents and video": (
        ["a", "--latents", "a.safetensors", "--video", "{tmp}/old.mp4"],
        "--latents and --video exclude",
    ),
    "file that is not a video": (["a", "--video", "{tmp}/old.mp4"], "old.mp4 is not a video in a supported format"),
    "video that is absent": (["a", "--video", "{tmp}/none.mp4"], "there is no video"),
    "length of no video": (["a", "--video-seconds", "2"], "video_seconds is 2.0, but there is no video"),
    "script and prompt": (["a", "--script", "{tmp}/good.yaml"], "prompts and --script exclude each other"),
    "script and seconds": (["--script", "{tmp}/good.yaml", "--seconds", "3"], "exclude each other"),
    "absent script": (["--script", "{tmp}/none.yaml"], "cannot read the script"),
    "script with an unknown key": (["--script", "{tmp}/key.yaml"], "shot 1 has the unknown key 'secs'"),
    "script with a negative length": (["--script", "{tmp}/negative.yaml"], "shot 2: seconds is -1;"),
    "output that exists": (["a", "-o", "{tmp}/old.mp4"], "old.mp4 exists"),
    "output of another kind": (["a", "-o", "{tmp}/new.avi"], "expected a name that ends in .mp4, .mkv, .webm, .gif"),
    "one picture for all frames": (["a", "-o", "{tmp}/new.png"], "expected one place for the number of the frame"),
    "output in no folder": (["a", "-o", "{tmp}/none/new.mp4"], "is not a folder"),
    "output that cannot be written": (["a", "-o", "/proc/self/new.mp4"], "cannot write /proc/self/new.mp4"),
    "unknown option": (["a", "--secnds", "4"], "--secnds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_two(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "old.mp4": "old",
        "text.png": "no picture",
        "good.yaml": "- {prompt: a, seconds: 2}",
        "key.yaml": "- {prompt: a, secs: 2}",
        "away.yaml": "negative_prompt: b\nshots:\n- {prompt: a, seconds: 2}",
        "negative.yaml": "- {prompt: a, seconds: 2}\n- {prompt: b, seconds: -1}",
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    arguments, message = BAD[name]
    assert run(model_folder, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert printed.out == ""
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize("damage", ["missing", "truncated", "misshapen", "no index"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_damaged_folder_is_one_line_and_code_two(
    part: str,
    damage: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "misshapen":
        tensors = load_file(weights)
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name].flatten()[:1].clone()}, weights)
    else:
        (folder / "model_index.json").unlink()
    assert run(folder, "a red ball") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert ("model_index.json" if damage == "no index" else part) in printed.err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--precision", "int8"], "one of bf16, nvfp4, nvfp4-weights, fp8"),
        (["--kv-cache", "int4"], "one of bf16, nvfp4, nvfp4-mixed"),
    ],
)
def test_an_unknown_number_format_is_refused(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a red ball bounces", *option, "-o", str(tmp_path / "out.mp4")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PROMPTS = ["a red ball bounces", "a blue square spins"]
OPTIONS = ["--device", "cpu", "--seconds", "3", "--steps", "1", "--decoder-precision", "fp32"]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "longvideo.cli.main", "generate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_two_ranks_write_the_video_of_one(tmp_path: Path) -> None:
    both, alone = tmp_path / "both.mp4", tmp_path / "alone.mp4"
    run = torchrun([*PROMPTS, *OPTIONS, "-o", str(both)])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("both.mp4: 72 frames") == 1
    assert main(["generate", *PROMPTS, *OPTIONS, "-o", str(alone)]) == 0
    result, expected = (iio.imread(path).astype(int) for path in (both, alone))
    assert result.shape == expected.shape
    # products of other shapes are rounded differently
    assert np.abs(result - expected).mean() < 2


def test_a_gpu_cannot_be_chosen_for_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", PROMPTS[0], "--device", "cuda:1", "-o", str(tmp_path / "a.mp4")]) == 2
    assert "expected cpu or cuda, the GPU of each rank's number" in capsys.readouterr().err
