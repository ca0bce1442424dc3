"""Record the videos that a model makes while it is trained: as a sheet of film strips, and as scores of the judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.evaluation.judge import judge_all
from longvideo.evaluation.sheet import film_strip

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from longvideo.shapeworld.world import Scene

COLUMNS = 8
"""Number of frames that a film strip shows of a video."""


def record_samples(
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    file: Path,
    *,
    shown: int,
    scenes: Sequence[Scene] = (),
    fps: float,
) -> dict[str, float]:
    """Draw film strips of videos into an image file, and return the judge's scores of all videos.

    videos: uint8 [T, H, W, 3] each. shown: number of videos to draw; 0 writes no file. scenes: what each video is to
    show; without scenes there are no scores. fps: frames per second of the videos.
    """
    if shown:
        file.parent.mkdir(parents=True, exist_ok=True)
        film_strip(videos[:shown], columns=COLUMNS, captions=captions[:shown]).save(file)
    return judge_all(videos, scenes, fps) if scenes else {}
