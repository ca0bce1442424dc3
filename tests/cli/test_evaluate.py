"""`longvideo eval` judges folders and models, prints the scores, and refuses invalid options in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from longvideo.cli.evaluation_videos import generate_videos
from longvideo.cli.main import main
from longvideo.evaluation.shapeworld import build_tasks
from longvideo.infer.pipeline import StreamingPipeline


class Painter:
    """Replaces the pipeline: all pixels equal the seed, which identifies a video."""

    def stream(
        self, _prompts: list[str], *, seconds: float, steps: int | None, guidance: float | None, seed: int
    ) -> Iterator[np.ndarray]:
        assert (steps, guidance) == (4, None)
        for _ in range(2):
            yield np.full((round(seconds * 12), 2, 2, 3), seed, np.uint8)

    def generate_batch(
        self,
        prompts: list[list[str]],
        *,
        seconds: list[float],
        seeds: list[int],
        steps: int | None,
        guidance: float | None,
    ) -> np.ndarray:
        assert (steps, guidance) == (4, None)
        assert len(prompts) == len(seeds) and all(len(shots) == len(seconds) for shots in prompts)
        return np.stack([np.full((round(sum(seconds) * 24), 2, 2, 3), seed, np.uint8) for seed in seeds])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_task_gets_its_own_video_whatever_the_batch(batch: int) -> None:
    tasks = build_tasks(5, seconds=2, shots=2, seed=3)
    videos = list(generate_videos(cast("StreamingPipeline", Painter()), tasks, batch=batch, steps=4, guidance=None))
    assert [task for task, _ in videos] == tasks
    for task, frames in videos:
        assert frames.shape == (96, 2, 2, 3)
        assert (frames == task.seed).all()


def test_judge_command_prints_json_for_every_condition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "judge", "--num", "1"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [row["condition"] for row in record] == ["clean", "soft", "compressed"]
    assert all(row["scores"]["color"]["right"] == 1 for row in record)
    assert "motion" in printed.err


def test_a_folder_of_ground_truth_videos_scores_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    options = ["--clips", "1", "--seconds", "7", "--shots", "2", "--split", "heldout"]
    assert main(["data", "shapeworld", "--out", str(data), *options]) == 0
    assert main(["eval", "shapeworld", "--videos", str(data), "--out", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["num_shots"] == 2
    for question in ("color", "shape", "background", "shows_prompt", "cut_in_time"):
        assert record["shots"][question]["share"] == 1.0, question
    capsys.readouterr()
    before = (out / "results.json").read_bytes()
    assert main(["eval", "shapeworld", "--videos", str(data), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


@pytest.mark.slow
def test_switches_are_counted_and_shown_in_every_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "switches"
    options = ["--model", "tiny", "--device", "cpu", "--num", "1", "--steps", "1"]
    assert main(["eval", "switches", *options, "--mode", "recache", "--mode", "keep", "--out", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    assert list(record) == ["keep", "recache"]
    for entry in record.values():
        (switch,) = entry["switches"]
        assert [entry[f"chunk {chunk}"]["right"] for chunk in (1, 2, 3, 4)] == [int(shown) for shown in switch["shown"]]
        assert entry["never_shown"] == (switch["late"] is None)
        assert entry["continues"]["right"] == switch["continues"]
    with Image.open(out / "switches.png") as picture:
        assert picture.width > 8 * 0.6 * 224 and 2 * 0.6 * 128 < picture.height < 3 * 0.6 * 128
    printed = capsys.readouterr().err
    assert "keep" in printed and "continues" in printed


@pytest.mark.filterwarnings("ignore:the (video|model)")
def test_continued_footage_is_judged(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "extension"
    options = ["--model", str(model_folder), "--device", "cpu", "--num", "2", "--seconds", "1.5", "--out", str(out)]
    assert main(["eval", "extension", *options]) == 0
    printed = capsys.readouterr().err
    record = json.loads((out / "results.json").read_text())
    assert len(record["videos"]) == record["scores"]["motion"]["total"] == 2
    inside = sum(video["inside"] for video in record["videos"])
    seams = [sum(video[name] for video in record["videos"]) / inside for name in ("seam", "file_seam")]
    assert f"inside: {seams[0]:.2f}, from the file {seams[1]:.2f}" in " ".join(printed.split())
    assert (out / "extension.png").exists()
    assert main(["eval", "extension", *options]) == 2
    assert "already contains results.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num", "0"], "--num"),
        (["--seconds", "-1"], "number above 0"),
        (["--seconds", "nan"], "number above 0"),
        (["--seconds", "1", "--shots", "3"], "at least 1.5"),
        (["--videos", "nowhere"], "nowhere"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--device", "cpu", "--text-encoder", "cuda"], "text_encoder is cuda, but the model runs on cpu"),
        (["--text-encoder", "int8"], "int8"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "shapeworld", "--out", str(tmp_path / "out"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert not (tmp_path / "out").exists()
