"""Convert a decoded frame to the picture that a viewer sees: 8-bit RGB in SDR, upright and with square pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longvideo.data.tone_mapping import BT2020_PRIMARIES, TRANSFERS, to_sdr

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

MATRIX = "DISPLAYMATRIX"


def picture(frame: Any, size: tuple[int, int] | None, pixel_aspect: Fraction) -> Tensor:
    """Return uint8 [H, W, 3].

    size: height and width of the result in pixels, by scaling with the aspect ratio and cropping at the center; None
    keeps the height of the file before it is turned. pixel_aspect: width of a pixel of the file relative to its height.
    """
    orient, is_turned = orientation(frame)
    target = size if size is None or not is_turned else (size[1], size[0])
    height, width = square_size(frame.height, frame.width, pixel_aspect)
    if target is not None:
        scale = max(target[0] / height, target[1] / width)
        height, width = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    interpolation = "AREA" if height < frame.height else "BICUBIC"
    transfer = TRANSFERS.get(int(frame.color_trc or 0))
    values = frame.reformat(
        width=width, height=height, format="rgb48le" if transfer else "rgb24", interpolation=interpolation
    ).to_ndarray()
    if target is not None:
        top, left = (height - target[0]) // 2, (width - target[1]) // 2
        values = values[top : top + target[0], left : left + target[1]]
    if transfer:
        values = to_sdr(values, transfer, wide=int(frame.color_primaries or 0) == BT2020_PRIMARIES)
    return torch.from_numpy(np.ascontiguousarray(orient(values)))


def shown_size(frame: Any, pixel_aspect: Fraction) -> tuple[int, int]:
    """Return height and width of the picture that a viewer sees, in square pixels."""
    height, width = square_size(frame.height, frame.width, pixel_aspect)
    return (width, height) if orientation(frame)[1] else (height, width)


def square_size(height: int, width: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Return height and width in square pixels, before a frame is turned; the height of the file is kept."""
    return height, round(width * pixel_aspect)


def orientation(frame: Any) -> tuple[Callable[[np.ndarray], np.ndarray], bool]:
    """Return the function that turns and mirrors [H, W, 3] as the file prescribes, and whether it swaps the axes.

    The display matrix (ISO/IEC 14496-12, 8.3.2) maps a point (x, y) of the file, y downward, to
    (a x + c y, b x + d y); it is applied to the nearest multiple of 90 degrees.
    """
    data = frame.side_data.get(MATRIX)
    if data is None:
        return (lambda values: values), False
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5]
    is_turned = abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d))
    # after the swap of axes, x comes from the file's y and y from its x
    flips_x, flips_y = (c < 0, b < 0) if is_turned else (a < 0, d < 0)

    def orient(values: np.ndarray) -> np.ndarray:
        turned = values.swapaxes(0, 1) if is_turned else values
        return turned[:: -1 if flips_y else 1, :: -1 if flips_x else 1]

    return orient, is_turned
