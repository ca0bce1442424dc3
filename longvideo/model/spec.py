"""Sizes of a chunk, of its window and of the token grid."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.errors import ConfigError

MAX_WINDOW_TOKENS = 2**20
"""Upper bound of the tokens of a window: those of 32 latent frames of 7680 x 4320 pixels."""


@dataclass(frozen=True)
class ChunkSpec:
    """Sizes that the layout, the cache and the rollout share.

    grid_height, grid_width: size of the token grid of a latent frame.
    chunk_frames: number of latent frames in a chunk.
    window_frames: number of latent frames in the window, with the sink and the live chunk.
    sink_frames: number of leading latent frames that stay in the window.
    pin_shots: whether the first chunk of the current shot stays in the window (multi-shot sink of LongLive 2.0).
    offset_per_shot: number of latent frames added to the temporal RoPE position at every cut.
    Raises ConfigError for sizes that do not fit together.
    """

    grid_height: int
    grid_width: int
    chunk_frames: int = 8
    window_frames: int = 32
    sink_frames: int = 8
    pin_shots: bool = True
    offset_per_shot: int = 0

    def __post_init__(self) -> None:
        for name in ("grid_height", "grid_width", "chunk_frames", "window_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("window_frames", "sink_frames"):
            frames = getattr(self, name)
            if frames < 0 or frames % self.chunk_frames:
                raise ConfigError(
                    f"{name} is {frames}; expected a multiple of chunk_frames={self.chunk_frames};"
                    f" use {max(frames, 0) // self.chunk_frames * self.chunk_frames}"
                )
        reserved = self.sink_chunks + self.pin_shots
        if self.window_chunks <= reserved:
            raise ConfigError(
                f"window_frames is {self.window_frames}; expected the live chunk in addition to"
                f" sink_frames={self.sink_frames}{' and the pin' if self.pin_shots else ''};"
                f" use at least {(reserved + 1) * self.chunk_frames}"
            )
        tokens = self.window_frames * self.tokens_per_frame
        if tokens > MAX_WINDOW_TOKENS:
            raise ConfigError(
                f"a window of window_frames={self.window_frames} of {self.grid_height} x {self.grid_width} tokens (the"
                f" height and width of a picture in patches) has {tokens} tokens; expected at most {MAX_WINDOW_TOKENS}"
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_height * self.grid_width

    @property
    def tokens_per_chunk(self) -> int:
        return self.chunk_frames * self.tokens_per_frame

    @property
    def window_chunks(self) -> int:
        return self.window_frames // self.chunk_frames

    @property
    def sink_chunks(self) -> int:
        return self.sink_frames // self.chunk_frames

    @property
    def exact_chunks(self) -> int:
        """Largest number of finished chunks that a mixed cache reads exactly: the sink and the newest one."""
        return self.sink_chunks + 1
