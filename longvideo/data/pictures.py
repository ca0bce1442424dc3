"""Read pictures of any bit depth and color format so that white is 255 and black is 0; other pictures are refused.

Files are decoded with imageio's Pillow plugin, and their headers are read with Pillow.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.files import check_file, reason

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 2**20
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
WHITE_OF_32_BITS = {"PNG": 2**16 - 1, "PPM": 2**16 - 1}
"""White of 16-bit gray formats that some versions of Pillow return as 32-bit integers."""
ONE_OF_SEVERAL = ("MPO",)
"""Formats of cameras in which only the first picture counts; the others are previews, or for the other eye."""
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, ZeroDivisionError, EOFError,
    MemoryError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
"""Errors that Pillow raises for files that are damaged or inconsistent."""


def read_image(path: Path, *, size: tuple[int, int] | None = None) -> Tensor:
    """Read a picture as uint8 [H, W, 3].

    size: height and width in pixels; the picture is scaled with its aspect ratio and cropped at the center. None keeps
    its size. The rotation in the file is applied, and transparent parts become black. Raises UserError if the file is
    not a picture, or if the meaning of its values is unknown, as for animations or floats above 1.
    """
    return decode_image(_content(path), str(path), size=size)


def decode_image(
    data: bytes,
    name: str,
    *,
    size: tuple[int, int] | None = None,
    formats: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode the content of a file as `read_image` does. name: start of errors.

    formats: names of Pillow's formats that are accepted; None means all. max_pixels: number of pixels of the file.
    """
    return _fitted(_decoded(data, name, formats, max_pixels), size)


def as_picture(image: object, *, size: tuple[int, int] | None = None) -> Tensor:
    """Return a picture as `read_image` does.

    image: path of a file, a Pillow image, or uint8 [H, W, 3] of numpy or torch. Raises UserError for anything else.
    """
    from PIL import Image, ImageOps

    if isinstance(image, str | Path):
        return decode_image(_content(Path(image)), str(image), size=size)
    if isinstance(image, Image.Image):
        _check_size(image, "image", MAX_PIXELS)
        white = _white(image, "image")
        try:
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright if white else upright.convert("RGBA"))
        except DAMAGE as error:  # Pillow reads the file of an image late
            raise UserError(f"image cannot be read: {' '.join(str(error).split())}") from error
        return _fitted(_eight_bits(values, white, "image"), size)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy() if image.dtype == torch.uint8 else image
    if not isinstance(image, np.ndarray):
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else f"of type {type(image).__name__}"
        raise UserError(f"image is {kind}; use a path, a Pillow image, or uint8 [H, W, 3] of numpy or torch")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"image is {image.dtype} {list(image.shape)}; use uint8 [H, W, 3], 0 for black, 255 for white")
    return _fitted(image, size)


def _content(path: Path) -> bytes:
    check_file(path, "image")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes; use a smaller picture")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


@dataclass(frozen=True)
class _White:
    """The value of white in a picture of one channel. is_least: white is 0, and `value` is black."""

    value: float
    is_least: bool = False


def _decoded(data: bytes, name: str, formats: tuple[str, ...] | None, max_pixels: int) -> np.ndarray:
    """Return uint8 [H, W, 3]."""
    import imageio.v3 as iio
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked here, and about unusual metadata
            with Image.open(io.BytesIO(data), formats=formats) as header:
                _check_size(header, name, max_pixels)
                several = getattr(header, "n_frames", 1)
                if several > 1 and header.format not in ONE_OF_SEVERAL:
                    raise UserError(f"{name} contains {several} pictures; save the first frame of the video as a PNG")
                white = _white(header, name)
            mode = None if white else "RGBA"
            values = iio.imread(data, plugin="pillow", index=0, mode=mode, rotate=True)
            return _eight_bits(values, white, name)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image in a supported format; use a PNG or JPEG file") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {max_pixels:,} pixels; use a smaller picture") from error
    except DAMAGE as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is a damaged image ({problem}); copy or download it again") from error


def _check_size(header: Image, name: str, max_pixels: int) -> None:
    width, height = header.size
    if not 0 < width * height <= max_pixels:
        raise UserError(f"{name} has {width} x {height} pixels; expected from 1 to {max_pixels:,}")


def _white(header: Image, name: str) -> _White | None:
    """Return the white of a picture with more than 8 bits; None if Pillow's own conversion is correct."""
    tags = getattr(header, "tag_v2", {})
    if header.mode in EIGHT_BITS:
        return None
    if header.mode in SIXTEEN_BITS:
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        return _White(2**bits - 1, is_least=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    if header.mode == "I" and header.format in WHITE_OF_32_BITS:
        return _White(WHITE_OF_32_BITS[header.format])
    if header.mode == "F":
        return _White(1.0, is_least=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    raise UserError(f"{name} has pixels of mode {header.mode!r}, whose white is unknown; save it as an 8-bit PNG")


def _eight_bits(values: np.ndarray, white: _White | None, name: str) -> np.ndarray:
    """Return uint8 [H, W, 3]. values: RGBA in 8 bits, or gray with the given white."""
    if white is None:
        opacity = values[..., 3:].astype(np.uint16)
        return ((values[..., :3] * opacity + 127) // 255).astype(np.uint8)
    values = values.astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= white.value):  # NaN included
        raise UserError(
            f"{name} has values from {least:g} to {most:g}, expected 0 for black to {white.value:g} for white; scale"
            " the values"
        )
    gray = np.rint(values * (255 / white.value)).astype(np.uint8)
    gray = 255 - gray if white.is_least else gray
    return np.repeat(gray[..., None], 3, axis=2)


def _fitted(pixels: np.ndarray, size: tuple[int, int] | None) -> Tensor:
    from PIL import Image, ImageOps

    if size is not None and pixels.shape[:2] != size:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS))
    return torch.from_numpy(np.array(pixels))
