"""Shape of the video autoencoder, with the keys of the configuration of diffusers' AutoencoderKLWan."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from longvideo.config.bounds import check_numbers, check_whole
from longvideo.errors import ConfigError

# a configuration above these bounds is a mistake, and such an autoencoder would take all memory
MOST = {
    "base_dim": 4096,
    "decoder_base_dim": 4096,
    "z_dim": 4096,
    "num_res_blocks": 100,
    "patch_size": 64,
    "in_channels": 3 * 64**2,
    "out_channels": 3 * 64**2,
    "scale_factor_spatial": 2**14,
    "scale_factor_temporal": 2**8,
}
MOST_FACTOR, MOST_LEVELS, MAX_STATISTIC = 64, 8, 1e6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of an autoencoder of the Wan2.2 form: 2x2 patches, residual shortcuts, 16 x 16 x 4 compression.

    `temperal_downsample` is the spelling of diffusers. `dim_mult` has one entry for each level; every level but the
    last halves the grid. Raises ConfigError for values that fit no such autoencoder.
    """

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    is_residual: bool
    in_channels: int
    out_channels: int
    patch_size: int
    scale_factor_spatial: int
    scale_factor_temporal: int = 4
    attn_scales: tuple[float, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_form()
        self._check_levels()
        check_numbers("latents_mean", self.latents_mean, self.z_dim, -MAX_STATISTIC, MAX_STATISTIC)
        check_numbers("latents_std", self.latents_std, self.z_dim, 1 / MAX_STATISTIC, MAX_STATISTIC)

    def _check_form(self) -> None:
        expected = {"is_residual": True, "attn_scales": (), "dropout": 0.0}
        for key, value in expected.items():
            if getattr(self, key) != value:
                raise ConfigError(f"{key} is {getattr(self, key)!r}; expected {value!r} for the Wan2.2 form")
        for key, most in MOST.items():
            check_whole(key, getattr(self, key), 1, most)
        for key in ("in_channels", "out_channels"):
            if getattr(self, key) != 3 * self.patch_size**2:
                raise ConfigError(
                    f"{key} is {getattr(self, key)}; expected {3 * self.patch_size**2}, 3 colors x patch_size squared"
                )

    def _check_levels(self) -> None:
        for key, kind in (("dim_mult", int), ("temperal_downsample", bool)):
            values = getattr(self, key)
            if not isinstance(values, tuple) or len(values) > MOST_LEVELS or any(type(x) is not kind for x in values):
                kinds = "whole numbers" if kind is int else "booleans"
                raise ConfigError(f"{key} is {str(values)[:60]}; expected a list of at most {MOST_LEVELS} {kinds}")
        for factor in self.dim_mult:
            check_whole("dim_mult", factor, 1, MOST_FACTOR)
        num_downsamples = len(self.dim_mult) - 1
        if num_downsamples < 1 or len(self.temperal_downsample) != num_downsamples:
            raise ConfigError(
                f"dim_mult has {len(self.dim_mult)} levels and temperal_downsample {len(self.temperal_downsample)} "
                "entries; expected one entry for every level but the last"
            )
        if self.scale_factor_spatial != self.patch_size * 2**num_downsamples:
            raise ConfigError(
                f"scale_factor_spatial is {self.scale_factor_spatial}; expected"
                f" {self.patch_size * 2**num_downsamples}, patch_size x 2 for each of {num_downsamples} downsamples"
            )
        if self.scale_factor_temporal != 2 ** sum(self.temperal_downsample):
            raise ConfigError(
                f"scale_factor_temporal is {self.scale_factor_temporal}; expected"
                f" {2 ** sum(self.temperal_downsample)}, 2 for each True in temperal_downsample"
            )
        # the shortcuts have no parameters: halved axes become channels, which limits how much a level widens
        narrow_to_wide = zip((1, *self.dim_mult[:-1]), self.dim_mult, strict=True)
        for (narrow, wide), halves_time in zip(narrow_to_wide, (*self.temperal_downsample, None), strict=True):
            most = 1 if halves_time is None else 8 if halves_time else 4
            if wide % narrow or most % (wide // narrow):
                raise ConfigError(
                    f"dim_mult {list(self.dim_mult)} goes from {narrow} to {wide}; expected a divisor of {most}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AutoencoderConfig":
        """Return the configuration in a diffusers config.json. Keys that start with "_" are metadata and are ignored.

        Raises ConfigError for other unknown keys, for missing keys and for values that fit no such autoencoder.
        """
        settings: dict[str, Any] = {key: values[key] for key in values if not key.startswith("_")}
        # the published file of Wan2.2 has this key, but the class that it names does not read it
        settings.pop("clip_output", None)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(settings.keys() - known):
            raise ConfigError(
                f"the autoencoder config has the unknown keys {unknown}; expected some of {sorted(known)}"
            )
        required = {field.name for field in fields(cls) if field.default is MISSING} - {"decoder_base_dim"}
        if missing := sorted(required - settings.keys()):
            raise ConfigError(f"the autoencoder config has no keys {missing}; add them")
        if settings.get("decoder_base_dim") is None:
            settings["decoder_base_dim"] = settings["base_dim"]
        for key, value in settings.items():
            settings[key] = tuple(value) if isinstance(value, list) else value
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json that diffusers' AutoencoderKLWan.from_pretrained reads."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"_class_name": "AutoencoderKLWan", **values}

    @classmethod
    def wan22(cls) -> "AutoencoderConfig":
        """Return the configuration of the autoencoder of Wan2.2-TI2V-5B, with its latent statistics."""
        return cls(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            dim_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            latents_mean=WAN22_LATENTS_MEAN,
            latents_std=WAN22_LATENTS_STD,
            **WAN22_FORM,
        )

    @classmethod
    def tiny(cls) -> "AutoencoderConfig":
        """Return the configuration of the shipped autoencoder, before its latent statistics are measured."""
        return cls(
            base_dim=24,
            decoder_base_dim=32,
            z_dim=24,
            dim_mult=(1, 2, 2, 2),
            num_res_blocks=1,
            latents_mean=(0.0,) * 24,
            latents_std=(1.0,) * 24,
            **WAN22_FORM,
        )


WAN22_FORM: dict[str, Any] = {
    "temperal_downsample": (False, True, True),
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}

# fmt: off
WAN22_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN22_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
