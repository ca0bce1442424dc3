"""Scripts: which prompt is shown for how long, and the chunks that a script is divided into.

A chunk is generated under one prompt, so a shot starts at a chunk boundary: the one nearest to the requested time, at
most one chunk away from it. This module does not import torch, so a wrong script is refused at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Rational, Real
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError, shown
from longvideo.files import check_text
from longvideo.model.chunk_frames import ChunkFrames

if TYPE_CHECKING:
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.streaming.decoders import DecoderConfig

MAX_SECONDS = 24 * 3600.0
SCRIPT_KEYS = ("negative_prompt", "shots")


class PromptError(UserError):
    """A prompt cannot be used, or a negative prompt, if `is_negative`."""

    def __init__(self, message: str, *, is_negative: bool = False) -> None:
        super().__init__(message)
        self.is_negative = is_negative


@dataclass(frozen=True)
class ShotRequest:
    """A shot of a script.

    prompt: text of the shot. seconds: its length, above 0. cut: whether the shot starts a new scene; otherwise the
    scene continues, and only the text changes. negative_prompt: text that guidance leads away from; None means that of
    the script.
    """

    prompt: str
    seconds: float
    cut: bool = True
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Script:
    """Shots in the order in which they are shown. Raises UserError for a shot that cannot be generated.

    negative_prompt: text that guidance leads away from in shots that state none.
    """

    shots: tuple[ShotRequest, ...]
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.shots, Sequence) or not all(isinstance(shot, ShotRequest) for shot in self.shots):
            raise UserError(f"the shots of a script are {shown(self.shots)}; expected a sequence of ShotRequest")
        if not self.shots:
            raise UserError("there is no prompt; describe what the video shows")
        for number, shot in enumerate(self.shots, 1):
            if not isinstance(shot.cut, bool):
                raise UserError(f"shot {number}: cut is {shown(shot.cut)}; expected true or false")
            check_prompt(shot.prompt, f"the prompt of shot {number}")
            if shot.negative_prompt is not None:
                check_negative_prompt(shot.negative_prompt, f"the negative prompt of shot {number}")
            check_seconds(shot.seconds, f"shot {number}")
        check_negative_prompt(self.negative_prompt, "the negative prompt")
        check_seconds(self.seconds, "the script")

    @classmethod
    def from_prompts(
        cls, prompts: str | Sequence[str] | Script, *, seconds: float | None, negative_prompt: str = ""
    ) -> Script:
        """Return a script with shots of equal length, one for each prompt.

        prompts: texts, or a Script, to which a negative prompt is added if one is given. seconds: length of the whole
        video. negative_prompt: as in `Script`. Raises UserError for a Script with seconds, and for prompts without.
        """
        if isinstance(prompts, Script):
            if seconds is not None:
                raise UserError(
                    "seconds and a Script exclude each other: a script has the length of each shot; leave seconds out"
                )
            if not negative_prompt:
                return prompts
            if prompts.negative_prompt:
                raise UserError(
                    f"the script has the negative prompt {shown(prompts.negative_prompt)}; leave the other one,"
                    f" {shown(negative_prompt)}, out"
                )
            return replace(prompts, negative_prompt=negative_prompt)
        if seconds is None:
            raise UserError("seconds is missing; give the length of the video")
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts is {shown(prompts)}; expected a text, or a sequence with a text for each shot")
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, "the prompt" if len(prompts) == 1 else f"prompt {number}")
        check_seconds(seconds, "the video")
        return cls(tuple(ShotRequest(prompt, seconds / len(prompts)) for prompt in prompts), negative_prompt)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Script:
        """Read a YAML list of shots, each with the keys prompt, seconds, cut (default: true) and negative_prompt.

        Or read a mapping with such a list as shots, and a negative_prompt for those that state none.
        Raises UserError with the file, the line and the shot for anything else.
        """
        from longvideo.config.yaml_reader import read_yaml

        document = read_yaml(Path(path), what="script")
        entries, lines, negative_prompt = document.value, document.lines, None
        if isinstance(entries, dict):
            negative_prompt = entries.get("negative_prompt")
            entries, lines = entries.get("shots"), document.lines_of.get("shots", ())
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path} holds no list; expected a list of shots, each with prompt and seconds")
        if isinstance(document.value, dict):
            _check_keys(document.value, SCRIPT_KEYS, str(path))
        if negative_prompt is not None:
            check_negative_prompt(negative_prompt, f"{path}: the negative prompt")
        numbered = enumerate(zip(entries, lines, strict=True), 1)
        shots = tuple(_read_shot(entry, f"{path}:{line}: shot {number}") for number, (entry, line) in numbered)
        return cls(shots, negative_prompt or "")

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompt of each shot."""
        own = (shot.negative_prompt for shot in self.shots)
        return tuple(self.negative_prompt if text is None else text for text in own)

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts and negative prompts."""
        return (*(shot.prompt for shot in self.shots), *self.negative_prompts)

    @property
    def seconds(self) -> float:
        """Length of the whole video."""
        return math.fsum(shot.seconds for shot in self.shots)


@dataclass(frozen=True)
class ChunkTiming(ChunkFrames):
    """How the pixel frames of a video are divided into chunks. fps: pixel frames per second."""

    fps: float

    @classmethod
    def of(cls, settings: ModelSettings, decoder: DecoderConfig) -> ChunkTiming:
        """Return the timing of the chunks of a model. decoder: sizes of its decoder."""
        frames = ChunkFrames.of_latents(settings.chunk_frames, decoder.scale_factor_temporal)
        return cls(frames.first, frames.later, settings.fps)

    @property
    def after_footage(self) -> ChunkTiming:
        """The timing of the chunks that continue footage, counted from the first of them."""
        return replace(self, first=self.later)

    def nearest(self, frame: int) -> int:
        """Return the chunk that starts nearest to a pixel frame."""
        if frame * 2 <= self.first:
            return 0
        return 1 + max(0, math.floor((frame - self.first) / self.later + 0.5))


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
        if abs(start - frame) > timing.later or start >= num_frames:
            minimum = timing.later / timing.fps
            raise UserError(
                f"shot {number} cannot start at {seconds:g} s of {script.seconds:g} s: a shot starts at a chunk"
                f" boundary and lasts at least one chunk; use {minimum:.2f} s or more for every shot"
            )
        first_chunks.append(chunk)
        seconds += shot.seconds
    return ChunkPlan(timing, tuple(first_chunks), tuple(shot.cut for shot in script.shots), num_frames)


def check_prompt(prompt: str, name: str) -> None:
    """Raise PromptError for a prompt that is not text, is empty, or has half a character. name: start of the error."""
    _check_words(prompt, name)
    if not prompt.strip():
        raise PromptError(f"{name} is empty; describe what the video shows")


def check_negative_prompt(text: str, name: str) -> None:
    """Raise PromptError for a negative prompt that is not text or has half a character. name: start of the error."""
    _check_words(text, name, is_negative=True)


def check_seconds(seconds: float, name: str) -> None:
    """Raise UserError unless a length is a number above 0 and at most a day. name: start of the error."""
    expected = f"expected a number above 0 and at most {MAX_SECONDS:g} (24 h)"
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise UserError(f"{name}: seconds is {shown(seconds)}; {expected}")
    if not 0 < seconds <= MAX_SECONDS:
        length = shown(int(seconds)) if isinstance(seconds, Rational) else f"{float(seconds):g}"
        raise UserError(f"{name}: seconds is {length}; {expected}")


def _check_words(text: str, name: str, *, is_negative: bool = False) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{name} is {shown(text)}; expected text", is_negative=is_negative)
    try:
        check_text(text, name)
    except UserError as error:
        raise PromptError(str(error), is_negative=is_negative) from error


def _read_shot(entry: object, where: str) -> ShotRequest:
    """Read a shot of a YAML file. where: file, line and shot, start of the error."""
    known = [field.name for field in fields(ShotRequest)]
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {shown(entry)}; expected a mapping with the keys {', '.join(known)}")
    _check_keys(entry, known, where)
    prompt, seconds, cut = entry.get("prompt"), entry.get("seconds"), entry.get("cut", True)
    negative_prompt = entry.get("negative_prompt")
    if prompt is None:
        raise UserError(f"{where} has no prompt; add 'prompt: what the shot shows'")
    check_prompt(prompt, f"{where}: the prompt")
    if seconds is None:
        raise UserError(f"{where} has no seconds; add 'seconds: 5' for a shot of 5 s")
    check_seconds(seconds, where)
    if not isinstance(cut, bool):
        raise UserError(f"{where}: cut is {shown(cut)}; expected true or false")
    if negative_prompt is not None:
        check_negative_prompt(negative_prompt, f"{where}: the negative prompt")
    return ShotRequest(prompt, float(seconds), cut, negative_prompt)


def _check_keys(entry: Mapping[object, object], known: Sequence[str], where: str) -> None:
    """Raise UserError, with the nearest known key, for a key that is unknown. where: start of the error."""
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=0.5)
            advice = f"did you mean '{nearest[0]}'?" if nearest else f"the keys are {', '.join(known)}"
            raise UserError(f"{where} has the unknown key {shown(key)}; {advice}")
