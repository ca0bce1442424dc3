"""Tables between the two namings of Wan's transformer: the official one, which our module uses, and diffusers'.

Blocks differ in their norms: the affine norm before cross attention is norm3 officially and norm2 in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from longvideo.errors import CheckpointError

# dicts inside public training checkpoints, in the order in which they are looked for
CHECKPOINT_ENTRIES = ("generator", "generator_ema", "model")
WRAPPER_PARTS = ("_fsdp_wrapped_module", "_orig_mod", "module")
MODEL_PREFIX = "model."

# module paths, official -> diffusers; the leaf (weight, bias) is the same in both
TOP_LEVEL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
BLOCK_LEVEL = {
    f"{official}.{part}": f"{diffusers}.{diffusers_part}"
    for official, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, diffusers_part in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
} | {
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
# parameters that are no module's weight or bias
TOP_LEVEL_PARAMETERS = {"head.modulation": "scale_shift_table"}
BLOCK_LEVEL_PARAMETERS = {"modulation": "scale_shift_table"}

OFFICIAL_MARK = "text_embedding.0.weight"
DIFFUSERS_MARK = TOP_LEVEL["text_embedding.0"] + ".weight"


def to_diffusers(name: str) -> str:
    """Translate an official parameter name; a name the tables lack is returned as it is."""
    return _translate(name, TOP_LEVEL, BLOCK_LEVEL, TOP_LEVEL_PARAMETERS, BLOCK_LEVEL_PARAMETERS)


def to_official(name: str) -> str:
    """Translate a diffusers parameter name; a name the tables lack is returned as it is."""
    tables = (TOP_LEVEL, BLOCK_LEVEL, TOP_LEVEL_PARAMETERS, BLOCK_LEVEL_PARAMETERS)
    return _translate(name, *({new: old for old, new in table.items()} for table in tables))


def strip_wrappers(name: str) -> str:
    """Drop the prefixes that training wrappers put before and inside a parameter name."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)
    while bare.startswith(MODEL_PREFIX):
        bare = bare.removeprefix(MODEL_PREFIX)
    return bare


def official_naming(names: Iterable[str]) -> Callable[[str], str]:
    """Detect by its keys how a checkpoint names the transformer and return the translation to official names.

    Raises CheckpointError when it is neither naming.
    """
    names = list(names)
    bare = {strip_wrappers(name) for name in names}
    if OFFICIAL_MARK in bare:
        return strip_wrappers
    if DIFFUSERS_MARK in bare:
        return lambda name: to_official(strip_wrappers(name))
    shown = ", ".join(names[:3]) or "none"
    raise CheckpointError(
        f"these {len(names)} tensors ({shown}, ...) are no Wan transformer:"
        f" wanted {OFFICIAL_MARK} (official names) or {DIFFUSERS_MARK} (diffusers names) among them"
    )


def _translate(
    name: str,
    top_level: dict[str, str],
    block_level: dict[str, str],
    top_level_parameters: dict[str, str],
    block_level_parameters: dict[str, str],
) -> str:
    prefix, modules, parameters = "", top_level, top_level_parameters
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2) if name.count(".") >= 2 else ("", "", name)
        prefix, modules, parameters = f"blocks.{number}." if number else "", block_level, block_level_parameters
    if name in parameters:
        return prefix + parameters[name]
    path, _, leaf = name.rpartition(".")
    return f"{prefix}{modules[path]}.{leaf}" if path in modules else prefix + name
