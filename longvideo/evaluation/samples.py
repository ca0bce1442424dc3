"""Record the videos that a model makes while it is trained: film strips, latents, and scores of the judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.checkpoint.latents import SUFFIX, LatentsHeader, save_latents
from longvideo.checkpoint.locations import lasting_name
from longvideo.evaluation.judge import judge_all
from longvideo.evaluation.sheet import film_strip, write_picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.shapeworld.world import Scene

COLUMNS = 8
"""Number of frames that a film strip shows of a video."""


def record_samples(
    videos: Sequence[np.ndarray],
    latents: Tensor,
    captions: Sequence[str],
    file: Path,
    *,
    shown: int,
    scenes: Sequence[Scene] = (),
    fps: float,
    decoder: ModelFolder,
) -> dict[str, float]:
    """Draw film strips of videos into an image file, and return the judge's scores of all videos.

    The latents of these videos are written next to the image, for `longvideo decode`.

    videos: uint8 [T, H, W, 3] each. latents: [B, C, T, H, W], normalized, of all videos. shown: number of videos to
    draw; 0 writes no file. scenes: what each video is to show; without scenes there are no scores. fps: frames per
    second of the videos. decoder: model with the autoencoder of the latents.
    """
    if shown:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_picture(film_strip(videos[:shown], columns=COLUMNS, captions=captions[:shown]), file)
        header = LatentsHeader(model=lasting_name(decoder.path), fps=fps)
        save_latents(file.with_suffix(SUFFIX), latents[:shown].contiguous(), header)
    return judge_all(videos, scenes, fps) if scenes else {}
