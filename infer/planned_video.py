"""The inputs of a video, or of a batch of videos, all of whose chunks are planned, and the history of footage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.infer.history import History, footage_records
from longvideo.infer.script import ChunkTiming, plan_chunks
from longvideo.infer.timeline import LiveShot, planned_steps
from longvideo.infer.video_inputs import VideoInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from longvideo.infer.beginning import Beginning
    from longvideo.infer.generation import Models
    from longvideo.infer.options import SamplingOptions
    from longvideo.infer.script import Script


def planned_inputs(
    models: Models,
    scripts: Sequence[Script],
    options: SamplingOptions,
    *,
    generators: Sequence[torch.Generator],
    beginning: Beginning,
) -> VideoInputs:
    """Return the inputs of videos with checked scripts.

    scripts: that of each video; their shots have equal lengths. generators: source of each video's noise; that of
    footage is drawn from them at once. beginning: what every video begins with.
    """
    footage, timing = beginning.footage, ChunkTiming.of(models.settings, models.decoder.config)
    plan = plan_chunks(scripts[0], timing.after_footage if footage else timing)
    shots = [LiveShot(script.shots[0].prompt, negative_prompt=script.negative_prompts[0]) for script in scripts]
    history = footage_history(models, footage, shots, generators=generators)
    return VideoInputs.of(
        planned_steps(plan, scripts, first=len(footage)),
        models.settings,
        options,
        generators=generators,
        first_latent=beginning.first_latent,
        past=history.past_of(len(footage)),
    )


def footage_history(
    models: Models,
    footage: Sequence[Tensor],
    shots: Sequence[LiveShot],
    *,
    generators: Sequence[torch.Generator],
    capacity: int = 0,
) -> History:
    """Return a history with the chunks of footage. The arguments are those of `footage_records` and `History`."""
    timing = ChunkTiming.of(models.settings, models.decoder.config)
    records = footage_records(footage, shots, timing, generators=generators)
    return History(models.spec, decode_lookback=models.decoder.lookback, capacity=capacity, records=records)
