"""The videos of a folder and which of them are finished, shared by all processes that generate them.

`videos.jsonl` has a line for each video and is always complete. A process takes the next waiting video under a lock,
so no two processes generate the same one, whatever their number.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from longvideo.errors import UserError
from longvideo.files import (
    BusyError,
    WriteError,
    parse_json,
    read_json,
    read_lines,
    reason,
    temporary_names,
    write_json,
    write_text,
)
from longvideo.infer.picture_folder import check_pictures_alone, delete_pictures

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

LIST, SETTINGS, LOCK = "videos.jsonl", "settings.json", ".videos.lock"
OTHER_FOLDER = "use another folder, or --overwrite to begin again"
NAME = re.compile(r"\d+(\.\w+)?")
"""Names of videos. Others in a list are damage: a video whose name leads elsewhere is not deleted."""
IN_USE, CHANGE = 0, 1
"""Bytes of the lock file: one is locked while a process generates videos, the other while the list is changed."""

VideoStatus = Literal["waiting", "generating", "done"]


@dataclass(frozen=True)
class ListedVideo:
    """A line of the list.

    file: name of the video file, or of the folder of its pictures. line: its line in the file of prompts, from 1.
    prompt, negative_prompt: those of each shot. seconds: its length. seed: seed of its noise.
    """

    file: str
    line: int
    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...]
    seconds: float
    seed: int
    status: VideoStatus = "waiting"


class VideoFolder:
    """A folder of videos with its list."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: int | None = None

    def begin(self, videos: Sequence[ListedVideo], settings: Mapping[str, Any], *, overwrite: bool) -> int:
        """Create the list, or continue it; return the number of finished videos. One process calls this.

        The others call `join` after it.

        A video is finished if its line and its file exist. settings: what else decides how the videos look.
        overwrite: delete the videos of an earlier list, and begin again.
        Raises UserError, before anything is changed, for a folder with other videos or settings, a damaged list, or a
        folder of pictures to delete that has other files, and BusyError if other processes generate its videos.
        """
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot write {self._folder}: {reason(error)}") from error
        settings = json.loads(json.dumps(dict(settings), default=str))  # as they are read from the file
        self._take_part(fcntl.LOCK_EX)
        earlier: list[ListedVideo] = []
        if overwrite:
            with suppress(UserError):  # a damaged list names no files
                earlier = self._read()
            _delete([self._folder / video.file for video in (*earlier, *videos)])
            earlier = []
        elif (self._folder / LIST).exists():
            earlier = self._read()
            self._check_settings(settings)
            self._check_equal(earlier, videos)
        elif existing := [video.file for video in videos if (self._folder / video.file).exists()]:
            raise WriteError(f"{self._folder / existing[0]} exists and is not in a {LIST}; {OTHER_FOLDER}")
        done = {video.file for video in earlier if video.status == "done" and (self._folder / video.file).exists()}
        for name in (LIST, SETTINGS):
            for abandoned in temporary_names(self._folder / name):  # of processes that were killed
                abandoned.unlink()
        write_json(self._folder / SETTINGS, settings)
        self._write([replace(video, status="done" if video.file in done else "waiting") for video in videos])
        self._take_part(fcntl.LOCK_SH)
        return len(done)

    def join(self) -> None:
        """Take part in generating the videos until the process ends or `close`. Raises BusyError as `begin` does."""
        self._take_part(fcntl.LOCK_SH)

    def close(self) -> None:
        """Take part no longer. Closing twice does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def unfinished(self) -> list[ListedVideo]:
        """Return the videos that this process may have to generate.

        Those that other processes generate are among them, since they wait again after a signal.
        """
        with self._changing():
            return [video for video in self._read() if video.status != "done"]

    def claim(self) -> ListedVideo | None:
        """Return a waiting video that this process is to generate, or None if no video waits."""
        with self._changing():
            videos = self._read()
            for index, video in enumerate(videos):
                if video.status == "waiting":
                    videos[index] = replace(video, status="generating")
                    self._write(videos)
                    return video
        return None

    def set_status(self, video: ListedVideo, status: VideoStatus) -> None:
        """Change the status of a video."""
        with self._changing():
            self._write([replace(item, status=status) if item.file == video.file else item for item in self._read()])

    def _take_part(self, kind: int) -> None:
        if self._lock is None:
            try:
                self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise WriteError(f"cannot write {self._folder}: {reason(error)}") from error
        try:
            fcntl.lockf(self._lock, kind | fcntl.LOCK_NB, 1, IN_USE)
        except (BlockingIOError, PermissionError) as error:
            raise BusyError(f"other processes generate the videos of {self._folder}; wait for them") from error

    @contextmanager
    def _changing(self) -> Generator[None]:
        assert self._lock is not None, "join was not called"
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, CHANGE)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, CHANGE)

    def _read(self) -> list[ListedVideo]:
        path = self._folder / LIST
        lines = read_lines(path, what="list of videos")
        return [_read_video(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], 1)]

    def _write(self, videos: Sequence[ListedVideo]) -> None:
        lines = [json.dumps(asdict(video), ensure_ascii=False) for video in videos]
        write_text(self._folder / LIST, "".join(f"{line}\n" for line in lines))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        earlier = read_json(self._folder / SETTINGS)
        for key, value in settings.items():
            if earlier.get(key) != value:
                raise UserError(
                    f"the videos of {self._folder} were begun with {key}={earlier.get(key)!r}, got {value!r}; use the"
                    f" same options, or {OTHER_FOLDER}"
                )

    def _check_equal(self, earlier: Sequence[ListedVideo], videos: Sequence[ListedVideo]) -> None:
        if len(earlier) > len(videos):
            raise UserError(
                f"{self._folder} has {len(earlier)} videos, and the file of prompts {len(videos)}; {OTHER_FOLDER}"
            )
        for before, now in zip(earlier, videos, strict=False):
            if replace(before, status=now.status) != now:
                raise UserError(
                    f"line {now.line} of the file of prompts is not what {self._folder / now.file} was begun with;"
                    f" restore its prompts, seconds and seed, or {OTHER_FOLDER}"
                )


def _delete(paths: Sequence[Path]) -> None:
    """Delete video files and folders of pictures that exist. Nothing is deleted if one folder has other files."""
    folders = [path for path in dict.fromkeys(paths) if path.is_dir()]
    for folder in folders:
        check_pictures_alone(folder)
    for path in dict.fromkeys(paths):
        if path in folders:
            delete_pictures(path)
        else:
            path.unlink(missing_ok=True)


def _read_video(line: str, where: str) -> ListedVideo:
    value = parse_json(line, where=where)
    known = {field.name for field in fields(ListedVideo)}
    is_line = isinstance(value, dict) and value.keys() == known and value["status"] in get_args(VideoStatus)
    if not is_line or not NAME.fullmatch(str(value["file"])):
        raise UserError(f"{where} is damaged: it is not a line of a list of videos; {OTHER_FOLDER}")
    texts = {name: tuple(value[name]) for name in ("prompt", "negative_prompt")}
    return ListedVideo(**{**value, **texts})
