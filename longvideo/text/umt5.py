"""The UMT5 encoder (arXiv 2304.09151), with the parameter names and results of transformers' UMT5EncoderModel.

It is implemented here because importing that class takes 3 s on an idle core, longer than generating the first second
of video.

Legend: P prompts, S tokens, D model dim, N heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.config.bounds import check_number, check_whole
from longvideo.errors import CheckpointError, ConfigError
from longvideo.model.config import MAX_EPS, MAX_LAYERS, MAX_WIDTH, MIN_EPS

if TYPE_CHECKING:
    from collections.abc import Mapping

POSITION_BIASES = "relative_attention_bias"
"""Name of the table of a block's attention with a bias for each bucket of relative positions."""
MOST = {
    "vocab_size": 2**22,
    "d_model": MAX_WIDTH,
    "d_kv": 1024,
    "d_ff": 4 * MAX_WIDTH,
    "num_layers": MAX_LAYERS,
    "num_heads": 1024,
    "relative_attention_num_buckets": 4096,
    "relative_attention_max_distance": 2**20,
}
"""Largest allowed values of a configuration; larger ones are mistakes that could exhaust the memory."""


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder. The names are those of transformers' UMT5Config, as in a model folder's config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for key, most in MOST.items():
            check_whole(key, getattr(self, key), 1, most)
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, MIN_EPS, MAX_EPS)
        if self.num_heads * self.d_kv > MAX_WIDTH:
            raise ConfigError(
                f"num_heads={self.num_heads} times d_kv={self.d_kv} is {self.num_heads * self.d_kv}, expected at most"
                f" {MAX_WIDTH}"
            )
        buckets = self.relative_attention_num_buckets
        if buckets % 4 or self.relative_attention_max_distance <= buckets // 4:
            raise ConfigError(
                f"relative_attention_num_buckets={buckets}, relative_attention_max_distance="
                f"{self.relative_attention_max_distance}; expected buckets in a multiple of 4, and a distance above a"
                " quarter of them"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UMT5Config:
        """Read config.json. Keys that do not affect the encoder (decoder, dropout, task heads) are ignored."""
        for key, expected in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
            if values.get(key, expected) != expected:
                raise CheckpointError(f"{key}={values[key]!r} is not supported; expected {expected!r}")
        own = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if missing := sorted({field.name for field in fields(cls)[:6]} - own.keys()):
            raise CheckpointError(f"the keys {missing} are missing")
        return cls(**own)

    @classmethod
    def xxl(cls) -> UMT5Config:
        """Return the sizes of google/umt5-xxl, the text encoder of Wan2.2-TI2V-5B: 5.68 billion parameters."""
        return cls(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json that transformers' UMT5EncoderModel.from_pretrained reads."""
        kind = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu"}
        return {**kind, **asdict(self), "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1}


class UMT5RMSNorm(nn.Module):
    """RMSNorm, computed in float32, without bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h_PSD: Tensor) -> Tensor:
        variance = h_PSD.float().square().mean(-1, keepdim=True)
        return self.weight * (h_PSD * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


class UMT5SelfAttention(nn.Module):
    """Unscaled attention with a learned bias for each bucket of relative positions; every layer has its own biases."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, h_PSD: Tensor, bucket_SS: Tensor, visible_P11S: Tensor) -> Tensor:
        q, k, v = (
            linear(h_PSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        bias_NSS = self.relative_attention_bias(bucket_SS).permute(2, 0, 1)
        bias_PNSS = bias_NSS.unsqueeze(0).masked_fill(~visible_P11S, torch.finfo(bias_NSS.dtype).min)
        out_PNSK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_PNSS, scale=1.0)
        return self.o(out_PNSK.transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    """Feed-forward layer with a GELU gate."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, h_PSD: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(h_PSD), approximate="tanh") * self.wi_1(h_PSD))


class UMT5Block(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        parts = {"SelfAttention": UMT5SelfAttention(config), "DenseReluDense": GatedFeedForward(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": UMT5RMSNorm(config.d_model, config.layer_norm_epsilon)})
            for name, part in parts.items()
        )

    def forward(self, h_PSD: Tensor, bucket_SS: Tensor, visible_P11S: Tensor) -> Tensor:
        attention: Any = self.layer[0]
        feed_forward: Any = self.layer[1]
        attended = attention["SelfAttention"](attention["layer_norm"](h_PSD), bucket_SS, visible_P11S)
        h_PSD = h_PSD + attended
        return h_PSD + feed_forward["DenseReluDense"](feed_forward["layer_norm"](h_PSD))


class UMT5Stack(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(UMT5Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = UMT5RMSNorm(config.d_model, config.layer_norm_epsilon)


class UMT5Encoder(nn.Module):
    """Encoder from token ids to features. `shared` is the embedding."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = UMT5Stack(config)
        # published files store the embedding under one of two names
        self.encoder.embed_tokens = self.shared

    def initialize(self, generator: torch.Generator) -> None:
        """Draw weights with T5's standard deviations, which replace the scale of attention."""
        config = self.config
        inner = config.num_heads * config.d_kv
        deviation = {
            "shared": 1.0,
            "q": (config.d_model * config.d_kv) ** -0.5,
            "o": inner**-0.5,
            "wo": config.d_ff**-0.5,
        }
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = deviation.get(name.rpartition(".")[2], config.d_model**-0.5)
                nn.init.normal_(module.weight, std=std, generator=generator)

    def forward(self, ids_PS: Tensor, mask_PS: Tensor) -> Tensor:
        """Return the features [P, S, D] of tokens. Tokens with mask 0 are ignored, and their features are undefined."""
        bucket_SS = self._buckets(ids_PS.shape[1], ids_PS.device)
        visible_P11S = mask_PS[:, None, None, :] != 0
        h_PSD = self.shared(ids_PS)
        for block in self.encoder.block:
            h_PSD = block(h_PSD, bucket_SS, visible_P11S)
        return self.encoder.final_layer_norm(h_PSD)

    def _buckets(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the bucket of each relative position, half of them for each direction: exact, then logarithmic."""
        per_side = self.config.relative_attention_num_buckets // 2
        exact = per_side // 2
        position = torch.arange(num_tokens, device=device)
        offset_SS = position[None, :] - position[:, None]
        distance = offset_SS.abs()
        growth = (per_side - exact) / math.log(self.config.relative_attention_max_distance / exact)
        far = exact + ((distance.float().clamp(min=1) / exact).log() * growth).long()
        near_or_far = torch.where(distance < exact, distance, far.clamp(max=per_side - 1))
        return near_or_far + (offset_SS > 0) * per_side
