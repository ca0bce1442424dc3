"""Options that say which model is run, and where and how: the same for every command that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from longvideo.cli.printing import printable

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder

ModelName: TypeAlias = Annotated[
    str, typer.Option("--model", help="`tiny`, a folder or file of any known format, or a Hugging Face id.")
]
Base: TypeAlias = Annotated[
    str | None, typer.Option(help="Model from which the parts that --model lacks come, and which a LoRA is added to.")
]
SettingsPreset: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Settings to use: `wan2.2-ti2v-5b` or `longlive-2.0-5b`.  [default: the model's, or the base's]"),
]
Entry: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Which weights of a training checkpoint, such as `generator_ema`.  [default: `generator`; of our own runs"
        " `ema`]"
    ),
]
Guidance: TypeAlias = Annotated[
    float | None,
    typer.Option(help="How strongly to follow the prompt; other than 1 doubles the work.  [default: the model's own]"),
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`.  [default: the GPU if any]")]
DecodeDevice: TypeAlias = Annotated[
    str | None, typer.Option(help="Where latents become pixels, for instance a second GPU.  [default: --device]")
]
DecodeShare: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Of the work of --decode-device, what --device does instead: 0.2 is a fifth.  [default: 0]"),
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Of the transformer: `bf16`, `fp8` or `nvfp4` (weights and inputs of the blocks in 8 or 4 bits), or"
        " `nvfp4-weights`. `fp8` needs a GPU with FP8 units.  [default: as the model is stored]"
    ),
]
KVCacheFormat: TypeAlias = Annotated[
    str, typer.Option(help="How the chunks already made are kept: `bf16`, or `nvfp4` in 0.28 of the memory.")
]
AttentionFormat: TypeAlias = Annotated[
    str,
    typer.Option(help="`bf16`, or `fp8` on a GPU of compute capability 9 with `pip install 'longvideo[cudnn]'`."),
]


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command was given."""

    name: str
    base: str | None = None
    preset: str | None = None
    entry: str | None = None

    def open(self) -> ModelFolder:
        """Open it; files that are of no part of it are named on standard error."""
        from longvideo.checkpoint.folder import ModelFolder

        folder = ModelFolder.open(self.name, base=self.base, preset=self.preset, entry=self.entry)
        for file, reason in folder.unused.items():
            typer.echo(printable(f"not used: {file}, {reason}"), err=True)
        return folder


def warn_of_missing_quotes(prompts: Sequence[str], *, command: str) -> None:
    """Warn where prompts are words in a row, as a shell makes them of a sentence without quotes."""
    if any(len(one.split()) == 1 == len(other.split()) for one, other in pairwise(prompts)):
        sentence = " ".join(prompts).replace("\\", "\\\\").replace('"', '\\"')
        text = f"warning: these are {len(prompts)} prompts, each shown on its own; for one prompt use quotes"
        typer.echo(printable(f'{text}: {command} "{sentence}"'), err=True)
