"""The sizes of a chunk, of the window it attends to, and of the token grid."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.errors import ConfigError

MAX_WINDOW_TOKENS = 2**20
"""What 32 latent frames of 7680 x 4320 pixels have."""


@dataclass(frozen=True)
class ChunkSpec:
    """Sizes that the layout, the cache and the rollout share.

    grid_height, grid_width: tokens of one latent frame, after patching.
    chunk_frames: latent frames made together.
    window_frames: latent frames attended to, the sink and the live chunk included.
    sink_frames: leading latent frames that are never evicted.
    pin_shots: keep the first chunk of the current shot in the window (the multi-shot sink of LongLive 2.0).
    offset_per_shot: latent frames added to the temporal RoPE position at every cut.
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
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("window_frames", "sink_frames"):
            frames = getattr(self, name)
            if frames < 0 or frames % self.chunk_frames:
                raise ConfigError(
                    f"{name}={frames} is not a multiple of chunk_frames={self.chunk_frames};"
                    f" use {max(frames, 0) // self.chunk_frames * self.chunk_frames}"
                )
        reserved = self.sink_chunks + self.pin_shots
        if self.window_chunks <= reserved:
            raise ConfigError(
                f"window_frames={self.window_frames} leaves no room for the live chunk beside"
                f" sink_frames={self.sink_frames}{' and the pinned chunk' if self.pin_shots else ''};"
                f" use at least {(reserved + 1) * self.chunk_frames}"
            )

        tokens = self.window_frames * self.tokens_per_frame
        if tokens > MAX_WINDOW_TOKENS:
            raise ConfigError(
                f"a window of window_frames={self.window_frames} of {self.grid_height} x {self.grid_width} tokens (the"
                f" height and width of a picture in patches) has {tokens} tokens, wanted at most {MAX_WINDOW_TOKENS}"
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
