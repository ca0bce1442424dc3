"""The growing video file: its content, when it appears, and which files it does not change."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.error import InvalidDataError
from PIL import Image, ImageSequence

from longvideo.data.video import check_complete, probe_video
from longvideo.errors import UserError
from longvideo.infer.containers import FragmentedMP4
from longvideo.infer.fragments import VideoFormat
from longvideo.infer.matroska import UNKNOWN_SIZE
from longvideo.infer.writer import OutputFile, VideoWriter, _Output
from tests.folders import file_names

SIZES = [29, 32, 32]
SUFFIXES = [".mp4", ".mkv", ".webm", ".gif", ".webp"]


def moving_disc(start: int, count: int, *, height: int = 128, width: int = 224) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (30, 60, 120)
    for index in range(count):
        inside = (columns - 20 - 3 * (start + index) % (width - 40)) ** 2 + (rows - height // 2) ** 2 < 400
        frames[index][inside] = (220, 40, 30)
    return frames


def decode(path: Path, *, truncated: bool = False) -> np.ndarray:
    if path.suffix in (".gif", ".webp"):
        return shown(path)[0]
    frames = []
    with av.open(str(path)) as container:
        try:
            frames.extend(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        except InvalidDataError:
            assert truncated
    return np.stack(frames)


def shown(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return the frames of an animation, and how long each is shown, in milliseconds."""
    frames, durations = [], []
    with Image.open(path) as animation:
        for frame in ImageSequence.Iterator(animation):
            frames.append(np.asarray(frame.convert("RGB")))
            durations.append(int(frame.info["duration"]))
    return np.stack(frames), durations


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_rate_and_colors_come_back(tmp_path: Path, suffix: str) -> None:
    path, start, written = tmp_path / f"out{suffix}", 0, []
    with VideoWriter(path, fps=24) as writer:
        for size in SIZES:
            written.append(moving_disc(start, size))
            writer.write(written[-1])
            start += size
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24 and (stream.width, stream.height) == (224, 128)
        times = [frame.time for frame in container.decode(video=0)]
    assert np.allclose(times, np.arange(sum(SIZES)) / 24, atol=2e-3)
    error = decode(path).astype(float) - np.concatenate(written)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 33
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1.5
    assert file_names(tmp_path) == [path.name]


@pytest.mark.parametrize("fps", [24, 24000 / 1001, 50])
@pytest.mark.parametrize(("suffix", "tick"), [(".gif", 10), (".webp", 1)])
def test_an_animation_has_the_exact_length_and_its_colors(tmp_path: Path, suffix: str, tick: int, fps: float) -> None:
    path, written = tmp_path / f"out{suffix}", moving_disc(0, 61, height=65, width=95)
    with VideoWriter(path, fps=fps) as writer:
        writer.write(written[:29])
        writer.write(written[29:])
    frames, durations = shown(path)
    assert sum(durations) == tick * round(61 * 1000 / tick / fps)
    assert max(abs(duration - 1000 / fps) for duration in durations) < tick
    error = np.abs(frames.astype(float) - written)
    assert error.max() == 0 if suffix == ".gif" else 10 * np.log10(255**2 / np.mean(error**2)) > 25  # 4:2:0 color
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0


def test_a_gif_of_many_colors_is_close_and_each_part_stands_alone(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:128, 0:192]
    picture = np.stack([rows * 2, columns * 255 // 191, (rows + columns) * 255 // 318], axis=-1).astype(np.uint8)
    written = np.stack([np.roll(picture, 3 * shift, axis=1) for shift in range(8)])
    path = tmp_path / "out.gif"
    with VideoWriter(path, fps=24) as writer:
        writer.write(written[:4])
        writer.write(np.clip(written[4:], 64, 192))  # colors that the first part does not have
    frames = decode(path)
    error = frames.astype(float) - np.concatenate([written[:4], np.clip(written[4:], 64, 192)])
    assert all(10 * np.log10(255**2 / np.mean(part**2)) > 29 for part in error)


def test_a_webp_file_ends_before_its_size_no_longer_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.webp"
    monkeypatch.setattr("longvideo.infer.animations.MAX_RIFF_BYTES", 20_000)
    message = r"more than 4 gib; use .webm, .mp4 or .mkv; the \d+ frames before are in it"
    with pytest.raises(UserError, match=message), VideoWriter(path, fps=24) as writer:
        for start in range(0, 300, 10):
            writer.write(moving_disc(start, 10))
    assert len(decode(path)) == writer.num_frames > 0 and path.stat().st_size <= 20_008


def test_pictures_are_numbered_exact_and_replace_older_ones(tmp_path: Path) -> None:
    pattern, frames = tmp_path / "frames" / "a%03d.png", moving_disc(0, 5, height=31, width=33)
    with OutputFile(pattern).open(fps=24) as writer:
        writer.write(frames[:1])
        writer.write(frames[1:])
    names = [f"a{number:03d}.png" for number in range(5)]
    assert file_names(pattern.parent) == names and writer.num_frames == 5
    assert writer.num_bytes == sum((pattern.parent / name).stat().st_size for name in names)
    read = [np.asarray(Image.open(pattern.parent / name)) for name in names]
    assert np.array_equal(np.stack(read), frames)
    (pattern.parent / "b000.png").write_text("of another pattern")
    with pytest.raises(UserError, match=r"a000.png exists; choose another name or add --overwrite"):
        OutputFile(pattern).open(fps=24)
    with OutputFile(pattern, overwrite=True).open(fps=24) as writer:
        assert len(file_names(pattern.parent)) == 6  # nothing changes before the first frame
        writer.write(frames[:2])
        other = OutputFile(pattern, overwrite=True).open(fps=24)
        with pytest.raises(UserError, match="is being written by another process"):
            other.write(frames[:1])
    assert file_names(pattern.parent) == ["a000.png", "a001.png", "b000.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", "expected one place for the number of the frame, as in frames/%05d.png"),
        ("%05d%d.png", "expected one place for the number"),
        ("%s.png", "expected one place for the number"),
        ("%d/%05d.png", "its folder has a %"),
        ("none/deep/%05d.png", "none is not a folder; create it first"),
        ("file/%05d.png", "file is not a folder"),
    ],
)
def test_bad_patterns_are_refused_before_anything_is_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=message):
        OutputFile(tmp_path / name).check()
    assert file_names(tmp_path) == ["file"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_file_grows_and_plays_at_every_chunk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    writer, total = VideoWriter(path, fps=24), 0
    assert not path.exists()
    for size in SIZES:
        writer.write(moving_disc(total, size))
        total += size
        copy = tmp_path / f"copy{suffix}"
        shutil.copy(path, copy)
        assert len(decode(copy)) == total
    writer.close()
    writer.close()
    assert len(decode(path)) == total


def test_a_truncated_file_plays_up_to_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 93))
    data = path.read_bytes()
    for part in (0.3, 0.6, 0.9):
        (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * part)])
        assert len(decode(tmp_path / "cut.mp4", truncated=True)) > 93 * part * 0.7


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("parts", [(1,), (1, 28), (1, 28, 32)])
def test_written_frames_can_be_played_after_a_kill(tmp_path: Path, suffix: str, parts: tuple[int, ...]) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    code = (
        "import os, sys, numpy; from longvideo.infer.writer import VideoWriter\n"
        "writer = VideoWriter(sys.argv[1], fps=24, overwrite=True)\n"
        "for count in map(int, sys.argv[2:]): writer.write(numpy.zeros((count, 64, 64, 3), numpy.uint8))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path), *map(str, parts)]).returncode == -9
    assert len(decode(path)) == sum(parts) and file_names(tmp_path) == [path.name]


def test_temporary_files_of_killed_writers_are_removed_by_the_next_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    code = (
        "import os, sys, pathlib, fractions; from longvideo.infer.writer import _Output\n"
        "from longvideo.infer.containers import FragmentedMP4, VideoFormat\n"
        "container = FragmentedMP4(VideoFormat(64, 64, fractions.Fraction(24)))\n"
        "_Output(pathlib.Path(sys.argv[1]), container, size=(64, 64)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    (tmp_path / ".other.mp4.0123abcd.part").write_text("of another file")
    assert len(file_names(tmp_path)) == 2
    running = _Output(path, FragmentedMP4(VideoFormat(64, 64, Fraction(24))), size=(64, 64))
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 2))
    assert len(list(tmp_path.glob(".out*"))) == 1
    running.release()
    assert file_names(tmp_path) == [".other.mp4.0123abcd.part", "out.mp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps is 0; expected a number above 0"),
        ({"fps": "24"}, "fps is '24'"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 24, "crf": 99}, "crf is 99; expected a whole number from 0 to 51"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / "out.mp4", **options)


def test_a_file_that_is_being_written_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 2))
        with pytest.raises(UserError, match="another process is writing it"):
            OutputFile(path, overwrite=True).check()
    OutputFile(path, overwrite=True).check()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_finished_file_has_its_length_and_an_index(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    with VideoWriter(path, fps=24) as writer:
        for size in (1, 28, 32, 100):
            writer.write(moving_disc(writer.num_frames, size, height=64, width=96))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (container.duration or 0) / av.time_base == pytest.approx(161 / 24, abs=2e-3)
        for seconds in (4.0, 1.3, 6.0):
            container.seek(int(seconds / stream.time_base), stream=stream)
            frame = next(container.decode(stream))
            assert seconds - 2.0 < frame.time <= seconds and frame.key_frame
    probed = probe_video(path)
    assert (probed.num_frames, probed.fps) == (161, 24.0)
    check_complete(path)


def test_a_finished_matroska_file_has_its_size(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 40, height=32, width=32))
        growing = path.read_bytes()
    data = path.read_bytes()
    place = data.index(b"\x18\x53\x80\x67") + 4
    assert growing[place : place + 8] == UNKNOWN_SIZE
    assert int.from_bytes(data[place + 1 : place + 8], "big") == len(data) - place - 8


def test_a_file_system_without_links_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, _target: str) -> None:
        raise PermissionError(errno.EPERM, "operation not permitted", str(source))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out.mp4"
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 2))
    assert len(decode(path)) == 2 and file_names(tmp_path) == [path.name]
    writer = VideoWriter(tmp_path / "other.mp4", fps=24)
    (tmp_path / "other.mp4").write_text("mine")
    with pytest.raises(UserError, match="file exists"):
        writer.write(moving_disc(0, 2))
    assert (tmp_path / "other.mp4").read_text() == "mine"


def test_a_rate_that_is_no_whole_number_is_kept(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        path = tmp_path / f"out{suffix}"
        with VideoWriter(path, fps=24000 / 1001) as writer:
            writer.write(moving_disc(0, 240, height=32, width=32))
        with av.open(str(path)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert np.allclose(times, np.arange(240) * 1001 / 24000, atol=1e-3)


def test_a_file_that_another_process_creates_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    writer = VideoWriter(path, fps=24)
    path.write_text("mine")
    with pytest.raises(UserError, match="file exists"):
        writer.write(moving_disc(0, 2))
    assert path.read_text() == "mine" and file_names(tmp_path) == [path.name]


def test_overwriting_replaces_the_file_once_the_first_frames_are_written(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("old")
    with VideoWriter(path, fps=24, overwrite=True):
        pass
    with pytest.raises(UserError, match="even width"), VideoWriter(path, fps=24, overwrite=True) as writer:
        writer.write(np.zeros((2, 63, 64, 3), np.uint8))
    assert path.read_text() == "old" and file_names(tmp_path) == [path.name]
    with VideoWriter(path, fps=24, overwrite=True) as writer:
        writer.write(moving_disc(0, 5))
    assert len(decode(path)) == 5


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy; from longvideo.errors import UserError\n"
        "from longvideo.infer.writer import VideoWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "noise = numpy.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), numpy.uint8)\n"
        "try:\n"
        "    with VideoWriter(sys.argv[1], fps=24, overwrite=True) as writer: writer.write(noise)\n"
        "except UserError as error: print(error)"
    )
    path = tmp_path / "out.mp4"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and f"cannot write {path}: file too large" in done.stdout, done.stderr
    assert path.read_text() == "old" and file_names(tmp_path) == [path.name]


@pytest.mark.parametrize(("frames", "word"), [(1, "frame before is"), (3, "3 frames before are")])
def test_a_disk_that_fills_up_keeps_the_frames_before(frames: int, word: str, tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy; from longvideo.errors import UserError\n"
        "from longvideo.infer.writer import VideoWriter\n"
        "noise = numpy.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), numpy.uint8)\n"
        "try:\n"
        "    with VideoWriter(sys.argv[1], fps=24) as writer:\n"
        f"        writer.write(noise[:{frames}]); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "        writer.write(noise)\n"
        "except UserError as error: print(error)"
    )
    path = tmp_path / "out.mp4"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"cannot write {path}: file too large; the {word} in it" in done.stdout, done.stderr
    assert len(decode(path)) == frames and path.stat().st_size < 100_000 and file_names(tmp_path) == [path.name]


def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    film, link = tmp_path / "far" / "film.mp4", tmp_path / "link.mp4"
    film.write_text("old")
    link.symlink_to(film)
    with VideoWriter(link, fps=24, overwrite=True) as writer:
        writer.write(moving_disc(0, 3))
    assert link.is_symlink() and len(decode(film)) == 3
    assert file_names(tmp_path) == ["far", "link.mp4"] and file_names(tmp_path / "far") == ["film.mp4"]


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".mp4")
    with VideoWriter(path, fps=24) as writer:
        writer.write(moving_disc(0, 2))
    assert file_names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 252 + ".mp4", "its name has more than 255 bytes"),
        ("dangling.mp4", "it is a link to nothing.mp4, which is missing"),
        ("pipe.mp4", "it is a device, a pipe or a socket"),
        ("null.mp4", "it is a device, a pipe or a socket"),
        ("out.avi", "expected a name that ends in .mp4, .mkv, .webm, .gif, .webp, or frames/%05d.png"),
        ("out", "expected a name that ends in .mp4, .mkv, .webm, .gif, .webp, or frames/%05d.png"),
        ("nowhere/out.mp4", "is not a folder; create it first"),
        ("folder.mp4", "it is a folder"),
        ("old.mp4", "exists; choose another name or add --overwrite"),
    ],
)
def test_bad_outputs_are_refused_before_anything_is_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to("nothing.mp4")
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "old.mp4").write_text("old")
    before = file_names(tmp_path)
    with pytest.raises(UserError, match=message):
        OutputFile(tmp_path / name).check()
    assert file_names(tmp_path) == before and (tmp_path / "old.mp4").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no process may write: /proc")
def test_an_unwritable_folder_is_refused() -> None:
    with pytest.raises(UserError, match="cannot write /proc/self/out.mp4"):
        OutputFile(Path("/proc/self/out.mp4")).check()
