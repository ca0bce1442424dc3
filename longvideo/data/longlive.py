"""Read the data folders of LongLive 2.0 as manifest entries.

A sample is a folder, and its numbered files are consecutive shots: video/<sample>/<number>.mp4, each with
caption/<sample>/<number>.json, which contains {"caption": "..."}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from longvideo.data.manifest import ShotEntry, VideoEntry
from longvideo.data.video import probe_video
from longvideo.errors import UserError
from longvideo.files import check_text, parse_json, read_text

if TYPE_CHECKING:
    from collections.abc import Callable

NO_CAPTION: Final = "no caption"
NO_VIDEO: Final = "no video"
UNREADABLE: Final = "cannot be read"
UNNUMBERED: Final = "not a numbered file"
LeftOutKind = Literal["no caption", "no video", "cannot be read", "not a numbered file"]


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used. kind: NO_CAPTION, NO_VIDEO, UNREADABLE or UNNUMBERED. why: the reason in words."""

    file: Path
    kind: LeftOutKind
    why: str


def read_longlive(
    folder: Path, *, on_sample: Callable[[int, int], None] | None = None
) -> tuple[list[VideoEntry], list[LeftOut]]:
    """Return all shots with a video and a caption, sorted by sample name and shot number, and the files left out.

    folder: prefix of all paths. on_sample: called with the number of finished samples and of all samples.
    Raises UserError if the folder has another layout or no shot.
    """
    for part in ("video", "caption"):
        if not (folder / part).is_dir():
            raise UserError(
                f"there is no folder {folder / part}; expected {folder}/video/SAMPLE/0.mp4 and"
                f" {folder}/caption/SAMPLE/0.json"
            )
    entries: list[VideoEntry] = []
    left_out: list[LeftOut] = []
    samples = sorted(
        {path.name for part in ("video", "caption") for path in (folder / part).iterdir() if path.is_dir()}
    )
    for done, sample in enumerate(samples, 1):
        videos = _numbered(folder / "video" / sample, ".mp4", left_out)
        captions = _numbered(folder / "caption" / sample, ".json", left_out)
        for number in sorted(videos.keys() | captions.keys()):
            if number not in videos:
                left_out.append(
                    LeftOut(
                        captions[number],
                        NO_VIDEO,
                        f"there is no {captions[number].stem}.mp4 in {folder / 'video' / sample}",
                    )
                )
            elif (shot := _read_shot(videos[number], captions.get(number), sample, left_out)) is not None:
                entries.append(shot)
        if on_sample is not None:
            on_sample(done, len(samples))
    if not entries:
        first = f"; {left_out[0].file}: {left_out[0].why}" if left_out else ""
        raise UserError(f"{folder} has no shot with a video and a caption{first}")
    return entries, left_out


def _numbered(folder: Path, suffix: str, left_out: list[LeftOut]) -> dict[int, Path]:
    """Return the files of a sample by number."""
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix != suffix or not path.stem.isdecimal():
            left_out.append(LeftOut(path, UNNUMBERED, f"its name is not a number and {suffix}"))
        elif int(path.stem) in files:
            left_out.append(LeftOut(path, UNNUMBERED, f"has the same number as {files[int(path.stem)].name}"))
        else:
            files[int(path.stem)] = path
    return files


def _read_shot(video: Path, caption: Path | None, sample: str, left_out: list[LeftOut]) -> VideoEntry | None:
    if caption is None:
        left_out.append(LeftOut(video, NO_CAPTION, "it has no caption file"))
        return None
    try:
        text = _read_caption(caption)
    except UserError as error:
        left_out.append(LeftOut(video, NO_CAPTION, str(error)))
        return None
    try:
        info = probe_video(video)
    except UserError as error:
        left_out.append(LeftOut(video, UNREADABLE, str(error)))
        return None
    return VideoEntry(video, info.fps, info.num_frames, (ShotEntry(0, info.num_frames, text),), sample)


def _read_caption(path: Path) -> str:
    data = parse_json(read_text(path, what="caption"), where=str(path))
    text = data.get("caption") if isinstance(data, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path} has no caption; expected {{"caption": "..."}} with a text that is not empty')
    check_text(text, f"the caption in {path}")
    return text
