"""Convert a decoded frame to the picture that a viewer sees: 8-bit RGB in SDR, upright and with square pixels."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longvideo.data.tone_mapping import BT2020_PRIMARIES, TRANSFERS, to_sdr

if TYPE_CHECKING:
    from collections.abc import Sequence

Filter = tuple[str, str]
"""Name and options of one of FFmpeg's filters."""
MATRIX = "DISPLAYMATRIX"
NO_CHROMA_LOCATION: Filter = ("setparams", "chroma_location=unspecified")
"""Removes the place of color samples, by which PyAV would move colors by a part of a pixel."""
SWAP_AXES: Filter = ("transpose", "dir=cclock_flip")


@dataclass(frozen=True)
class Orientation:
    """How a file is turned: its axes are swapped, then x and y are mirrored."""

    swaps_axes: bool = False
    flips_x: bool = False
    flips_y: bool = False

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """Return the orientation that the file prescribes for a frame.

        The display matrix (ISO/IEC 14496-12, 8.3.2) maps a point (x, y) of the file, y downward, to
        (a x + c y, b x + d y); it is applied to the nearest multiple of 90 degrees.
        """
        data = frame.side_data.get(MATRIX)
        if data is None:
            return cls()
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), "<i4")[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, flips_x=c < 0, flips_y=b < 0)  # x comes from the file's y, and y from its x
        return cls(False, flips_x=a < 0, flips_y=d < 0)

    @property
    def filters(self) -> tuple[Filter, ...]:
        steps = ((self.swaps_axes, SWAP_AXES), (self.flips_x, ("hflip", "")), (self.flips_y, ("vflip", "")))
        return tuple(step for is_needed, step in steps if is_needed)


class PictureConversion:
    """Converts the frames of one stream to pictures.

    stream: PyAV's video stream. size: height and width of the result in pixels, by scaling with the aspect ratio and
    cropping at the center; None keeps the size of the first frame.
    """

    def __init__(self, stream: Any, size: tuple[int, int] | None) -> None:
        self._stream, self._size = stream, size
        self._graph: Any = None
        self._graph_input: tuple[int, int, str, Orientation] | None = None

    def __call__(self, frame: Any) -> Tensor:
        """Return uint8 [H, W, 3]."""
        height, width = picture_size(frame, self._stream)
        target = self._size = self._size or (height, width)
        scale = max(target[0] / height, target[1] / width)
        height, width = max(target[0], round(height * scale)), max(target[1], round(width * scale))
        upright = self._upright(frame)
        transfer = TRANSFERS.get(int(frame.color_trc or 0))
        values = upright.reformat(
            width=width,
            height=height,
            format="rgb48le" if transfer else "rgb24",
            interpolation="AREA" if height < upright.height else "BICUBIC",
        ).to_ndarray()
        top, left = (height - target[0]) // 2, (width - target[1]) // 2
        values = values[top : top + target[0], left : left + target[1]]
        if transfer:
            values = to_sdr(values, transfer, wide=int(frame.color_primaries or 0) == BT2020_PRIMARIES)
        return torch.from_numpy(np.ascontiguousarray(values))

    def _upright(self, frame: Any) -> Any:
        """Return the frame turned, and without its chroma location."""
        orientation = Orientation.of(frame)
        graph_input = (frame.width, frame.height, frame.format.name, orientation)
        if graph_input != self._graph_input:
            self._graph = filter_graph(self._stream, [NO_CHROMA_LOCATION, *orientation.filters])
            self._graph_input = graph_input
        self._graph.vpush(frame)
        return self._graph.vpull()


def filter_graph(stream: Any, filters: Sequence[Filter]) -> Any:
    """Return a graph of filters, one after another. stream: PyAV's video stream, of which a frame is decoded."""
    from av.filter import Graph

    graph = Graph()
    nodes = [graph.add(name, options or None) for name, options in filters]
    graph.link_nodes(graph.add_buffer(template=stream), *nodes, graph.add("buffersink"))
    graph.configure()
    return graph


def picture_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return height and width of the picture that a viewer sees, in square pixels. stream: PyAV's video stream.

    The height of the file, before it is turned, is kept.
    """
    height, width = frame.height, round(frame.width * (stream.sample_aspect_ratio or Fraction(1)))
    return (width, height) if Orientation.of(frame).swaps_axes else (height, width)
