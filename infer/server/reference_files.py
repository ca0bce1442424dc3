"""Pictures and videos that clients send: they are recognized by their first bytes, and checked before they are used.

FFmpeg also reads formats that name other files, such as playlists. No file with the first bytes of a video is one of
them.
"""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

from PIL import Image

from longvideo.data.pictures import decode_image
from longvideo.errors import UserError
from longvideo.infer.footage import FootageReader

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.server.limits import Limits

FORMATS = ("JPEG", "PNG", "WEBP")
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG
MAX_PIXELS = 25_000_000  # of one picture or frame; a decoded picture takes about 0.5 GB
MATROSKA = b"\x1a\x45\xdf\xa3"  # RFC 8794, 11.2.1
BOX, BRAND = slice(4, 8), slice(8, 12)  # ISO/IEC 14496-12, 4.3; RIFF has its form at the place of the brand
PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def begins_as_video(data: bytes) -> bool:
    """Return whether the content of a file begins as a video does: MP4, QuickTime, WebM or Matroska."""
    return data.startswith(MATROSKA) or (data[BOX] == b"ftyp" and data[BRAND] not in PICTURE_BRANDS)


def begins_as_picture(data: bytes) -> bool:
    """Return whether the content of a file begins as a picture does: JPEG, PNG or WebP."""
    return data.startswith(PICTURE_STARTS) or (data.startswith(b"RIFF") and data[BRAND] == b"WEBP")


class ReferenceChecker:
    """Checks the pictures and videos that a model's videos begin with. Methods raise UserError, without a path.

    One file is decoded at a time, because a large one takes much memory. `name` is the start of errors.
    """

    def __init__(self, pipeline: StreamingPipeline, limits: Limits) -> None:
        self._pipeline, self._limits = pipeline, limits
        self._decoding = threading.Lock()

    def is_video(self, data: bytes, *, name: str) -> bool:
        """Return whether the content of a file is a video, and not a picture. Raises for anything else."""
        if not self._pipeline.models.encoder.exists:
            raise UserError(
                f"{name} cannot be used: the model has no encoder of pictures and videos; serve one with its whole"
                " autoencoder"
            )
        if not begins_as_video(data) and not begins_as_picture(data):
            raise UserError(
                f"{name} is neither a picture nor a video in a supported format; expected JPEG, PNG, WebP, MP4,"
                " QuickTime, WebM or Matroska"
            )
        return begins_as_video(data)

    def first_frame(self, data: bytes, *, name: str) -> bytes:
        """Scale and crop a picture to the size of the video, and return it as a PNG.

        Raises for a picture that is damaged, animated or has more than 25 million pixels.
        """
        settings, file = self._pipeline.models.settings, io.BytesIO()
        size = (settings.height, settings.width)
        with self._decoding:
            pixels = decode_image(data, name, size=size, formats=FORMATS, max_pixels=MAX_PIXELS)
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        return file.getvalue()

    def check_footage(self, path: Path, *, name: str) -> None:
        """Read the end of a video as its continuation will. Raises for a video that cannot be continued."""
        models = self._pipeline.models
        reader = FootageReader.of(models.settings, models.spec, models.decoder.config)
        with self._decoding:
            try:
                _check_footage(path, reader, name=name, max_seconds=self._limits.footage_seconds)
            except UserError as error:
                raise UserError(str(error).replace(str(path), name)) from error


def _check_footage(path: Path, reader: FootageReader, *, name: str, max_seconds: float) -> None:
    from longvideo.data.container import OpenVideo
    from longvideo.data.video import probe_video

    with OpenVideo(path) as video:
        width, height = video.stream.width, video.stream.height
    if width * height > MAX_PIXELS:  # before a frame is decoded
        raise UserError(f"{name} has {width} x {height} pixels; expected at most {MAX_PIXELS:,}")
    if (seconds := probe_video(path).seconds) > max_seconds:
        raise UserError(f"{name} has {seconds:.1f} s; expected at most {max_seconds:g}, of which the end is used")
    reader.read(path)
