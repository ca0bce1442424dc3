"""The list of videos of a folder: who generates which, what is finished, and which folders are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from longvideo.errors import UserError
from longvideo.infer.video_folder import ListedVideo, VideoFolder
from tests.folders import file_names

SETTINGS = {"model": Path("tiny"), "steps": 2, "adapters": ("a", "b")}
PROMPTS, NEGATIVE_PROMPTS = ("a ball", "a cube"), ("", "rain")
VIDEOS = [ListedVideo(f"{index:05d}.mp4", index + 1, PROMPTS, NEGATIVE_PROMPTS, 2.0, index) for index in range(4)]


def statuses(folder: Path) -> list[str]:
    return [json.loads(line)["status"] for line in (folder / "videos.jsonl").read_text().splitlines()]


def begin(folder: Path, videos: list[ListedVideo] = VIDEOS, *, overwrite: bool = False) -> VideoFolder:
    listed = VideoFolder(folder)
    try:
        listed.begin(videos, SETTINGS, overwrite=overwrite)
    except UserError:
        listed.close()
        raise
    return listed


def test_finished_videos_are_skipped_and_others_begin_again(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    listed = begin(folder)
    for _ in range(3):
        video = listed.claim()
        assert video is not None
        (folder / video.file).write_text("frames")
        if video.line < 3:
            listed.set_status(video, "done")
    assert statuses(folder) == ["done", "done", "generating", "waiting"]
    assert [video.line for video in listed.unfinished()] == [3, 4]
    assert json.loads((folder / "videos.jsonl").read_text().splitlines()[1]) == {
        "file": "00001.mp4", "line": 2, "prompt": ["a ball", "a cube"], "negative_prompt": ["", "rain"],
        "seconds": 2.0, "seed": 1, "status": "done",
    }  # fmt: skip
    listed.close()
    (folder / "00000.mp4").unlink()  # its line is done, and its file is gone
    more = [*VIDEOS, replace(VIDEOS[0], file="00004.mp4", line=5, seed=4)]
    listed = begin(folder, more)
    claimed = []
    while (video := listed.claim()) is not None:
        claimed.append(video.file)
    listed.close()
    assert claimed == ["00000.mp4", "00002.mp4", "00003.mp4", "00004.mp4"]


def test_two_processes_never_claim_the_same_video(tmp_path: Path) -> None:
    folder, count = tmp_path / "videos", 60
    videos = [replace(VIDEOS[0], file=f"{index:05d}.mp4", line=index + 1) for index in range(count)]
    listed = begin(folder, videos)
    code = (
        "import sys, pathlib; from longvideo.infer.video_folder import VideoFolder\n"
        "videos = VideoFolder(pathlib.Path(sys.argv[1])); videos.join()\n"
        "while (video := videos.claim()) is not None:\n"
        "    print(video.file, flush=True); videos.set_status(video, 'done')\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    claimed = [file for process in processes for file in process.communicate(timeout=60)[0].split()]
    listed.close()
    assert sorted(claimed) == [video.file for video in videos] and statuses(folder) == ["done"] * count


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    listed = begin(tmp_path)
    code = (
        "import sys, pathlib; from longvideo.infer.video_folder import VideoFolder\n"
        "VideoFolder(pathlib.Path(sys.argv[1])).begin([], {}, overwrite=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    listed.close()
    assert "other processes generate the videos of" in run.stderr and statuses(tmp_path) == ["waiting"] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompt", r"line 2 of the file of prompts is not what .*00001.mp4 was begun with; restore its prompt"),
        ("fewer", "has 4 videos, and the file of prompts 3; use another folder, or --overwrite"),
        ("settings", "were begun with steps=3, got 2; use the same options"),
        ("damaged", "videos.jsonl:2 is not JSON"),
        ("line", "videos.jsonl:2 is damaged"),
        ("name", "videos.jsonl:2 is damaged"),
        ("no list", "00000.mp4 exists and is not in a videos.jsonl; use another folder"),
    ],
)
def test_other_folders_are_refused_and_do_not_change(tmp_path: Path, change: str, message: str) -> None:
    begin(tmp_path).close()
    path, videos = tmp_path / "videos.jsonl", list(VIDEOS)
    (tmp_path / "00000.mp4").write_text("frames")
    lines = path.read_text().splitlines(keepends=True)
    if change == "prompt":
        videos[1] = replace(VIDEOS[1], prompt=("another",))
    elif change == "fewer":
        videos.pop()
    elif change == "settings":
        (tmp_path / "settings.json").write_text('{"model": "tiny", "steps": 3, "adapters": ["a", "b"]}')
    elif change == "no list":
        path.unlink()
    else:
        elsewhere = lines[1].replace("00001.mp4", "../00001.mp4")
        lines[1] = {"damaged": "{\n", "line": '{"file": "00001.mp4"}\n', "name": elsewhere}[change]
        path.write_text("".join(lines))
    before = {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)}
    with pytest.raises(UserError, match=message):
        begin(tmp_path, videos)
    assert {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)} == before
    begin(tmp_path, videos, overwrite=True).close()
    assert statuses(tmp_path) == ["waiting"] * len(videos) and not (tmp_path / "00000.mp4").exists()
