"""The causal diffusion transformer, in the Wan2.2-TI2V-5B family (arXiv 2503.20314).

The model has a forward pass, and a clean pass that fills a cache. The caller passes an AttentionPattern (to which
tokens a token attends), the rotation of a TokenLayout (the positions of tokens) and sigma (the noise of every frame).
Module names are those of the official weights.

Shapes: B batch, C channels, T latent frames, H W latent size, L tokens, D model dim, N heads, K head dim, S time
embeddings per frame (1, or tokens per frame), P prompts, J text positions, G groups of tokens with one prompt each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from longvideo.model.attention import AttentionPattern, attend
from longvideo.model.rope import Rope, rope_from_positions
from longvideo.model.slots import CacheSizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longvideo.model.attention import Filling
    from longvideo.model.config import TransformerConfig
    from longvideo.model.layout import TokenLayout
    from longvideo.model.spec import ChunkSpec

TIMESTEPS = 1000.0
MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of P prompts, one tensor [P, J, N, K] per layer, computed once per prompt.

    The model needs them in the order of use: prompt b * G + g is that of the g-th group of tokens of sample b.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_prompts(self) -> int:
        return self.keys[0].shape[0]

    def select(self, rows: Tensor) -> TextContext:
        """Return the prompts of `rows` (int64, any shape), in their order."""
        rows = rows.flatten()
        return TextContext(tuple(k[rows] for k in self.keys), tuple(v[rows] for v in self.values))


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


class ModulatedNorm(nn.Module):
    """LayerNorm without weight and bias, scaled and shifted by the modulation of every frame, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor) -> Tensor:
        frames = shift_BTSD.shape[1]
        normed = F.layer_norm(h_BLD.float(), (self.dim,), eps=self.eps).unflatten(1, (frames, -1))
        return (normed * (1 + scale_BTSD) + shift_BTSD).flatten(1, 2).to(h_BLD.dtype)


class SelfAttention(nn.Module):
    """Projections of self-attention. Queries and keys are normalized over all heads together."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
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
    """Attention of every group of tokens to its own prompt, and as in Wan to the padding as well.

    shared_input: module that is applied once to the input of k and v; it rounds the input in a quantized model.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
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

    In a quantized model norm1, norm2 and GELU round the inputs of the linear layers after them.
    """

    def __init__(self, config: TransformerConfig) -> None:
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
        """Return the tokens after the result of self-attention, cross-attention and feed-forward."""
        _, _, gate1, shift2, scale2, gate2 = self._modulation(time_BTS6D)
        h_BLD = add_gated(h_BLD, self.self_attn.o(attended_BLD), gate1)
        h_BLD = h_BLD + self.cross_attn(normalize(self.norm3, h_BLD), *text)
        return add_gated(h_BLD, self.ffn(self.norm2(h_BLD, shift2, scale2)), gate2)

    def compile_around_attention(self) -> None:
        """Compile the parts before and after self-attention, which itself changes from chunk to chunk."""
        self.before_attention = torch.compile(self.before_attention, dynamic=False)
        self.after_attention = torch.compile(self.after_attention, dynamic=False)

    def self_keys_values(self, h_BLD: Tensor, time_BTS6D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's self-attention keys and values without running the block."""
        shift, scale, *_ = self._modulation(time_BTS6D)
        return self.self_attn.keys_values(self.norm1(h_BLD, shift, scale))

    def _modulation(self, time_BTS6D: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation.float() + time_BTS6D.float()).unbind(-2)


class Head(nn.Module):
    """Modulated projection from tokens to patches of latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        _, height, width = config.patch_size
        self.norm = ModulatedNorm(config.dim, config.eps)
        self.head = nn.Linear(config.dim, height * width * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, h_BLD: Tensor, time_BTSD: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time_BTSD.float().unsqueeze(-2)).unbind(-2)
        return self.head(self.norm(h_BLD, shift, scale))


class BlockWeights(Protocol):
    """Place of the weights of blocks. recordable: whether CUDA graphs may record the blocks."""

    recordable: bool

    def in_turn(self, blocks: list[Block]) -> AbstractContextManager[Iterator[Block]]:
        """Return all blocks in order. The weights of each may be read until the next one is returned."""
        ...


class ResidentWeights:
    """Weights that stay where the blocks are."""

    recordable = True

    def in_turn(self, blocks: list[Block]) -> AbstractContextManager[Iterator[Block]]:
        return nullcontext(iter(blocks))


class CausalTransformer(nn.Module):
    """The diffusion transformer, which predicts the velocity of noisy latents; see `forward`."""

    def __init__(self, config: TransformerConfig) -> None:
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
        self.block_weights: BlockWeights = ResidentWeights()

    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights for training: Xavier for all layers but the head, which starts at zero velocity."""
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

    def cache_sizes(self, spec: ChunkSpec, *, batch: int) -> CacheSizes:
        """Return the sizes of a KV cache for all layers and heads, in the dtype and on the device of the model."""
        config, weight = self.config, self.patch_embedding.weight
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return CacheSizes(spec, config.num_layers, heads, head_dim, batch, weight.dtype, weight.device)

    def rope(self, layout: TokenLayout) -> Rope:
        """Return the rotation of every token of a layout, on the device of the layout."""
        return rope_from_positions(layout.position_BL3, self.config.attention_head_dim)

    def encode_text(self, features_PJD: Tensor) -> TextContext:
        """Return the text keys and values of all layers. Gradients reach the features.

        features_PJD: output of the text encoder, padded with zeros to J = config.text_len.
        Raises ValueError for other shapes.
        """
        if features_PJD.shape[1:] != (self.config.text_len, self.config.text_dim):
            raise ValueError(
                f"text features are {list(features_PJD.shape)};"
                f" expected [prompts, {self.config.text_len}, {self.config.text_dim}]"
            )
        text_PJD = self.text_embedding(features_PJD.to(self.patch_embedding.weight.dtype))
        with self.in_turn() as blocks:
            pairs = [block.cross_attn.keys_values(text_PJD) for block in blocks]
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

        sigma_BT: noise level of every latent frame in [0, 1], or of every token, [B, T, tokens per frame].
        text: for each sample, a prompt for each of G equal runs of tokens, in the order of the layout. A rollout has
            G = 1, a training pass one run for each chunk. See `TextContext.select`.
        rope: rotation of every token of T latent frames, from `rope`.
        checkpoint: whether to store only the inputs of blocks for the backward pass, which runs the blocks again.
        """
        h_BLD, time_BTSD, time_BTS6D = self.embed(latents_BCTHW, sigma_BT)
        assert rope.cos.shape[1] == h_BLD.shape[1], (rope.cos.shape, latents_BCTHW.shape)
        with self.in_turn() as blocks:
            for layer, block in enumerate(blocks):
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
        """Store the keys and values of finished latents; the pass ends with those of the last block."""
        h_BLD, _, time_BTS6D = self.embed(latents_BCTHW, sigma_BT)
        last = len(self.blocks) - 1
        with self.in_turn() as blocks:
            for layer, block in enumerate(blocks):
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
        # a convolution with the stride of its kernel is a product, for which libraries have faster kernels
        h_BLD = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        sigma_BTS = sigma_BT if sigma_BT.ndim == 3 else sigma_BT.unsqueeze(-1)
        frequencies = timestep_frequencies(sigma_BTS * TIMESTEPS, self.config.freq_dim)
        time_BTSD = self.time_embedding(frequencies.to(weight.dtype))
        return h_BLD, time_BTSD, self.time_projection(time_BTSD).unflatten(-1, (6, -1))

    def unpatch(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """Return the output of the head as latents of `shape`, [B, C, T, H, W]."""
        _, _, frames, height, width = shape
        _, p, q = self.config.patch_size
        return rearrange(
            patches, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=height // p, w=width // q, p=p, q=q
        )

    def in_turn(self) -> AbstractContextManager[Iterator[Block]]:
        """Return the blocks in order, as `BlockWeights` does."""
        return self.block_weights.in_turn(self._blocks())

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))


def timestep_frequencies(timestep: Tensor, freq_dim: int) -> Tensor:
    """Return cosines, then sines, of timesteps in [0, 1000] at `freq_dim / 2` frequencies: float32, from float64."""
    half = freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double().unsqueeze(-1) * MAX_PERIOD**-exponent
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def normalize(norm: nn.LayerNorm, h_BLD: Tensor) -> Tensor:
    """Return a LayerNorm of tokens, computed in float32."""
    weight = None if norm.weight is None else norm.weight.float()
    bias = None if norm.bias is None else norm.bias.float()
    return F.layer_norm(h_BLD.float(), norm.normalized_shape, weight, bias, norm.eps).to(h_BLD.dtype)


def add_gated(h_BLD: Tensor, update_BLD: Tensor, gate_BTSD: Tensor) -> Tensor:
    """Return h plus an update times the gate of its frame, computed in float32."""
    frames = gate_BTSD.shape[1]
    gated = update_BLD.float().unflatten(1, (frames, -1)) * gate_BTSD
    return (h_BLD.float() + gated.flatten(1, 2)).to(h_BLD.dtype)
