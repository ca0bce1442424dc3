"""The settings in longvideo.json: geometry and generation defaults of a model."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.config.bounds import check_number, check_whole
from longvideo.errors import ConfigError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.model.spec import ChunkSpec

VAE_SCALE = 16  # height and width in pixels of one latent of Wan2.2's autoencoder


BOUNDS = {
    "chunk_frames": (1, 1024),
    "window_frames": (1, 16384),
    "sink_frames": (0, 16384),
    "offset_per_shot": (0, 65536),
    "fps": (1, 1000),
    "height": (1, 16384),
    "width": (1, 16384),
    "text_len": (1, 8192),
    "steps": (1, NUM_TRAIN_TIMESTEPS),
}
"""Smallest and largest allowed values of longvideo.json; others are mistakes that could exhaust the memory."""
MAX_GUIDANCE, MIN_SHIFT, MAX_SHIFT, MAX_PREFIX = 1000, 1e-3, 1000, 1000


@dataclass(frozen=True)
class ModelSettings:
    """Geometry and generation defaults of a model. The default values are those of Wan2.2-TI2V-5B.

    chunk_frames, window_frames, sink_frames, offset_per_shot: latent frames, as in ChunkSpec. pin_shots: whether the
    first chunk of the current shot stays in the window. height, width: pixels. fps: frames per second. text_len: prompt
    positions, tokens. steps: denoising steps of a chunk. guidance: guidance scale. shift: of the noise schedule.
    clean_pass: whether the keys and values of a finished chunk come from a clean pass, or else from its last denoising
    step, for which a model must be trained. cut_prefix: text before the prompt of the first chunk after a cut.
    trained_on: name of the data that the model was trained on, for warnings; empty if it is unknown.
    """

    chunk_frames: int = 8
    window_frames: int = 32
    sink_frames: int = 8
    pin_shots: bool = True
    offset_per_shot: int = 0
    fps: int = 24
    height: int = 704
    width: int = 1280
    text_len: int = 512
    steps: int = 50
    guidance: float = 5.0
    shift: float = 5.0
    clean_pass: bool = True
    cut_prefix: str = ""
    trained_on: str = ""

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            check_whole(name, getattr(self, name), least, most)
        check_number("guidance", self.guidance, 0, MAX_GUIDANCE)
        check_number("shift", self.shift, MIN_SHIFT, MAX_SHIFT)
        if self.window_frames < self.chunk_frames:
            raise ConfigError(f"window_frames={self.window_frames}, expected at least chunk_frames={self.chunk_frames}")
        for name in ("cut_prefix", "trained_on"):
            if (length := len(getattr(self, name))) > MAX_PREFIX:
                raise ConfigError(f"{name} has {length} characters, expected at most {MAX_PREFIX}")


PRESETS = {
    "wan2.2-ti2v-5b": ModelSettings(),
    "longlive-2.0-5b": ModelSettings(offset_per_shot=8, steps=4, guidance=1.0, cut_prefix="The scene transitions. "),
}
"""Settings of published models. LongLive 2.0 samples in 4 steps without guidance, advances positions by 8 latent frames
at a cut, and was trained with this text before the prompt of a shot's first chunk."""


def check_settings(settings: ModelSettings, stored: ModelSettings, folder: str) -> None:
    """Raise ConfigError if the configuration of a run sets another value than the model that the run starts from.

    settings: of the configuration; its default values count as not set. stored: of the model. folder: its name.
    """
    default = ModelSettings()
    for name, value in vars(settings).items():
        expected = getattr(stored, name)
        if value not in (getattr(default, name), expected):
            raise ConfigError(
                f"settings.{name} is {value}; expected {expected}, as the model in {folder}; leave it out"
            )


def chunk_spec(settings: ModelSettings, spatial_scale: int = VAE_SCALE) -> ChunkSpec:
    """Return the chunk and window sizes and the token grid of a model at its own picture size."""
    patch = 2 * spatial_scale
    if settings.height % patch or settings.width % patch:
        raise ConfigError(f"height={settings.height}, width={settings.width}; expected multiples of {patch}")
    return ChunkSpec(
        grid_height=settings.height // patch,
        grid_width=settings.width // patch,
        chunk_frames=settings.chunk_frames,
        window_frames=settings.window_frames,
        sink_frames=settings.sink_frames,
        pin_shots=settings.pin_shots,
        offset_per_shot=settings.offset_per_shot,
    )
