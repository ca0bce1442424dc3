"""A folder of pictures appears whole or not at all, and other files are never deleted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvideo.errors import UserError
from longvideo.infer.picture_folder import PictureFolder, delete_pictures
from longvideo.infer.writer import count_playable_frames
from tests.folders import file_names

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
NAMES = [f"0000{number}.png" for number in range(5)]


def test_the_folder_has_its_name_when_all_pictures_are_written(tmp_path: Path) -> None:
    path = tmp_path / "00000"
    with PictureFolder(path) as folder:
        folder.write(FRAMES[:2])
        folder.write(FRAMES[2:])
        assert not path.exists() and folder.num_frames == 5
    assert file_names(tmp_path) == ["00000"] and file_names(path) == NAMES and count_playable_frames(path) == 5
    for name, frame in zip(NAMES, FRAMES, strict=True):
        assert np.array_equal(np.asarray(Image.open(path / name)), frame)
    assert folder.num_bytes == sum((path / name).stat().st_size for name in NAMES)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_nothing_remains_of_a_folder_that_is_not_finished(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), PictureFolder(tmp_path / "00000") as folder:
        folder.write(FRAMES)
        raise error
    assert file_names(tmp_path) == [] and count_playable_frames(tmp_path / "00000") == 0


def test_older_pictures_and_what_a_killed_process_left_are_replaced(tmp_path: Path) -> None:
    with PictureFolder(tmp_path / "00000") as folder:
        folder.write(FRAMES)
    (tmp_path / ".00000.0123abcd.part").mkdir()
    with PictureFolder(tmp_path / "00000") as folder:
        folder.write(FRAMES[:1])
    assert file_names(tmp_path) == ["00000"] and file_names(tmp_path / "00000") == NAMES[:1]


def test_a_folder_with_other_files_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "00000"
    path.mkdir()
    for name in ("00000.png", "notes.txt"):
        (path / name).write_text("mine")
    for call in (lambda: delete_pictures(path), PictureFolder(path).__enter__):
        with pytest.raises(UserError, match="00000: notes.txt in it is not a picture of a video; move it elsewhere"):
            call()
    assert file_names(tmp_path) == ["00000"] and file_names(path) == ["00000.png", "notes.txt"]
