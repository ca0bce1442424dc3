"""Sharing of a chunk among ranks: each holds the tokens of its frames, and in self-attention all tokens of its heads.

One all-to-all exchanges queries, keys and values between the two divisions, another one the result (DeepSpeed-Ulysses,
arXiv 2309.14509; `longvideo.train.sequence_parallel` is the version with gradients). The host does not wait and nothing
depends on the contents of a tensor, so a CUDA graph can record it.

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
from longvideo.model.slots import WORD

if TYPE_CHECKING:
    from collections.abc import Generator


class Sharing(Protocol):
    """The exchange between the tokens of a rank and the heads with which it attends.

    ranks: number of ranks, R. rotary: operations that take own tokens of all heads, and write all tokens of own heads
        to where attention reads them.
    """

    ranks: int
    rotary: RotaryOperations

    def own(self, x: Tensor, dim: int, /) -> Tensor:
        """Return the part of this rank of a dimension of frames or tokens, as a view."""
        ...

    def heads(self, *own_BONK: Tensor) -> tuple[Tensor, ...]:
        """Return all tokens of own heads, [B, L, M, K] each, from own tokens of all heads; all have one dtype."""
        ...

    def tokens(self, x_BLD: Tensor | FP8Rows) -> Tensor | FP8Rows:
        """Return own tokens of all heads, [B, O, N K], from the attention of all tokens of own heads, [B, L, M K]."""
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
    """Return the exchange of a group of ranks; None and a group of one rank exchange nothing.

    Raises UserError for sizes that the ranks do not divide.
    """
    rotary = rotary_operations(device)
    if group is None or group.size() == 1:
        return Unshared(rotary)
    check_ranks(group.size(), chunk_frames=chunk_frames, heads=heads, head_dim=head_dim)
    return UlyssesSharing(group, rotary, device)


def check_ranks(ranks: int, *, chunk_frames: int, heads: int, head_dim: int) -> None:
    """Raise UserError with the valid numbers unless the ranks can share frames and heads evenly."""
    if heads % ranks or chunk_frames % ranks:
        valid = ", ".join(map(str, divisors(math.gcd(heads, chunk_frames))))
        raise UserError(
            f"there are {ranks} ranks; expected a number that divides {heads} attention heads and chunks of"
            f" {chunk_frames} latent frames; use one of {valid}"
        )
    if head_dim % WORD.itemsize:
        raise UserError(
            f"the head dim is {head_dim}; expected a multiple of {WORD.itemsize} for an exchange between {ranks} ranks;"
            " use one rank"
        )


@contextmanager
def launched_ranks(device: str | None) -> Generator[tuple[str | None, dist.ProcessGroup | None]]:
    """Join the ranks that `torchrun` started, and yield the device of the rank and the group, None for one rank.

    device: device option of the user. Every rank uses the GPU of its number, or the CPU with the option cpu or
        without GPUs.
    Everything that used the group must be deleted before this context ends, since a recorded graph would wait for the
    other ranks. Raises UserError for the name of a single GPU.
    """
    place = process_rank()
    if place.world == 1:
        yield device, None
        return
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"device is {device!r} with {place.world} ranks; expected cpu or cuda, the GPU of each rank's number"
        )
    if device != "cpu" and torch.cuda.is_available():
        device = f"cuda:{place.local_rank}"
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {place.rank} has no GPU; this machine has {torch.cuda.device_count()}; start fewer ranks"
            )
        torch.cuda.set_device(device)
    else:
        device = "cpu"
    start_processes(ParallelConfig(), torch.device(device))
    try:
        yield device, dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Unshared:
    """One rank, which exchanges nothing."""

    ranks = 1

    def __init__(self, rotary: RotaryOperations) -> None:
        self.rotary = rotary

    def own(self, x: Tensor, _dim: int, /) -> Tensor:
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
    """The exchange of a group, in which rank r has the r-th run of frames and the r-th run of heads.

    The sizes must pass `check_ranks`.
    """

    def __init__(self, group: dist.ProcessGroup, rotary: RotaryOperations, device: torch.device) -> None:
        self.ranks, self._rank, self._group = group.size(), group.rank(), group
        self.rotary: RotaryOperations = _ExchangingRotary(self, rotary, device)

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.ranks, dim)[self._rank]

    def heads(self, *own_BONK: Tensor) -> tuple[Tensor, ...]:
        dtype = own_BONK[0].dtype
        # tokens come before the tensors, so that for one sample the received data needs no reordering
        parts = [x.view(WORD).unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4) for x in own_BONK]
        received_RBOXMW = self._exchange(torch.stack(parts, dim=3))
        all_BLXMW = received_RBOXMW.transpose(0, 1).flatten(1, 2)
        return tuple(x.view(dtype) for x in all_BLXMW.unbind(2))

    def tokens(self, x_BLD: Tensor | FP8Rows) -> Tensor | FP8Rows:
        if isinstance(x_BLD, FP8Rows):
            # attention has one constant scale, so the heads of other ranks have it too
            return FP8Rows(self._tokens(x_BLD.values), self.own(x_BLD.scales, 1).contiguous())
        return self._tokens(x_BLD)

    def mean(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=self._group)
        return total / self.ranks

    def whole(self, x_BOD: Tensor) -> Tensor:
        # not an all-gather into a tensor, whose name depends on the version of torch; the same bytes are sent
        received_RBOD = self._exchange(x_BOD.expand(self.ranks, *x_BOD.shape).contiguous())
        return received_RBOD.transpose(0, 1).flatten(1, 2)

    def _tokens(self, x_BLD: Tensor) -> Tensor:
        words_RBOW = x_BLD.view(WORD).unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()
        return self._exchange(words_RBOW).permute(1, 2, 0, 3).flatten(2).view(x_BLD.dtype)

    def _exchange(self, x_R: Tensor) -> Tensor:
        """Send part r to rank r, and return the parts that were received, in the order of the ranks."""
        received_R = torch.empty_like(x_R)
        dist.all_to_all_single(received_R, x_R, group=self._group)
        return received_R


class _ExchangingRotary:
    """`norm_rotate_keep` of own tokens with all heads, and then the exchange, after which own heads go to the cache."""

    def __init__(self, sharing: UlyssesSharing, rotary: RotaryOperations, device: torch.device) -> None:
        self._sharing, self._rotary = sharing, rotary
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
        """See `longvideo.kernels.rotary.reference`.

        q, k, v: [B, O, N, K]. cos, sin: [O, H]. mean: mean of all heads. rotated: [B, L, M, K].
        keys, values: [B, S, L, M, K].
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
