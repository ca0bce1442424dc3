"""Tables of parameter names in other projects, one for each format, that are read in both directions.

This project's transformer has Wan's official names; its autoencoder and text encoder have those of diffusers and
transformers. In a table `{}` is a number, the same numbers in the same order on both sides, and `*` at the end is the
rest of a name (weight, bias, lora_A.weight, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from longvideo.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Rules: TypeAlias = list[tuple[re.Pattern[str], str]]

WRAPPER_PARTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
"""Name parts that FSDP, activation checkpointing, torch.compile and DDP add to parameter names."""
MODEL_PREFIX = "model."


class NameTable:
    """Two namings of the same parameters. A name that is not in the table is returned unchanged.

    ours_to_theirs: this project's names with the other project's.
    """

    def __init__(self, ours_to_theirs: Mapping[str, str]) -> None:
        self.ours_to_theirs = dict(ours_to_theirs)

    def theirs(self, name: str) -> str:
        """Translate a name of this project."""
        return _translate(name, self._to_theirs)

    def ours(self, name: str) -> str:
        """Translate a name of the other project."""
        return _translate(name, self._to_ours)

    @cached_property
    def _to_theirs(self) -> Rules:
        return _rules(self.ours_to_theirs)

    @cached_property
    def _to_ours(self) -> Rules:
        return _rules({theirs: ours for ours, theirs in self.ours_to_theirs.items()})


_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}

# Blocks differ in their norms: the affine norm before cross attention is norm3 officially and norm2 in diffusers.
TRANSFORMER_DIFFUSERS = NameTable(
    {
        "patch_embedding.*": "patch_embedding.*",
        "text_embedding.0.*": "condition_embedder.text_embedder.linear_1.*",
        "text_embedding.2.*": "condition_embedder.text_embedder.linear_2.*",
        "time_embedding.0.*": "condition_embedder.time_embedder.linear_1.*",
        "time_embedding.2.*": "condition_embedder.time_embedder.linear_2.*",
        "time_projection.1.*": "condition_embedder.time_proj.*",
        "head.head.*": "proj_out.*",
        "head.modulation": "scale_shift_table",
        "blocks.{}.modulation": "blocks.{}.scale_shift_table",
        "blocks.{}.norm3.*": "blocks.{}.norm2.*",
        "blocks.{}.ffn.0.*": "blocks.{}.ffn.net.0.proj.*",
        "blocks.{}.ffn.2.*": "blocks.{}.ffn.net.2.*",
    }
    | {f"blocks.{{}}.self_attn.{ours}.*": f"blocks.{{}}.attn1.{theirs}.*" for ours, theirs in _ATTENTION.items()}
    | {f"blocks.{{}}.cross_attn.{ours}.*": f"blocks.{{}}.attn2.{theirs}.*" for ours, theirs in _ATTENTION.items()}
)

TEXT_ENCODER_OFFICIAL = NameTable(
    {
        "shared.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
        "encoder.block.{}.layer.0.layer_norm.weight": "blocks.{}.norm1.weight",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight": (
            "blocks.{}.pos_embedding.embedding.weight"
        ),
        "encoder.block.{}.layer.1.layer_norm.weight": "blocks.{}.norm2.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "blocks.{}.ffn.gate.0.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "blocks.{}.ffn.fc1.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "blocks.{}.ffn.fc2.weight",
    }
    | {f"encoder.block.{{}}.layer.0.SelfAttention.{x}.weight": f"blocks.{{}}.attn.{x}.weight" for x in "qkvo"}
)

# llama.cpp's names, which GGUF files of text encoders have
TEXT_ENCODER_GGUF = NameTable(
    {
        "shared.weight": "token_embd.weight",
        "encoder.final_layer_norm.weight": "enc.output_norm.weight",
        "encoder.block.{}.layer.0.layer_norm.weight": "enc.blk.{}.attn_norm.weight",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight": "enc.blk.{}.attn_rel_b.weight",
        "encoder.block.{}.layer.1.layer_norm.weight": "enc.blk.{}.ffn_norm.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "enc.blk.{}.ffn_gate.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "enc.blk.{}.ffn_up.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "enc.blk.{}.ffn_down.weight",
    }
    | {f"encoder.block.{{}}.layer.0.SelfAttention.{x}.weight": f"enc.blk.{{}}.attn_{x}.weight" for x in "qkvo"}
)

_RESIDUAL = {
    "norm1.gamma": "residual.0.gamma",
    "conv1.*": "residual.2.*",
    "norm2.gamma": "residual.3.gamma",
    "conv2.*": "residual.6.*",
    "conv_shortcut.*": "shortcut.*",
}
# the official modules list the change of resolution after a level's residual blocks, in the same list
_LEVELS = (
    ("encoder.down_blocks.{}", "encoder.downsamples.{}.downsamples", "downsampler", 0),
    ("decoder.up_blocks.{}", "decoder.upsamples.{}.upsamples", "upsampler", 1),
)


def autoencoder_official(num_res_blocks: int) -> NameTable:
    """Return the table of Wan2.2_VAE.pth. num_res_blocks: residual blocks in each level of the encoder."""
    table = {"quant_conv.*": "conv1.*", "post_quant_conv.*": "conv2.*"}
    for coder in ("encoder", "decoder"):
        table |= {
            f"{coder}.conv_in.*": f"{coder}.conv1.*",
            f"{coder}.norm_out.gamma": f"{coder}.head.0.gamma",
            f"{coder}.conv_out.*": f"{coder}.head.2.*",
            f"{coder}.mid_block.attentions.0.*": f"{coder}.middle.1.*",
        }
        for ours, theirs in _RESIDUAL.items():
            table[f"{coder}.mid_block.resnets.0.{ours}"] = f"{coder}.middle.0.{theirs}"
            table[f"{coder}.mid_block.resnets.1.{ours}"] = f"{coder}.middle.2.{theirs}"
    for ours_level, their_level, resampler, more_blocks in _LEVELS:
        last = num_res_blocks + more_blocks
        table |= {
            f"{ours_level}.{resampler}.resample.1.*": f"{their_level}.{last}.resample.1.*",
            f"{ours_level}.{resampler}.time_conv.*": f"{their_level}.{last}.time_conv.*",
        }
        for ours, theirs in _RESIDUAL.items():
            table[f"{ours_level}.resnets.{{}}.{ours}"] = f"{their_level}.{{}}.{theirs}"
    return NameTable(table)


@dataclass(frozen=True)
class FlatLayers:
    """Places of layers in a network of TAEHV, whose files name each layer by its number in one list.

    stem, head: the first and last convolution, by our name. start, length: of the first stage, and of every stage.
    blocks: first memory block of a stage. layers: other layers of a stage, counted from its start, by our name.
    """

    stem: tuple[str, int]
    head: tuple[str, int]
    start: int
    length: int
    blocks: int
    layers: Mapping[str, tuple[int, str]]

    def table(self, coder: str) -> NameTable:
        """Return the table of names. coder: "encoder" or "decoder"."""
        table = {f"{coder}.{ours}.*": f"{coder}.{theirs}.*" for ours, theirs in (self.stem, self.head)}
        for stage in range(TINY_STAGES):
            start, ours = self.start + stage * self.length, f"{coder}.stages.{stage}"
            for block in range(TINY_BLOCKS):
                table[f"{ours}.blocks.{block}.*"] = f"{coder}.{start + self.blocks + block}.*"
            for name, (place, inner) in self.layers.items():
                table[f"{ours}.{name}.*"] = f"{coder}.{start + place}.{inner}*"
        return NameTable(table)


TINY_STAGES = TINY_BLOCKS = 3
TINY_ENCODER = FlatLayers(("stem.0", 0), ("head", 17), 2, 5, 2, {"pool": (0, "conv."), "conv": (1, "")}).table(
    "encoder"
)
TINY_DECODERS = {
    "base": FlatLayers(("stem.1", 1), ("head.1", 22), 3, 6, 0, {"grow": (4, "conv."), "conv": (5, "")}).table(
        "decoder"
    ),
    "super": FlatLayers(("stem.0", 0), ("head.0", 22), 1, 7, 0, {"conv": (3, ""), "grow": (6, "conv.")}).table(
        "decoder"
    ),
}
"""Names of the two forms of TAEHV's decoder."""

# names outside of the blocks that occur only in one naming, and names that occur in both
OFFICIAL_MARKS = ("text_embedding.0.weight", "time_projection.1.weight", "head.head.weight", "head.modulation")
DIFFUSERS_MARKS = (
    "condition_embedder.text_embedder.linear_1.weight",
    "condition_embedder.time_proj.weight",
    "proj_out.weight",
    "scale_shift_table",
)
COMMON_MARKS = ("patch_embedding.weight",)


def to_diffusers(name: str) -> str:
    """Translate an official name of a transformer parameter to diffusers' name."""
    return TRANSFORMER_DIFFUSERS.theirs(name)


def to_official(name: str) -> str:
    """Translate diffusers' name of a transformer parameter to the official name."""
    return TRANSFORMER_DIFFUSERS.ours(name)


def from_underscores(name: str) -> str:
    """Translate a layer's official or diffusers' name, with underscores instead of dots, to the official name."""
    return _translate(name, _UNDERSCORED)


def strip_wrappers(name: str) -> str:
    """Remove the parts that training wrappers add to a parameter name."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)
    while bare.startswith(MODEL_PREFIX):
        bare = bare.removeprefix(MODEL_PREFIX)
    return bare


def official_naming(names: Iterable[str]) -> Callable[[str], str]:
    """Detect the naming of a transformer's parameters and return the translation to official names.

    Raises CheckpointError for a naming that is neither official nor that of diffusers.
    """
    names = list(names)
    bare = {strip_wrappers(name) for name in names}
    if not bare.isdisjoint(OFFICIAL_MARKS):
        return strip_wrappers
    if not bare.isdisjoint(DIFFUSERS_MARKS):
        return lambda name: to_official(strip_wrappers(name))
    shown = ", ".join(names[:3]) or "none"
    raise CheckpointError(
        f"these {len(names)} tensors ({shown}, ...) are not those of a Wan transformer;"
        f" expected {OFFICIAL_MARKS[0]} (official names) or {DIFFUSERS_MARKS[0]} (diffusers' names) among them"
    )


def _rules(table: Mapping[str, str]) -> Rules:
    return [(_pattern(source), _replacement(target)) for source, target in table.items()]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)"))


def _replacement(template: str) -> str:
    return template.replace("*", "{}")


def _translate(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        if match := pattern.fullmatch(name):
            return replacement.format(*match.groups())
    return name


_UNDERSCORED = _rules(
    {
        name.removesuffix(".*").replace(".", "_"): ours.removesuffix(".*")
        for ours, theirs in TRANSFORMER_DIFFUSERS.ours_to_theirs.items()
        for name in (theirs, ours)
        if name.endswith(".*")
    }
)
