"""Scripts of several shots, rendered as long videos.

T pixel frames. Cuts are on chunk boundaries, and the time of a scene starts at 0 at its cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.model.chunk_frames import WAN_CHUNKS
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.render import render_with_mask
from longvideo.shapeworld.world import Scene, Split, sample_scene

if TYPE_CHECKING:
    from collections.abc import Iterator

FPS = 24


@dataclass(frozen=True)
class SceneShot:
    """A scene that is shown for some chunks. cut: False continues the time of the previous shot."""

    scene: Scene
    caption: str
    num_chunks: int
    cut: bool = True


@dataclass(frozen=True)
class ShotFrames:
    """The pixel frames [start, end) of a shot in its clip. start_seconds: time of the scene at `start`."""

    shot: SceneShot
    start: int
    end: int
    start_seconds: float


@dataclass(frozen=True)
class SceneScript:
    """Consecutive shots of one video."""

    shots: tuple[SceneShot, ...]

    @property
    def num_chunks(self) -> int:
        """Number of chunks of all shots."""
        return sum(shot.num_chunks for shot in self.shots)

    @property
    def num_frames(self) -> int:
        """Number of pixel frames of all shots."""
        return WAN_CHUNKS.start(self.num_chunks)

    def frames(self) -> list[ShotFrames]:
        """Return the pixel frames of each shot."""
        spans: list[ShotFrames] = []
        chunk = 0
        for shot in self.shots:
            start, end = WAN_CHUNKS.start(chunk), WAN_CHUNKS.start(chunk + shot.num_chunks)
            clock = 0.0
            if spans and not shot.cut:
                clock = spans[-1].start_seconds + (spans[-1].end - spans[-1].start) / FPS
            spans.append(ShotFrames(shot, start, end, clock))
            chunk += shot.num_chunks
        return spans


def sample_script(seed: int, *, split: Split, num_shots: int, num_chunks: int) -> SceneScript:
    """Draw the script of a seed: `num_shots` scenes that share `num_chunks`, with at least one chunk each."""
    if not 1 <= num_shots <= num_chunks:
        raise UserError(f"{num_shots} shots do not fit into {num_chunks} chunks; use at least one chunk for each shot")
    generator = random.Random(f"shapeworld script {split} {seed}")
    lengths = [1] * num_shots
    for _ in range(num_chunks - num_shots):
        # short shots are more likely to get the next chunk, so none stays much shorter than the others
        weights = [1.0 / length**2 for length in lengths]
        mark, shot = generator.random() * sum(weights), 0
        while mark > weights[shot] and shot < num_shots - 1:
            mark -= weights[shot]
            shot += 1
        lengths[shot] += 1
    shots = []
    for length in lengths:
        scene_seed = int(generator.random() * 2**53)
        scene = sample_scene(scene_seed, split=split)
        shots.append(SceneShot(scene, caption(scene, scene_seed), length))
    return SceneScript(tuple(shots))


def render_script(script: SceneScript, *, height: int = 128, width: int = 224) -> Iterator[Tensor]:
    """Render a script chunk by chunk: yield uint8 [T, H, W, 3] with T = 29, then 32."""
    for span in script.frames():
        batch = SceneBatch.from_scenes([span.shot.scene])
        start = span.start
        while start < span.end:
            end = start + (WAN_CHUNKS.later if start else WAN_CHUNKS.first)
            frames = torch.arange(start - span.start, end - span.start, dtype=torch.float64)
            times = span.start_seconds + frames / FPS
            yield to_uint8(render_with_mask(batch, times[None], height=height, width=width)[0])[0]
            start = end
