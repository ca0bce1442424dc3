"""Files and folders are written atomically, and errors of the disk are one line."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longvideo.files import WriteError, temporary_name, write_file, write_folder, write_json, write_text


@contextmanager
def no_file_longer_than(size: int) -> Generator[None]:
    """Limit the size of files in the block, so that longer ones fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_file_is_one_line_and_the_older_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with no_file_longer_than(1000), pytest.raises(WriteError, match=r"cannot write .*a\.json: .*too large; the older"):
        write_text(path, "x" * 2000)
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_library_that_wraps_the_error_is_one_line_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with no_file_longer_than(1000), pytest.raises(WriteError, match="too large; no part of it remains"):
        write_file(path, lambda target: save_file({"x": torch.zeros(5000)}, target))
    assert list(tmp_path.iterdir()) == []


def test_a_file_keeps_the_permissions_of_the_one_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old", mode=0o640)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "far" / "file.txt")
    write_text(link, "text")
    assert link.is_symlink() and (tmp_path / "far" / "file.txt").read_text() == "text"


def test_a_device_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(WriteError, match="it is a folder or a device"):
        write_text(pipe, "text")
    assert list(tmp_path.iterdir()) == [pipe]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127 + "x")
    write_text(path, "text")
    assert path.read_text() == "text"
    assert len(os.fsencode(temporary_name(path).name)) <= 255


def test_a_source_that_cannot_be_read_keeps_its_own_error(tmp_path: Path) -> None:
    def copy(target: Path) -> None:
        target.write_bytes((tmp_path / "missing" / "b").read_bytes())

    with pytest.raises(FileNotFoundError, match="missing"):
        write_file(tmp_path / "a", copy)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("old", "new"):
        with write_folder(path, overwrite=True) as folder:
            (folder / content).write_text(content)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with write_folder(path) as folder:
        (folder / "a").write_text("old")
    unchanged = pytest.raises(WriteError, match="the older one is unchanged")
    with no_file_longer_than(10), unchanged, write_folder(path, overwrite=True) as folder:
        (folder / "a").write_text("longer than ten bytes")
    with pytest.raises(WriteError, match="exists; choose another name"), write_folder(path):
        pass
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
