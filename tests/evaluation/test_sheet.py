"""Contact sheets, GIFs and curves have the requested size, number of pictures and timing."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvideo.errors import UserError
from longvideo.evaluation.sheet import (
    contact_sheet,
    film_strip,
    plot_curves,
    round_ticks,
    write_animation,
    write_picture,
)


def test_contact_sheet_places_frames_row_by_row() -> None:
    frames = np.stack([np.full((10, 20, 3), value, np.uint8) for value in (10, 60, 110, 160, 210)])
    sheet = np.asarray(contact_sheet(frames, 3, gap=2))
    assert sheet.shape == (2 + 2 * 12, 2 + 3 * 22, 3)
    assert sheet[2, 2 + 2 * 22].tolist() == [110] * 3
    assert sheet[2 + 12, 2].tolist() == [160] * 3
    assert sheet[-3, -3].tolist() == [255] * 3


def test_film_strip_has_a_row_a_clip_from_first_to_last_frame() -> None:
    clip = np.arange(96, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    sheet = np.asarray(film_strip([clip, clip], columns=4, gap=0))
    assert sheet.shape == (16, 32, 3)
    assert sheet[0, 0, 0] == 0 and sheet[15, 31, 0] == 95


def test_empty_sheet_is_a_user_error() -> None:
    with pytest.raises(UserError, match="expected at least one of each"):
        contact_sheet([], 4)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_lasts_as_long_as_the_clip(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (96, 16, 24, 3), dtype=np.uint8)
    write_animation(frames, tmp_path / f"clip{suffix}", fps=12)
    with Image.open(tmp_path / f"clip{suffix}") as picture:
        assert picture.info["loop"] == 0
        total = 0
        for index in range(picture.n_frames):
            picture.seek(index)
            picture.load()
            total += picture.info["duration"]
    assert abs(total - 4000) <= 80


def test_curves_accept_gaps_and_differ_by_value() -> None:
    x = list(range(10))
    low = np.asarray(plot_curves({"a": [0.1] * 10}, x, title="t", x_label="s"))
    high = np.asarray(plot_curves({"a": [0.9] * 9 + [math.nan]}, x, title="t", x_label="s"))
    assert low.shape == (380, 760, 3)
    assert (low != high).any()


@pytest.mark.parametrize(("low", "high"), [(0, 60), (1, 4), (0, 0.3), (5, 5)])
def test_ticks_are_inside_the_range(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_gif_has_the_colors_of_its_frames(tmp_path: Path) -> None:
    levels = np.arange(0, 240, 30, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (8, 16, 24, 3)).copy()
    frames[:, :8, :, 1] = 255 - levels[:, None, None]
    write_animation(frames, tmp_path / "clip.gif", fps=25, source_fps=25)
    with Image.open(tmp_path / "clip.gif") as picture:
        for index, frame in enumerate(frames):
            picture.seek(index)
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frame).max() <= 4


def test_a_picture_is_written_whole_and_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "far.png").write_bytes(b"old")
    (tmp_path / "near.png").symlink_to(tmp_path / "far.png")
    write_picture(Image.new("RGB", (3, 2), (9, 8, 7)), tmp_path / "near.png")
    assert np.asarray(Image.open(tmp_path / "far.png")).tolist() == [[[9, 8, 7]] * 3] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far.png", "near.png"]
