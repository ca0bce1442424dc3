"""Decode saved latents as generation does: a file of latents, or a folder of encoded clips, chunk by chunk.

Shapes: C channels, T latent frames, t some of them, H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from longvideo.checkpoint.decoders import SMALL, WAN, StoredDecoder, choose_decoder, decoder_file, open_decoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.latents import SUFFIX, LatentsHeader, open_latents
from longvideo.checkpoint.settings import ModelSettings
from longvideo.data.encoded import EncodedDataset
from longvideo.errors import UserError
from longvideo.infer.decode import ChunkDecoder, mark_ready
from longvideo.infer.decoder_choice import load_decoder, load_decoder_file, with_decoder_precision
from longvideo.infer.fit.memory import decoding_parts
from longvideo.infer.fit.refusal import check_decoding_memory
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoders import check_fp8
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    import numpy as np

    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.streaming.decoders import DecoderConfig, DecoderModel


@dataclass(frozen=True)
class SavedVideo:
    """The latents of one video.

    name: name among the videos of the same source, "" for the only one of a file. read: returns the latent frames
    [first, last) as float32 [C, t, H, W], for `first` and `last`.
    """

    name: str
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class SavedLatents:
    """Latents of videos of one size. stem: name of the file or folder without suffix. shape: [C, T, H, W]."""

    path: Path
    stem: str
    shape: tuple[int, int, int, int]
    header: LatentsHeader
    videos: tuple[SavedVideo, ...]


def open_saved(path: Path, *, num: int | None = None) -> SavedLatents:
    """Open a file of latents or a folder of encoded clips.

    num: largest number of videos; None means all. The values of a file are read once, to refuse NaN before a decoder is
    loaded. Raises UserError, naming the file, for anything else.
    """
    if path.is_dir():
        return _open_clips(path, num)
    stored = open_latents(path)
    stored.check_values()
    stem = path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else path.stem
    numbers = range(stored.num_videos)[:num]
    videos = (SavedVideo(str(i) if stored.num_videos > 1 else "", partial(stored.frames, i)) for i in numbers)
    return SavedLatents(path, stem, stored.shape[1:], stored.header, tuple(videos))


@dataclass(frozen=True)
class LatentsDecoder:
    """The decoder of saved latents. folder: the model, None without one. stored: None for the model's autoencoder.

    One of them is not None.
    """

    folder: ModelFolder | None
    stored: StoredDecoder | None

    @classmethod
    def choose(
        cls, saved: SavedLatents, folder: ModelFolder | None, name: str | None, placement: Placement
    ) -> LatentsDecoder:
        """Open a decoder; no weights are loaded.

        folder: the model that made the latents, None without one; a file with a decoder of Wan2.2's latents needs none.
        name: as in `choose_decoder`. Raises UserError where a model is needed.
        """
        if folder is not None:
            return cls(folder, choose_decoder(folder, name, device=placement.decode_device))
        wan, file = AutoencoderConfig.wan22(), None if name in (None, WAN, SMALL) else decoder_file(name)
        if file is not None and saved.shape[0] == wan.z_dim:
            return cls(None, open_decoder(file, wan))
        model = saved.header.model
        reason = "states no model" if model is None else f"was made by {model!r}, which is not on this machine"
        raise UserError(
            f"{saved.path} {reason}; use --model with the model that made the latents, or, for those of Wan2.2"
            f" with {wan.z_dim} channels, --decoder with a file such as taew2_2.pth"
        )

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the decoder."""
        return self._own_folder.vae_config if self.stored is None else self.stored.config

    @property
    def settings(self) -> ModelSettings:
        """Settings of the model, or those of Wan2.2 without one."""
        return ModelSettings() if self.folder is None else self.folder.settings

    def check(self, saved: SavedLatents, formats: NumberFormats, placement: Placement) -> int:
        """Return the number of frames of each video. Raises UserError where these latents cannot be decoded."""
        name = str(self._own_folder.path if self.stored is None else self.stored.path)
        channels, total = saved.shape[:2]
        if channels != self.config.z_dim:
            swapped = "; their axes seem to be [T, C, H, W], transpose them" if total == self.config.z_dim else ""
            raise UserError(
                f"{saved.path} has latents of {channels} channels; expected [C, T, H, W] with C={self.config.z_dim} for"
                f" {name}{swapped}; use the model or the decoder of these latents"
            )
        if formats.decoder in FP8_FORMATS:
            check_fp8(self.config, name)
        scale = self.config.scale_factor_temporal
        most = 1 + scale * (total - 1)
        num_frames = most if saved.header.num_frames is None else saved.header.num_frames
        if not most - scale < num_frames <= most:
            raise UserError(
                f"{saved.path} states num_frames={num_frames}, but its {total} latent frames are {most} frames; save it"
                " again"
            )
        check_decoding_memory(
            decoding_parts(self.config, formats.decoder, placement, Grid(1, self.chunk_frames(saved), *saved.shape[2:]))
        )
        return num_frames

    def load(self, placement: Placement, formats: NumberFormats) -> tuple[DecoderModel, NumberFormats]:
        """Load the weights. Return them, and the formats with the precision that was chosen."""
        formats = with_decoder_precision(formats, self.config, placement)
        if self.stored is not None:
            return load_decoder_file(self.stored, placement, formats), formats
        decoder, _ = load_decoder(self._own_folder, None, placement, formats)
        return decoder, formats

    def chunk_frames(self, saved: SavedLatents) -> int:
        """Return the number of latent frames of a chunk: that of the latents, or else of the model."""
        return saved.header.chunk_frames or self.settings.chunk_frames

    @property
    def _own_folder(self) -> ModelFolder:
        assert self.folder is not None
        return self.folder


def decode_videos(
    saved: SavedLatents, model: DecoderModel, *, chunk_frames: int, num_frames: int
) -> Iterator[tuple[SavedVideo, Generator[np.ndarray, None, None]]]:
    """Yield each video with its frames, uint8 [T, H, W, 3], which are decoded chunk by chunk when they are read.

    chunk_frames: latent frames of a chunk. num_frames: frames of each video. Chunks are decoded in the same parts as
    while they are generated, so the same decoder returns the same bits.
    """
    _, total, height, width = saved.shape
    decoder = ChunkDecoder(model, Grid(1, chunk_frames, height, width))
    decoder.warm_up()
    parts = list(_parts(total, chunk_frames))
    for video in saved.videos:
        decoder.reset()
        yield video, _decoded(video, decoder, model, parts=parts, num_frames=num_frames)


def _decoded(
    video: SavedVideo,
    decoder: ChunkDecoder,
    model: DecoderModel,
    *,
    parts: Sequence[tuple[int, int]],
    num_frames: int,
) -> Generator[np.ndarray, None, None]:
    scale, left = model.config.scale_factor_temporal, num_frames
    for first, last in parts:
        count = min(left, scale * (last - first) - (0 if first else scale - 1))
        latents = video.read(first, last)[None].to(model.device)
        yield decoder.decode(latents, count, ready=mark_ready(latents))[0]
        left -= count
    assert not left, (num_frames, parts)


def _parts(total: int, chunk_frames: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of latent frames that are decoded together: the first frame, the rest of its chunk, chunks."""
    yield 0, 1
    for first in range(0, total, chunk_frames):
        begin, end = max(first, 1), min(first + chunk_frames, total)
        if begin < end:
            yield begin, end


def _open_clips(path: Path, num: int | None) -> SavedLatents:
    dataset = EncodedDataset.open(path)
    if not dataset.clips:
        raise UserError(f"{path} has no clips; use a folder of encoded clips that could be read")
    info = dataset.info
    header = LatentsHeader(model=info.model or None, fps=info.fps, chunk_frames=info.chunk_frames)
    videos = (SavedVideo(str(clip.number), partial(dataset.latents, i)) for i, clip in enumerate(dataset.clips[:num]))
    total, channels, height, width = info.latents_shape
    return SavedLatents(path, "clip", (channels, total, height, width), header, tuple(videos))
