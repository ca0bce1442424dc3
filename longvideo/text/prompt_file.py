"""Read files of prompts: a prompt in each line, or, in a `.jsonl`, a list of shots in each line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.files import check_text, parse_json, read_lines
from longvideo.text.encoder import clean_prompt

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("prompts", "negative_prompt", "seconds", "seed")
EXAMPLE = '{"prompts": ["first shot", "second shot"]}'


@dataclass(frozen=True)
class PromptLine:
    """A video of a file.

    shots: prompt of each shot. negative_prompts: text of each shot that guidance leads away from; none where the file
    states none. seconds: length of the video. seed: seed of its noise.
    """

    shots: tuple[str, ...]
    negative_prompts: tuple[str, ...] = ()
    seconds: float | None = None
    seed: int | None = None


def read_prompt_file(path: Path) -> list[PromptLine]:
    """Read prompts: one in each line, or, in a `.jsonl`, objects with a prompt for each shot.

    Such an object is `{"prompts": ["first shot", "second shot"], "seconds": 10, "seed": 0}`; the last two may be
    missing. It may have a `negative_prompt`, one text or a list with one for each shot.
    Raises UserError, with the line, for a file without prompts, an empty line, or a line that cannot be read.
    """
    lines = read_lines(path, what="file of prompts")
    if lines[-1] == "":
        lines.pop()  # the last line ends with a line break
    if not lines:
        raise UserError(f"{path} is empty; expected a prompt in each line")
    parse = _json_line if path.suffix == ".jsonl" else lambda line, _where: PromptLine((line,))
    videos = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        video = parse(line, where)
        shots = tuple(map(clean_prompt, video.shots))
        if not shots or not all(shots):
            raise UserError(f"{where} has an empty prompt; remove the line, or describe a video")
        for text in (*shots, *video.negative_prompts):
            check_text(text, f"{where}: the prompt")
        videos.append(replace(video, shots=shots))
    return videos


def _json_line(line: str, where: str) -> PromptLine:
    value = parse_json(line, where=where)
    shots = value.get("prompts") if isinstance(value, dict) else None
    if not isinstance(shots, list) or not all(isinstance(shot, str) for shot in shots):
        raise UserError(f"{where} is not an object of the form {EXAMPLE}")
    if unknown := [key for key in value if key not in KEYS]:
        raise UserError(f"{where} has the unknown key {unknown[0][:40]!r}; the keys are {', '.join(KEYS)}")
    seconds, seed = value.get("seconds"), value.get("seed")
    negative_prompts = _negative_prompts(value.get("negative_prompt"), len(shots), where)
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0):
        raise UserError(f"{where}: seconds is {str(seconds)[:40]}; expected a number above 0")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UserError(f"{where}: seed is {str(seed)[:40]}; expected a whole number from 0 on")
    return PromptLine(tuple(shots), negative_prompts, seconds, seed)


def _negative_prompts(value: object, num_shots: int, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] * num_shots if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        text = str(value)[:40]
        raise UserError(f"{where}: negative_prompt is {text}; expected text, or a list with one for each shot")
    if len(texts) != num_shots:
        raise UserError(f"{where} has {len(texts)} negative prompts; expected one for each of {num_shots} shots")
    return tuple(texts)
