"""Footage that a video continues: the last whole chunks of a file, at the rate and size of a model.

They are read and encoded as a video of their own, whose first latent frame encodes one pixel frame. Training clips are
cut from longer videos in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.options import check_path
from longvideo.infer.script import ChunkTiming, check_seconds

if TYPE_CHECKING:
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.spec import ChunkSpec
    from longvideo.streaming.decoders import DecoderConfig

FootageSource: TypeAlias = "Path | str | np.ndarray | Tensor"


@dataclass(frozen=True)
class FootageReader:
    """Reads the end of footage, as much as a model attends to.

    timing: how frames are divided into chunks. max_chunks: number of chunks that the live chunk attends to. size:
    height and width in pixels.
    """

    timing: ChunkTiming
    max_chunks: int
    size: tuple[int, int]

    @classmethod
    def of(cls, settings: ModelSettings, spec: ChunkSpec, decoder: DecoderConfig) -> FootageReader:
        """Return the reader for a model. decoder: sizes of its decoder."""
        return cls(ChunkTiming.of(settings, decoder), spec.window_chunks - 1, (settings.height, settings.width))

    def check_seconds(self, seconds: float | None) -> None:
        """Raise UserError for a length that is not a number, less than a chunk, or more than the model attends to."""
        if seconds is None:
            return
        check_seconds(seconds, "video_seconds")
        timing, fps = self.timing, self.timing.fps
        least, most = timing.first, timing.start(self.max_chunks)
        if not least <= round(seconds * fps) <= most:
            raise UserError(
                f"video_seconds is {seconds:g}; expected from {least / fps:.2f}, one chunk, to {most / fps:.2f}, as"
                " much as the model attends to"
            )

    def check(self, path: Path, *, seconds: float | None) -> None:
        """Raise UserError as `read` does, without reading more than the times of the frames."""
        self._place(path, seconds)

    def read(self, video: FootageSource, *, seconds: float | None = None) -> Tensor:
        """Return the last whole chunks, uint8 [T, H, W, 3] with T = 1 + 4 n.

        video: a file, or uint8 [T, H, W, 3] of numpy or torch at the frame rate of the model. seconds: length to use at
        most; None means as much as the model attends to. Raises UserError for footage of less than a chunk.
        """
        from longvideo.data.video import VideoReader

        if isinstance(video, np.ndarray | Tensor):
            return self._fitted(video, seconds)
        check_path(video, "video")
        start_seconds, count = self._place(Path(video), seconds)
        reader = VideoReader(self.timing.fps, self.size)
        frames = reader.read(Path(video), start_seconds=start_seconds, max_frames=count)
        if len(frames) < count:
            raise UserError(f"{video} is damaged near its end: {count - len(frames)} frames are missing; copy it again")
        return frames

    def _place(self, path: Path, seconds: float | None) -> tuple[float, int]:
        """Return the time of the first frame in a file, and the number of frames."""
        from longvideo.data.timeline import frames_until
        from longvideo.data.video import probe_video

        self.check_seconds(seconds)
        available = frames_until(probe_video(path).timeline.read_end, self.timing.fps)
        count = self._count(available, seconds, str(path))
        return (available - count) / self.timing.fps, count

    def _count(self, available: int, seconds: float | None, name: str) -> int:
        timing = self.timing
        usable = available if seconds is None else min(available, round(seconds * timing.fps))
        chunks = min(timing.whole_chunks(usable), self.max_chunks)
        if not chunks:
            least, fps = timing.first, timing.fps
            raise UserError(
                f"{name} has {available} frames at {fps:g} per second, {available / fps:.2f} s; expected one chunk,"
                f" {least} frames or {least / fps:.2f} s; use a longer video"
            )
        return timing.start(chunks)

    def _fitted(self, frames: np.ndarray | Tensor, seconds: float | None) -> Tensor:
        from longvideo.data.pictures import as_picture

        values = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
        if values.dtype != np.uint8 or values.ndim != 4 or values.shape[3] != 3 or not values.size:
            kind = f"{frames.dtype} {list(frames.shape)}"
            raise UserError(f"video is {kind}; use a path, or uint8 [T, H, W, 3] of numpy or torch")
        self.check_seconds(seconds)
        count = self._count(len(values), seconds, "video")
        return torch.stack([as_picture(picture, size=self.size) for picture in values[-count:]])
