"""The causal diffusion transformer, in the Wan2.2-TI2V-5B family (arXiv 2503.20314).

One forward pass and one clean pass that fills a cache. What a token may attend to comes in as an AttentionPattern,
where tokens stand as a TokenLayout, how noisy every frame is as sigma. Module names are those of the official weights.

Shapes: B batch, C channels, T latent frames, H W latent size, L tokens, D model dim, N heads, K head dim, S time
embeddings per frame (1, or tokens per frame), P prompts, J text positions, G groups of tokens with one prompt each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from longvideo.model.attention import AttentionPattern, attend
from longvideo.model.rope import Rope, rope_from_positions

if TYPE_CHECKING:
    from longvideo.model.attention import Filling
    from longvideo.model.config import TransformerConfig
    from longvideo.model.layout import TokenLayout

TIMESTEPS = 1000.0
MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of P prompts, one [P, J, N, K] tensor per layer; made once per prompt.

    The model wants them in the order of use: prompt b * G + g belongs to the g-th group of tokens of sample b.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_prompts(self) -> int:
        return self.keys[0].shape[0]

    def select(self, rows: Tensor) -> TextContext:
        """Return the prompts in the order of `rows` (int64, any shape), repeated where a row is."""
        rows = rows.flatten()
        return TextContext(tuple(k[rows] for k in self.keys), tuple(v[rows] for v in self.values))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


class ModulatedNorm(nn.Module):
    """LayerNorm without weight and bias, then every frame scaled and shifted by its own modulation, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor) -> Tensor:
        frames = shift_BTSD.shape[1]
        normed = F.layer_norm(h_BLD.float(), (self.dim,), eps=self.eps).unflatten(1, (frames, -1))
        return (normed * (1 + scale_BTSD) + shift_BTSD).flatten(1, 2).to(h_BLD.dtype)


class SelfAttention(nn.Module):
    """Projections of self-attention; queries and keys are normalised over the full width before the head split."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def keys_values(self, h_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.norm_k(self.k(h_BLD))), self._heads(self.v(h_BLD))

    def queries(self, h_BLD: Tensor) -> Tensor:
        return self._heads(self.norm_q(self.q(h_BLD)))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))


class CrossAttention(nn.Module):
    """Attention of every group of tokens to its own prompt, padding included as Wan does it.

    shared_input: what is done once to the input of k and v; nothing here, rounding it in a quantised model.
    """

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.shared_input: nn.Module = nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def keys_values(self, text_PJD: Tensor) -> tuple[Tensor, Tensor]:
        shared, split = self.shared_input(text_PJD), (self.num_heads, -1)
        return self.norm_k(self.k(shared)).unflatten(-1, split), self.v(shared).unflatten(-1, split)

    def forward(self, h_BLD: Tensor, keys_PJNK: Tensor, values_PJNK: Tensor) -> Tensor:
        batch, prompts = h_BLD.shape[0], keys_PJNK.shape[0]
        q_BLNK = self.norm_q(self.q(h_BLD)).unflatten(-1, (self.num_heads, -1))
        grouped_PLNK = rearrange(q_BLNK, "b (g l) n k -> (b g) l n k", g=prompts // batch)
        out_PLNK = attend(grouped_PLNK, keys_PJNK, values_PJNK)
        return self.o(rearrange(out_PLNK, "(b g) l n k -> b (g l) (n k)", b=batch).to(h_BLD.dtype))


class Block(nn.Module):
    """Modulated self-attention, cross-attention and feed-forward, each with a residual.

    In a quantised model norm1, norm2 and the GELU round what they hand to the linear layer after them.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, heads, eps = config.dim, config.num_attention_heads, config.eps
        self.norm1: nn.Module = ModulatedNorm(dim, eps)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, heads, eps)
        self.norm2: nn.Module = ModulatedNorm(dim, eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        h_BLD: Tensor,
        time_BTS6D: Tensor,
        text: tuple[Tensor, Tensor],
        rope: Rope,
        attention: AttentionPattern,
        layer: int,
    ) -> Tensor:
        q_BLNK, k_BLNK, v_BLNK = self.before_attention(h_BLD, time_BTS6D)
        attended_BLD = attention(layer, q_BLNK, k_BLNK, v_BLNK, rope).flatten(-2).to(q_BLNK.dtype)
        return self.after_attention(h_BLD, attended_BLD, time_BTS6D, text)

    def before_attention(self, h_BLD: Tensor, time_BTS6D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values before rotation, [B, L, N, K] each."""
        shift, scale, *_ = self._modulation(time_BTS6D)
        normed = self.norm1(h_BLD, shift, scale)
        return (self.self_attn.queries(normed), *self.self_attn.keys_values(normed))

    def after_attention(
        self, h_BLD: Tensor, attended_BLD: Tensor, time_BTS6D: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Take in what self-attention found, then the prompt, then the feed-forward layers."""
        _, _, gate1, shift2, scale2, gate2 = self._modulation(time_BTS6D)
        h_BLD = add_gated(h_BLD, self.self_attn.o(attended_BLD), gate1)
        h_BLD = h_BLD + self.cross_attn(normalize(self.norm3, h_BLD), *text)
        return add_gated(h_BLD, self.ffn(self.norm2(h_BLD, shift2, scale2)), gate2)

    def compile_around_attention(self) -> None:
        """Compile what comes before and after self-attention, whose context changes from chunk to chunk."""
        self.before_attention = torch.compile(self.before_attention, dynamic=False)
        self.after_attention = torch.compile(self.after_attention, dynamic=False)

    def self_keys_values(self, h_BLD: Tensor, time_BTS6D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's self-attention keys and values without running the block."""
        shift, scale, *_ = self._modulation(time_BTS6D)
        return self.self_attn.keys_values(self.norm1(h_BLD, shift, scale))

    def _modulation(self, time_BTS6D: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation.float() + time_BTS6D.float()).unbind(-2)


class Head(nn.Module):
    """Modulated projection from tokens to the patches they stand for."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        _, height, width = config.patch_size
        self.norm = ModulatedNorm(config.dim, config.eps)
        self.head = nn.Linear(config.dim, height * width * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, h_BLD: Tensor, time_BTSD: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time_BTSD.float().unsqueeze(-2)).unbind(-2)
        return self.head(self.norm(h_BLD, shift, scale))


class CausalTransformer(nn.Module):
    """Velocity of noisy latents, given what they may attend to. See `forward`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw fresh weights for training: Xavier everywhere, and a head that starts at zero velocity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for modulation in (self.head.modulation, *(block.modulation for block in self._blocks())):
            nn.init.normal_(modulation, std=self.config.dim**-0.5, generator=generator)
        nn.init.zeros_(self.head.head.weight)

    def rope(self, layout: TokenLayout) -> Rope:
        """Compute the rotation of every token of a layout, on the layout's device; once a chunk, or once a run."""
        return rope_from_positions(layout.position_BL3, self.config.attention_head_dim)

    def encode_text(self, features_PJD: Tensor) -> TextContext:
        """Compute every layer's text keys and values.

        features_PJD: output of the text encoder, zero-padded to J = config.text_len. Differentiable.
        """
        if features_PJD.shape[1:] != (self.config.text_len, self.config.text_dim):
            raise ValueError(
                f"text features are {tuple(features_PJD.shape)},"
                f" wanted [prompts, {self.config.text_len}, {self.config.text_dim}]"
            )
        text_PJD = self.text_embedding(features_PJD.to(self.patch_embedding.weight.dtype))
        pairs = [block.cross_attn.keys_values(text_PJD) for block in self._blocks()]
        return TextContext(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))

    def forward(
        self,
        latents_BCTHW: Tensor,
        sigma_BT: Tensor,
        text: TextContext,
        *,
        rope: Rope,
        attention: AttentionPattern,
        checkpoint: bool = False,
    ) -> Tensor:
        """Return the flow velocity (noise minus clean) of every latent frame, [B, C, T, H, W] float32.

        sigma_BT: noise level of every frame in [0, 1]; [B, T, tokens per frame] gives every token its own.
        text: for each sample, a prompt for each of G equal runs of tokens, in the order of the layout; a rollout has
            G = 1, a training pass one for each chunk. See `TextContext.select`.
        rope: rotation of every token, from `rope`; it must be of T frames.
        checkpoint: keep only the input of each block for the backward pass, which runs the blocks once more.
        """
        h_BLD, time_BTSD, time_BTS6D = self.embed(latents_BCTHW, sigma_BT)
        assert rope.cos.shape[1] == h_BLD.shape[1], (rope.cos.shape, latents_BCTHW.shape)
        for layer, block in enumerate(self._blocks()):
            pair = (text.keys[layer], text.values[layer])
            inputs = (h_BLD, time_BTS6D, pair, rope, attention, layer)
            h_BLD = recompute(block, *inputs, use_reentrant=False) if checkpoint else block(*inputs)
        return self.unpatch(self.head(h_BLD, time_BTSD).float(), latents_BCTHW.shape)

    def fill_cache(
        self,
        latents_BCTHW: Tensor,
        sigma_BT: Tensor,
        text: TextContext,
        *,
        rope: Rope,
        attention: Filling,
    ) -> None:
        """Store the keys and values of finished latents; the last block stops there, and nothing follows it."""
        h_BLD, _, time_BTS6D = self.embed(latents_BCTHW, sigma_BT)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self._blocks()):
            if layer == last:
                attention.keep(layer, *block.self_keys_values(h_BLD, time_BTS6D), rope)
                return
            pair = (text.keys[layer], text.values[layer])
            h_BLD = block(h_BLD, time_BTS6D, pair, rope, attention, layer)

    def embed(self, latents_BCTHW: Tensor, sigma_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [B, L, D] and time embeddings, the head's [B, T, S, D] and the blocks' [B, T, S, 6, D]."""
        weight = self.patch_embedding.weight
        _, p, q = self.config.patch_size
        patches = rearrange(latents_BCTHW.to(weight.dtype), "b c t (h p) (w q) -> b (t h w) (c p q)", p=p, q=q)
        # a convolution whose stride is its kernel is a product, for which libraries have faster kernels
        h_BLD = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        sigma_BTS = sigma_BT if sigma_BT.ndim == 3 else sigma_BT.unsqueeze(-1)
        frequencies = timestep_frequencies(sigma_BTS * TIMESTEPS, self.config.freq_dim)
        time_BTSD = self.time_embedding(frequencies.to(weight.dtype))
        return h_BLD, time_BTSD, self.time_projection(time_BTSD).unflatten(-1, (6, -1))

    def unpatch(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """Put the head's output where its tokens' pixels are: latents of `shape`, [B, C, T, H, W]."""
        _, _, frames, height, width = shape
        _, p, q = self.config.patch_size
        return rearrange(
            patches, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=height // p, w=width // q, p=p, q=q
        )

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))


def timestep_frequencies(timestep: Tensor, freq_dim: int) -> Tensor:
    """Embed timesteps in [0, 1000] as cosines then sines of `freq_dim / 2` frequencies; float64 inside, float32 out."""
    half = freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double().unsqueeze(-1) * MAX_PERIOD**-exponent
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def normalize(norm: nn.LayerNorm, h_BLD: Tensor) -> Tensor:
    """Apply a LayerNorm in float32."""
    weight = None if norm.weight is None else norm.weight.float()
    bias = None if norm.bias is None else norm.bias.float()
    return F.layer_norm(h_BLD.float(), norm.normalized_shape, weight, bias, norm.eps).to(h_BLD.dtype)


def add_gated(h_BLD: Tensor, update_BLD: Tensor, gate_BTSD: Tensor) -> Tensor:
    """Add an update scaled by its frame's gate, in float32."""
    frames = gate_BTSD.shape[1]
    gated = update_BLD.float().unflatten(1, (frames, -1)) * gate_BTSD
    return (h_BLD.float() + gated.flatten(1, 2)).to(h_BLD.dtype)
