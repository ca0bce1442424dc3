"""Pictures of any bit depth and color format are read with the correct white, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longvideo.data.pictures import as_picture, read_image
from longvideo.errors import UserError
from tests.data.test_video import assert_round, disc

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50], [0, 0, 0], [255, 255, 255]], np.uint8)
RAMP = np.linspace(0, 65535, 224).round().astype(np.uint16)


def png(bits: int, color: int, rows: bytes, *, width: int, height: int) -> bytes:
    """Return a PNG of raw scan lines, as Pillow writes no PNG with 16-bit colors."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    crc = [struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    body = (struct.pack(">I", len(data)) + kind + data + check for (kind, data), check in zip(chunks, crc, strict=True))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(values: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """Return a little-endian TIFF of one channel (TIFF 6.0)."""
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height),
            (279, values.nbytes), (339, sample_format)]  # fmt: skip
    begin = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, begin if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values.tobytes()


def columns(path: Path) -> list[int]:
    return read_image(path)[0, [10, 60, 112, 160, 210], 0].tolist()


def test_gray_of_16_bits_is_read_by_value(tmp_path: Path) -> None:
    gray = np.tile(RAMP, (16, 1))
    Image.fromarray(gray).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(tiff(gray, bits=16))
    (tmp_path / "c.tif").write_bytes(tiff(65535 - gray, bits=16, photometric=0))
    (tmp_path / "d.tif").write_bytes(tiff((gray / 65535).astype(np.float32), bits=32, sample_format=3))
    (tmp_path / "e.pgm").write_bytes(b"P5 224 16 65535\n" + gray.astype(">u2").tobytes())
    for name in "abcde":
        (path,) = tmp_path.glob(f"{name}.*")
        assert columns(path) == [11, 69, 128, 183, 240], path
        assert torch.equal(read_image(path)[..., 0], read_image(path)[..., 2])


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4), (4, 2), (0, 1)])
def test_every_png_of_16_bits_is_read_by_value(tmp_path: Path, color: int, channels: int) -> None:
    rows = np.repeat(RAMP[None, :, None], channels, axis=2)
    if channels in (2, 4):
        rows[..., -1] = 65535
    data = np.tile(rows, (4, 1, 1)).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in data)
    (tmp_path / "deep.png").write_bytes(png(16, color, lines, width=224, height=4))
    got = read_image(tmp_path / "deep.png").int()
    assert (got[0, :, 0] - torch.from_numpy(RAMP / 257)).abs().max() < 1
    assert torch.equal(got[..., 0], got[..., 1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_colors_of_every_mode_are_those_of_the_picture(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.tile(COLORS, (4, 1, 1)))
    gray = image.convert("L")
    source = {"LA": gray, "PA": image.convert("P", palette=Image.Palette.ADAPTIVE)}.get(mode, image)
    converted = source.convert(mode, palette=Image.Palette.ADAPTIVE)
    shown = {"1": image.convert("1"), "L": gray, "LA": gray}.get(mode, image)
    expected = np.asarray(shown.convert("RGB"))
    if mode not in ("PA", "YCbCr"):
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        converted.save(path)
        assert np.abs(read_image(path).numpy().astype(int) - expected).max() <= 3
    assert np.abs(as_picture(converted).numpy().astype(int) - expected).max() <= 3


def test_a_palette_with_a_transparent_color_is_black_there(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([9, 9, 9, 250, 0, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.gif", transparency=0)
    assert read_image(tmp_path / "a.gif")[0].tolist() == [[0, 0, 0], *[[250, 0, 0]] * 3]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_pictures_are_turned_upright_as_cameras_note(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left: at the top after a rotation to the right
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / f"turned{suffix}", exif=exif, lossless=True)  # lossless: an option of WebP only
    picture = read_image(tmp_path / f"turned{suffix}")
    assert picture.shape == (32, 16, 3) and picture[:14].min() > 240 and picture[18:].max() < 15
    with Image.open(tmp_path / f"turned{suffix}") as opened:
        assert torch.equal(as_picture(opened), picture)


GRAY32 = np.full((4, 4), 7, np.uint32)
REFUSED = {
    "floats.tif": (
        tiff(np.full((4, 4), 2, np.float32), bits=32, sample_format=3),
        "has values from 2 to 2, expected 0",
    ),
    "below.tif": (tiff(np.full((4, 4), -0.5, np.float32), bits=32, sample_format=3), "has values from -0.5"),
    "nan.tif": (tiff(np.full((4, 4), np.nan, np.float32), bits=32, sample_format=3), "has values from nan"),
    "wide.tif": (tiff(GRAY32, bits=32), "has pixels of mode 'I', whose white is unknown"),
    "signed.tif": (tiff(GRAY32.astype(np.int16), bits=16, sample_format=2), "has pixels of mode"),
    "bomb.png": (png(8, 0, b"\0" * 100, width=60_000, height=60_000), "has more than 100,000,000 pixels"),
    "large.png": (png(8, 0, b"\0" * 100, width=10_001, height=10_000), "has 10001 x 10000 pixels"),
    "short.png": (png(8, 2, b"\0" * 100, width=64, height=64), "is a damaged image"),
    "text.png": (b"hello", "is not an image in a supported format"),
    "empty.png": (b"", "is not an image in a supported format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path, name: str) -> None:
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {message}") as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_a_file_of_several_pictures_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film{suffix}"
    frames = [Image.new("RGB", (32, 32), (80 * level, 0, 0)) for level in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="contains 3 pictures; save the first frame of the video as a PNG"):
        read_image(path)


def test_a_picture_is_the_same_from_every_source(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for size in (None, (32, 64), (90, 150)):
        expected = read_image(path, size=size)
        assert expected.shape == (*(size or (90, 150)), 3)
        for source in (str(path), Image.open(path), pixels, torch.from_numpy(pixels), pixels[::-1][::-1]):
            assert torch.equal(as_picture(source, size=size), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"image is float32 \[4, 4, 3\]; use uint8"),
        (np.zeros((4, 4), np.uint8), r"image is uint8 \[4, 4\]; use uint8 \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"image is uint8 \[0, 4, 3\]"),
        (torch.zeros(3, 4, 4), r"image is torch.float32 \[3, 4, 4\]"),
        (7, "image is of type int; use a path, a Pillow image"),
        (b"a.png", "image is of type bytes"),
        (Image.new("LAB", (4, 4)), "image has pixels of mode 'LAB'"),
    ],
)
def test_what_is_no_picture_is_refused(image: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_picture(image, size=(4, 4))


def test_a_picture_of_pillow_that_is_read_late_and_damaged_is_refused() -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(data, "png")
    with pytest.raises(UserError, match="image cannot be read"):
        as_picture(Image.open(io.BytesIO(data.getvalue()[:2000])))


def test_images_are_cropped_never_stretched(tmp_path: Path) -> None:
    path = tmp_path / "disc.png"
    Image.fromarray(disc(90, 150, 30).numpy()).save(path)
    assert torch.equal(read_image(path), disc(90, 150, 30))
    picture = read_image(path, size=(128, 224))
    assert picture.shape == (128, 224, 3) and picture.dtype == torch.uint8
    assert_round(picture)


def test_transparency_is_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").max() == 0


def test_files_that_are_no_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png is not an image"):
        read_image(tmp_path / "text.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut.png is a damaged image"):
        read_image(tmp_path / "cut.png")
