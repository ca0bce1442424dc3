"""Videos that clients send to be continued: MP4, QuickTime, WebM and Matroska, recognized by their first bytes.

FFmpeg also reads formats that name other files, such as playlists. No file with these first bytes is one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.infer.server.job_pictures import MAX_PIXELS

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.infer.footage import FootageReader

MATROSKA = b"\x1a\x45\xdf\xa3"  # RFC 8794, 11.2.1
BOX, BRAND = slice(4, 8), slice(8, 12)  # ISO/IEC 14496-12, 4.3
PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def begins_as_video(data: bytes) -> bool:
    """Return whether the content of a file begins as a video does."""
    return data.startswith(MATROSKA) or (data[BOX] == b"ftyp" and data[BRAND] not in PICTURE_BRANDS)


def check_footage(path: Path, reader: FootageReader, *, name: str, max_seconds: float) -> None:
    """Read the end of a video as a job will. Raises UserError where it cannot be continued.

    name: start of errors, in place of the path, which clients do not see.
    """
    from longvideo.data.container import OpenVideo
    from longvideo.data.video import probe_video

    try:
        with OpenVideo(path) as video:
            width, height = video.stream.width, video.stream.height
        if width * height > MAX_PIXELS:  # before a frame is decoded
            raise UserError(f"{name} has {width} x {height} pixels; expected at most {MAX_PIXELS:,}")
        if (seconds := probe_video(path).seconds) > max_seconds:
            raise UserError(f"{name} has {seconds:.1f} s; expected at most {max_seconds:g}, of which the end is used")
        reader.read(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error
