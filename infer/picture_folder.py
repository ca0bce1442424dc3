"""Write the frames of a video to a folder of numbered PNG files that appears whole or not at all."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from longvideo.files import WriteError, locked_target, write_folder
from longvideo.infer.pictures import PictureWriter, pictures_of

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import numpy as np

PICTURES = "%05d.png"
"""Pattern of the names in the folder."""


def count_folder_pictures(folder: Path) -> int:
    """Return the number of pictures in a folder."""
    return len(pictures_of(folder / PICTURES))


def check_pictures_alone(folder: Path) -> None:
    """Raise WriteError for a folder with anything but pictures, which is not deleted."""
    pictures = set(pictures_of(folder / PICTURES))
    if others := sorted(path.name for path in folder.iterdir() if path not in pictures or path.is_dir()):
        raise WriteError(f"cannot replace {folder}: {others[0]} in it is not a picture of a video; move it elsewhere")


def delete_pictures(folder: Path) -> None:
    """Delete a folder of pictures. Raises WriteError as `check_pictures_alone` does, before anything is deleted."""
    check_pictures_alone(folder)
    for picture in pictures_of(folder / PICTURES):
        picture.unlink()
    folder.rmdir()


class PictureFolder:
    """A folder for the frames of a video; a context manager.

    The pictures are written to a hidden folder next to it, which gets the name at the end of the block. After an error
    or a signal in the block, nothing remains. An older folder of pictures is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = ExitStack()
        self._writer: PictureWriter | None = None

    @property
    def num_frames(self) -> int:
        """Number of frames that were written."""
        return 0 if self._writer is None else self._writer.num_frames

    @property
    def num_bytes(self) -> int:
        """Size of the pictures."""
        return 0 if self._writer is None else self._writer.num_bytes

    def write(self, frames: np.ndarray) -> None:
        """Write frames, uint8 [T, H, W, 3]. Raises WriteError when the disk refuses one."""
        assert self._writer is not None, "the block has not begun"
        self._writer.write(frames)

    def __enter__(self) -> PictureFolder:
        with ExitStack() as opened:
            opened.enter_context(locked_target(self.path))
            if self.path.is_dir():
                delete_pictures(self.path)
            temporary = opened.enter_context(write_folder(self.path))
            self._writer = opened.enter_context(PictureWriter(temporary / PICTURES))
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
