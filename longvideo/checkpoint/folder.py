"""A model on disk: diffusers' folder layout plus longvideo.json, opened, checked, loaded and saved.

model_index.json, longvideo.json, scheduler/, tokenizer/; transformer/ and vae/ with config.json and
diffusion_pytorch_model.safetensors (diffusers' names); text_encoder/ with config.json and model.safetensors.
"""

from __future__ import annotations

import difflib
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn

from longvideo.checkpoint import diffusers_json, names, packed
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.tensors import (
    OnMeta,
    Weights,
    check_fits,
    load_weights,
    open_weights,
    own_tensors,
    read_json,
    save_weights,
    write_json,
)
from longvideo.config import load_config
from longvideo.errors import CheckpointError, UserError
from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import expect_packed
from longvideo.text import TextEncoder, load_tokenizer, save_tokenizer
from longvideo.umt5 import UMT5Config, UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

T = TypeVar("T")

SHIPPED = {name: Path(__file__).parent.parent / "weights" / name for name in ("tiny", "tiny-teacher")}
SETTINGS_FILE = "longvideo.json"
INDEX_FILE = "model_index.json"
WEIGHT_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [INDEX_FILE, SETTINGS_FILE, "tokenizer/*", "scheduler/*"] + [
    f"{part}/{pattern}" for part in WEIGHT_STEMS for pattern in ("*.json", "*.safetensors")
]


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder: its configurations are read and agree; no weight is loaded yet.

    parts: which of transformer, vae and text_encoder it holds.
    """

    path: Path
    settings: ModelSettings
    parts: tuple[str, ...]

    @classmethod
    def open(cls, name: str | Path) -> ModelFolder:
        """Open a shipped name ("tiny", "tiny-teacher"), a folder, or a hub id ("org/name", which is downloaded).

        Raises CheckpointError or ConfigError, naming the file, when something is absent or does not agree.
        """
        path = locate(name)
        index = read_json(path / INDEX_FILE)
        parts = tuple(part for part in WEIGHT_STEMS if _listed_class(index.get(part)))
        if not parts:
            raise CheckpointError(f"{path / INDEX_FILE} lists none of {', '.join(WEIGHT_STEMS)}")
        settings_file = path / SETTINGS_FILE
        settings = load_config(ModelSettings, [settings_file] if settings_file.is_file() else [])
        folder = cls(path=path, settings=settings, parts=parts)
        folder._check_configs()
        return folder

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        text_len = self.settings.text_len
        return self._read_config("transformer", lambda json: diffusers_json.transformer_config(json, text_len=text_len))

    @cached_property
    def vae_config(self) -> AutoencoderConfig:
        return self._read_config("vae", AutoencoderConfig.from_dict)

    @cached_property
    def text_encoder_config(self) -> UMT5Config:
        return self._read_config("text_encoder", UMT5Config.from_dict)

    @cached_property
    def spec(self) -> ChunkSpec:
        """Chunk, window and token grid at the folder's own picture size."""
        settings = self.settings
        _, patch_height, patch_width = self.transformer_config.patch_size
        grid = []
        for name, pixels, patch in (("height", settings.height, patch_height), ("width", settings.width, patch_width)):
            unit = self.vae_config.scale_factor_spatial * patch
            if pixels % unit:
                raise CheckpointError(f"{self.path / SETTINGS_FILE}: {name}={pixels} is not a multiple of {unit}")
            grid.append(pixels // unit)
        return ChunkSpec(
            grid_height=grid[0],
            grid_width=grid[1],
            chunk_frames=settings.chunk_frames,
            window_frames=settings.window_frames,
            sink_frames=settings.sink_frames,
            pin_shots=settings.pin_shots,
            offset_per_shot=settings.offset_per_shot,
        )

    def weights(self, part: str) -> Weights:
        """Read the headers of a part's weight files; the transformer's tensors under official names."""
        self._require(part)
        weights = open_weights(self.path / part, stem=WEIGHT_STEMS[part])
        return _official(weights) if part == "transformer" else weights

    def kind(self, part: str) -> str:
        """Name the class that model_index.json gives a part."""
        self._require(part)
        return _listed_class(read_json(self.path / INDEX_FILE)[part])

    @property
    def is_packed(self) -> bool:
        """Whether the transformer's weights are NVFP4."""
        return packed.is_packed(self.weights("transformer"))

    def check(self, part: str) -> None:
        """Raise CheckpointError unless a part's weight files fit its config. Reads headers only."""
        if part == "text_encoder":
            self._load_tokenizer()
        weights = self.weights(part)
        module = self._build_transformer(weights) if part == "transformer" else self._build(part)
        check_fits(module, weights)

    def load_transformer(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights: Path | None = None,
        entry: str | None = None,
    ) -> CausalTransformer:
        """Load the transformer. dtype None keeps the stored one; packed layers stay packed whatever it is.

        weights: take them from this file instead (.safetensors, index, .pt), in official or diffusers names; entry
        selects the dict of a training checkpoint, for example "generator_ema".
        """
        source = self.weights("transformer") if weights is None else _official(open_weights(weights, entry=entry))
        module = self._build_transformer(source)
        load_weights(module, source, device=device, dtype=dtype)
        return module.eval()

    def load_vae(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
        """Load the video autoencoder. dtype None keeps the stored one."""
        module = self._build_vae()
        load_weights(module, self.weights("vae"), device=device, dtype=dtype)
        return module.eval()

    def load_text_encoder(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """Load tokenizer and text encoder. dtype None keeps the stored one."""
        tokenizer = self._load_tokenizer()
        module = self._build_umt5()
        load_weights(module, self.weights("text_encoder"), device=device, dtype=dtype)
        return TextEncoder(module, tokenizer, text_len=self.settings.text_len).eval()

    @classmethod
    def save(
        cls,
        folder: Path,
        *,
        settings: ModelSettings,
        transformer: CausalTransformer | None = None,
        vae: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 2**30,
        overwrite: bool = False,
    ) -> ModelFolder:
        """Write the given parts as a folder that this class and diffusers' classes open.

        Floating weights are cast to dtype (None keeps theirs). The folder appears whole or not at all; an existing one
        is only replaced with overwrite.
        """
        if folder.exists() and not overwrite:
            raise CheckpointError(f"{folder} exists; choose another name, or ask to overwrite it")
        _check_text_len(settings, transformer, text_encoder)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        options = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        parts: tuple[str, ...] = ("scheduler",)
        try:
            if transformer is not None:
                own, metadata = packed.to_save(transformer, own_tensors(transformer), dtype)
                tensors = {names.to_diffusers(name): tensor for name, tensor in own.items()}
                stem = WEIGHT_STEMS["transformer"]
                save_weights(
                    temporary / "transformer", stem, tensors, max_shard_bytes=max_shard_bytes, metadata=metadata
                )
                config = diffusers_json.transformer_json(transformer.config)
                write_json(temporary / "transformer" / "config.json", {**config, **packed.config_entry(metadata)})
                parts += ("transformer",)
            if vae is not None:
                save_weights(temporary / "vae", WEIGHT_STEMS["vae"], own_tensors(vae), **options)
                write_json(temporary / "vae" / "config.json", vae.config.to_dict())
                parts += ("vae",)
            if text_encoder is not None:
                tensors = own_tensors(text_encoder.model)
                save_weights(temporary / "text_encoder", WEIGHT_STEMS["text_encoder"], tensors, **options)
                write_json(temporary / "text_encoder" / "config.json", text_encoder.config_json())
                save_tokenizer(text_encoder.tokenizer, temporary / "tokenizer", text_len=settings.text_len)
                parts += ("text_encoder", "tokenizer")
            (temporary / "scheduler").mkdir(parents=True)
            write_json(temporary / "scheduler" / "scheduler_config.json", diffusers_json.scheduler_json(settings))
            write_json(temporary / INDEX_FILE, diffusers_json.model_index(parts))
            write_json(temporary / SETTINGS_FILE, asdict(settings))
            opened = cls.open(temporary)
            _replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path=folder, settings=opened.settings, parts=opened.parts)

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.path / "tokenizer")
        num_tokens, rows = tokenizer.get_vocab_size(), self.text_encoder_config.vocab_size
        if num_tokens > rows:
            raise CheckpointError(f"{self.path / 'tokenizer'} has {num_tokens} tokens, the text encoder {rows}")
        return tokenizer

    def _check_configs(self) -> None:
        parts = set(self.parts)
        for part in self.parts:
            self._read_config(part, dict)
            self.weights(part)
        if "transformer" in parts and "vae" in parts:
            channels, z_dim = self.transformer_config.in_channels, self.vae_config.z_dim
            self._agree("transformer in_channels", channels, "vae z_dim", z_dim)
            self.spec  # noqa: B018, raises when the picture size or the window does not fit
        if "transformer" in parts and "text_encoder" in parts:
            width = self.text_encoder_config.d_model
            self._agree("transformer text_dim", self.transformer_config.text_dim, "text encoder d_model", width)

    def _agree(self, one: str, one_value: object, other: str, other_value: object) -> None:
        if one_value != other_value:
            raise CheckpointError(f"{self.path}: {one} is {one_value}, {other} is {other_value}; they must be equal")

    def _require(self, part: str) -> None:
        if part not in self.parts:
            raise CheckpointError(f"{self.path} holds no {part}, only {', '.join(self.parts)}")

    def _read_config(self, part: str, parse: Callable[[dict[str, Any]], T]) -> T:
        self._require(part)
        file = self.path / part / "config.json"
        try:
            return parse(read_json(file))
        except UserError as error:
            if str(file) in str(error):
                raise
            raise CheckpointError(f"{file}: {error}") from error

    def _build(self, part: str) -> nn.Module:
        return {"vae": self._build_vae, "text_encoder": self._build_umt5}[part]()

    def _build_transformer(self, weights: Weights) -> CausalTransformer:
        """Build the module that these weights fit: packed layers where they hold codes."""
        packed.check_convention(weights)
        with OnMeta():
            model = CausalTransformer(self.transformer_config)
        expect_packed(model, weights.infos)
        return model

    def _build_vae(self) -> Autoencoder:
        with OnMeta():
            return Autoencoder(self.vae_config)

    def _build_umt5(self) -> UMT5Encoder:
        with OnMeta():
            return UMT5Encoder(self.text_encoder_config)


def locate(name: str | Path) -> Path:
    """Find the folder that a shipped name, a path or a hub id means; download the latter if need be."""
    text = str(name)
    if text in SHIPPED:
        if not SHIPPED[text].is_dir():
            raise CheckpointError(f"this installation lacks the weights of {text!r} at {SHIPPED[text]}; install again")
        return SHIPPED[text]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; wanted a model folder")
    if HUB_ID.fullmatch(text):
        return _download(text)
    near = difflib.get_close_matches(text, SHIPPED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(SHIPPED)}"
    raise CheckpointError(f"no model {text!r}: neither a folder nor a hub id like org/name; {hint}")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {hub_id!r}, and it cannot be had from the hub: {reason}") from error


def _listed_class(entry: object) -> str:
    """Take the class from an entry [library, class] of model_index.json; "" for an absent part."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else ""


def _official(weights: Weights) -> Weights:
    try:
        return weights.renamed(names.official_naming(weights.infos))
    except CheckpointError as error:
        raise CheckpointError(f"{weights.label}: {error}") from error


def _check_text_len(
    settings: ModelSettings, transformer: CausalTransformer | None, text_encoder: TextEncoder | None
) -> None:
    lengths: dict[str, int] = {}
    if transformer is not None:
        lengths["transformer"] = transformer.config.text_len
    if text_encoder is not None:
        lengths["text encoder"] = text_encoder.text_len
    for part, text_len in lengths.items():
        if text_len != settings.text_len:
            raise CheckpointError(f"the {part} takes {text_len} text positions, the settings say {settings.text_len}")


def _replace_folder(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)
