"""Turn a model of any known format into another, tensor by tensor: what is held in memory is one tensor at most.

What is written lies in a neighbour of the destination until it is whole, and is then renamed. A conversion that was cut
short goes on from the files it has finished, if source and wishes are still the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longvideo.checkpoint import diffusers_json, longlive_packed, names, packed, pickle_file
from longvideo.checkpoint.diffusers_folder import INDEX_FILE, SETTINGS_FILE, WEIGHT_STEMS
from longvideo.checkpoint.files import write_json
from longvideo.checkpoint.folder import ModelFolder, locate, replace_path
from longvideo.checkpoint.formats import recognise
from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER, VAE
from longvideo.checkpoint.saving import MAX_SHARD_BYTES, save_weights
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError, UserError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import layers_to_quantize
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD

PLAN_FILE = "conversion.json"
OFFICIAL_STEM = "diffusion_pytorch_model"
OFFICIAL_VAE, OFFICIAL_TEXT_ENCODER = "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = Path("google/umt5-xxl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NVFP4 = "nvfp4"


@dataclass(frozen=True)
class Wishes:
    """What to make of a model.

    target: one of TARGETS. precision: of the transformer, "bf16", "fp32" or "nvfp4", None as it is stored; rule, keep:
    how it is packed, and official names of layers that are not.
    """

    target: str = "longvideo"
    precision: str | None = None
    rule: str = Rule.ADAPTIVE.value
    keep: tuple[str, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"target {self.target!r} is unknown; use one of {', '.join(TARGETS)}")
        if self.precision not in (None, *DTYPES, NVFP4):
            raise UserError(f"precision {self.precision!r} is unknown; use one of {', '.join((*DTYPES, NVFP4))}")
        if self.rule not in [rule.value for rule in Rule]:
            raise UserError(f"rule {self.rule!r} is unknown; use one of {', '.join(rule.value for rule in Rule)}")


@dataclass(frozen=True)
class Progress:
    """Called with the bytes that there will be, once, and then with those written or found as they are.

    on_packed: see `packed.OnPacked`.
    """

    on_total: Callable[[int], None] = lambda total: None
    on_bytes: Callable[[int], None] = lambda count: None
    on_packed: packed.OnPacked = lambda layer, weight, result: None


SILENT = Progress()


def convert_model(
    source: ModelFolder,
    destination: Path,
    wishes: Wishes,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write a model in another format.

    Raises CheckpointError or UserError before anything is written where a tensor is missing, unknown or of a wrong
    shape or type, where the target has no place for something, and where the disk has no room.
    """
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another place or add --overwrite")
    for part in source.parts:
        source.check(part)
    weights = {part: source.weights(part) for part in source.parts}
    if TRANSFORMER in weights:
        weights[TRANSFORMER] = _in_precision(source, wishes, progress.on_packed)
    target = TARGETS[wishes.target]
    target.check(source, weights)
    total = sum(weights[part].num_bytes for part in target.parts(source))
    temporary = destination.with_name(f".{destination.name}.part")
    plan = {**asdict(wishes), "settings": asdict(source.settings), "files": _stamps(weights)}
    done = _prepare(temporary, plan)
    _check_room(temporary, total - done)
    progress.on_total(total)
    result = target.write(temporary, source, weights, wishes, progress.on_bytes)
    (temporary / PLAN_FILE).unlink()
    replace_path(result, destination)
    if result != temporary:
        shutil.rmtree(temporary)


def convert_adapter(
    source: str | Path, destination: Path, *, base: str | None, entry: str | None = None, overwrite: bool = False
) -> None:
    """Write a LoRA of any known format as a folder for peft, and beside it a file for diffusers.

    base: what the adapter says it belongs to. Raises CheckpointError where the source is no LoRA.
    """
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another place or add --overwrite")
    found = recognise(locate(source), entry=entry)
    if found.adapter is None:
        raise CheckpointError(f"{source} is no LoRA but: {found.format}")
    temporary = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    found.adapter.load().save(temporary, base=base or "")
    replace_path(temporary, destination)


@dataclass(frozen=True)
class Target:
    """A format to write.

    parts: those of a model that it holds. check: raises where it has no place for something. write: fills a folder and
    returns the path in it, or itself, that is the result.
    """

    parts: Callable[[ModelFolder], Sequence[str]]
    check: Callable[[ModelFolder, Mapping[str, Weights]], None]
    write: Callable[[Path, ModelFolder, Mapping[str, Weights], Wishes, Callable[[int], None]], Path]


def _write_diffusers(
    folder: Path,
    source: ModelFolder,
    weights: Mapping[str, Weights],
    wishes: Wishes,
    on_bytes: Callable[[int], None],
) -> Path:
    for part in source.parts:
        own, metadata = weights[part], {}
        if part == TRANSFORMER:
            metadata = packed.header_metadata(own)
            own = own.renamed(names.to_diffusers)
            config = {**diffusers_json.transformer_json(source.transformer_config), **packed.config_entry(metadata)}
        else:
            config = (source.vae_config if part == VAE else source.text_encoder_config).to_dict()
        save_weights(
            folder / part,
            WEIGHT_STEMS[part],
            own,
            max_shard_bytes=wishes.max_shard_bytes,
            metadata=metadata,
            go_on=True,
            on_bytes=on_bytes,
        )
        write_json(folder / part / "config.json", config)
    listed = ("scheduler", *source.parts)
    if TEXT_ENCODER in source.parts:
        _copy_tokenizer(source, folder / "tokenizer")
        listed += ("tokenizer",)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers_json.scheduler_json(source.settings))
    write_json(folder / INDEX_FILE, diffusers_json.model_index(listed))
    return folder


def _write_longvideo(
    folder: Path,
    source: ModelFolder,
    weights: Mapping[str, Weights],
    wishes: Wishes,
    on_bytes: Callable[[int], None],
) -> Path:
    _write_diffusers(folder, source, weights, wishes, on_bytes)
    write_json(folder / SETTINGS_FILE, asdict(source.settings))
    ModelFolder.open(folder)
    return folder


def _write_official(
    folder: Path,
    source: ModelFolder,
    weights: Mapping[str, Weights],
    wishes: Wishes,
    on_bytes: Callable[[int], None],
) -> Path:
    own = weights[TRANSFORMER]
    save_weights(folder, OFFICIAL_STEM, own, max_shard_bytes=wishes.max_shard_bytes, go_on=True, on_bytes=on_bytes)
    write_json(folder / "config.json", diffusers_json.official_json(source.transformer_config))
    if VAE in weights:
        table = names.autoencoder_official(source.vae_config.num_res_blocks)
        _write_pickle(folder / OFFICIAL_VAE, weights[VAE].renamed(table.theirs), on_bytes)
    if TEXT_ENCODER in weights:
        own = weights[TEXT_ENCODER].renamed(names.TEXT_ENCODER_OFFICIAL.theirs)
        _write_pickle(folder / OFFICIAL_TEXT_ENCODER, own, on_bytes)
        _copy_tokenizer(source, folder / OFFICIAL_TOKENIZER)
    return folder


def _write_longlive(
    folder: Path,
    source: ModelFolder,
    weights: Mapping[str, Weights],
    wishes: Wishes,
    on_bytes: Callable[[int], None],
) -> Path:
    own = longlive_packed.to_longlive(weights[TRANSFORMER]).renamed(lambda name: f"{names.MODEL_PREFIX}{name}")
    file = folder / "model.pt"
    _write_pickle(file, own, on_bytes, within=("generator",))
    return file


def _write_safetensors(
    folder: Path,
    source: ModelFolder,
    weights: Mapping[str, Weights],
    wishes: Wishes,
    on_bytes: Callable[[int], None],
) -> Path:
    own = weights[TRANSFORMER]
    save_weights(
        folder,
        "model",
        own,
        max_shard_bytes=own.num_bytes + 1,
        metadata=packed.header_metadata(own),
        go_on=True,
        on_bytes=on_bytes,
    )
    return folder / "model.safetensors"


def _all_parts(source: ModelFolder) -> Sequence[str]:
    return source.parts


def _transformer_alone(source: ModelFolder) -> Sequence[str]:
    return (TRANSFORMER,)


def _anything(source: ModelFolder, weights: Mapping[str, Weights]) -> None:
    pass


def _needs_transformer(source: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER not in weights:
        raise CheckpointError(f"{source.path} holds no transformer, which this format is of")


def _not_packed(source: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER in weights and packed.is_packed(weights[TRANSFORMER]):
        raise CheckpointError(
            f"{source.path} is packed in 4 bits, for which this format has no place; convert the model it is from"
        )


def _wan_itself(source: ModelFolder, weights: Mapping[str, Weights]) -> None:
    _needs_transformer(source, weights)
    _not_packed(source, weights)
    if VAE in weights:
        config = source.vae_config
        if (config.latents_mean, config.latents_std) != (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD):
            raise CheckpointError(
                f"{source.path}: the official files do not hold the statistics of latents, and Wan knows only its"
                " own; convert to longvideo or diffusers instead"
            )


TARGETS: dict[str, Target] = {
    "longvideo": Target(_all_parts, _anything, _write_longvideo),
    "diffusers": Target(_all_parts, _not_packed, _write_diffusers),
    "official": Target(_all_parts, _wan_itself, _write_official),
    "longlive": Target(_transformer_alone, _needs_transformer, _write_longlive),
    "safetensors": Target(_transformer_alone, _needs_transformer, _write_safetensors),
}


def _in_precision(source: ModelFolder, wishes: Wishes, on_packed: packed.OnPacked) -> Weights:
    own = source.weights(TRANSFORMER)
    if wishes.precision is None or (wishes.precision == NVFP4 and packed.is_packed(own)):
        return own
    if packed.is_packed(own):
        raise CheckpointError(
            f"{source.path} is packed in 4 bits; its weights are not what they were, so convert the model it is from"
        )
    if wishes.precision == NVFP4:
        model = source.build(TRANSFORMER)
        assert isinstance(model, CausalTransformer)
        layers = layers_to_quantize(model, wishes.keep)
        return packed.pack(own, layers, Rule(wishes.rule), on_packed=on_packed)
    return own.cast(DTYPES[wishes.precision])


def _write_pickle(
    file: Path, weights: Weights, on_bytes: Callable[[int], None], *, within: tuple[str, ...] = ()
) -> None:
    if file.is_file():  # it has this name only when it is whole
        on_bytes(weights.num_bytes)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    pickle_file.write_file(file, weights, within=within, on_bytes=on_bytes)


def _copy_tokenizer(source: ModelFolder, folder: Path) -> None:
    assert source.tokenizer is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source.tokenizer / name).is_file():
            shutil.copyfile(source.tokenizer / name, folder / name)


def _stamps(weights: Mapping[str, Weights]) -> dict[str, list[int]]:
    """Identify the files that tensors come from, so that a changed source is noticed."""
    files = {file for own in weights.values() for file in own.files}
    return {str(file.resolve()): [(status := file.stat()).st_size, status.st_mtime_ns] for file in sorted(files)}


def _prepare(folder: Path, plan: object) -> int:
    """Make the folder to write to, empty unless it is of the same plan; return the bytes that are in it."""
    file = folder / PLAN_FILE
    if folder.exists() and not (file.is_file() and json.loads(file.read_text(encoding="utf-8")) == _plain(plan)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, plan)
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB more are needed; make room or"
            " write to another disk"
        )
