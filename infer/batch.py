"""Check the arguments of a batch of videos that are generated together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longvideo.errors import UserError, shown
from longvideo.infer.script import Script, ShotRequest


def batch_scripts(
    prompts: Sequence[Sequence[str]], seconds: Sequence[float], seeds: Sequence[int], negative_prompt: str = ""
) -> tuple[Script, ...]:
    """Return the script of each video; their shots have the same lengths.

    prompts: for every video, a prompt for each shot. seconds: length of each shot. seeds: seed of each video.
    negative_prompt: of all videos.
    Raises UserError for other numbers of them, or values of other types.
    """
    shots = [(f"prompts[{index}]", own) for index, own in enumerate(prompts if isinstance(prompts, Sequence) else ())]
    for name, values in (("prompts", prompts), ("seconds", seconds), ("seeds", seeds), *shots):
        is_number = isinstance(values, np.ndarray) and not values.ndim
        if is_number or isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise UserError(f"{name} is {shown(values)}; expected a sequence with one item for each video or shot")
    if not len(prompts) or len(prompts) != len(seeds):
        raise UserError(f"there are {len(prompts)} videos and {len(seeds)} seeds; expected one seed for each video")
    if any(len(own) != len(seconds) for own in prompts):
        raise UserError(
            f"every video needs {len(seconds)} prompts, one for each length; give as many prompts as seconds"
        )
    return tuple(Script(tuple(map(ShotRequest, own, seconds)), negative_prompt) for own in prompts)
