"""`longvideo config`: explain the configuration of training and distillation."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.errors import ConfigError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(no_args_is_help=True, help="Explain the configuration of training and distillation.")
WIDTH = 100


def _vae() -> type:
    from longvideo.train.vae.recipe import VaeTraining

    return VaeTraining


def _ar() -> type:
    from longvideo.train.shapeworld.recipe import ArTraining

    return ArTraining


def _clips() -> type:
    from longvideo.train.clips.config import ClipTraining

    return ClipTraining


def _decoder() -> type:
    from longvideo.train.decoder.recipe import DecoderTraining

    return DecoderTraining


def _distill() -> type:
    from longvideo.distill.config import Distillation

    return Distillation


SCHEMAS: dict[str, Callable[[], type]] = {
    "train vae": _vae,
    "train ar": _ar,
    "train clips": _clips,
    "train decoder": _decoder,
    "distill": _distill,
}


@app.callback()
def config() -> None:
    """Explain the configuration of training and distillation."""


@app.command(no_args_is_help=False)
def keys(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND|PRESET [KEY]",
            help="`train vae`, `train ar`, `train clips`, `train decoder` or `distill`, or the name of a preset or a"
            " YAML file; then, to see a part only, a key such as `optimizer`.",
        ),
    ] = None,
) -> None:
    """Print every key of a configuration with its type, its default and what it does.

    For a preset or a YAML file the values are those of the file.

    `longvideo config keys train clips`

    `longvideo config keys wan/dmd backbone`
    """
    from longvideo.config.keys import keys_of, select_keys
    from longvideo.config.loading import packaged_configs

    name, prefix = _split(words or [])
    if name is None:
        print(f"commands: {', '.join(SCHEMAS)}\npresets: {', '.join(packaged_configs())}")
        return
    explained = list(keys_of(SCHEMAS[name]())) if name in SCHEMAS else list(keys_of(*_of_file(name)))
    for key in select_keys(explained, prefix) if prefix else explained:
        print(f"{key.name}={key.value}  ({key.type})")
        if key.text:
            print(textwrap.fill(key.text, WIDTH, initial_indent="    ", subsequent_indent="    "))


def _split(words: list[str]) -> tuple[str | None, str | None]:
    """Return the name of a command or of a configuration, and the key to show."""
    if not words:
        return None, None
    count = 2 if words[0] == "train" and len(words) > 1 else 1
    name, rest = " ".join(words[:count]), words[count:]
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is one word too many; expected a command or a preset, then at most one key")
    return name, rest[0] if rest else None


def _of_file(name: str) -> tuple[type, Any]:
    """Return the dataclass that a file configures, and its values."""
    from longvideo.config.loading import find_config, load_config

    file, errors = find_config(name), []
    for command, schema in SCHEMAS.items():
        try:
            return schema(), load_config(schema(), [file])
        except ConfigError as error:
            errors.append(f"{command}: {error}")
    raise ConfigError(f"{file} configures none of {', '.join(SCHEMAS)} ({'; '.join(errors)})")
