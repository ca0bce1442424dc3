"""Patterns of self-attention: which tokens attend to which others. The caller passes one to the model.

A pattern receives queries and keys before rotation, so that it decides in which form keys are stored. Shapes: B batch,
L tokens, N heads, K head dim.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.model.rope import Rope, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

    from longvideo.model.cache import ChunkCache
    from longvideo.model.layout import TokenLayout


class AttentionPattern(Protocol):
    """Self-attention of one layer: q, k, v [B, L, N, K] before rotation -> [B, L, N, K]."""

    def __call__(self, layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope, /) -> Tensor: ...


class StaticPattern(AttentionPattern, Protocol):
    """A pattern without a cache, for which tokens may be rotated before."""

    def rotated(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
        """Return the result for queries and keys that are rotated already."""
        ...


class Full:
    """Attention of every token to every token, as in the bidirectional Wan model."""

    def __call__(self, _layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        return attend(rotate(q_BLNK, rope), rotate(k_BLNK, rope), v_BLNK)


class Masked:
    """Block-causal and teacher-forcing attention over a whole video in one pass.

    A clean token attends to the clean tokens of its own chunk and of the visible earlier chunks. A noisy token attends
    to the clean tokens of the visible earlier chunks and to the noisy tokens of its own chunk. Layouts without noisy
    tokens are therefore block-causal.

    visible: whether chunk i may attend to chunk j, bool [num_chunks, num_chunks]; by default all earlier chunks are
        visible. `visible_chunks` returns the table of a rollout with a window.

    On CUDA the mask is a FlexAttention block mask; on other devices, where FlexAttention has no backward pass, it is
    dense.
    """

    def __init__(self, layout: TokenLayout, visible: Tensor | None = None) -> None:
        runs, device = _runs(layout), layout.chunk_L.device
        lengths = torch.tensor([end - start for start, end, _, _ in runs])
        run_L = torch.arange(len(runs)).repeat_interleave(lengths).to(device)
        seen_RR = _seen(runs, visible).to(device)
        self._dense_LL: Tensor | None = None
        self._block_mask = None
        if device.type == "cuda":
            self._block_mask = block_mask(run_L, seen_RR)
        else:
            self._dense_LL = seen_RR[run_L[:, None], run_L[None, :]]

    def __call__(self, _layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        return self.rotated(rotate(q_BLNK, rope), rotate(k_BLNK, rope), v_BLNK)

    def rotated(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
        if self._block_mask is None:
            return attend(q_BLNK, k_BLNK, v_BLNK, self._dense_LL)
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.to(v_BLNK.dtype).transpose(1, 2) for x in (q_BLNK, k_BLNK, v_BLNK))
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        out = flex(q, k, v, block_mask=self._block_mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


class Blockwise:
    """The attention of `Masked`, computed without a mask, for a few short chunks.

    Every run of tokens of one chunk and one copy attends to its visible runs. There is no work for hidden keys,
    whatever the size of a chunk, and plain attention kernels are used; but a run copies the keys of its visible runs.
    """

    def __init__(self, layout: TokenLayout, visible: Tensor | None = None) -> None:
        runs = _runs(layout)
        self._lengths = [end - start for start, end, _, _ in runs]
        self._seen: list[list[int]] = [row.nonzero().flatten().tolist() for row in _seen(runs, visible)]

    def __call__(self, _layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        return self.rotated(rotate(q_BLNK, rope), rotate(k_BLNK, rope), v_BLNK)

    def rotated(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
        q_runs, k_runs, v_runs = (x.split(self._lengths, dim=1) for x in (q_BLNK, k_BLNK, v_BLNK))
        out = []
        for q, seen in zip(q_runs, self._seen, strict=True):
            keys, values = (torch.cat([runs[number] for number in seen], dim=1) for runs in (k_runs, v_runs))
            out.append(attend(q, keys, values))
        return torch.cat(out, dim=1)


class Cached:
    """Attention of the live chunk to itself and to the chunks in a cache.

    Under autograd the keys and values of the live chunk are concatenated to detached copies of the past, so nothing
    that a gradient needs is overwritten, and no gradient reaches the past.
    """

    def __init__(self, cache: ChunkCache) -> None:
        self.cache = cache

    def __call__(self, layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        q = rotate(q_BLNK, rope)
        if torch.is_grad_enabled():
            k, (past_k, past_v) = rotate(k_BLNK, rope), self.cache.past(layer)
            return attend(q, torch.cat((past_k.to(k), k), 1), torch.cat((past_v.to(v_BLNK), v_BLNK), 1))
        return attend(q, *self.cache.attended(layer, k_BLNK, v_BLNK, rope))


class Filling:
    """`Cached` for the clean pass, which stores keys and values of the finished live chunk in the cache."""

    def __init__(self, cache: ChunkCache) -> None:
        self.cache = cache

    def __call__(self, layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        attended = attend(rotate(q_BLNK, rope), *self.cache.attended(layer, k_BLNK, v_BLNK, rope))
        self.cache.keep(layer, k_BLNK, v_BLNK, rope)
        return attended

    def keep(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> None:
        """Store keys and values of a layer without computing its attention."""
        self.cache.keep(layer, k_BLNK, v_BLNK, rope)


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None = None) -> Tensor:
    """Return scaled dot-product attention in the layout [B, L, N, K]."""
    q, k, v = q_BLNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask_LS).transpose(1, 2)


def _runs(layout: TokenLayout) -> list[tuple[int, int, int, bool]]:
    """Return start, end, chunk and noisiness of every run of consecutive tokens with one chunk and noisiness."""
    kinds = list(zip(layout.chunk_L.tolist(), layout.is_noisy_L.tolist(), strict=True))
    runs, start = [], 0
    for kind, group in itertools.groupby(kinds):
        end = start + len(list(group))
        runs.append((start, end, *kind))
        start = end
    return runs


def _seen(runs: list[tuple[int, int, int, bool]], visible: Tensor | None) -> Tensor:
    """Return whether the tokens of run i attend to those of run j, bool [R, R]."""
    chunk, noisy = (torch.tensor([run[place] for run in runs]) for place in (2, 3))
    if visible is None:
        visible = torch.ones(int(chunk.max()) + 1, int(chunk.max()) + 1, dtype=torch.bool).tril()
    same = chunk[:, None] == chunk[None, :]
    earlier = visible.cpu()[chunk[:, None], chunk[None, :]] & ~same
    return (same & (noisy[:, None] == noisy[None, :])) | (earlier & ~noisy[None, :])


def block_mask(run_L: Tensor, seen_RR: Tensor, *, block: int = 128) -> BlockMask:
    """Return a FlexAttention mask, in which a token of run r attends to those of the runs in row r of seen_RR.

    It is computed from the runs in each block of tokens; computed from single tokens, it would take eight bytes for
    every pair of tokens. Blocks that attend completely need no mask inside.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = run_L.numel(), run_L.device
    num_blocks = -(-length // block)
    # floats, since matrices of booleans have no product; counts are small
    holds_GR = torch.zeros(num_blocks, seen_RR.shape[0], device=device)
    holds_GR[torch.arange(length, device=device) // block, run_L] = 1
    some_GG = holds_GR @ seen_RR.float() @ holds_GR.T > 0
    full_GG = some_GG & (holds_GR @ (~seen_RR).float() @ holds_GR.T == 0)
    if length % block:
        full_GG[-1] = full_GG[:, -1] = False

    def listed(chosen_GG: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen_GG.int().argsort(dim=-1, descending=True, stable=True)
        return chosen_GG.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some_GG & ~full_GG),
        *listed(full_GG),
        BLOCK_SIZE=block,
        mask_mod=lambda _batch, _head, q, k: seen_RR[run_L[q], run_L[k]],
        seq_lengths=(length, length),
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
