"""One chunk made by several ranks: each holds the tokens of its frames, in self-attention all tokens of its heads.

One all-to-all carries queries, keys and values from the one division to the other, another the result back
(DeepSpeed-Ulysses, arXiv 2309.14509; `longvideo.train.sequence_parallel` has it with gradients). Nothing waits for the
host and nothing depends on what a tensor holds, so a CUDA graph can record it.

Shapes: R ranks, B samples, L tokens of the chunk, O = L / R own tokens, N heads, M = N / R own heads, K head dim, H = K
/ 2 pairs, W words, S slots, D width, X tensors exchanged together.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longvideo.distributed import ParallelConfig, divisors, start_processes
from longvideo.errors import UserError
from longvideo.kernels.backends import RotaryOperations, rotary_operations
from longvideo.kernels.fp8.format import FP8Rows
from longvideo.machine.launcher import process_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD = torch.int64
"""As what heads are moved: no operation has to know FP8, and no kernel moves single bytes."""


class Sharing(Protocol):
    """What lies between the tokens that a rank holds and the heads that it attends with.

    ranks: R. rotary: takes own tokens of all heads, and writes all tokens of own heads where attention reads them.
    """

    ranks: int
    rotary: RotaryOperations

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return the part of this rank of a dimension of frames or of tokens, as a view."""
        ...

    def heads(self, *own_BONK: Tensor) -> tuple[Tensor, ...]:
        """Exchange own tokens of all heads for all tokens of own heads, [B, L, M, K] each; all of one dtype."""
        ...

    def tokens(self, x_BLD: Tensor | FP8Rows) -> Tensor | FP8Rows:
        """Exchange attention's result, all tokens of own heads [B, L, M K], for own tokens of all heads [B, O, N K]."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        ...

    def whole(self, x_BOD: Tensor) -> Tensor:
        """Return the tokens of all ranks, [B, L, D]."""
        ...


def sharing_of(
    group: dist.ProcessGroup | None, device: torch.device, *, chunk_frames: int, heads: int, head_dim: int
) -> Sharing:
    """Return how the ranks of a group share a chunk; a group of one and None share nothing.

    Raises UserError for sizes that the ranks do not divide.
    """
    if group is None or group.size() == 1:
        return Unshared(device)
    check_ranks(group.size(), chunk_frames=chunk_frames, heads=heads, head_dim=head_dim)
    return UlyssesSharing(group, device)


def check_ranks(ranks: int, *, chunk_frames: int, heads: int, head_dim: int) -> None:
    """Raise UserError, naming the valid numbers, unless the ranks can share frames and heads evenly."""
    if heads % ranks or chunk_frames % ranks:
        valid = ", ".join(map(str, divisors(math.gcd(heads, chunk_frames))))
        raise UserError(
            f"{ranks} ranks must divide {heads} attention heads and chunks of {chunk_frames} latent frames;"
            f" use one of {valid}"
        )
    if head_dim % WORD.itemsize:
        raise UserError(
            f"heads of {head_dim} cannot be exchanged between {ranks} ranks, only multiples of {WORD.itemsize};"
            " use one rank"
        )


@contextmanager
def launched_ranks(device: str | None) -> Iterator[tuple[str | None, dist.ProcessGroup | None]]:
    """Join the ranks that `torchrun` started; give the rank's device and the group, None where there is one rank.

    device: as it was asked for. Every rank takes the GPU of its number, or the CPU where that is asked for or there is
    no GPU. What used the group must be gone when this ends: a recorded graph would go on waiting for the others.
    Raises UserError for a single GPU.
    """
    place = process_rank()
    if place.world == 1:
        yield device, None
        return
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device is {device!r}, but several ranks were started; each takes the GPU of its number")
    if device != "cpu" and torch.cuda.is_available():
        device = f"cuda:{place.local_rank}"
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {place.rank} has no GPU: {torch.cuda.device_count()} were found")
        torch.cuda.set_device(device)
    else:
        device = "cpu"
    start_processes(ParallelConfig(), torch.device(device))
    try:
        yield device, dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Unshared:
    """One rank, which holds everything."""

    ranks = 1

    def __init__(self, device: torch.device):
        self.rotary: RotaryOperations = rotary_operations(device)

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x

    def heads(self, *own_BONK: Tensor) -> tuple[Tensor, ...]:
        return own_BONK

    def tokens(self, x_BLD: Tensor | FP8Rows) -> Tensor | FP8Rows:
        return x_BLD

    def mean(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x_BOD: Tensor) -> Tensor:
        return x_BOD


class UlyssesSharing:
    """Rank r holds the r-th run of frames, and the r-th run of heads. See `check_ranks` for what must divide."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.ranks, self._rank, self._group = group.size(), group.rank(), group
        self.rotary: RotaryOperations = _ExchangingRotary(self, device)

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.ranks, dim)[self._rank]

    def heads(self, *own_BONK: Tensor) -> tuple[Tensor, ...]:
        dtype = own_BONK[0].dtype
        # tokens before what is exchanged together: for one sample, what arrives is in place already
        parts = [x.view(WORD).unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4) for x in own_BONK]
        arrived_RBOXMW = self._exchange(torch.stack(parts, dim=3))
        all_BLXMW = arrived_RBOXMW.transpose(0, 1).flatten(1, 2)
        return tuple(x.view(dtype) for x in all_BLXMW.unbind(2))

    def tokens(self, x_BLD: Tensor | FP8Rows) -> Tensor | FP8Rows:
        if isinstance(x_BLD, FP8Rows):
            # the scale of attention is one constant, so it is that of the other ranks' heads, too
            return FP8Rows(self._tokens(x_BLD.values), self.own(x_BLD.scales, 1).contiguous())
        return self._tokens(x_BLD)

    def mean(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=self._group)
        return total / self.ranks

    def whole(self, x_BOD: Tensor) -> Tensor:
        # not by an all-gather into a tensor, whose name depends on the version of torch; the same bytes travel
        arrived_RBOD = self._exchange(x_BOD.expand(self.ranks, *x_BOD.shape).contiguous())
        return arrived_RBOD.transpose(0, 1).flatten(1, 2)

    def _tokens(self, x_BLD: Tensor) -> Tensor:
        words_RBOW = x_BLD.view(WORD).unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()
        return self._exchange(words_RBOW).permute(1, 2, 0, 3).flatten(2).view(x_BLD.dtype)

    def _exchange(self, x_R: Tensor) -> Tensor:
        """Send part r to rank r; part r of the result comes from rank r."""
        arrived_R = torch.empty_like(x_R)
        dist.all_to_all_single(arrived_R, x_R, group=self._group)
        return arrived_R


class _ExchangingRotary:
    """`norm_rotate_keep` of own tokens, which knows all heads, and then the exchange: keys and values of own heads go
    into the cache."""

    def __init__(self, sharing: UlyssesSharing, device: torch.device):
        self._sharing, self._rotary = sharing, rotary_operations(device)
        self._only = torch.zeros((), dtype=torch.int64, device=device)

    def norm_rotate_keep(
        self,
        q_BLNK: Tensor,
        k_BLNK: Tensor,
        v_BLNK: Tensor,
        gamma_q: Tensor,
        gamma_k: Tensor,
        cos_LH: Tensor,
        sin_LH: Tensor,
        slot: Tensor,
        rotated_BLNK: Tensor,
        keys_BSLNK: Tensor,
        values_BSLNK: Tensor,
        *,
        eps: float,
        mean_NK: Tensor | None = None,
    ) -> None:
        """See `longvideo.kernels.rotary.reference`. q, k, v: [B, O, N, K]; cos, sin: [O, H]; mean: of all heads.
        rotated: [B, L, M, K]; keys, values: [B, S, L, M, K].
        """
        shape = (3, *q_BLNK.shape)
        q, k, v = torch.empty(shape, dtype=rotated_BLNK.dtype, device=rotated_BLNK.device).unbind()
        self._rotary.norm_rotate_keep(
            q_BLNK,
            k_BLNK,
            v_BLNK,
            gamma_q,
            gamma_k,
            cos_LH,
            sin_LH,
            self._only,
            q,
            k.unsqueeze(1),
            v.unsqueeze(1),
            eps=eps,
            mean_NK=mean_NK,
        )
        q, k, v = self._sharing.heads(q, k, v)
        rotated_BLNK.view(WORD).copy_(q.view(WORD))
        for stored_BSLMK, x_BLMK in ((keys_BSLNK, k), (values_BSLNK, v)):
            stored_BSLMK.view(WORD).index_copy_(1, slot.reshape(1), x_BLMK.view(WORD).unsqueeze(1))
