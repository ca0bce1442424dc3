"""Convert a decoded frame to the picture that a viewer sees: 8-bit RGB in SDR, upright and with square pixels."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longvideo.data.tone_mapping import BT2020_PRIMARIES, TRANSFERS, to_sdr

if TYPE_CHECKING:
    from collections.abc import Callable

MATRIX = "DISPLAYMATRIX"
NO_CHROMA_LOCATION = "setparams", "chroma_location=unspecified"
"""FFmpeg's filter that removes the place of color samples, by which PyAV would move colors by a part of a pixel."""


class PictureConversion:
    """Converts the frames of one stream to pictures.

    stream: PyAV's video stream. size: height and width of the result in pixels, by scaling with the aspect ratio and
    cropping at the center; None keeps the size of the first frame.
    """

    def __init__(self, stream: Any, size: tuple[int, int] | None) -> None:
        self._stream, self._size = stream, size
        self._graph: Any = None
        self._graph_format: tuple[int, int, str] | None = None

    def __call__(self, frame: Any) -> Tensor:
        """Return uint8 [H, W, 3]."""
        orient, is_turned = orientation(frame)
        target = self._size if self._size is None or not is_turned else (self._size[1], self._size[0])
        height, width = square_size(frame, self._stream)
        if target is not None:
            scale = max(target[0] / height, target[1] / width)
            height, width = max(target[0], round(height * scale)), max(target[1], round(width * scale))
        transfer = TRANSFERS.get(int(frame.color_trc or 0))
        values = (
            self._without_chroma_location(frame)
            .reformat(
                width=width,
                height=height,
                format="rgb48le" if transfer else "rgb24",
                interpolation="AREA" if height < frame.height else "BICUBIC",
            )
            .to_ndarray()
        )
        if target is not None:
            top, left = (height - target[0]) // 2, (width - target[1]) // 2
            values = values[top : top + target[0], left : left + target[1]]
        if transfer:
            values = to_sdr(values, transfer, wide=int(frame.color_primaries or 0) == BT2020_PRIMARIES)
        result = torch.from_numpy(np.ascontiguousarray(orient(values)))
        self._size = (result.shape[0], result.shape[1])
        return result

    def _without_chroma_location(self, frame: Any) -> Any:
        frame_format = (frame.width, frame.height, frame.format.name)
        if frame_format != self._graph_format:
            self._graph, self._graph_format = filter_graph(self._stream, *NO_CHROMA_LOCATION), frame_format
        self._graph.vpush(frame)
        return self._graph.vpull()


def filter_graph(stream: Any, name: str, options: str) -> Any:
    """Return a graph of one of FFmpeg's filters. stream: PyAV's video stream, of which a frame is decoded."""
    from av.filter import Graph

    graph = Graph()
    graph.link_nodes(graph.add_buffer(template=stream), graph.add(name, options), graph.add("buffersink"))
    graph.configure()
    return graph


def shown_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return height and width of the picture that a viewer sees, in square pixels. stream: PyAV's video stream."""
    height, width = square_size(frame, stream)
    return (width, height) if orientation(frame)[1] else (height, width)


def square_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return height and width in square pixels, before a frame is turned; the height of the file is kept."""
    return frame.height, round(frame.width * (stream.sample_aspect_ratio or Fraction(1)))


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
