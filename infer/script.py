"""Scripts: which prompt is shown for how long, and the chunks that a script is divided into.

A chunk is generated under one prompt, so a shot starts at a chunk boundary: the one nearest to the requested time, at
most one chunk away from it. This module does not import torch, so a wrong script is refused at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Rational, Real
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.files import check_text
from longvideo.infer.options import shown

if TYPE_CHECKING:
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.streaming.decoders import DecoderConfig

MAX_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class ShotRequest:
    """A shot of a script.

    prompt: text of the shot. seconds: its length, above 0. cut: whether the shot starts a new scene; otherwise the
    scene continues, and only the text changes.
    """

    prompt: str
    seconds: float
    cut: bool = True


@dataclass(frozen=True)
class Script:
    """Shots in the order in which they are shown. Raises UserError for a shot that cannot be generated."""

    shots: tuple[ShotRequest, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shots, Sequence) or not all(isinstance(shot, ShotRequest) for shot in self.shots):
            raise UserError(f"the shots of a script are {shown(self.shots)}; expected a sequence of ShotRequest")
        if not self.shots:
            raise UserError("there is no prompt; describe what the video shows")
        for number, shot in enumerate(self.shots, 1):
            if not isinstance(shot.cut, bool):
                raise UserError(f"shot {number}: cut is {shown(shot.cut)}; expected true or false")
            check_prompt(shot.prompt, f"the prompt of shot {number}")
            check_seconds(shot.seconds, f"shot {number}")
        check_seconds(self.seconds, "the script")

    @classmethod
    def from_prompts(cls, prompts: str | Sequence[str] | Script, *, seconds: float | None) -> Script:
        """Return a script with shots of equal length, one for each prompt. A Script is returned unchanged.

        seconds: length of the whole video. Raises UserError for a Script with seconds, and for prompts without.
        """
        if isinstance(prompts, Script):
            if seconds is not None:
                raise UserError(
                    "seconds and a Script exclude each other: a script has the length of each shot; leave seconds out"
                )
            return prompts
        if seconds is None:
            raise UserError("seconds is missing; give the length of the video")
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts is {shown(prompts)}; expected a text, or a sequence with a text for each shot")
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, "the prompt" if len(prompts) == 1 else f"prompt {number}")
        check_seconds(seconds, "the video")
        return cls(tuple(ShotRequest(prompt, seconds / len(prompts)) for prompt in prompts))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Script:
        """Read a YAML list of shots, each with the keys prompt, seconds and cut (default: true).

        Raises UserError with the file, the line and the shot for anything else.
        """
        from longvideo.config.yaml_reader import read_yaml

        document = read_yaml(Path(path), what="script")
        if not isinstance(document.value, list) or not document.value:
            raise UserError(f"{path} holds no list; expected a list of shots, each with prompt and seconds")
        numbered = enumerate(zip(document.value, document.lines, strict=True), 1)
        return cls(tuple(_read_shot(entry, f"{path}:{line}: shot {number}") for number, (entry, line) in numbered))

    @property
    def seconds(self) -> float:
        """Length of the whole video."""
        return math.fsum(shot.seconds for shot in self.shots)


@dataclass(frozen=True)
class ChunkTiming:
    """How the pixel frames of a video are divided into chunks.

    first_frames, later_frames: pixel frames of the first chunk and of every later one. The first has fewer, because the
    first latent frame of a video is decoded to a single pixel frame. fps: pixel frames per second.
    """

    first_frames: int
    later_frames: int
    fps: float

    @classmethod
    def of(cls, settings: ModelSettings, decoder: DecoderConfig) -> ChunkTiming:
        """Return the timing of the chunks of a model. decoder: sizes of its decoder."""
        frames, scale = settings.chunk_frames, decoder.scale_factor_temporal
        return cls(1 + (frames - 1) * scale, frames * scale, settings.fps)

    @property
    def after_footage(self) -> ChunkTiming:
        """The timing of the chunks that continue footage, counted from the first of them."""
        return replace(self, first_frames=self.later_frames)

    def start(self, chunk: int) -> int:
        """Return the pixel frame at which a chunk starts."""
        return 0 if chunk == 0 else self.first_frames + (chunk - 1) * self.later_frames

    def nearest(self, frame: int) -> int:
        """Return the chunk that starts nearest to a pixel frame."""
        if frame * 2 <= self.first_frames:
            return 0
        return 1 + max(0, math.floor((frame - self.first_frames) / self.later_frames + 0.5))

    def whole_chunks(self, frames: int) -> int:
        """Return the number of whole chunks in this many pixel frames of a video."""
        return 0 if frames < self.first_frames else 1 + (frames - self.first_frames) // self.later_frames

    def chunks_for(self, frames: int) -> int:
        """Return the number of chunks that hold this many pixel frames."""
        return 1 + max(0, math.ceil((frames - self.first_frames) / self.later_frames))


@dataclass(frozen=True)
class PlannedChunk:
    """A chunk of a plan.

    index: its number in the video. shot: number of the shot it belongs to. cut: whether it starts a new scene.
    num_frames: pixel frames that are kept; the last chunk of a video may have fewer than the others.
    """

    index: int
    shot: int
    cut: bool
    num_frames: int


@dataclass(frozen=True)
class ChunkPlan:
    """A script divided into chunks; iterate over it for the chunks.

    first_chunks: number of the first chunk of each shot. cuts: whether each shot starts a new scene. num_frames: pixel
    frames of the video.
    """

    timing: ChunkTiming
    first_chunks: tuple[int, ...]
    cuts: tuple[bool, ...]
    num_frames: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the video."""
        return self.timing.chunks_for(self.num_frames)

    def __iter__(self) -> Iterator[PlannedChunk]:
        shot = 0
        for index in range(self.num_chunks):
            while shot + 1 < len(self.first_chunks) and self.first_chunks[shot + 1] <= index:
                shot += 1
            start = self.timing.start(index)
            end = min(self.timing.start(index + 1), self.num_frames)
            cut = index > 0 and index == self.first_chunks[shot] and self.cuts[shot]
            yield PlannedChunk(index, shot, cut, end - start)


def plan_chunks(script: Script, timing: ChunkTiming) -> ChunkPlan:
    """Divide a script into chunks; the video has exactly round(seconds * fps) pixel frames.

    Raises UserError when a shot is too short to start within one chunk of its requested time.
    """
    num_frames = round(script.seconds * timing.fps)
    if num_frames < 1:
        raise UserError(
            f"{script.seconds:g} s is shorter than one frame at {timing.fps:g} frames per second; use"
            f" {1 / timing.fps:.2f} s or more"
        )
    first_chunks: list[int] = []
    seconds = 0.0
    for number, shot in enumerate(script.shots, 1):
        frame = round(seconds * timing.fps)
        chunk = max(timing.nearest(frame), first_chunks[-1] + 1) if first_chunks else 0
        start = timing.start(chunk)
        if abs(start - frame) > timing.later_frames or start >= num_frames:
            minimum = timing.later_frames / timing.fps
            raise UserError(
                f"shot {number} cannot start at {seconds:g} s of {script.seconds:g} s: a shot starts at a chunk"
                f" boundary and lasts at least one chunk; use {minimum:.2f} s or more for every shot"
            )
        first_chunks.append(chunk)
        seconds += shot.seconds
    return ChunkPlan(timing, tuple(first_chunks), tuple(shot.cut for shot in script.shots), num_frames)


def check_prompt(prompt: str, name: str) -> None:
    """Raise UserError for a prompt that is not text, is empty, or holds half a character. name: start of the error."""
    if not isinstance(prompt, str):
        raise UserError(f"{name} is {shown(prompt)}; expected text")
    check_text(prompt, name)
    if not prompt.strip():
        raise UserError(f"{name} is empty; describe what the video shows")


def check_seconds(seconds: float, name: str) -> None:
    """Raise UserError unless a length is a number above 0 and at most a day. name: start of the error."""
    expected = f"expected a number above 0 and at most {MAX_SECONDS:g} (24 h)"
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise UserError(f"{name}: seconds is {shown(seconds)}; {expected}")
    if not 0 < seconds <= MAX_SECONDS:
        length = shown(int(seconds)) if isinstance(seconds, Rational) else f"{float(seconds):g}"
        raise UserError(f"{name}: seconds is {length}; {expected}")


def _read_shot(entry: object, where: str) -> ShotRequest:
    """Read a shot of a YAML file. where: file, line and shot, start of the error."""
    known = [field.name for field in fields(ShotRequest)]
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {shown(entry)}; expected a mapping with the keys {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has the unknown key {shown(key)}; {_nearest_key(str(key), known)}")
    prompt, seconds, cut = entry.get("prompt"), entry.get("seconds"), entry.get("cut", True)
    if prompt is None:
        raise UserError(f"{where} has no prompt; add 'prompt: what the shot shows'")
    check_prompt(prompt, f"{where}: the prompt")
    if seconds is None:
        raise UserError(f"{where} has no seconds; add 'seconds: 5' for a shot of 5 s")
    check_seconds(seconds, where)
    if not isinstance(cut, bool):
        raise UserError(f"{where}: cut is {shown(cut)}; expected true or false")
    return ShotRequest(prompt, float(seconds), cut)


def _nearest_key(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"did you mean '{nearest[0]}'?" if nearest else f"the keys are {', '.join(known)}"
