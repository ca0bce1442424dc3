"""Layout of tokens: the chunk of every token, whether it is noisy, and its position in the video.

The attention mask, the RoPE positions and the order in which ranks hold tokens are computed from a layout. If the
frames of a layout and the latents are reordered in the same way, only the order of the result changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.model.spec import ChunkSpec


@dataclass(frozen=True)
class TokenLayout:
    """Properties of tokens.

    chunk_L: chunk of every token, int64. is_noisy_L: whether the token is noisy, bool. position_BL3: time, height and
    width of the token, int64; B is 1 unless samples differ.
    """

    chunk_L: Tensor
    is_noisy_L: Tensor
    position_BL3: Tensor
    tokens_per_frame: int

    @classmethod
    def from_frames(
        cls, spec: ChunkSpec, *, chunk: Sequence[int], is_noisy: Sequence[bool], time: Tensor | Sequence[int]
    ) -> TokenLayout:
        """Return the layout of latent frames, with tokens frame by frame and row by row.

        time: temporal positions, [T], or [B, T] when the shots of the samples start at different chunks.
        """
        time_BT = torch.as_tensor(time).long()
        time_BT = time_BT if time_BT.ndim == 2 else time_BT.unsqueeze(0)
        height, width = spec.grid_height, spec.grid_width
        shape = (*time_BT.shape, height, width)
        position = torch.stack(
            (
                time_BT[:, :, None, None].expand(shape),
                torch.arange(height)[None, None, :, None].expand(shape),
                torch.arange(width).expand(shape),
            ),
            dim=-1,
        )
        per_token = spec.tokens_per_frame
        return cls(
            chunk_L=torch.tensor(chunk).repeat_interleave(per_token),
            is_noisy_L=torch.tensor(is_noisy).repeat_interleave(per_token),
            position_BL3=position.flatten(1, 3),
            tokens_per_frame=per_token,
        )

    @classmethod
    def block_causal(cls, spec: ChunkSpec, num_chunks: int, cuts: Tensor | Sequence[bool] | None = None) -> TokenLayout:
        """Return the layout of one clean copy of a video."""
        frames = num_chunks * spec.chunk_frames
        return cls.from_frames(
            spec,
            chunk=[frame // spec.chunk_frames for frame in range(frames)],
            is_noisy=[False] * frames,
            time=frame_times(spec, num_chunks, cuts),
        )

    @classmethod
    def teacher_forcing(
        cls, spec: ChunkSpec, num_chunks: int, cuts: Tensor | Sequence[bool] | None = None
    ) -> TokenLayout:
        """Return the layout of a clean copy followed by a noisy copy of the same frames, at the same positions.

        cuts: whether a chunk opens a shot, [num_chunks] or [B, num_chunks].
        """
        frames = num_chunks * spec.chunk_frames
        time = torch.as_tensor(frame_times(spec, num_chunks, cuts))
        return cls.from_frames(
            spec,
            chunk=[frame // spec.chunk_frames for frame in range(frames)] * 2,
            is_noisy=[False] * frames + [True] * frames,
            time=torch.cat((time, time), dim=-1),
        )

    @classmethod
    def training(cls, spec: ChunkSpec, num_chunks: int, cuts: Tensor | Sequence[bool] | None = None) -> TokenLayout:
        """Return `teacher_forcing` without the clean copy of the last chunk, to which nothing attends."""
        frames, last = num_chunks * spec.chunk_frames, (num_chunks - 1) * spec.chunk_frames
        whole = cls.teacher_forcing(spec, num_chunks, cuts)
        return whole.permute_frames([*range(last), *range(frames, 2 * frames)])

    @classmethod
    def balanced(
        cls, spec: ChunkSpec, num_chunks: int, *, ranks: int, cuts: Tensor | Sequence[bool] | None = None
    ) -> TokenLayout:
        """Return `teacher_forcing` in the order of ranks: the clean, then the noisy copy of the chunks of each."""
        whole = cls.teacher_forcing(spec, num_chunks, cuts)
        frames = num_chunks * spec.chunk_frames
        own = frames // ranks
        starts = [copy + rank * own for rank in range(ranks) for copy in (0, frames)]
        return whole.permute_frames([frame for start in starts for frame in range(start, start + own)])

    def part(self, rank: int, ranks: int) -> TokenLayout:
        """Return the part of one of several ranks, which share the tokens in order."""
        length = self.chunk_L.numel() // ranks
        tokens = slice(rank * length, (rank + 1) * length)
        return TokenLayout(
            self.chunk_L[tokens], self.is_noisy_L[tokens], self.position_BL3[:, tokens], self.tokens_per_frame
        )

    @classmethod
    def one_chunk(cls, spec: ChunkSpec, index: int, *, shot: int = 0) -> TokenLayout:
        """Return the layout of chunk `index` (from 0) of a rollout. shot: number of cuts before it or at it."""
        start = index * spec.chunk_frames + shot * spec.offset_per_shot
        return cls.from_frames(
            spec,
            chunk=[index] * spec.chunk_frames,
            is_noisy=[True] * spec.chunk_frames,
            time=range(start, start + spec.chunk_frames),
        )

    @property
    def num_frames(self) -> int:
        return self.chunk_L.numel() // self.tokens_per_frame

    def to(self, device: torch.device | str) -> TokenLayout:
        return TokenLayout(
            self.chunk_L.to(device), self.is_noisy_L.to(device), self.position_BL3.to(device), self.tokens_per_frame
        )

    def permute_frames(self, order: Sequence[int]) -> TokenLayout:
        """Return the layout of the same video with its frames in another order."""
        frames = torch.tensor(order, device=self.chunk_L.device)
        per_frame = torch.arange(self.tokens_per_frame, device=frames.device)
        tokens = (frames[:, None] * self.tokens_per_frame + per_frame).flatten()
        return TokenLayout(
            self.chunk_L[tokens], self.is_noisy_L[tokens], self.position_BL3[:, tokens], self.tokens_per_frame
        )


def frame_times(spec: ChunkSpec, num_chunks: int, cuts: Tensor | Sequence[bool] | None) -> Tensor:
    """Return the temporal position of every latent frame, [T] or [B, T], with the offsets of all cuts before it."""
    time = torch.arange(num_chunks * spec.chunk_frames)
    if cuts is None:
        return time
    shot = torch.as_tensor(cuts).long().cpu().cumsum(-1)
    return time + spec.offset_per_shot * shot.repeat_interleave(spec.chunk_frames, dim=-1)
