"""Options that choose a model, its devices and its number formats, the same in every command that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from longvideo.checkpoint.choices import AdapterChoice
from longvideo.cli.printing import printable
from longvideo.errors import UserError

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.quantization.number_formats import NumberFormats

ModelName: TypeAlias = Annotated[
    str, typer.Option("--model", help="`tiny`, a folder or file of any known format, or a Hugging Face id.")
]
Base: TypeAlias = Annotated[
    str | None, typer.Option(help="Model with the parts that are missing in --model, and to which a LoRA is added.")
]
SettingsPreset: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Settings of a published model, `wan2.2-ti2v-5b` or `longlive-2.0-5b`.  [default: the model's, or the"
        " base's]"
    ),
]
Entry: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Entry of a training checkpoint with the weights, such as `generator_ema`.  [default: `generator`; `ema`"
        " in checkpoints of longvideo]"
    ),
]
AdapterNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="PATH[:STRENGTH]",
        help="LoRA to add to the transformer: a file or folder of kohya, ComfyUI, diffusers, peft or LongLive, such as"
        " `style.safetensors:0.8`. Several are added in their order.",
    ),
]
Guidance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="How strongly to follow the prompt; any value but 1 doubles the work.  [default: the model's own]"
    ),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`.  [default: cuda if there is a GPU]")
]
DecodeDevice: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Device that decodes latents to frames, for example a second GPU.  [default: --device]"),
]
DecodeShare: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Fraction of the decoding that --device does for --decode-device, such as 0.2.  [default: 0]"),
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Format of the transformer: `bf16`, `fp8` or `nvfp4` (weights and inputs of the blocks in 8 or 4 bits), or"
        " `nvfp4-weights`. `fp8` needs a GPU with FP8 units. `nvfp4-te` is `nvfp4` through TransformerEngine, and needs"
        " FP4 units.  [default: the format of the files]"
    ),
]
KVCacheFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Format of the KV cache: `bf16`, `nvfp4` with 0.28 of the memory, or `nvfp4-mixed`, in 4 bits with sink"
        " and newest chunk exact."
    ),
]
AttentionFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Format of attention: `bf16`, or `fp8` on a GPU of compute capability 9 with the extra `longvideo[cudnn]`."
    ),
]
DecoderName: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder",
        metavar="NAME",
        help="`wan` for the model's autoencoder, `small` for the small decoder in its folder, or a file: TAEW2.2, its"
        " super form, lighttae, MG-LightVAE, or one of your own.  [default: small on a CPU if there is one, else wan]",
    ),
]
DecoderFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        "--decoder-precision",
        help="Format of the decoder: `fp32`, `bf16` or `fp8` (large convolutions; for `wan`, on a GPU with FP8 units)."
        " `auto` is bf16 on a GPU, and on a CPU the faster of fp32 and bf16, which is measured.",
    ),
]

Size: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Picture size in pixels, WIDTHxHEIGHT, in multiples of 32 and with no more tokens than the model's own."
        "  [default: the model's own]"
    ),
]
TextEncoderChoice: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        help="`cuda` for the text encoder on --device; `cpu` for the CPU, which takes longer for each prompt; `fp8` or"
        " `nvfp4` for --device with weights in 8 or 4 bits.  [default: on --device]",
    ),
]
LowMemory: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Use memory in turn: denoising and decoding on one GPU never overlap, and the decoder has one buffer, from"
        " and to which each convolution copies the frames that it keeps. The results are the same; by the estimate,"
        " the 5B needs 0.8 to 4.4 GB less.",
    ),
]
OffloadWeights: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--offload-weights",
        help="Keep the weights of the transformer's blocks in host memory and copy each block to the GPU before it"
        " runs. The results are the same, but each step waits for the copies: 9.8 GB for the 5B in bf16, 4.9 in fp8,"
        " 2.8 in 4 bits. The last resort.",
    ),
]


@dataclass(frozen=True)
class DeviceChoice:
    """The devices that a user chose, as the arguments of `Placement.choose`."""

    device: str | None = None
    decode_device: str | None = None
    decode_share: float | None = None
    text_encoder: str | None = None
    low_memory: bool = False
    offload_weights: bool = False

    def place(self) -> Placement:
        """Return the placement on devices of this machine. Raises UserError as `Placement.choose` does."""
        from longvideo.infer.fit.placement import Placement

        return Placement.choose(**asdict(self))


def one_decoder(names: Sequence[str] | None) -> str | None:
    """Return the decoder that a user chose. Raises UserError for two of them."""
    if names and len(names) > 1:
        raise UserError(f"there are {len(names)} decoders, {', '.join(names)}; use --decoder once")
    return names[0] if names else None


FUNCTION_WORDS = frozenset(
    "a an the this that its and or but of in on at to into onto from by with without over under near is are".split()
)
"""English words that describe nothing on their own, so that none of them alone is a prompt."""


@dataclass(frozen=True)
class ModelChoice:
    """The model that a user chose. size: picture size; the other fields are those of `ModelFolder.open`."""

    name: str
    base: str | None = None
    preset: str | None = None
    entry: str | None = None
    size: str | None = None
    adapters: tuple[AdapterChoice, ...] = ()

    def open(self) -> ModelFolder:
        """Open the model; print the names of files that are not used to standard error."""
        from longvideo.checkpoint.folder import ModelFolder
        from longvideo.checkpoint.picture_size import PictureSize

        size = None if self.size is None else PictureSize.parse(self.size)
        folder = ModelFolder.open(
            self.name, base=self.base, preset=self.preset, entry=self.entry, adapters=self.adapters
        )
        for file, reason in folder.unused.items():
            typer.echo(printable(f"not used: {file}, {reason}"), err=True)
        return folder if size is None else folder.resized(size)

    def load(self, placement: Placement, formats: NumberFormats, decoder: str | None) -> StreamingPipeline:
        """Open and load the model. decoder: as in `longvideo.checkpoint.decoders.choose_decoder`."""
        from longvideo.infer.fit.formats import check_hardware
        from longvideo.infer.loading import load_models
        from longvideo.infer.pipeline import StreamingPipeline

        check_hardware(formats, placement)  # before a model is downloaded
        return StreamingPipeline(load_models(self.open(), placement, formats=formats, decoder_name=decoder))


def warn_of_missing_quotes(prompts: Sequence[str], *, command: str) -> None:
    """Print a warning if prompts look like parts of a sentence without quotes, or with quotes in its middle.

    Consecutive prompts of one word look so, and a prompt that is only an article, a preposition or the like.
    command: start of the command line with quotes that the warning shows.
    """
    of_one_word = [len(prompt.split()) == 1 for prompt in prompts]
    in_sentence = [prompt.strip().lower() in FUNCTION_WORDS for prompt in prompts]
    if any(map(all, pairwise(of_one_word))) or (len(prompts) > 1 and any(in_sentence)):
        sentence = " ".join(prompts).replace("\\", "\\\\").replace('"', '\\"')
        text = f"warning: these are {len(prompts)} prompts, each shown on its own; for one prompt use quotes"
        typer.echo(printable(f'{text}: {command} "{sentence}"'), err=True)
