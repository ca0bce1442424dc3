"""Clips of ShapeWorld: scripts of several shots drawn as long videos, and batches drawn on the fly for training.

B clips, G chunks, T pixel frames. Cuts fall on chunk boundaries; the clock of a scene starts at 0 at its cut.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.render import render_with_mask
from longvideo.shapeworld.world import Scene, Split, sample_scene

FPS = 24
FIRST_CHUNK_FRAMES = 29
"""Pixel frames of the first chunk: 8 latent frames, of which the first holds one frame and the others four."""
CHUNK_FRAMES = 32


@dataclass(frozen=True)
class SceneShot:
    """A scene shown for some chunks. Without a cut the clock of the shot before runs on."""

    scene: Scene
    caption: str
    num_chunks: int
    cut: bool = True


@dataclass(frozen=True)
class ShotFrames:
    """The pixel frames [start, end) of a shot within its clip, and the scene's time at `start`."""

    shot: SceneShot
    start: int
    end: int
    start_seconds: float


@dataclass(frozen=True)
class SceneScript:
    """Several shots in a row."""

    shots: tuple[SceneShot, ...]

    @property
    def num_chunks(self) -> int:
        return sum(shot.num_chunks for shot in self.shots)

    @property
    def num_frames(self) -> int:
        return chunk_start(self.num_chunks)

    def frames(self) -> list[ShotFrames]:
        """Lay the shots out on the clip's pixel frames."""
        spans: list[ShotFrames] = []
        chunk = 0
        for shot in self.shots:
            start, end = chunk_start(chunk), chunk_start(chunk + shot.num_chunks)
            clock = 0.0
            if spans and not shot.cut:
                clock = spans[-1].start_seconds + (spans[-1].end - spans[-1].start) / FPS
            spans.append(ShotFrames(shot, start, end, clock))
            chunk += shot.num_chunks
        return spans


def chunk_start(chunk: int) -> int:
    """First pixel frame of a chunk, and so the number of frames of all chunks before it."""
    return 0 if chunk == 0 else FIRST_CHUNK_FRAMES + (chunk - 1) * CHUNK_FRAMES


def chunks_for(seconds: float) -> int:
    """The fewest chunks that last at least `seconds`."""
    beyond_first = seconds * FPS - FIRST_CHUNK_FRAMES
    return 1 + max(0, -int(-beyond_first // CHUNK_FRAMES))


def sample_script(seed: int, *, split: Split, num_shots: int, num_chunks: int) -> SceneScript:
    """Draw the script of `seed`: `num_shots` scenes that share `num_chunks`, each at least one."""
    if not 1 <= num_shots <= num_chunks:
        raise UserError(f"{num_shots} shots do not fit {num_chunks} chunks; a shot needs at least one chunk")
    generator = random.Random(f"shapeworld script {split} {seed}")
    lengths = [1] * num_shots
    for _ in range(num_chunks - num_shots):
        # the shorter a shot is so far, the likelier it grows: no shot is starved
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
    """Draw a script chunk by chunk: uint8 [T, H, W, 3] with T = 29, then 32."""
    for span in script.frames():
        batch = SceneBatch.from_scenes([span.shot.scene])
        start = span.start
        while start < span.end:
            end = start + (FIRST_CHUNK_FRAMES if start == 0 else CHUNK_FRAMES)
            frames = torch.arange(start - span.start, end - span.start, dtype=torch.float64)
            times = span.start_seconds + frames / FPS
            yield to_uint8(render_with_mask(batch, times[None], height=height, width=width)[0][0])
            start = end


def to_uint8(video_CTHW: Tensor) -> Tensor:
    """Turn one clip in [-1, 1] into 8-bit frames [T, H, W, 3]."""
    return ((video_CTHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@dataclass(frozen=True)
class ClipPlan:
    """What a batch of training clips shows: for every chunk its scene, its caption and when the scene began."""

    scene_BG: Tensor  # long, row of the pool's scenes
    caption_BG: Tensor  # long, row of the pool's captions
    cut_BG: Tensor  # bool: the chunk begins a shot; always true for chunk 0
    start_B: Tensor  # seconds that the first shot had run before the clip begins


@dataclass(frozen=True)
class ScenePool:
    """Thousands of scenes on one device with several captions each, to draw training clips from.

    Captions are rows `scene * captions_per_scene + variant` of `captions`, so that their tokens can be prepared once.
    """

    scenes: SceneBatch
    captions: list[str]
    captions_per_scene: int

    @classmethod
    def build(
        cls,
        num_scenes: int,
        *,
        split: Split = "train",
        first_seed: int = 0,
        captions_per_scene: int = 4,
        omit: float = 0.0,
    ) -> ScenePool:
        """Draw the scenes of seeds first_seed ... first_seed + num_scenes - 1; `omit` as in `caption`."""
        scenes = [sample_scene(first_seed + i, split=split) for i in range(num_scenes)]
        captions = [
            caption(scene, scene.seed * captions_per_scene + variant, omit=omit)
            for scene in scenes
            for variant in range(captions_per_scene)
        ]
        return cls(SceneBatch.from_scenes(scenes), captions, captions_per_scene)

    def to(self, device: torch.device | str) -> ScenePool:
        """Move the scenes."""
        return ScenePool(self.scenes.to(device), self.captions, self.captions_per_scene)

    def sample(
        self,
        batch_size: int,
        *,
        num_chunks: int,
        generator: torch.Generator,
        cut_probability: float = 0.0,
        max_start_seconds: float = 0.0,
    ) -> ClipPlan:
        """Plan clips with random scenes; each chunk but the first begins a new shot with `cut_probability`.

        A first shot begins at a random time up to `max_start_seconds` (a later time may show a sprite that has already
        bounced, so its first chunk alone does not follow from the caption). Draws on the generator's device, without
        a host sync when that is the pool's.
        """
        device = self.scenes.background_B.device
        shape = (batch_size, num_chunks)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=generator.device).to(device)

        cut_BG = uniform(*shape) < cut_probability
        cut_BG[:, 0] = True
        fresh_BG = (uniform(*shape) * len(self.scenes)).long().clamp_max(len(self.scenes) - 1)
        variant_BG = (uniform(*shape) * self.captions_per_scene).long().clamp_max(self.captions_per_scene - 1)
        shot_BG = _shot_begin(cut_BG)
        scene_BG = fresh_BG.gather(1, shot_BG)
        caption_BG = scene_BG * self.captions_per_scene + variant_BG.gather(1, shot_BG)
        return ClipPlan(scene_BG, caption_BG, cut_BG, uniform(batch_size) * max_start_seconds)

    def render(self, plan: ClipPlan, *, height: int = 128, width: int = 224) -> tuple[Tensor, Tensor]:
        """Draw planned clips: video [B, 3, T, H, W] in [-1, 1] and foreground mask [B, 1, T, H, W]."""
        begin_BG = _shot_begin(plan.cut_BG)
        videos, masks = [], []
        for chunk in range(plan.scene_BG.shape[1]):
            first = chunk_start(chunk)
            frames = torch.arange(first, chunk_start(chunk + 1), device=begin_BG.device)
            begin_B = begin_BG[:, chunk]
            begin_frame_B = (begin_B > 0) * (FIRST_CHUNK_FRAMES + (begin_B - 1) * CHUNK_FRAMES)
            elapsed_B = torch.where(begin_B > 0, 0.0, plan.start_B)
            times_BT = elapsed_B[:, None] + (frames - begin_frame_B[:, None]) / FPS
            scenes = self.scenes[plan.scene_BG[:, chunk]]
            video, mask = render_with_mask(scenes, times_BT, height=height, width=width)
            videos.append(video)
            masks.append(mask)
        return torch.cat(videos, 2), torch.cat(masks, 2)


def _shot_begin(cut_BG: Tensor) -> Tensor:
    """The chunk in which the shot of each chunk began."""
    index_G = torch.arange(cut_BG.shape[1], device=cut_BG.device)
    return torch.where(cut_BG, index_G, 0).cummax(1).values
