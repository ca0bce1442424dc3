"""Recognize a decoder of a model's latents by the content of its file: Wan's own, a pruned one, or a tiny one.

TAEW2.2, TAEW2.2 super and lighttae are networks of `longvideo.vae.tae`; MG-LightVAE is Wan2.2's network with fewer
channels. The weights of TAEW2.2 and lighttae have the same names and shapes. They differ in the scale of the latents.
The caller states it, or the header of a file that `save_decoder` wrote, or the name of a public file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import nn

from longvideo.checkpoint import names, shapes
from longvideo.checkpoint.adapter_files import is_adapter
from longvideo.checkpoint.diffusers_folder import SMALL_FILE
from longvideo.checkpoint.formats import FOREIGN, autoencoder_weights, part_of
from longvideo.checkpoint.modules import OnMeta, check_fits, load_weights, own_tensors
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.parts import VAE
from longvideo.checkpoint.saving import save_weights
from longvideo.checkpoint.tensors import Weights, listing
from longvideo.errors import CheckpointError, ConfigError, UserError
from longvideo.vae.autoencoder import Autoencoder, DecodingAutoencoder
from longvideo.vae.config import WAN22_LATENTS_MEAN, AutoencoderConfig
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder, TinyEncoder, TinyForm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from longvideo.checkpoint.folder import ModelFolder

DecoderKind: TypeAlias = Literal[
    "TAEW2.2",
    "TAEW2.2 super",
    "lighttae",
    "distilled decoder",
    "MG-LightVAE",
    "MG-LightVAE v2",
    "pruned Wan2.2 VAE",
    "Wan2.2 VAE",
]
LatentScale: TypeAlias = Literal["normalized", "denormalized"]
"""Scale of the latents that a tiny network computes with: mean 0 and deviation 1, or that of Wan's autoencoder."""
Coder = TypeVar("Coder", bound=nn.Module)
Config = TypeVar("Config", TinyAutoencoderConfig, AutoencoderConfig)
DECODER, ENCODER = "decoder.", "encoder."
WAN, SMALL = "wan", "small"
"""Names of a model's own autoencoder, and of the small decoder in its folder."""
BY_WIDTH: dict[int, DecoderKind] = {256: "Wan2.2 VAE", 128: "MG-LightVAE", 64: "MG-LightVAE v2"}
"""Files of Wan2.2's network by `decoder_base_dim`."""
FAMILIES = {16: "Wan2.1, Hunyuan Video and CogVideoX", 32: "Hunyuan Video 1.5", 48: "Wan2.2", 128: "LTX Video"}
"""Models by the latent channels of the published tiny autoencoders."""
DISTILLED: DecoderKind = "distilled decoder"
KIND, LATENTS, MODEL = "kind", "latents", "model"
"""Keys in the header of a distilled decoder: DISTILLED, the scale of its latents, and the model that it was made of."""
WAN22_FILES = "Wan2.2_VAE.pth, taew2_2, taew2_2_super, lighttaew2_2 or MG-LightVAE"


@dataclass(frozen=True)
class StoredDecoder:
    """A decoder in a file: its kind and configuration are known, and its headers fit, but no weights are loaded.

    path: the file. weights: under this project's names, "decoder.*" (and "post_quant_conv.*"), and "encoder.*" where
    the file has one. missing: "encoder" where the file has none.
    """

    path: Path
    kind: DecoderKind
    config: TinyAutoencoderConfig | AutoencoderConfig
    weights: Weights
    missing: tuple[str, ...]

    def load_decoder(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> TinyDecoder | DecodingAutoencoder:
        """Load the decoder. dtype: of the weights; None keeps the stored one. Raises CheckpointError for NaN."""
        module, weights = self._decoder()
        load_weights(module, weights, device=device, dtype=dtype)
        return _arranged(module)

    def load_encoder(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> TinyEncoder | Autoencoder:
        """Load the encoder; Wan2.2's network is loaded as a whole. dtype: as in `load_decoder`.

        Raises CheckpointError for NaN, and if the file has no encoder.
        """
        if self.missing:
            raise CheckpointError(
                f"{self.path} has a decoder only; use the encoder of the model, or a file of {self.kind} that has one"
            )
        module, weights = self._encoder()
        load_weights(module, weights, device=device, dtype=dtype)
        return _arranged(module)

    def check(self) -> None:
        """Raise CheckpointError unless the names, shapes and dtypes in the file fit. Only headers are read."""
        check_fits(*self._decoder())
        if not self.missing:
            check_fits(*self._encoder())

    def _decoder(self) -> tuple[TinyDecoder | DecodingAutoencoder, Weights]:
        with OnMeta():
            if isinstance(self.config, TinyAutoencoderConfig):
                return TinyDecoder(self.config), _without_prefix(self.weights, DECODER)
            unused = {name: None for name in self.weights.infos if name.startswith((ENCODER, "quant_conv."))}
            return DecodingAutoencoder(self.config), self.weights.replaced(unused)

    def _encoder(self) -> tuple[TinyEncoder | Autoencoder, Weights]:
        with OnMeta():
            if isinstance(self.config, TinyAutoencoderConfig):
                return TinyEncoder(self.config), _without_prefix(self.weights, ENCODER)
            return Autoencoder(self.config), self.weights


def open_decoder(path: Path, vae: AutoencoderConfig, *, latents: LatentScale | None = None) -> StoredDecoder:
    """Open a .safetensors, .pt or .pth file with a decoder of the latents of a model. Only headers are read.

    vae: configuration of the model's autoencoder, whose latents are decoded and whose statistics are used.
    latents: scale that a tiny network computes with; None takes it from the file's header, or, where that does not
        state it, from the file's name, which contains "lighttae" for denormalized latents and "taew2_2" for normalized
        ones. TAEW2.2 super exists for normalized ones only.
    Raises CheckpointError, naming the file, if it is damaged, is not a decoder, or decodes other latents.
    """
    weights = open_weights(path)
    bare = weights.renamed(names.strip_wrappers)
    form = _tiny_form(bare)
    if form is not None:
        stored = _tiny(path, form, bare, vae, latents)
    elif part_of(weights) == VAE:
        stored = _wan(path, weights, vae)
    else:
        raise CheckpointError(f"{path} is not a decoder: {_described(weights)}; use {WAN22_FILES}")
    stored.check()
    return stored


def save_decoder(folder: Path, stem: str, decoder: TinyDecoder, *, model: str, dtype: torch.dtype) -> None:
    """Write folder/stem.safetensors as `open_decoder` reads it, with TAEHV's names of the weights.

    model: name of the model whose latents it decodes, as a note. dtype: of the weights in the file.
    """
    rename = names.TINY_DECODERS[decoder.config.form].theirs
    weights = {rename(f"{DECODER}{name}"): tensor for name, tensor in own_tensors(decoder).items()}
    scale: LatentScale = "normalized" if decoder.config.takes_normalized else "denormalized"
    save_weights(folder, stem, weights, dtype=dtype, metadata={KIND: DISTILLED, LATENTS: scale, MODEL: model})


def choose_decoder(folder: ModelFolder, name: str | None, *, device: torch.device) -> StoredDecoder | None:
    """Return the decoder of a model with a name, or None for its own autoencoder.

    name: "wan" for the autoencoder, "small" for the small decoder in its folder, or a file; None means the
    small one on a CPU, if there is one, else the autoencoder.
    Raises UserError if there is no such decoder, and as `open_decoder` does.
    """
    small = small_decoder(folder)
    if name == WAN or (name is None and (small is None or device.type != "cpu")):
        if VAE not in folder.stored:
            raise CheckpointError(
                f"{folder.path} has no {VAE}, only {', '.join(folder.parts)}; use --base with a model folder that has"
                " it, or --decoder with a file"
            )
        return None
    if name is None or name == SMALL:
        if small is None:
            raise UserError(
                f"{folder.path} has no small decoder, which would be {SMALL_FILE}; use --decoder {WAN}, or a file"
            )
        return open_decoder(small, folder.vae_config)
    return open_decoder(decoder_file(name), folder.latents_config)


def decoder_file(name: str) -> Path:
    """Return the file of a decoder that is neither "wan" nor "small". Raises UserError if it does not exist."""
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(
            f"decoder is {name!r}, which is not a file; expected {WAN}, {SMALL} or a file, such as {WAN22_FILES}"
        )
    return file


def small_decoder(folder: ModelFolder) -> Path | None:
    """Return the file of the small decoder that is stored with the autoencoder of a model, or None without one."""
    part = folder.stored.get(VAE)
    if part is None or part.folder is None:
        return None
    file = part.folder.parent / SMALL_FILE
    return file if file.is_file() else None


def _tiny_form(weights: Weights) -> TinyForm | None:
    """Return the form of TAEHV's decoder, None for other weights."""
    if "decoder.22.weight" not in weights.infos and "decoder.3.conv.0.weight" not in weights.infos:
        return None
    return "super" if "decoder.0.weight" in weights.infos else "base"


def _tiny(
    path: Path, form: TinyForm, weights: Weights, vae: AutoencoderConfig, latents: LatentScale | None
) -> StoredDecoder:
    weights = weights.renamed(names.TINY_DECODERS[form].ours).renamed(names.TINY_ENCODER.ours)
    config = _derived(path, lambda: shapes.tiny_autoencoder_config(weights))
    _check_channels(path, "tiny autoencoder", config.z_dim, vae)
    _check_scales(path, config, vae)
    kind: DecoderKind = "TAEW2.2" if form == "base" else "TAEW2.2 super"
    if _scale(path, form, weights.metadata, latents) == "denormalized":
        config = replace(config, latents_mean=vae.latents_mean, latents_std=vae.latents_std)
        kind = "lighttae" if form == "base" else kind
    if weights.metadata.get(KIND) == DISTILLED:
        kind = DISTILLED
    return StoredDecoder(path, kind, config, weights, _missing(weights))


def _scale(path: Path, form: TinyForm, metadata: Mapping[str, str], latents: LatentScale | None) -> LatentScale:
    if latents is not None:
        return latents
    stated = metadata.get(LATENTS)
    for scale in get_args(LatentScale):
        if stated == scale:
            return scale
    if stated is not None:
        raise CheckpointError(
            f"{path} states latents={stated!r} in its header; expected {' or '.join(get_args(LatentScale))}; use"
            " another file, or state the scale of its latents"
        )
    if "lighttae" in path.name.lower():
        return "denormalized"
    if form == "super" or "taew2_2" in path.name.lower():
        return "normalized"
    raise CheckpointError(
        f"{path} is TAEW2.2 or lighttae, which differ only in the scale of latents, and its name contains neither"
        " taew2_2 nor lighttae; rename it so that its name contains the one that it is"
    )


def _wan(path: Path, weights: Weights, vae: AutoencoderConfig) -> StoredDecoder:
    weights, _ = autoencoder_weights(weights)
    if "post_quant_conv.weight" in weights.infos:
        _check_channels(path, "Wan autoencoder", weights.infos["post_quant_conv.weight"].shape[0], vae)
    config = _derived(path, lambda: shapes.autoencoder_config(weights, vae))
    _check_scales(path, config, vae)
    kind = BY_WIDTH.get(config.decoder_base_dim, "pruned Wan2.2 VAE")
    return StoredDecoder(path, kind, config, weights, _missing(weights))


def _derived(path: Path, derive: Callable[[], Config]) -> Config:
    """Return a configuration that is derived from shapes. Raises CheckpointError, naming the file, if they fit none."""
    try:
        return derive()
    except ConfigError as error:
        raise CheckpointError(f"{path} has the shapes of no known decoder: {error}; use {WAN22_FILES}") from error


def _check_channels(path: Path, network: str, z_dim: int, vae: AutoencoderConfig) -> None:
    if z_dim != vae.z_dim:
        family = f" (those of {FAMILIES[z_dim]})" if z_dim in FAMILIES else ""
        remedy = WAN22_FILES if vae.z_dim == len(WAN22_LATENTS_MEAN) else "a decoder that was trained for this model"
        raise CheckpointError(
            f"{path} is a {network} of {z_dim} latent channels{family}; expected the {vae.z_dim} of the model; use"
            f" {remedy}"
        )


def _check_scales(path: Path, config: TinyAutoencoderConfig | AutoencoderConfig, vae: AutoencoderConfig) -> None:
    scales = config.scale_factor_temporal, config.scale_factor_spatial
    expected = vae.scale_factor_temporal, vae.scale_factor_spatial
    if scales != expected:
        raise CheckpointError(
            f"{path} decodes a latent pixel to {scales[0]} frames of {scales[1]} x {scales[1]} pixels; expected"
            f" {expected[0]} of {expected[1]} x {expected[1]}, as the model's autoencoder does; use a decoder"
            " of this model's latents"
        )


def _missing(weights: Weights) -> tuple[str, ...]:
    return () if any(name.startswith(ENCODER) for name in weights.infos) else ("encoder",)


def _described(weights: Weights) -> str:
    if is_adapter(weights.infos):
        return "it is a LoRA"
    part = part_of(weights)
    if part is not None:
        return f"it has the weights of a {part.replace('_', ' ')}"
    return f"its tensors ({listing(list(weights.infos)[:3])}, ...) {FOREIGN}"


def _without_prefix(weights: Weights, prefix: str) -> Weights:
    others = {name: None for name in weights.infos if not name.startswith(prefix)}
    return weights.replaced(others).renamed(lambda name: name.removeprefix(prefix))


def _arranged(module: Coder) -> Coder:
    """Return a loaded network as it is used: in the order of the memory in which it is fast, and not in training."""
    if isinstance(module, TinyDecoder | TinyEncoder):
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module.eval()
