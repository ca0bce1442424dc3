"""`longvideo generate --prompts`: which videos a file of prompts becomes, on one rank and on two, and after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.generate_prompts import BatchFormat
from longvideo.cli.main import main
from longvideo.cli.stopping import Stopped
from longvideo.errors import UserError
from longvideo.infer import loading
from longvideo.infer.containers import CONTAINERS
from longvideo.infer.fit.placement import Placement
from longvideo.infer.generation import Models
from longvideo.infer.loading import load_models
from longvideo.infer.pictures import PNG, PictureWriter
from longvideo.infer.script import Script
from longvideo.infer.text_encoder import encode_prompts
from longvideo.infer.writer import count_playable_frames
from tests.cli.test_generate import probe, restore_signals
from tests.folders import file_names

OPTIONS = ["--device", "cpu", "--steps", "1", "--decoder-precision", "fp32"]


def run(folder: Path, file: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(folder), *OPTIONS, "--prompts", str(file), *arguments])


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "videos.jsonl").read_text().splitlines()]


def test_each_line_becomes_the_video_of_its_seed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "videos"
    lines = [{"prompts": ["a red ball"]}, {"prompts": ["a red ball", "a zebra"], "seconds": 3}]
    lines += [{"prompts": ["a red ball"], "seed": 5, "seconds": 0.5}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert run(model_folder, file, "--seconds", "1", "--seed", "4", "-o", str(out)) == 0
    printed = capsys.readouterr()
    assert "0 of 3 videos are finished" in printed.err and printed.out.count("\n") == 3
    assert "warning: 00001.mp4: the model's vocabulary does not contain 'zebra'" in printed.err
    names = ["00000.mp4", "00001.mp4", "00002.mp4"]
    assert file_names(out) == [".videos.lock", *names, "settings.json", "videos.jsonl"]
    assert [probe(out / name)[0] for name in names] == [24, 72, 12]
    assert [(row["line"], row["seed"], row["status"]) for row in listed(out)] == [
        (1, 4, "done"),
        (2, 5, "done"),
        (3, 5, "done"),
    ]
    alone = ["generate", "--model", str(model_folder), *OPTIONS, "a red ball", "a zebra", "--seed", "5"]
    assert main([*alone, "--seconds", "3", "-o", str(tmp_path / "alone.mp4")]) == 0
    assert (tmp_path / "alone.mp4").read_bytes() == (out / "00001.mp4").read_bytes()
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    capsys.readouterr()
    assert run(model_folder, file, "--seconds", "1", "--seed", "4", "-o", str(out)) == 0
    printed = capsys.readouterr()
    assert "3 of 3 videos are finished" in printed.err and not printed.out
    assert {name: (out / name).stat().st_mtime_ns for name in names} == before


def test_a_complete_video_whose_line_was_not_written_is_kept(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text("a red ball\na blue ball\n")
    assert run(model_folder, file, "--seconds", "1", "-o", str(out)) == 0
    rows = [{**row, "status": "generating"} for row in listed(out)]
    (out / "videos.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (out / "00001.mp4").write_bytes((out / "00001.mp4").read_bytes()[:2000])
    before = (out / "00000.mp4").stat().st_mtime_ns
    capsys.readouterr()
    assert run(model_folder, file, "--seconds", "1", "-o", str(out)) == 0
    assert "00000.mp4: 24 frames, complete before" in capsys.readouterr().out
    assert (out / "00000.mp4").stat().st_mtime_ns == before and probe(out / "00001.mp4")[0] == 24
    assert [row["status"] for row in listed(out)] == ["done", "done"]


def test_the_prompts_of_unfinished_videos_are_all_that_a_run_or_its_continuation_encodes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "videos"
    lines = [{"prompts": ["a red ball"]}, {"prompts": ["a ball", "a square"], "seconds": 3, "negative_prompt": "blue"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--seconds", "1", "--guidance", "2", "--negative-prompt", "red", "-o", str(out)]
    assert run(model_folder, file, *options) == 0
    whole = {str(row["file"]): (out / str(row["file"])).read_bytes() for row in listed(out)}
    seen: list[Models] = []

    def load(folder: ModelFolder, placement: Placement, *, scripts: list[Script], **others: Any) -> Models:
        """Free the text encoder on a CPU too."""
        models = load_models(folder, placement, **others)
        own, device = models.text_encoder, placement.text_device
        known = encode_prompts(lambda: own, scripts, cut_prefix=folder.settings.cut_prefix, device=device)
        seen.append(replace(models, text_encoder=known))
        return seen[-1]

    monkeypatch.setattr(loading, "load_models", load)
    assert run(model_folder, file, *options, "--overwrite") == 0
    assert {name: (out / name).read_bytes() for name in whole} == whole
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompts": ["a blue square"]}])))
    rows = [listed(out)[0], {**listed(out)[1], "status": "generating"}]
    (out / "videos.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (out / "00001.mp4").unlink()
    assert run(model_folder, file, *options) == 0
    assert {name: (out / name).read_bytes() for name in whole} == whole and probe(out / "00002.mp4")[0] == 24
    seen[1].text_encoder.encode(["a ball", "a square", "blue", "a blue square", "red"])
    with pytest.raises(UserError, match="freed after .* and 'a red ball' is not one of them"):
        seen[1].text_encoder.encode(["a red ball"])


@pytest.mark.parametrize("suffix", [suffix for suffix in get_args(BatchFormat) if suffix != "png"])
def test_every_format_is_written_and_continued(
    suffix: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text("a red ball\na blue ball\n")
    options = ["--seconds", "0.5", "-o", str(out), "--format", suffix]
    assert run(model_folder, file, *options) == 0
    first, second = (out / f"0000{number}.{suffix}" for number in range(2))
    assert [row["file"] for row in listed(out)] == [first.name, second.name]
    assert count_playable_frames(first) == count_playable_frames(second) == 12
    rows = [{**row, "status": "generating"} for row in listed(out)]
    (out / "videos.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    assert run(model_folder, file, *options) == 0
    printed = capsys.readouterr().out
    assert f"{first.name}: 12 frames, complete before" in printed and f"{second.name}: 12 frames, 0.50 s" in printed
    assert first.stat().st_mtime_ns == before and second.read_bytes() == whole


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_folders_of_pictures_are_those_of_one_video_and_whole_or_missing(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, names = tmp_path / "prompts.txt", tmp_path / "videos", [f"{number:05d}.png" for number in range(36)]
    file.write_text("a red ball\na blue ball\na square\n")
    options = ["--seconds", "1.5", "-o", str(out), "--format", "png"]
    write, written = PictureWriter.write, [0]

    def stopped(writer: PictureWriter, frames: np.ndarray) -> None:
        write(writer, frames)
        written[0] += len(frames)
        if written[0] == 36 + 29:  # in the second video
            raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PictureWriter, "write", stopped)
        assert run(model_folder, file, *options) == 143
    assert [(row["file"], row["status"]) for row in listed(out)] == [
        ("00000", "done"),
        ("00001", "waiting"),
        ("00002", "waiting"),
    ]
    assert entries(out) == [".videos.lock", *(f"00000/{name}" for name in names), "settings.json", "videos.jsonl"]
    rows = [{**row, "status": "generating"} for row in listed(out)]
    (out / "videos.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (out / ".00001.0123abcd.part").mkdir()  # of a process that was killed
    before = (out / "00000/00035.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(model_folder, file, *options) == 0
    printed = capsys.readouterr().out
    assert "00000: 36 frames, complete before" in printed and "00001: 36 frames, 1.50 s" in printed
    assert (out / "00000/00035.png").stat().st_mtime_ns == before
    assert [row["status"] for row in listed(out)] == ["done"] * 3
    assert file_names(out) == [".videos.lock", "00000", "00001", "00002", "settings.json", "videos.jsonl"]
    alone = ["generate", "--model", str(model_folder), *OPTIONS, "a blue ball", "--seed", "1", "--seconds", "1.5"]
    assert main([*alone, "-o", str(tmp_path / "alone/%05d.png")]) == 0
    assert file_names(tmp_path / "alone") == file_names(out / "00001") == names
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (out / "00001" / name).read_bytes()


def test_another_format_deletes_pictures_and_no_other_files(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text("a red ball\na blue ball\n")
    options = ["--seconds", "0.2", "-o", str(out), "--format"]
    assert run(model_folder, file, *options, "png") == 0
    (out / "00001/notes.txt").write_text("mine")
    before = entries(out)
    capsys.readouterr()
    assert run(model_folder, file, *options, "webm", "--overwrite") == 2
    assert "00001: notes.txt in it is not a picture of a video; move it elsewhere" in capsys.readouterr().err
    assert entries(out) == before
    (out / "00001/notes.txt").unlink()
    assert run(model_folder, file, *options, "webm", "--overwrite") == 0
    assert file_names(out) == [".videos.lock", "00000.webm", "00001.webm", "settings.json", "videos.jsonl"]


def test_formats_are_those_of_one_video() -> None:
    assert {f".{suffix}" for suffix in get_args(BatchFormat)} == {*CONTAINERS, PNG}


def test_another_format_is_refused_or_begins_again(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text("a red ball\na blue ball\n")
    assert run(model_folder, file, "--seconds", "0.5", "-o", str(out)) == 0
    capsys.readouterr()
    file.write_text("a red ball\n")
    options = ["--seconds", "0.5", "-o", str(out), "--format", "webm"]
    assert run(model_folder, file, *options) == 2
    assert "were begun with format='mp4', got 'webm'" in capsys.readouterr().err
    assert run(model_folder, file, *options, "--overwrite") == 0
    assert file_names(out) == [".videos.lock", "00000.webm", "settings.json", "videos.jsonl"]


BAD = {
    "a damaged line": (["-o", "{tmp}/out"], "bad.jsonl", "bad.jsonl:2 is not JSON"),
    "a negative prompt without guidance": (["-o", "{tmp}/out"], "away.jsonl", "away.jsonl:2: the negative prompt has"),
    "too many tokens": (
        ["-o", "{tmp}/out"],
        "tokens.txt",
        "tokens.txt:1: the prompt has 41 tokens; expected",
    ),
    "a shot that is too short": (["-o", "{tmp}/out"], "short.jsonl", "short.jsonl:2: shot 2 cannot start at"),
    "a length out of range": (["-o", "{tmp}/out"], "long.jsonl", "long.jsonl:1: the video: seconds is 1e+09"),
    "a seed out of range": (["-o", "{tmp}/out", "--seed", str(2**63 - 1)], "good.txt", "good.txt:2: seed is 92233"),
    "a file as output": (["-o", "{tmp}/out.mp4"], "good.txt", "expected a name without suffix, for a folder"),
    "no folder above": (["-o", "{tmp}/none/out"], "good.txt", "none/out: no such file or directory"),
    "no file": (["-o", "{tmp}/out"], "none.txt", "cannot read the file of prompts"),
    "prompts twice": (["a ball", "-o", "{tmp}/out"], "good.txt", "--prompts and prompts on the command line exclude"),
    "a script": (["--script", "a.yaml", "-o", "{tmp}/out"], "good.txt", "--prompts and --script exclude each other"),
    "a picture": (["--image", "a.png", "-o", "{tmp}/out"], "good.txt", "--prompts and --image exclude each other"),
    "a video": (["--video", "a.mp4", "-o", "{tmp}/out"], "good.txt", "--prompts and --video exclude each other"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_loading(
    name: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("a red ball\na blue ball\n")
    (tmp_path / "bad.jsonl").write_text('{"prompts": ["a"]}\n{"prompts": ["a"\n')
    (tmp_path / "short.jsonl").write_text('{"prompts": ["a"]}\n{"prompts": ["a", "b"], "seconds": 0.5}\n')
    (tmp_path / "long.jsonl").write_text('{"prompts": ["a"], "seconds": 1000000000}\n')
    (tmp_path / "away.jsonl").write_text('{"prompts": ["a"]}\n{"prompts": ["a"], "negative_prompt": "b"}\n')
    (tmp_path / "tokens.txt").write_text("ball " * 40)
    before = file_names(tmp_path)
    arguments, file, message = BAD[name]
    code = run(model_folder, tmp_path / file, *(word.replace("{tmp}", str(tmp_path)) for word in arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and message in line and file_names(tmp_path) == before


def test_a_format_without_a_file_of_prompts_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a red ball", "--model", str(model_folder), "--format", "webm"]
    assert main([*arguments, "-o", str(tmp_path / "out.mp4")]) == 2
    assert "--format needs --prompts; the name of the output states its format" in capsys.readouterr().err


def launch(model_folder: Path, file: Path, out: Path) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "longvideo.cli.main", "generate", "--model", str(model_folder), *OPTIONS]
    return subprocess.Popen(
        [*command, "--prompts", str(file), "--seconds", "0.5", "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=restore_signals,
    )


@pytest.mark.slow
def test_two_ranks_make_each_of_64_videos_once_although_they_are_killed(model_folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text("".join(f"a red ball {number}\n" for number in range(64)))
    process = launch(model_folder, file, out)
    assert process.stdout is not None
    reported = []
    for line in process.stdout:
        reported.append(line)
        if len(reported) == 20:  # the launcher first, so that it does not stop the ranks in its own way
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(ranks) == 2
            for number in (process.pid, *map(int, ranks)):
                os.kill(number, signal.SIGKILL)
    process.communicate(timeout=60)
    unfinished = [row for row in listed(out) if row["status"] != "done"]
    assert 0 < len(unfinished) <= 44
    resumed = launch(model_folder, file, out)
    stdout, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    assert len(re.findall(r"\d+ of 64 videos are finished", stderr)) == 1
    finished = 64 - len(unfinished)
    assert f"{finished} of 64 videos are finished" in stderr
    reported += stdout.splitlines()
    counts = Counter(re.findall(r"(\d{5})\.mp4: 12 frames", "\n".join(reported)))
    # a kill may come between a change of the list and the line about it, at most once on each rank
    assert max(counts.values()) == 1 and 62 <= len(counts) <= 64
    assert [(row["line"], row["seed"], row["status"]) for row in listed(out)] == [
        (index + 1, index, "done") for index in range(64)
    ]
    assert file_names(out) == [
        ".videos.lock", *(f"{index:05d}.mp4" for index in range(64)), "settings.json", "videos.jsonl"
    ]  # fmt: skip
    assert all(probe(out / f"{index:05d}.mp4")[0] == 12 for index in range(64))


@pytest.mark.slow
def test_a_refusal_of_two_ranks_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n\n")
    process = launch(model_folder, tmp_path / "prompts.txt", tmp_path / "videos")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and stderr.count("prompts.txt:2 has an empty prompt") == 1
    assert not (tmp_path / "videos").exists()
