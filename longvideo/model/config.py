"""Shape of the transformer, and presets of it."""

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
"""Upper bounds; a configuration above them is a mistake, and such a model would take all memory."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer; names are those of diffusers' WanTransformer3DModel config.

    text_len: number of prompt positions, padded with zeros; as in Wan, tokens attend to all of them.
    Raises ConfigError for sizes out of bounds or that do not fit together.
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
                f"attention_head_dim is {self.attention_head_dim}; expected an even number, 6 or more for 3-axis RoPE"
            )
        if self.dim > MAX_WIDTH:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} times attention_head_dim={self.attention_head_dim} is"
                f" {self.dim}; expected at most {MAX_WIDTH}"
            )
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch_size is {self.patch_size}; expected 1 as the first number, the temporal patch")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim is {self.freq_dim}; expected an even number")

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
