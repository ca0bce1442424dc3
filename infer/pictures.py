"""Write the frames of a video as numbered PNG files."""

from __future__ import annotations

import io
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from longvideo.errors import UserError
from longvideo.files import WriteError, check_target, locked_target, write_bytes
from longvideo.infer.closing import ClosedAtEnd
from longvideo.infer.options import check_frames

if TYPE_CHECKING:
    import numpy as np

PNG = ".png"
NUMBER = re.compile(r"%(0(?P<digits>[1-9]))?d")
EXAMPLE = "frames/%05d.png"


def check_pictures(pattern: Path, *, overwrite: bool) -> None:
    """Raise UserError for a pattern whose files cannot be written. Nothing on the disk is changed.

    pattern: name with the place of the number, such as `frames/%05d.png`; its folder may be missing, not the folder
    above it. overwrite: whether files of the pattern may exist.
    """
    if len(NUMBER.findall(pattern.name)) != 1 or pattern.name.count("%") != 1:
        raise UserError(f"cannot write {pattern}: expected one place for the number of the frame, as in {EXAMPLE}")
    if "%" in str(pattern.parent):
        raise UserError(f"cannot write {pattern}: its folder has a %; expected it in the name alone, as in {EXAMPLE}")
    if not pattern.parent.exists():
        check_target(pattern.parent)
        return
    check_target(picture_path(pattern, 0), overwrite=True)
    if not overwrite and (existing := pictures_of(pattern)):
        raise WriteError(f"{existing[0]} exists; choose another name or add --overwrite")


def picture_path(pattern: Path, number: int) -> Path:
    """Return the path of a frame. number: that of the frame, from 0."""
    return pattern.with_name(pattern.name % number)


def pictures_of(pattern: Path) -> list[Path]:
    """Return the existing files of a pattern, in order of their names."""
    before, _, _, after = NUMBER.split(pattern.name)
    name = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    return sorted(path for path in pattern.parent.iterdir() if name.fullmatch(path.name))


class PictureWriter(ClosedAtEnd):
    """Writes frames to numbered PNG files, each of which is complete when it has its name.

    Older files of the pattern are deleted when the first frame is written.
    """

    def __init__(self, pattern: str | Path, *, overwrite: bool = False) -> None:
        """Check the pattern; nothing is written yet. The arguments are those of `check_pictures`."""
        self.path = Path(pattern)
        check_pictures(self.path, overwrite=overwrite)
        self._overwrite, self._lock = overwrite, ExitStack()
        self._is_locked = False
        self.num_frames = self.num_bytes = 0

    def write(self, frames: np.ndarray) -> None:
        """Write frames, uint8 [T, H, W, 3]. Raises WriteError when the disk refuses one; those before it stay."""
        check_frames(frames)
        if not self._is_locked:
            self._begin()
        for pixels in frames:
            memory = io.BytesIO()
            Image.fromarray(pixels).save(memory, format="PNG")
            write_bytes(picture_path(self.path, self.num_frames), memory.getvalue())
            self.num_frames += 1
            self.num_bytes += len(memory.getvalue())

    def close(self) -> None:
        """Allow other processes to write files of the pattern. Closing twice does nothing."""
        self._lock.close()

    def _begin(self) -> None:
        self._lock.enter_context(locked_target(self.path))
        self._is_locked = True
        check_pictures(self.path, overwrite=self._overwrite)
        for older in pictures_of(self.path):
            older.unlink()
