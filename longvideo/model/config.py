"""Shape of the transformer, with the presets this project trains and streams."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.config.bounds import check_number, check_whole
from longvideo.errors import ConfigError

MAX_WIDTH, MAX_LAYERS, MAX_TEXT_LEN, MAX_PATCH = 2**16, 1000, 8192, 64
MIN_EPS, MAX_EPS = 1e-20, 0.1
MOST = {
    "num_attention_heads": 1024,
    "attention_head_dim": 1024,
    "in_channels": 4096,
    "out_channels": 4096,
    "text_dim": MAX_WIDTH,
    "ffn_dim": 4 * MAX_WIDTH,
    "num_layers": MAX_LAYERS,
    "freq_dim": MAX_WIDTH,
    "text_len": MAX_TEXT_LEN,
}
"""Beyond these a configuration is a mistake, and building what it says would take all memory."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer; names are those of diffusers' WanTransformer3DModel config.

    text_len: prompt positions, zero-padded, all attended to as Wan does.
    """

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    ffn_dim: int
    num_layers: int
    freq_dim: int = 256
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            check_whole(name, getattr(self, name), 1, most)
        for size in self.patch_size:
            check_whole("patch_size", size, 1, MAX_PATCH)
        check_number("eps", self.eps, MIN_EPS, MAX_EPS)
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ConfigError(
                f"attention_head_dim={self.attention_head_dim} must be even and at least 6 for 3-axis RoPE"
            )
        if self.dim > MAX_WIDTH:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} times attention_head_dim={self.attention_head_dim} is"
                f" {self.dim}, wanted at most {MAX_WIDTH}"
            )
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch_size={self.patch_size} joins latent frames; the temporal patch must be 1")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim={self.freq_dim} must be even")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


PRESETS = {
    "wan2.2-ti2v-5b": TransformerConfig(
        num_attention_heads=24,
        attention_head_dim=128,
        in_channels=48,
        out_channels=48,
        text_dim=4096,
        ffn_dim=14336,
        num_layers=30,
    ),
    "tiny": TransformerConfig(
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=24,
        out_channels=24,
        text_dim=128,
        ffn_dim=768,
        num_layers=8,
    ),
}
