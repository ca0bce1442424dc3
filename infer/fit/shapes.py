"""Shapes and settings of a model without its weights: of a model folder, or of a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longvideo.checkpoint.decoders import WAN, StoredDecoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.packed import unpacked_matrices
from longvideo.checkpoint.picture_size import PictureSize
from longvideo.checkpoint.settings import ModelSettings, chunk_spec
from longvideo.errors import UserError
from longvideo.model.config import PRESETS, TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.streaming.decoders import OWN_DECODER, DecoderConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.tae import TinyAutoencoderConfig

WAN_SIZE, WAN_WINDOW_FRAMES = PictureSize(1280, 704), 32
PUBLIC_DECODERS: dict[str, DecoderConfig] = {
    "taew2_2": TinyAutoencoderConfig("base", 48, (256, 128, 64, 64)),
    "taew2_2_super": TinyAutoencoderConfig("super", 48, (512, 256, 128, 64)),
    "mg-lightvae": replace(AutoencoderConfig.wan22(), decoder_base_dim=128),
    "mg-lightvae-v2": replace(AutoencoderConfig.wan22(), decoder_base_dim=64),
}
"""Sizes of public decoders of Wan2.2's latents."""
STREAMING_STEPS, STREAMING_GUIDANCE = 2, 1.0
"""Settings of the preset of the 5B: those of a model that is distilled for streaming."""


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of the parts of a model, and its settings.

    text_encoder: None if prompts are given as features. packed: whether the weights of the transformer are packed in 4
    bits. decoder: another decoder than the autoencoder's. decoder_name: kind of the decoder, for people.
    Of a packed transformer, unpacked: layers of the blocks that are not packed. branch_values: values of the adapters
    next to packed layers. branch_rank: largest of their ranks.
    """

    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    text_encoder: UMT5Config | None
    settings: ModelSettings
    spec: ChunkSpec
    packed: bool = False
    decoder: DecoderConfig | None = None
    decoder_name: str = OWN_DECODER
    unpacked: frozenset[str] = frozenset()
    branch_values: int = 0
    branch_rank: int = 0

    @property
    def decoder_config(self) -> DecoderConfig:
        """Configuration of the decoder that is used."""
        return self.autoencoder if self.decoder is None else self.decoder

    def with_decoder(self, name: str | None) -> ModelShapes:
        """Return the shapes with a public decoder of Wan2.2's latents; None and "wan" keep the autoencoder.

        Raises UserError for an unknown name, and for latents of another model.
        """
        if name in (None, WAN):
            return self
        if name not in PUBLIC_DECODERS:
            raise UserError(f"decoder is {name!r}; expected one of {', '.join((WAN, *PUBLIC_DECODERS))}")
        if self.autoencoder.z_dim != AutoencoderConfig.wan22().z_dim:
            raise UserError(f"the decoder {name} is for latents of Wan2.2; leave --decoder out, or use another preset")
        return replace(self, decoder=PUBLIC_DECODERS[name], decoder_name=name)

    def with_guidance(self, guidance: float | None) -> ModelShapes:
        """Return the shapes with another guidance scale; None keeps the model's own."""
        return self if guidance is None else replace(self, settings=replace(self.settings, guidance=guidance))


def folder_shapes(folder: ModelFolder, decoder: StoredDecoder | None = None) -> ModelShapes:
    """Return the shapes of an opened folder. Raises CheckpointError where a part is missing.

    decoder: another decoder than the folder's autoencoder, which may be missing then.
    """
    branches = folder.branches
    unpacked = (*unpacked_matrices(folder.base_weights), *branches.widened) if folder.is_packed else ()
    return ModelShapes(
        transformer=folder.transformer_config,
        autoencoder=folder.vae_config if decoder is None else folder.latents_config,
        text_encoder=folder.text_encoder_config,
        settings=folder.settings,
        spec=folder.spec,
        packed=folder.is_packed,
        decoder=None if decoder is None else decoder.config,
        decoder_name=OWN_DECODER if decoder is None else decoder.kind,
        unpacked=frozenset(unpacked),
        branch_values=branches.num_values,
        branch_rank=max(branches.ranks.values(), default=0),
    )


def preset_shapes(name: str, *, size: PictureSize | None = None, window_frames: int | None = None) -> ModelShapes:
    """Return the shapes of a preset, "wan2.2-ti2v-5b" or "tiny".

    window_frames: size of the window in latent frames. None means the preset's own,
    and "tiny" accepts nothing else.
    Raises UserError for an unknown name, and for a size or window with "tiny"; ConfigError for a size that the patches
    do not divide.
    """
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    if name == "tiny":
        folder = ModelFolder.open("tiny")
        own = folder.settings
        if size is not None or window_frames is not None:
            raise UserError(
                f"the preset tiny has a fixed size, {own.width}x{own.height}, and a fixed window, {own.window_frames};"
                " leave --size and --window out"
            )
        return folder_shapes(folder)
    size = size or WAN_SIZE
    settings = ModelSettings(
        window_frames=window_frames or WAN_WINDOW_FRAMES,
        height=size.height,
        width=size.width,
        steps=STREAMING_STEPS,
        guidance=STREAMING_GUIDANCE,
    )
    autoencoder = AutoencoderConfig.wan22()
    spec = chunk_spec(settings, autoencoder.scale_factor_spatial)
    return ModelShapes(PRESETS[name], autoencoder, UMT5Config.xxl(), settings, spec)
