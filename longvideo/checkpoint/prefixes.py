"""Divide the tensors of one file into the parts of a model, whose names ComfyUI, DiffSynth or Lightning prefix.

ComfyUI's all-in-one files have `model.diffusion_model.`, `vae.` or `first_stage_model.`, and
`text_encoders.umt5xxl.transformer.`; DiffSynth's trainers write `pipe.dit.`. Prefixes are found by names that occur
once in a part, so others are read too.
"""

from __future__ import annotations

from longvideo.checkpoint import names
from longvideo.checkpoint.tensors import Weights, listing
from longvideo.errors import CheckpointError

ROOTS = (
    "patch_embedding.weight",
    "decoder.head.0.gamma",
    "post_quant_conv.weight",
    "token_embedding.weight",
    "shared.weight",
)
"""Names of which every part has one, in Wan's official naming or in that of diffusers or transformers."""
NOT_WEIGHTS = ("logit_scale",)
"""Last parts of the names of tensors that ComfyUI stores outside of the parts."""


def divide_parts(weights: Weights) -> dict[str, Weights]:
    """Return the weights of each part by the prefix of their names, which is removed with those of training wrappers.

    Weights whose names have no prefix are returned unchanged, under "". Raises CheckpointError for other tensors.
    """
    bare = {name: names.strip_wrappers(name) for name in weights.infos}
    prefixes = {
        name.removesuffix(root) for name in bare.values() for root in ROOTS if name == root or name.endswith(f".{root}")
    }
    if prefixes <= {""}:
        return {"": weights}
    longest_first = sorted(prefixes, key=len, reverse=True)
    members: dict[str, list[str]] = {prefix: [] for prefix in longest_first}
    others: list[str] = []
    for name, own in bare.items():
        prefix = next((prefix for prefix in longest_first if own.startswith(prefix)), None)
        if prefix is not None:
            members[prefix].append(name)
        elif own.rpartition(".")[2] not in NOT_WEIGHTS:
            others.append(name)
    if others:
        raise CheckpointError(
            f"{weights.label}: {len(others)} tensors ({listing(others[:3])}) belong to none of its parts, which are"
            f" under {listing(sorted(prefixes))}; save the part that you need in a file of its own"
        )
    return {prefix: _without(weights, members[prefix], bare, prefix) for prefix in sorted(prefixes)}


def _without(weights: Weights, members: list[str], bare: dict[str, str], prefix: str) -> Weights:
    own = Weights({name: weights.tensors[name] for name in members}, weights.files, weights.metadata)
    return own.renamed(lambda name: bare[name].removeprefix(prefix))
