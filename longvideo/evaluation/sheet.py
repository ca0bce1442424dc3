"""Draw contact sheets and curves, and write pictures and looping animations as small files."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longvideo.errors import UserError
from longvideo.evaluation.palette import hold_colors, index_colors
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PAPER = (255, 255, 255)
INK = (32, 33, 36)
RULE = (222, 224, 228)
CURVE_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
PNG_COLORS = 256
GIF_COLORS = 255  # one more marks pixels that do not change
MAX_ERROR, MAX_MEAN_ERROR = 16, 2.0
"""Largest error of a pixel and of the mean, in levels of a channel, with which a picture is written with a palette."""
GIF_TICK_MS = 10
WEBP_QUALITY = 85
OVERSAMPLING = 3


def contact_sheet(
    frames: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    gap: int = 4,
    scale: float = 1.0,
    font_size: int = 13,
) -> Image.Image:
    """Arrange frames uint8 [H, W, 3] of one size in rows, from left to right and top to bottom.

    labels: a line below each frame. row_labels: a line above each row. gap: between frames, pixels. scale: of frames.
    font_size: pixels.
    """
    if len(frames) == 0 or columns < 1:
        raise UserError(f"a contact sheet of {len(frames)} frames in {columns} columns; expected at least one of each")
    font = ImageFont.load_default(size=font_size)
    height, width = (round(side * scale) for side in frames[0].shape[:2])
    line = round(font_size * 1.45)
    above, below = (line if row_labels else 0), (line if labels else 0)
    rows = -(-len(frames) // columns)
    row_height = above + height + below + gap
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        if row_labels and row < len(row_labels):
            text = fit_text(row_labels[row], font, sheet.width - 2 * gap)
            draw.text((gap, gap + row * row_height), text, fill=INK, font=font)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), gap + row * row_height + above
        picture = Image.fromarray(np.ascontiguousarray(frame))
        if scale != 1.0:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        if labels and index < len(labels):
            draw.text((left, top + height), fit_text(labels[index], font, width), fill=INK, font=font)
    return sheet


def film_strip(
    clips: Sequence[np.ndarray],
    *,
    columns: int = 8,
    captions: Sequence[str] | None = None,
    gap: int = 4,
    scale: float = 1.0,
) -> Image.Image:
    """Show each clip, uint8 [T, H, W, 3], as a row of evenly spaced frames below its caption."""
    frames = [clip[index] for clip in clips for index in spaced_indices(len(clip), columns)]
    return contact_sheet(frames, columns, row_labels=captions, gap=gap, scale=scale)


def spaced_indices(length: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices from the first to the last of `length`."""
    return [round(value) for value in np.linspace(0, length - 1, count)]


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, completely or not at all. Raises WriteError as `longvideo.files.write_file` does.

    A picture of few colors gets a palette, which makes the file smaller. One whose colors would change by more than
    MAX_ERROR at a pixel, or MAX_MEAN_ERROR on average, is written with all its colors.
    """
    pixels = np.asarray(picture.convert("RGB"))
    indexed = index_colors([pixels], limit=PNG_COLORS)
    [indices] = indexed.indices
    error = np.abs(indexed.palette[indices].astype(np.int16) - pixels).max(-1)
    few = error.max() <= MAX_ERROR and error.mean() <= MAX_MEAN_ERROR
    written = _indexed_picture(indices, indexed.palette) if few else Image.fromarray(pixels)
    # optimizing full colors saves little and takes several times longer
    write_file(path, lambda target: written.save(target, format="PNG", optimize=bool(few)))


def write_animation(
    frames: np.ndarray, path: Path, *, fps: float, source_fps: float = 24.0, scale: float = 1.0
) -> None:
    """Write frames uint8 [T, H, W, 3] as a looping GIF or WebP, depending on the suffix of the path.

    fps: of the animation, rounded to hundredths of a second per frame, as GIF requires. source_fps: of the frames.
    scale: of the size. All frames of a GIF use one palette, and pixels that hardly change keep their color: separate
    palettes and noise would make flat areas flicker. Raises WriteError as `longvideo.files.write_file` does.
    """
    if len(frames) == 0 or fps <= 0:
        raise UserError(
            f"an animation of {len(frames)} frames at {fps} per second; expected frames and a positive rate"
        )
    ticks = max(1, round(1000 / fps / GIF_TICK_MS))
    step = source_fps * ticks * GIF_TICK_MS / 1000
    chosen = frames[np.arange(0, len(frames) - 0.5, step).round().astype(int)]
    pictures = [Image.fromarray(frame) for frame in chosen]
    if scale != 1.0:
        size = (round(chosen.shape[2] * scale), round(chosen.shape[1] * scale))
        pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
    settings: dict[str, Any] = {"quality": WEBP_QUALITY}
    if path.suffix == ".gif":
        indexed = hold_colors(index_colors([np.asarray(picture) for picture in pictures], limit=GIF_COLORS))
        pictures = [_indexed_picture(indices, indexed.palette) for indices in indexed.indices]
        settings = {"optimize": True}
    settings |= {"duration": ticks * GIF_TICK_MS, "loop": 0, "save_all": True, "append_images": pictures[1:]}
    write_file(path, lambda target: pictures[0].save(target, format=path.suffix[1:], **settings))


def _indexed_picture(indices: np.ndarray, palette: np.ndarray) -> Image.Image:
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    return picture


def plot_curves(
    series: Mapping[str, Sequence[float]],
    x: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_range: tuple[float, float] = (0.0, 1.0),
    percent: bool = True,
    size: tuple[int, int] = (760, 380),
) -> Image.Image:
    """Draw named curves over a common x axis. NaN values are gaps. size: width and height in pixels."""
    if len(x) == 0:
        raise UserError("the x axis is empty; expected at least one value to plot")
    k = OVERSAMPLING
    width, height = size[0] * k, size[1] * k
    font, bold = ImageFont.load_default(size=13 * k), ImageFont.load_default(size=16 * k)
    left, right, top, bottom = 58 * k, width - 130 * k, 42 * k, height - 48 * k
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    x_low, x_high = float(min(x)), float(max(x))
    x_span = (x_high - x_low) or 1.0
    y_low, y_high = y_range

    def place(value_x: float, value_y: float) -> tuple[float, float]:
        across, up = (value_x - x_low) / x_span, (value_y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - min(max(up, 0.0), 1.0) * (bottom - top)

    draw.text((left, 10 * k), title, fill=INK, font=bold)
    for value in np.linspace(y_low, y_high, 6):
        level = place(x_low, float(value))[1]
        draw.line([(left, level), (right, level)], fill=RULE, width=k)
        text = f"{value:.0%}" if percent else f"{value:.3g}"
        draw.text((left - 8 * k, level), text, fill=INK, font=font, anchor="rm")
    for value in round_ticks(x_low, x_high):
        place_x = place(value, y_low)[0]
        draw.line([(place_x, bottom), (place_x, bottom + 5 * k)], fill=INK, width=k)
        draw.text((place_x, bottom + 8 * k), f"{value:g}", fill=INK, font=font, anchor="mt")
    draw.line([(left, bottom), (right, bottom)], fill=INK, width=k)
    draw.text(((left + right) / 2, height - 6 * k), x_label, fill=INK, font=font, anchor="mb")
    for index, (name, values) in enumerate(series.items()):
        color = CURVE_COLORS[index % len(CURVE_COLORS)]
        points = list(zip(x, values, strict=True))
        for (x0, y0), (x1, y1) in pairwise(points):
            if np.isfinite(y0) and np.isfinite(y1):
                draw.line([place(x0, y0), place(x1, y1)], fill=color, width=2 * k, joint="curve")
        for value_x, value_y in points:
            if np.isfinite(value_y):
                cx, cy = place(value_x, value_y)
                draw.ellipse([cx - 2.5 * k, cy - 2.5 * k, cx + 2.5 * k, cy + 2.5 * k], fill=color)
        level = top + (10 + 22 * index) * k
        draw.line([(right + 14 * k, level), (right + 34 * k, level)], fill=color, width=3 * k)
        draw.text((right + 40 * k, level), name, fill=INK, font=font, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def round_ticks(low: float, high: float, at_most: int = 10) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten in [low, high], at most about `at_most` of them."""
    span = (high - low) or 1.0
    power = 10.0 ** np.floor(np.log10(span / at_most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= at_most)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def fit_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten `text` with an ellipsis until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
