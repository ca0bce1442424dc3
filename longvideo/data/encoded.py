"""Read encoded clips from disk, a few latent frames at a time; `encoded_format` describes the files.

Legend: T latent frames of a clip, t latent frames to read, C channels, H W latent grid, J text positions, D text width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from longvideo.data.encoded_format import (
    DatasetInfo,
    EncodedClip,
    Shard,
    SkippedClip,
    latents_key,
    open_shard,
    read_index,
    read_info,
    text_key,
)
from longvideo.errors import UserError
from longvideo.model.conditioning import video_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from longvideo.checkpoint.tensors import TensorInfo


class EncodedDataset:
    """Latents and text features of clips, read from disk on request. It can be sent to other processes.

    clips: available clips, by number. skipped: clips that could not be read when they were encoded.
    """

    def __init__(
        self,
        path: Path,
        info: DatasetInfo,
        *,
        clips: Sequence[EncodedClip],
        skipped: Sequence[SkippedClip],
        text_files: Mapping[str, Path],
    ) -> None:
        self.path = path
        self.info = info
        self.clips = tuple(clips)
        self.skipped = tuple(skipped)
        self._text_files = text_files
        self._handles: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> EncodedDataset:
        """Open a folder and check that it is complete; no tensor is read.

        Raises UserError, naming the file, if one is missing, damaged, of another version or of another run.
        """
        path = Path(path)
        info = read_info(path)
        clips: list[EncodedClip] = []
        skipped: list[SkippedClip] = []
        for shard in _all(path, info, info.latents_shards):
            stored = open_shard(path / shard.file, info)
            lines = read_index(path, shard)
            own = [line for line in lines if isinstance(line, EncodedClip)]
            _check_tensors(path / shard.file, stored, {latents_key(clip.number): info.latents_shape for clip in own})
            clips += own
            skipped += [line for line in lines if isinstance(line, SkippedClip)]
        text_files: dict[str, Path] = {}
        for shard in _all(path, info, info.text_shards):
            stored = open_shard(path / shard.file, info)
            if len(stored) != len(shard.numbers):
                raise UserError(
                    f"{path / shard.file} has {len(stored)} captions, expected {len(shard.numbers)}; encode again"
                )
            for name, tensor in stored.items():
                if len(tensor.shape) != 2 or tensor.shape[0] > info.text_len or tensor.shape[1] != info.text_dim:
                    raise UserError(
                        f"{path / shard.file}: {name} has shape {list(tensor.shape)}, expected at most"
                        f" {[info.text_len, info.text_dim]}; encode again"
                    )
            text_files.update(dict.fromkeys(stored, path / shard.file))
        return cls(
            path,
            info,
            clips=sorted(clips, key=lambda clip: clip.number),
            skipped=sorted(skipped, key=lambda clip: clip.number),
            text_files=text_files,
        )

    def __len__(self) -> int:
        return len(self.clips)

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedDataset.open, (self.path,)

    @property
    def num_chunks(self) -> int:
        """Chunks of every clip."""
        return self.info.num_chunks

    @property
    def chunk_frames(self) -> int:
        """Latent frames of a chunk."""
        return self.info.chunk_frames

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.info.channels

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.info.latent_height, self.info.latent_width

    @property
    def text_len(self) -> int:
        """Text positions, tokens."""
        return self.info.text_len

    @property
    def text_dim(self) -> int:
        """Width of text features."""
        return self.info.text_dim

    def latents(self, index: int, first: int, last: int) -> Tensor:
        """Read only the latent frames [first, last) of `clips[index]`: float32 [C, t, H, W], normalized."""
        clip = self.clips[index]
        if not 0 <= first < last <= clip.num_frames:
            raise UserError(
                f"frames {first} to {last} of a clip of {clip.num_frames} latent frames; expected"
                f" 0 <= first < last <= {clip.num_frames}"
            )
        stored_tCHW = self._handle(self.path / f"{clip.shard}.safetensors").get_slice(latents_key(clip.number))
        return stored_tCHW[first:last].float().transpose(0, 1).contiguous()

    def text(self, caption: str) -> Tensor:
        """Read the features of a text of any clip, or of the empty text: float32 [J, D], zero after its tokens.

        caption: a caption, or a caption with the `cut_prefix` of the model that encoded it.
        """
        key = text_key(caption)
        if key not in self._text_files:
            raise UserError(
                f"{self.path} has no features of {caption!r}; use a caption of its clips, or the empty text"
            )
        features_JD = torch.zeros(self.info.text_len, self.info.text_dim)
        stored = self._handle(self._text_files[key]).get_tensor(key)
        features_JD[: len(stored)] = stored
        return features_JD

    def check_texts(self, cut_prefix: str) -> None:
        """Raise UserError unless the captions at cuts are also encoded with this prefix."""
        for clip in self.clips if cut_prefix else ():
            for text in video_texts(clip.captions, clip.cuts, cut_prefix=cut_prefix):
                if text_key(text) not in self._text_files:
                    raise UserError(
                        f"{self.path} has no features of {text!r}, which the model with cut_prefix={cut_prefix!r} reads"
                        f" at a cut of clip {clip.number}; encode the clips again with this model"
                    )

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]


def _all(path: Path, info: DatasetInfo, shares: Sequence[Sequence[Shard]]) -> Iterator[Shard]:
    """Yield the shards of all shares. Raises UserError if a file is missing."""
    for share, shards in enumerate(shares):
        for shard in shards:
            for name in shard.files:
                if not (path / name).is_file():
                    raise UserError(
                        f"{path / name} is missing; copy it too, or finish share {share} of {info.shares} with"
                        f" `longvideo data encode ... --shard-of {share}/{info.shares}`"
                    )
            yield shard


def _check_tensors(file: Path, stored: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if {key: tensor.shape for key, tensor in stored.items()} != shapes:
        raise UserError(f"{file} does not have the tensors that its index lists; copy both files again")
