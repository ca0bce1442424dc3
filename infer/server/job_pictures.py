"""Pictures of the video of a job: the thumbnail and the sprite sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from longvideo.errors import UserError

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

THUMBNAIL_TYPE, SHEET_TYPE = "image/webp", "image/jpeg"  # as OpenAI's interface sends them
NO_FRAME = "no frame of the video can be decoded; download the video itself"
SHEET_COLUMNS, SHEET_TILES, TILE_WIDTH = 4, 16, 320


def thumbnail(video: Path) -> bytes:
    """Return the first frame of a video as WebP. Raises UserError where no frame can be decoded."""
    with _video(video) as container:
        return _encoded(next(_key_frames(container, {0}), None), "WEBP")


def sprite_sheet(video: Path) -> bytes:
    """Return a JPEG with up to 16 frames of a video in rows of 4.

    The frames are the first ones of parts of the video, at even distances. Raises UserError where none can be decoded.
    """
    with _video(video) as container:
        count = sum(1 for _ in _key_packets(container))
    num_tiles = min(count, SHEET_TILES)
    chosen = {index * count // num_tiles for index in range(num_tiles)}
    sheet = None
    with _video(video) as container:
        for index, frame in enumerate(_key_frames(container, chosen)):
            frame.thumbnail((TILE_WIDTH, frame.height))
            if sheet is None:
                columns, rows = min(num_tiles, SHEET_COLUMNS), math.ceil(num_tiles / SHEET_COLUMNS)
                sheet = Image.new("RGB", (columns * frame.width, rows * frame.height))
            row, column = divmod(index, SHEET_COLUMNS)
            sheet.paste(frame, (column * frame.width, row * frame.height))
    return _encoded(sheet, "JPEG")


@contextmanager
def _video(path: Path) -> Iterator[InputContainer]:
    import av

    try:
        with av.open(str(path)) as container:
            yield container
    except av.FFmpegError as error:
        raise UserError(NO_FRAME) from error


def _key_packets(container: InputContainer) -> Iterator[Packet]:
    return (packet for packet in container.demux(video=0) if packet.size and packet.is_keyframe)


def _key_frames(container: InputContainer, chosen: set[int]) -> Iterator[Image.Image]:
    """Yield key frames of a video by their numbers. A key frame is decoded without the frames before it."""
    decoder = container.streams.video[0].codec_context
    for index, packet in enumerate(_key_packets(container)):
        if index in chosen:
            yield from (frame.to_image() for frame in decoder.decode(packet))
        if index == max(chosen):
            break
    yield from (frame.to_image() for frame in decoder.decode(None))


def _encoded(picture: Image.Image | None, kind: str) -> bytes:
    if picture is None:
        raise UserError(NO_FRAME)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
