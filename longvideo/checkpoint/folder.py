"""Open, check and load a model of any known format, and save one in diffusers' folder layout.

A saved folder contains model_index.json, longvideo.json, scheduler/ and tokenizer/; transformer/ and vae/ with
config.json and diffusion_pytorch_model.safetensors (diffusers' names); text_encoder/ with config.json and
model.safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint import packed
from longvideo.checkpoint.branches import Branches
from longvideo.checkpoint.chosen_adapters import open_choice
from longvideo.checkpoint.diffusers_folder import SETTINGS_FILE, SMALL_FILE, copy_part, write_index, write_part
from longvideo.checkpoint.formats import recognize
from longvideo.checkpoint.locations import locate
from longvideo.checkpoint.modules import OnMeta, check_fits, load_weights, own_tensors
from longvideo.checkpoint.parts import PARTS, TEXT_ENCODER, TRANSFORMER, VAE, ModelPart, PartConfig
from longvideo.checkpoint.picture_size import PictureSize
from longvideo.checkpoint.run_checkpoint import exported_model, is_run_checkpoint
from longvideo.checkpoint.saving import MAX_SHARD_BYTES, SaveOptions
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.stored_tokenizer import StoredTokenizer
from longvideo.checkpoint.tensors import Weights
from longvideo.checkpoint.updates import StoredAdapter, merged
from longvideo.errors import CheckpointError, ConfigError
from longvideo.files import copy_file, locked_target, write_folder, write_json
from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import expect_packed
from longvideo.text.encoder import PromptTokenizer, TextEncoder
from longvideo.text.tokenizer import save_tokenizer
from longvideo.text.umt5 import UMT5Config, UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from longvideo.checkpoint.choices import AdapterChoice


class MissingBase(CheckpointError):
    """The opened model is an adapter, and no base model was specified. adapter: the opened adapter."""

    def __init__(self, message: str, adapter: StoredAdapter) -> None:
        super().__init__(message)
        self.adapter = adapter


@dataclass(frozen=True)
class ModelFolder:
    """An opened model: its configurations are read and consistent, but no weights are loaded.

    path: the folder or file. format: description of the recognized format. stored: its parts, of transformer, vae and
    text_encoder. notes: numbers and texts stored with the weights. unused: files that belong to no part, with the
    reason. adapters: added to the transformer, in this order; `stored` has the sum, and `load_transformer` keeps them
    next to packed layers. originals: the transformer's weights without them; None without adapters.
    """

    path: Path
    format: str
    settings: ModelSettings
    stored: Mapping[str, ModelPart]
    tokenizer: StoredTokenizer | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[Path, str] = field(default_factory=dict)
    adapters: tuple[StoredAdapter, ...] = ()
    originals: Weights | None = None

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        base: str | Path | None = None,
        preset: str | None = None,
        entry: str | None = None,
        adapters: Sequence[AdapterChoice] = (),
    ) -> ModelFolder:
        """Open a packaged model ("tiny", "tiny-teacher"), a folder or file, or a hub id (see `locate`).

        The format is recognized by content; `longvideo.checkpoint.formats` lists the known formats.

        base: another model that provides missing parts, and the transformer for a LoRA; for a checkpoint of a run the
        default is the model folder of that run. preset: name of settings in `PRESETS`; None uses the model's own.
        entry: which weights of a training checkpoint to open, for example "generator_ema" or "ema". adapters: adapters
        that are added to the transformer, in this order.

        Raises CheckpointError or ConfigError, naming the file, if something is missing or inconsistent.
        """
        path = locate(name)
        if base is None and is_run_checkpoint(path):
            base = exported_model(path)
        base_model = None if base is None else cls.open(base)
        stored = recognize(path, entry=entry, like={} if base_model is None else base_model.stored)
        parts = {**(base_model.stored if base_model else {}), **stored.parts}
        settings = stored.settings_of(preset, base=None if base_model is None else base_model.settings)
        if stored.adapter is not None and TRANSFORMER not in parts:
            raise MissingBase(f"{path} is a LoRA; use --base with the model that it belongs to", stored.adapter)
        if TRANSFORMER in parts:
            config = parts[TRANSFORMER].config
            assert isinstance(config, TransformerConfig)
            parts[TRANSFORMER] = replace(parts[TRANSFORMER], config=replace(config, text_len=settings.text_len))
        tokenizer = base_model.tokenizer if stored.tokenizer is None and base_model is not None else stored.tokenizer
        ordered = {part: parts[part] for part in PARTS if part in parts}
        folder = cls(path, stored.format, settings, ordered, tokenizer, stored.notes, stored.unused)
        folder._check_configs()
        own = () if stored.adapter is None else (stored.adapter,)
        return folder.with_adapters((*own, *map(open_choice, adapters)))

    def with_adapters(self, adapters: Sequence[StoredAdapter]) -> ModelFolder:
        """Return the model with adapters added to its transformer, after those that it has (see `updates.merged`).

        Raises CheckpointError for an update that does not fit the transformer.
        """
        return self.with_other_adapters((*self.adapters, *adapters)) if adapters else self

    def with_other_adapters(self, adapters: Sequence[StoredAdapter]) -> ModelFolder:
        """Return the model with these adapters in place of all that it has. Raises as `with_adapters` does."""
        part, base = self._part(TRANSFORMER), self.base_weights
        changed = {TRANSFORMER: part.with_weights(merged(base, adapters) if adapters else base)}
        originals = base if adapters else None
        return replace(self, stored={**self.stored, **changed}, adapters=tuple(adapters), originals=originals)

    def resized(self, size: PictureSize) -> ModelFolder:
        """Return the model with another picture size. Warns (UserWarning) that the model was not trained for it.

        Raises UserError for a size that is not a multiple of a token's, and for one with more tokens than its own size.
        """
        own = PictureSize(self.settings.width, self.settings.height)
        if size == own:
            return self
        size.check(own, self.latents_config.scale_factor_spatial * self.transformer_config.patch_size[1])
        message = f"the model was trained for {own}; videos of {size} may look worse or show something else"
        warnings.warn(message, UserWarning, stacklevel=2)
        return replace(self, settings=replace(self.settings, width=size.width, height=size.height))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its parts, of transformer, vae and text_encoder."""
        return tuple(self.stored)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the parts that are missing for generating videos."""
        return tuple(part for part in PARTS if part not in self.stored)

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        config = self._part(TRANSFORMER).config
        assert isinstance(config, TransformerConfig)
        return config

    @cached_property
    def vae_config(self) -> AutoencoderConfig:
        config = self._part(VAE).config
        assert isinstance(config, AutoencoderConfig)
        return config

    @property
    def latents_config(self) -> AutoencoderConfig:
        """Configuration of the autoencoder of the latents, which for latents of Wan2.2 needs no file."""
        wan = AutoencoderConfig.wan22()
        if VAE not in self.stored and TRANSFORMER in self.stored and self.transformer_config.in_channels == wan.z_dim:
            return wan
        return self.vae_config

    @cached_property
    def text_encoder_config(self) -> UMT5Config:
        config = self._part(TEXT_ENCODER).config
        assert isinstance(config, UMT5Config)
        return config

    @cached_property
    def spec(self) -> ChunkSpec:
        """Chunk and window sizes and token grid at the model's own picture size."""
        settings = self.settings
        _, patch_height, patch_width = self.transformer_config.patch_size
        grid = []
        for name, pixels, patch in (("height", settings.height, patch_height), ("width", settings.width, patch_width)):
            unit = self.latents_config.scale_factor_spatial * patch
            if pixels % unit:
                raise CheckpointError(f"{self.path / SETTINGS_FILE}: {name}={pixels}, expected a multiple of {unit}")
            grid.append(pixels // unit)
        try:
            return ChunkSpec(
                grid_height=grid[0],
                grid_width=grid[1],
                chunk_frames=settings.chunk_frames,
                window_frames=settings.window_frames,
                sink_frames=settings.sink_frames,
                pin_shots=settings.pin_shots,
                offset_per_shot=settings.offset_per_shot,
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.path / SETTINGS_FILE}: {error}") from error

    def weights(self, part: str) -> Weights:
        """Return the weights of a part under this project's names; only file headers are read."""
        return self._part(part).weights

    def kind(self, part: str) -> str:
        """Return the name of the class in a part's files, or of the naming that its tensors follow."""
        return self._part(part).kind

    @property
    def base_weights(self) -> Weights:
        """Weights of the transformer without adapters."""
        return self.weights(TRANSFORMER) if self.originals is None else self.originals

    @property
    def is_packed(self) -> bool:
        """Whether the transformer's weights, without adapters, are packed to NVFP4."""
        return packed.is_packed(self.base_weights)

    @cached_property
    def branches(self) -> Branches:
        """Adapters as `load_transformer` applies them."""
        return Branches.of(self.base_weights, self.adapters)

    def check(self, part: str) -> None:
        """Raise CheckpointError unless a part's weight files match its configuration. Only headers are read."""
        if part == TEXT_ENCODER:
            self._load_tokenizer()
        check_fits(self.build(part), self.weights(part))

    def build(self, part: str) -> nn.Module:
        """Build the module for a part's weights on the meta device, with packed layers where the weights are packed."""
        with OnMeta():
            if part == VAE:
                return Autoencoder(self.vae_config)
            if part == TEXT_ENCODER:
                return UMT5Encoder(self.text_encoder_config)
        return self._build_transformer(self.weights(TRANSFORMER))

    def _build_transformer(self, weights: Weights) -> CausalTransformer:
        with OnMeta():
            model = CausalTransformer(self.transformer_config)
        expect_packed(model, weights.infos)
        return model

    def load_transformer(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> CausalTransformer:
        """Load the transformer with its adapters. dtype: of the weights; None keeps the stored one.

        Packed layers stay packed, with their low-rank updates as branches next to them. A packed layer with another
        update gets `dtype`, or bf16, and a line is logged. All other updates are added to the weights in fp32.
        """
        branches = self.branches
        branches.report(str(self.path), dtype or torch.bfloat16)
        # rounded once, to the dtype of the model
        weights = merged(self.base_weights, branches.others, dtype=dtype) if self.adapters else self.base_weights
        module = self._build_transformer(weights)
        load_weights(module, weights, device=device, dtype=dtype)
        branches.attach(module)
        return module.eval()

    def load_vae(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
        """Load the video autoencoder. dtype: of the weights; None keeps the stored one."""
        module = self.build(VAE)
        assert isinstance(module, Autoencoder)
        load_weights(module, self.weights(VAE), device=device, dtype=dtype)
        return module.eval()

    def load_prompt_tokenizer(self) -> PromptTokenizer:
        """Load the tokenizer alone."""
        tokenizer = self._load_tokenizer()
        assert self.tokenizer is not None
        return PromptTokenizer(tokenizer, name=self.tokenizer.name)

    def load_text_encoder(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> TextEncoder:
        """Load the tokenizer and the text encoder. dtype: of the weights; None keeps the stored one."""
        tokenizer = self._load_tokenizer()
        assert self.tokenizer is not None
        module = self.build(TEXT_ENCODER)
        assert isinstance(module, UMT5Encoder)
        load_weights(module, self.weights(TEXT_ENCODER), device=device, dtype=dtype)
        return TextEncoder(
            module,
            tokenizer,
            text_len=self.settings.text_len,
            tokenizer_name=self.tokenizer.name,
        ).eval()

    @classmethod
    def save(
        cls,
        folder: Path,
        *,
        settings: ModelSettings,
        transformer: CausalTransformer | None = None,
        vae: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        other_parts: ModelFolder | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> ModelFolder:
        """Write parts as a folder that this class and diffusers' classes open.

        other_parts: a model with the parts that are copied unchanged where none is given here: as files from a folder
        in this layout, otherwise tensor by tensor.

        dtype: of the floating weights of the modules; None keeps their own. max_shard_bytes: largest weight file that
        is written, bytes. overwrite: replace an existing folder. The folder appears complete or not at all.
        """
        if folder.exists() and not overwrite:
            raise CheckpointError(f"{folder} exists; choose another name or pass overwrite=True")
        _check_text_len(settings, transformer, text_encoder)
        parts: dict[str, tuple[Weights, PartConfig]] = {}
        if transformer is not None:
            parts[TRANSFORMER] = Weights.of(own_tensors(transformer)), transformer.config
        if vae is not None:
            parts[VAE] = Weights.of(own_tensors(vae)), vae.config
        if text_encoder is not None:
            parts[TEXT_ENCODER] = Weights.of(own_tensors(text_encoder.model)), text_encoder.model.config
        others = {} if other_parts is None else other_parts.stored
        copied = {name: part for name, part in others.items() if name not in parts}
        tokenizer = None if text_encoder is None else text_encoder.tokenizer
        if other_parts is not None and TEXT_ENCODER in copied:
            tokenizer = other_parts._load_tokenizer()
        options = SaveOptions(max_shard_bytes)
        with locked_target(folder), write_folder(folder, overwrite=overwrite) as temporary:
            for name, (weights, config) in parts.items():
                cast = weights.cast(dtype, keep=packed.is_of_packed_layer)
                write_part(temporary, name, cast, config, options=options)
            small = None if other_parts is None or VAE not in copied else copied[VAE].folder
            if small is not None and (small.parent / SMALL_FILE).is_file():
                copy_file(small.parent / SMALL_FILE, temporary / SMALL_FILE)
            for name, part in copied.items():
                copy_part(temporary, name, part, options=options)
            if tokenizer is not None:
                save_tokenizer(tokenizer, temporary / "tokenizer", text_len=settings.text_len)
            write_index(temporary, [*parts, *copied], settings)
            write_json(temporary / SETTINGS_FILE, asdict(settings))
            cls.open(temporary)
        return cls.open(folder)

    def _load_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.path} has no tokenizer.json; copy it from google/umt5-xxl of Wan's official folder"
            )
        return self.tokenizer.load(rows=self.text_encoder_config.vocab_size)

    def _check_configs(self) -> None:
        parts = set(self.parts)
        if "transformer" in parts and "vae" in parts:
            channels, z_dim = self.transformer_config.in_channels, self.vae_config.z_dim
            self._check_equal("transformer in_channels", channels, "vae z_dim", z_dim)
            self.spec  # noqa: B018, raises when the picture size or the window does not fit
        if "transformer" in parts and "text_encoder" in parts:
            width = self.text_encoder_config.d_model
            self._check_equal("transformer text_dim", self.transformer_config.text_dim, "text encoder d_model", width)

    def _check_equal(self, one: str, one_value: object, other: str, other_value: object) -> None:
        if one_value != other_value:
            raise CheckpointError(
                f"{self.path}: {one} is {one_value} but {other} is {other_value}; expected equal values"
            )

    def _part(self, part: str) -> ModelPart:
        if part not in self.stored:
            available = ", ".join(self.parts) or "no part of a model"
            raise CheckpointError(
                f"{self.path} has no {part}, only {available}; use --base with a model folder that has it"
            )
        return self.stored[part]


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
            raise CheckpointError(
                f"the {part} has {text_len} text positions; expected text_len={settings.text_len} of the settings"
            )
