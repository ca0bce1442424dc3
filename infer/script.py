"""Scripts: which prompt is shown for how long, and the chunks that a script becomes.

A shot starts at a chunk boundary, because one chunk is made under one prompt: a cut lands on the boundary nearest to
where it was asked, never more than one chunk away. This module needs no torch, so that a bad script is refused at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Rational, Real
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import check_text
from longvideo.infer.options import shown

MAX_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class ShotRequest:
    """One prompt and how long it is shown. `cut` starts a new scene; without it only the text changes."""

    prompt: str
    seconds: float
    cut: bool = True


@dataclass(frozen=True)
class Script:
    """Shots in the order in which they are shown."""

    shots: tuple[ShotRequest, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shots, Sequence) or not all(isinstance(shot, ShotRequest) for shot in self.shots):
            raise UserError(f"the shots of a script are {shown(self.shots)}; give a sequence of ShotRequest")
        if not self.shots:
            raise UserError("no prompt given: write what the video should show")
        for number, shot in enumerate(self.shots, 1):
            if not isinstance(shot.cut, bool):
                raise UserError(f"shot {number} has cut {shown(shot.cut)}; true or false was expected")
            check_prompt(shot.prompt, f"the prompt of shot {number}")
            check_seconds(shot.seconds, f"shot {number}")
        check_seconds(self.seconds, "the script")

    @classmethod
    def from_prompts(cls, prompts: str | Sequence[str], *, seconds: float) -> Script:
        """Give every prompt a shot of equal length; `seconds` is the length of the whole video."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts is {shown(prompts)}; give a text, or a sequence of texts, one for each shot")
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, "the prompt" if len(prompts) == 1 else f"prompt {number}")
        check_seconds(seconds, "the video")
        return cls(tuple(ShotRequest(prompt, seconds / len(prompts)) for prompt in prompts))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Script:
        """Read a list of `{prompt, seconds, cut}` (cut defaults to true); raise UserError naming file and shot."""
        from longvideo.config.yaml_reader import read_yaml

        document = read_yaml(Path(path), what="script")
        if not isinstance(document.value, list) or not document.value:
            raise UserError(f"{path} must hold a list of shots, each with prompt and seconds")
        numbered = enumerate(zip(document.value, document.lines, strict=True), 1)
        return cls(tuple(_read_shot(entry, f"{path}:{line}: shot {number}") for number, (entry, line) in numbered))

    @property
    def seconds(self) -> float:
        return math.fsum(shot.seconds for shot in self.shots)


@dataclass(frozen=True)
class ChunkTiming:
    """How chunks divide pixel frames: the first has fewer, because the first latent frame is a single pixel frame."""

    first_frames: int
    later_frames: int
    fps: float

    @classmethod
    def of(cls, *, chunk_frames: int, temporal_scale: int, fps: float) -> ChunkTiming:
        """Derive it from latent frames in a chunk and pixel frames in a latent frame."""
        return cls(1 + (chunk_frames - 1) * temporal_scale, chunk_frames * temporal_scale, fps)

    def start(self, chunk: int) -> int:
        """Pixel frame at which a chunk starts."""
        return 0 if chunk == 0 else self.first_frames + (chunk - 1) * self.later_frames

    def nearest(self, frame: int) -> int:
        """Chunk whose start is nearest to a pixel frame."""
        if frame * 2 <= self.first_frames:
            return 0
        return 1 + max(0, math.floor((frame - self.first_frames) / self.later_frames + 0.5))

    def chunks_for(self, frames: int) -> int:
        """Chunks that hold this many pixel frames."""
        return 1 + max(0, math.ceil((frames - self.first_frames) / self.later_frames))


@dataclass(frozen=True)
class PlannedChunk:
    """One chunk of a plan: the shot it belongs to, whether it opens a scene, and the frames that are kept of it."""

    index: int
    shot: int
    cut: bool
    num_frames: int


@dataclass(frozen=True)
class ChunkPlan:
    """A script laid on chunk boundaries. `first_chunks[i]` is the chunk with which shot i starts."""

    timing: ChunkTiming
    first_chunks: tuple[int, ...]
    cuts: tuple[bool, ...]
    num_frames: int

    @property
    def num_chunks(self) -> int:
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
    """Lay a script on chunk boundaries; the video has exactly round(seconds * fps) frames.

    Raises UserError when a shot is too short to start within one chunk of where it was asked.
    """
    num_frames = round(script.seconds * timing.fps)
    if num_frames < 1:
        raise UserError(f"{script.seconds:g} s is shorter than one frame at {timing.fps:g} frames a second")
    first_chunks: list[int] = []
    asked_seconds = 0.0
    for number, shot in enumerate(script.shots, 1):
        asked = round(asked_seconds * timing.fps)
        chunk = max(timing.nearest(asked), first_chunks[-1] + 1) if first_chunks else 0
        start = timing.start(chunk)
        if abs(start - asked) > timing.later_frames or start >= num_frames:
            needed = timing.later_frames / timing.fps
            raise UserError(
                f"shot {number} cannot start at {asked_seconds:g} s of {script.seconds:g} s: a shot starts at a chunk "
                f"boundary and lasts at least one chunk; give every shot {needed:.2f} s or more"
            )
        first_chunks.append(chunk)
        asked_seconds += shot.seconds
    return ChunkPlan(timing, tuple(first_chunks), tuple(shot.cut for shot in script.shots), num_frames)


def check_prompt(prompt: str, what: str) -> None:
    """Raise UserError for a prompt that is no text, says nothing, or holds half a character."""
    if not isinstance(prompt, str):
        raise UserError(f"{what} is {shown(prompt)}; give text")
    check_text(prompt, what)
    if not prompt.strip():
        raise UserError(f"{what} is empty: write what the video should show")


def check_seconds(seconds: float, what: str) -> None:
    """Raise UserError unless a length is a number above 0 and at most a day."""
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise UserError(f"{what} has seconds {shown(seconds)}; a number was expected")
    if not 0 < seconds <= MAX_SECONDS:
        length = shown(int(seconds)) if isinstance(seconds, Rational) else f"{float(seconds):g}"
        raise UserError(f"{what} has {length} seconds; a length must be above 0 and at most {MAX_SECONDS:g} (24 h)")


def _read_shot(entry: object, where: str) -> ShotRequest:
    known = [field.name for field in fields(ShotRequest)]
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {shown(entry)}, not a mapping with the keys {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has the unknown key {shown(key)}{_nearest_key(str(key), known)}")
    prompt, seconds, cut = entry.get("prompt"), entry.get("seconds"), entry.get("cut", True)
    if prompt is None:
        raise UserError(f"{where} has no prompt: add 'prompt: what the shot shows'")
    check_prompt(prompt, f"{where}: the prompt")
    if seconds is None:
        raise UserError(f"{where} has no seconds: add 'seconds: 5' for a shot of 5 s")
    check_seconds(seconds, where)
    if not isinstance(cut, bool):
        raise UserError(f"{where} has cut {shown(cut)}; true or false was expected")
    return ShotRequest(prompt, float(seconds), cut)


def _nearest_key(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else f"; the keys are {', '.join(known)}"
