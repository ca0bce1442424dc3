"""Pictures and videos that clients upload for live streams, which name them when they start."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.files import TEMPORARY_SUFFIX, write_bytes
from longvideo.infer.server.messages import Refusal
from longvideo.infer.server.security import new_id

if TYPE_CHECKING:
    from longvideo.infer.server.reference_files import ReferenceChecker

NAME = "the file"
PICTURE_SUFFIX, VIDEO_SUFFIX = ".png", ".video"


@dataclass(frozen=True)
class Reference:
    """A picture or a video that a stream begins with. path: its file, named after its id."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def is_video(self) -> bool:
        return self.path.suffix == VIDEO_SUFFIX


class References:
    """The newest references in a folder. Older ones are deleted."""

    def __init__(self, checker: ReferenceChecker, folder: Path, *, capacity: int) -> None:
        """capacity: number of references that are kept."""
        self._checker, self._folder, self._capacity = checker, folder, capacity
        self._lock = threading.Lock()
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)

    def add(self, data: bytes) -> Reference:
        """Store the content of a file. Raises UserError for a file that no stream can begin with, and WriteError."""
        with self._lock:
            is_video = self._checker.is_video(data, name=NAME)
            path = self._folder / f"{new_id()}{VIDEO_SUFFIX if is_video else PICTURE_SUFFIX}"
            write_bytes(path, data if is_video else self._checker.first_frame(data, name=NAME))
            if is_video:
                try:
                    self._checker.check_footage(path, name=NAME)
                except UserError:
                    path.unlink()
                    raise
            self._delete_oldest(newest=path)
            return Reference(path)

    def find(self, name: str) -> Reference:
        """Return a reference. name: its id. Raises Refusal (bad_reference) where it is not stored."""
        for suffix in (PICTURE_SUFFIX, VIDEO_SUFFIX):
            if (path := self._folder / f"{name}{suffix}").exists():
                return Reference(path)
        raise Refusal("bad_reference", "the picture or video is no longer on the server; upload it again")

    def _delete_oldest(self, *, newest: Path) -> None:
        paths = {*self._folder.glob(f"*{PICTURE_SUFFIX}"), *self._folder.glob(f"*{VIDEO_SUFFIX}")} - {newest}
        oldest_first = sorted(paths, key=lambda path: path.stat().st_mtime)
        for path in oldest_first[: max(0, len(paths) + 1 - self._capacity)]:
            path.unlink()
