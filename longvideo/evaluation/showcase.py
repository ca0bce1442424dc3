"""Write the two pictures for a model's page: a contact sheet and a looping animation of the same clips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longvideo.evaluation.sheet import INK, PAPER, film_strip, write_animation, write_picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROMPTS = (
    "a large purple star spins above a meadow",
    "a small orange ball drifts left at night, bouncing off the edges",
    "a big green ring pulses over a black background",
    "a large pink cross circles clockwise over a checkerboard",
    "a small red triangle falls and a big blue square moves right over a gray background, both bouncing off the walls",
    "a small green square stays still while a large cyan star circles clockwise on a cream background",
)
"""Prompts with held-out combinations of shape, color and motion, on which no model of ShapeWorld is trained."""

SHEET_COLUMNS = 8
SHEET_SCALE = 0.6
GIF_COLUMNS = 3
GIF_FPS = 10.0
GAP = 6
FONT_SIZE = 12
CAPTION_LINES = 3


def write_showcase(
    clips: Sequence[np.ndarray], prompts: Sequence[str], targets: tuple[Path, Path], *, fps: float
) -> None:
    """Write a sheet with a row of frames for each clip, and an animation of the clips side by side.

    clips: uint8 [T, H, W, 3], all of one shape. prompts: captions of the clips. targets: a PNG, and a GIF or WebP.
    fps: frames per second of the clips.
    """
    sheet, animation = targets
    write_picture(film_strip(clips, columns=SHEET_COLUMNS, captions=prompts, scale=SHEET_SCALE), sheet)
    write_animation(tile_clips(clips, prompts), animation, fps=GIF_FPS, source_fps=fps)


def tile_clips(clips: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = GIF_COLUMNS) -> np.ndarray:
    """Arrange clips uint8 [T, H, W, 3] of one shape in rows, each with its caption below; return [T, H', W', 3]."""
    frames, height, width, _ = clips[0].shape
    font = ImageFont.load_default(size=FONT_SIZE)
    line = round(1.3 * FONT_SIZE)
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    down, across = height + CAPTION_LINES * line + GAP, width + GAP
    page = Image.new("RGB", (GAP + columns * across, GAP + rows * down), PAPER)
    draw = ImageDraw.Draw(page)
    corners = [(GAP + index // columns * down, GAP + index % columns * across) for index in range(len(clips))]
    for (top, left), caption in zip(corners, captions, strict=True):
        for number, text in enumerate(wrap_text(caption, font, width)[:CAPTION_LINES]):
            draw.text((left, top + height + 1 + number * line), text, fill=INK, font=font)
    video = np.repeat(np.asarray(page)[None], frames, axis=0)
    for (top, left), clip in zip(corners, clips, strict=True):
        video[:, top : top + height, left : left + width] = clip
    return video


def wrap_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` between words into lines of at most `width` pixels; a longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
