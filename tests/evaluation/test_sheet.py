"""Contact sheets, GIFs and curves have the requested size, number of pictures and timing."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvideo.errors import UserError
from longvideo.evaluation.palette import COLOR_TOLERANCE, HOLD_TOLERANCE, IndexedFrames, hold_colors, index_colors
from longvideo.evaluation.sheet import (
    MAX_ERROR,
    MAX_MEAN_ERROR,
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
    assert np.asarray(Image.open(tmp_path / "far.png").convert("RGB")).tolist() == [[[9, 8, 7]] * 3] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far.png", "near.png"]


@pytest.fixture(scope="module")
def strip() -> Image.Image:
    """Return a film strip of a noisy gradient with a moving disk."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:128, :224]
    gradient = np.stack([20 + rows // 4, 40 + rows // 3, 20 + rows // 5], axis=-1)
    clip = np.stack([gradient + random.integers(-1, 2, gradient.shape) for _ in range(8)]).astype(np.uint8)
    for index, frame in enumerate(clip):
        frame[(rows - 64) ** 2 + (columns - 30 - 20 * index) ** 2 < 300] = (250, 220, 40)
    return film_strip([clip] * 3, captions=["a yellow disk moves right"] * 3, scale=0.6)


def test_a_sheet_is_a_fraction_of_the_plain_file_and_looks_the_same(strip: Image.Image, tmp_path: Path) -> None:
    write_picture(strip, tmp_path / "sheet.png")
    strip.save(tmp_path / "plain.png", optimize=True)
    assert 3 * (tmp_path / "sheet.png").stat().st_size < (tmp_path / "plain.png").stat().st_size
    error = _error(tmp_path / "sheet.png", strip)
    assert error.max() <= MAX_ERROR
    assert error.mean() <= MAX_MEAN_ERROR


def test_curves_are_a_fraction_of_the_plain_file_and_keep_their_colors(tmp_path: Path) -> None:
    x = np.arange(200)
    series = {name: (0.5 + 0.4 * np.sin(x / slope)).tolist() for name, slope in {"a": 9, "b": 14, "c": 33}.items()}
    picture = plot_curves(series, x.tolist(), title="t", x_label="steps")
    write_picture(picture, tmp_path / "curves.png")
    picture.save(tmp_path / "plain.png", optimize=True)
    assert 2 * (tmp_path / "curves.png").stat().st_size < (tmp_path / "plain.png").stat().st_size
    error = _error(tmp_path / "curves.png", picture)
    assert error.max() <= MAX_ERROR
    flat = np.isin(np.asarray(picture) @ (1, 256, 65536), [255 * 65793, 31 + 119 * 256 + 180 * 65536])
    assert flat.mean() > 0.5
    assert error[flat].max() == 0


def test_a_picture_of_many_colors_keeps_all_of_them(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    write_picture(noise, tmp_path / "noise.png")
    assert _error(tmp_path / "noise.png", noise).max() == 0


def test_few_colors_are_exact_and_near_ones_share_one() -> None:
    frame = np.full((8, 8, 3), 100, np.uint8)
    frame[0, :3] = [[100, 100, 100 + COLOR_TOLERANCE], [100, 101 + COLOR_TOLERANCE, 100], [0, 255, 9]]
    indexed = index_colors([frame, frame], limit=256)
    assert sorted(indexed.palette.tolist()) == [[0, 255, 9], [100, 100, 100], [100, 101 + COLOR_TOLERANCE, 100]]
    shown = indexed.palette[indexed.indices]
    assert shown.shape == (2, 8, 8, 3)
    assert shown[1, 0, :3].tolist() == [[100] * 3, [100, 101 + COLOR_TOLERANCE, 100], [0, 255, 9]]


def test_a_rare_color_has_a_place_in_a_full_palette() -> None:
    frame = np.random.default_rng(0).integers(0, 80, (100, 100, 3), dtype=np.uint8)
    frame[50, 50] = (255, 10, 200)
    indexed = index_colors([frame], limit=64)
    assert len(indexed.palette) == 64
    assert indexed.palette[indexed.indices[0, 50, 50]].tolist() == [255, 10, 200]


def test_noise_is_held_and_a_slow_change_is_followed() -> None:
    levels = np.array([100, 102, 98, 100 + HOLD_TOLERANCE, 101 + HOLD_TOLERANCE, 102, 90], np.uint8)
    frames = IndexedFrames(np.repeat(levels[:, None], 3, axis=1), np.arange(7, dtype=np.uint8)[:, None, None])
    held = hold_colors(frames)
    changed = 101 + HOLD_TOLERANCE
    assert held.palette[held.indices][:, 0, 0, 0].tolist() == [100] * 4 + [changed, changed, 90]
    assert frames.indices[1, 0, 0] == 1


def test_noise_hardly_grows_a_gif(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    still = np.full((24, 64, 96, 3), 120, np.uint8)
    still[:, 20:40, 30:60] = (250, 40, 40)
    noisy = (still.astype(np.int16) + random.integers(-1, 2, still.shape)).clip(0, 255).astype(np.uint8)
    write_animation(noisy[:1], tmp_path / "one.gif", fps=24)
    write_animation(noisy, tmp_path / "all.gif", fps=24)
    assert (tmp_path / "all.gif").stat().st_size < 1.5 * (tmp_path / "one.gif").stat().st_size
    with Image.open(tmp_path / "all.gif") as picture:
        for index in range(picture.n_frames):
            picture.seek(index)
            error = np.abs(np.asarray(picture.convert("RGB")).astype(int) - still[index])
            assert error.max() <= HOLD_TOLERANCE + COLOR_TOLERANCE


def _error(path: Path, picture: Image.Image) -> np.ndarray:
    with Image.open(path) as written:
        return np.abs(np.asarray(written.convert("RGB")).astype(int) - np.asarray(picture)).max(-1)
