"""Open the prompts that a configuration names, and check that they fit the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.data.encoded import EncodedDataset
from longvideo.distill.prompts import (
    SHAPEWORLD,
    ClipScripts,
    FileScripts,
    Scripts,
    ShapeWorldScripts,
    encode_all,
    read_scripts,
)
from longvideo.errors import ConfigError
from longvideo.model.conditioning import chunk_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longvideo.distill.config import Distillation

HELD_OUT = 10
"""Number of prompts of which one is held out for validation."""


def read_own_prompts(config: Distillation) -> list[tuple[str, ...]] | None:
    """Read the file of prompts of a configuration; return None for prompts of ShapeWorld and of clips."""
    if config.data is not None or config.prompts == SHAPEWORLD:
        return None
    return read_scripts(Path(config.prompts), config.negative_prompt)


@dataclass(frozen=True)
class ScriptModel:
    """What prompts must fit.

    latent_shape: [C, T, H, W] of a chunk. device, dtype: of the text encoder.
    """

    folder: ModelFolder
    latent_shape: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class ScriptSets:
    """Prompts. held_out: those for validation, None where nothing is validated."""

    train: Scripts
    held_out: Scripts | None = None


def open_scripts(config: Distillation, model: ScriptModel, lines: Sequence[tuple[str, ...]] | None) -> ScriptSets:
    """Return the prompts of a configuration. lines: those of its file, None where it names none.

    Raises ConfigError for encoded clips that do not fit the model, and for too few prompts.
    """
    if config.data is not None:
        clips = _open_clips(config, config.data, model)

        def of_clips(numbers: range) -> Scripts:
            return ClipScripts(
                clips,
                numbers=numbers,
                image_fraction=config.image_fraction,
                seed=config.seed,
                device=model.device,
            )

        return _divided(config, len(clips), config.data, of_clips)
    encoder = model.folder.load_text_encoder(device=model.device, dtype=model.dtype).requires_grad_(False)
    if lines is None:
        held_out = ShapeWorldScripts(config.shapeworld, encoder, seed=config.seed, split="heldout")
        train = ShapeWorldScripts(config.shapeworld, encoder, seed=config.seed)
        return ScriptSets(train, held_out if config.validates else None)
    settings = model.folder.settings
    texts = [text for shots in lines for text in shots]
    texts += [chunk_text(text, cut=True, cut_prefix=settings.cut_prefix) for shots in lines for text in shots[1:]]
    features = encode_all(encoder, [*texts, config.negative_prompt])

    def of_lines(numbers: range) -> Scripts:
        chosen = [lines[number] for number in numbers]
        return FileScripts(chosen, features, seed=config.seed, text_len=settings.text_len, device=model.device)

    return _divided(config, len(lines), config.prompts, of_lines)


def _divided(config: Distillation, count: int, name: str, part: Callable[[range], Scripts]) -> ScriptSets:
    """Hold out the last tenth of numbered prompts, at least one, if a run validates."""
    if not config.validates:
        return ScriptSets(part(range(count)))
    if count == 1:
        raise ConfigError(
            f"{name} has 1 prompt; expected at least 2, of which one is held out; set qad.validation_batches=0"
        )
    first = count - max(1, count // HELD_OUT)
    return ScriptSets(part(range(first)), part(range(first, count)))


def _open_clips(config: Distillation, name: str, model: ScriptModel) -> EncodedDataset:
    """Open encoded clips. Raises ConfigError unless they have the model's sizes and are long enough."""
    clips = EncodedDataset.open(name)
    settings = model.folder.settings
    channels, chunk_frames, *latent_size = model.latent_shape
    for what, value, expected in (
        ("latent channels", clips.channels, channels),
        ("latent frames of a chunk", clips.chunk_frames, chunk_frames),
        ("latent height and width", clips.latent_size, tuple(latent_size)),
        ("text positions", clips.text_len, settings.text_len),
        ("text width", clips.text_dim, model.folder.transformer_config.text_dim),
    ):
        if value != expected:
            raise ConfigError(f"{what} of {name} are {value}; expected {expected}; encode it again with this model")
    clips.check_texts(settings.cut_prefix)
    longest = max(stage.frames for stage in config.stages)
    if clips.num_chunks * clips.chunk_frames < longest:
        raise ConfigError(
            f"clips of {name} have {clips.num_chunks * clips.chunk_frames} latent frames; expected at"
            f" least {longest}, the frames of a stage"
        )
    return clips
