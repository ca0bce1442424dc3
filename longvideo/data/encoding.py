"""Encode the clips and captions of a manifest once for all training runs; `encoded_format` describes the files.

The work is planned first. The plan, and therefore every byte of the result, depends only on the manifest, the model and
the options. Then each process writes the missing shards of its own share, each under a temporary name first.

Legend: T frames, H W pixels, then latent grid, C channels, S tokens of a caption, D text width.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.data.clips import ClipReference, ClipSpec, Footage, clips_of
from longvideo.data.encoded_format import (
    DATASET_FILE,
    FINGERPRINT,
    LATENTS,
    TEXT,
    DatasetInfo,
    EncodedClip,
    EncodingPrecision,
    Shard,
    ShardKind,
    SkippedClip,
    index_line,
    latents_key,
    open_shard,
    read_index,
    read_info,
    text_key,
)
from longvideo.data.left_out import clip_notices, video_notices
from longvideo.data.manifest import read_manifest
from longvideo.data.reading import read_in_order
from longvideo.data.timing import measure, notices
from longvideo.errors import CheckpointError, UserError
from longvideo.files import WriteError, locked, temporary_names, write_file, write_json, write_text
from longvideo.model.chunk_frames import ChunkFrames
from longvideo.model.conditioning import video_texts
from longvideo.pixels import from_uint8

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.text.encoder import TextEncoder
    from longvideo.vae.autoencoder import Autoencoder

STORED = torch.bfloat16
MAX_NAMED = 5
BAD_CLIPS, BAD_SHARE = 10, 0.01
"""Default of the unreadable clips that are skipped: this number, or this share of all clips if it is larger."""


@dataclass(frozen=True)
class EncodingPlan:
    """The items to encode, their division into shares, and the folder to write.

    out: folder to write. root: the manifest's folder. chunks: sizes in pixel frames. clips, captions: of all shares.
    notices: what is converted while videos are read, and what is left out, in words.
    """

    out: Path
    root: Path
    info: DatasetInfo
    chunks: ChunkFrames
    clips: tuple[ClipReference, ...]
    captions: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.info.height, self.info.width


def plan_encoding(
    manifest: Path,
    folder: ModelFolder,
    out: Path,
    *,
    num_chunks: int,
    size: tuple[int, int] | None = None,
    shard_bytes: int = 2**30,
    shares: int = 1,
    precision: EncodingPrecision = "fp32",
    model: str = "",
) -> EncodingPlan:
    """Plan the encoding of a manifest. Reads the weight files of the encoders completely, for their digests.

    out: folder to write. num_chunks: chunks of a clip. size: height and width in pixels; None uses the model's own.
    shard_bytes: largest shard. shares: processes that divide the work. precision: "fp32", or "bf16" for autocast.
    model: name of the model, as a note.
    Raises UserError for a wrong manifest, for a size that does not fit the model, and if no video is long enough.
    """
    settings, vae = folder.settings, folder.vae_config
    height, width = size or (settings.height, settings.width)
    scale = vae.scale_factor_spatial
    patch_height, patch_width = folder.transformer_config.patch_size[1:] if "transformer" in folder.parts else (1, 1)
    for name, pixels, unit in (("height", height, scale * patch_height), ("width", width, scale * patch_width)):
        if pixels < unit or pixels % unit:
            nearest = max(1, pixels // unit) * unit
            raise UserError(f"--{name} is {pixels}, expected a multiple of {unit}; use {nearest}")
    spec = ClipSpec.of_model(num_chunks, settings, vae.scale_factor_temporal)
    videos = measure(read_manifest(manifest))
    samples = clips_of(videos, spec)
    clips = [clip for sample in samples for clip in sample.clips]
    plain = [caption for clip in clips for caption in clip.captions]
    read = [text for clip in clips for text in video_texts(clip.captions, clip.cuts, cut_prefix=settings.cut_prefix)]
    captions = tuple(dict.fromkeys(["", *plain, *read]))
    text_dim = folder.text_encoder_config.d_model
    clip_bytes = num_chunks * settings.chunk_frames * vae.z_dim * (height // scale) * (width // scale) * STORED.itemsize
    info = DatasetInfo(
        model=model,
        num_clips=len(clips),
        num_captions=len(captions),
        num_chunks=num_chunks,
        chunk_frames=settings.chunk_frames,
        fps=settings.fps,
        height=height,
        width=width,
        channels=vae.z_dim,
        latent_height=height // scale,
        latent_width=width // scale,
        text_len=settings.text_len,
        text_dim=text_dim,
        precision=precision,
        manifest_sha256=sha256([manifest]),
        vae_sha256=sha256(folder.weights("vae").files),
        text_encoder_sha256=sha256(folder.weights("text_encoder").files),
        shares=shares,
        clips_per_shard=max(1, shard_bytes // clip_bytes),
        captions_per_shard=max(1, shard_bytes // (settings.text_len * text_dim * STORED.itemsize)),
    )
    sentences = (*notices(videos), *video_notices(samples, spec), *clip_notices(samples))
    return EncodingPlan(out, manifest.parent, info, spec.chunks, tuple(clips), captions, sentences)


@dataclass(frozen=True)
class EncodingShare:
    """The part of a plan that one process encodes.

    number: from 0. workers: processes that decode video; 0 decodes in this process. bad_limit: number of unreadable
    clips to skip before stopping, those of earlier runs included; None is 1 % of the clips, but at least 10.
    """

    plan: EncodingPlan
    number: int
    workers: int
    bad_limit: int | None = None

    @property
    def num_clips(self) -> int:
        """Number of planned clips."""
        return sum(len(shard.numbers) for shard in self.plan.info.latents_shards[self.number])

    @property
    def max_bad(self) -> int:
        """Number of unreadable clips to skip before stopping."""
        if self.bad_limit is not None:
            return self.bad_limit
        # a share without any readable clip is always an error
        return min(max(BAD_CLIPS, int(BAD_SHARE * self.num_clips)), max(0, self.num_clips - 1))

    def missing_shards(self, kind: ShardKind) -> list[Shard]:
        """Return the incomplete shards. kind: LATENTS or TEXT. Raises UserError for a shard of another run."""
        shards = [shard for shard in _shards(self.plan.info, share=self.number) if shard.kind == kind]
        return [shard for shard in shards if not _is_complete(self.plan, shard)]

    def skipped_clips(self) -> list[SkippedClip]:
        """Return the clips of complete shards that could not be read."""
        shards = [shard for shard in self.plan.info.latents_shards[self.number] if _is_complete(self.plan, shard)]
        entries = [entry for shard in shards for entry in read_index(self.plan.out, shard)]
        return [entry for entry in entries if isinstance(entry, SkippedClip)]

    def check_limit(self, skipped: Sequence[SkippedClip]) -> None:
        """Raise UserError, naming the unreadable clips, if there are more than `max_bad`."""
        if len(skipped) > self.max_bad:
            named = "; ".join(f"clip {clip.number}: {clip.why}" for clip in skipped[:MAX_NAMED])
            more = f"; and {len(skipped) - MAX_NAMED} more" if len(skipped) > MAX_NAMED else ""
            raise UserError(
                f"unreadable clips: {len(skipped)}, more than --max-bad {self.max_bad} ({named}{more}); repair the"
                " videos that `longvideo data validate --frames` lists, or increase --max-bad"
            )


@contextmanager
def open_output(share: EncodingShare, *, overwrite: bool) -> Generator[None]:
    """Hold the lock of a share while it is written; write dataset.json, or check that it equals the plan's.

    overwrite: delete the files of this share, and those of another number of shares.
    Raises UserError if the folder contains other clips, and if another process encodes the same share. A WriteError
    inside the block gets the remedy: complete files stay, and the command continues after them.
    """
    out, info = share.plan.out, share.plan.info
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; use a folder")
    out.mkdir(parents=True, exist_ok=True)
    name = f"share {share.number} of {info.shares}"
    with locked(
        out / f".share-{share.number}-of-{info.shares}.lock",
        busy=f"{name} of {out} is being encoded by another process; wait for it",
    ):
        _prepare(share, overwrite=overwrite)
        try:
            yield
        except WriteError as error:
            command = "the same command without --overwrite" if overwrite else "the same command"
            raise WriteError(
                f"{error}; the complete files in {out} stay, and {command} continues after them"
            ) from error


def _prepare(share: EncodingShare, *, overwrite: bool) -> None:
    out, info = share.plan.out, share.plan.info
    own = {name for shard in _shards(info, share=share.number) for name in shard.files}
    for abandoned in [path for name in own for path in temporary_names(out / name)]:
        abandoned.unlink()
    if overwrite:
        planned = {name for shard in _shards(info, share=None) for name in shard.files}
        for old in [path for kind in (LATENTS, TEXT) for path in out.glob(f"{kind}-?????-of-?????.*")]:
            if old.name in own or old.name not in planned:
                old.unlink(missing_ok=True)
    file = out / DATASET_FILE
    if not overwrite and file.is_file():
        existing = read_info(out)
        names = [key.name for key in fields(info) if key.compare]
        different = [name for name in names if getattr(existing, name) != getattr(info, name)]
        if different:
            name = different[0]
            raise UserError(
                f"{file} has {name}={getattr(existing, name)}, but this run has {getattr(info, name)}; use the same"
                " manifest, model and options to continue, or another folder, or --overwrite"
            )
    else:
        write_json(file, asdict(info))


def encode_captions(
    plan: EncodingPlan, shards: Sequence[Shard], text_encoder: TextEncoder, *, on_caption: Callable[[], None]
) -> None:
    """Write shards of text features. on_caption: called after each caption, for progress."""
    for shard in shards:
        features: dict[str, Tensor] = {}
        for number in shard.numbers:
            caption = plan.captions[number]
            features[text_key(caption)] = encode_caption(text_encoder, caption)
            on_caption()
        _write_shard(plan, shard, features)


def encode_clips(
    share: EncodingShare,
    shards: Sequence[Shard],
    autoencoder: Autoencoder,
    *,
    on_clip: Callable[[], None],
    on_skip: Callable[[SkippedClip], None],
) -> None:
    """Write shards of latents.

    on_clip: called after each clip. on_skip: called for a clip that cannot be read; it is left out, and its error is
    written to the shard's index. Raises UserError as `EncodingShare.check_limit` does.
    """
    plan, skipped = share.plan, share.skipped_clips()
    clips = [plan.clips[number] for shard in shards for number in shard.numbers]
    results = read_in_order(clips, size=plan.size, workers=share.workers)
    with closing(results):
        for shard in shards:
            latents: dict[str, Tensor] = {}
            index: list[EncodedClip | SkippedClip] = []
            for number in shard.numbers:
                clip, frames = plan.clips[number], next(results)
                source = tuple(_below(footage, plan.root) for footage in clip.footage)
                if isinstance(frames, str):
                    skip = SkippedClip(number, source, frames)
                    index.append(skip)
                    skipped.append(skip)
                    on_skip(skip)
                    share.check_limit(skipped)
                else:
                    encoded = encode_clip(autoencoder, frames, chunks=plan.chunks, precision=plan.info.precision)
                    latents[latents_key(number)] = encoded
                    index.append(EncodedClip(number, clip.captions, clip.cuts, len(encoded), source, shard.stem))
                on_clip()
            lines = "".join(index_line(entry) + "\n" for entry in index)
            write_text(plan.out / shard.index_file, lines)
            _write_shard(plan, shard, latents)


def unknown_words(plan: EncodingPlan, text_encoder: TextEncoder) -> dict[str, int]:
    """Return the words that the text encoder has no token for, with the number of captions that contain each."""
    return dict(Counter(word for caption in plan.captions for word in text_encoder.unknown_words(caption)))


@torch.no_grad()
def encode_clip(
    autoencoder: Autoencoder, frames_THWC: Tensor, *, chunks: ChunkFrames, precision: EncodingPrecision
) -> Tensor:
    """Encode frames uint8 [T, H, W, 3] as `encode_frames` does.

    Returns bf16 [T, C, H, W], on the CPU. Raises UserError if the latents are not finite.
    """
    device = next(autoencoder.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        latents_CTHW = encode_frames(autoencoder, frames_THWC, chunks=chunks)[0]
    if not latents_CTHW.isfinite().all():
        raise UserError("the latents are not finite; check the weights of the autoencoder with `longvideo info`")
    return latents_CTHW.transpose(0, 1).to(STORED).contiguous().cpu()


@torch.no_grad()
def encode_frames(autoencoder: Autoencoder, frames_THWC: Tensor, *, chunks: ChunkFrames) -> Tensor:
    """Encode 1 + 4 n frames uint8 [T, H, W, 3] chunk by chunk, as a stream.

    Returns the mean latents, normalized, float32 [1, C, 1 + n, H, W], on the device of the autoencoder.
    """
    weight = next(autoencoder.parameters())
    state, latents, chunk = None, [], 0
    while chunks.start(chunk) < len(frames_THWC):
        part_THWC = frames_THWC[chunks.start(chunk) : chunks.start(chunk + 1)].to(weight.device)
        video_BCTHW = from_uint8(part_THWC).permute(3, 0, 1, 2)[None].to(weight.dtype)
        moments, state = autoencoder.encode(video_BCTHW, state)
        latents.append(autoencoder.normalize(moments.float().chunk(2, dim=1)[0]))
        chunk += 1
    return torch.cat(latents, dim=2)


@torch.no_grad()
def encode_caption(text_encoder: TextEncoder, caption: str) -> Tensor:
    """Return the features of a caption's own tokens, bf16 [S, D], on the CPU."""
    ids_PS, mask_PS = text_encoder.tokenize([caption])
    return text_encoder(ids_PS, mask_PS)[0, : int(mask_PS.sum())].to(STORED).contiguous().cpu()


def sha256(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the concatenated contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _shards(info: DatasetInfo, *, share: int | None) -> list[Shard]:
    """Return the shards of one share, or of all."""
    shares = range(info.shares) if share is None else [share]
    return [shard for planned in (info.latents_shards, info.text_shards) for one in shares for shard in planned[one]]


def _is_complete(plan: EncodingPlan, shard: Shard) -> bool:
    if not all((plan.out / name).is_file() for name in shard.files):
        return False
    try:
        open_shard(plan.out / shard.file, plan.info)
        if shard.kind == LATENTS:
            read_index(plan.out, shard)
    except CheckpointError:
        # damaged, for example by an interrupted copy: it is written again
        return False
    return True


def _write_shard(plan: EncodingPlan, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
    header = {FINGERPRINT: plan.info.fingerprint}
    write_file(plan.out / shard.file, lambda target: save_file(dict(tensors), target, metadata=header))


def _below(footage: Footage, root: Path) -> Footage:
    """Return footage with its file relative to the manifest's folder."""
    return replace(footage, video=Path(os.path.relpath(footage.video, root)))
