"""The format of encoded clips on disk: names, contents and indexes of the files.

A folder contains:

- `dataset.json`;
- shards `latents-00000-of-00012.safetensors` with one tensor `clip/<number>/latents` for each clip, bf16 [T, C, H, W].
  Frames are the first axis, so a range of frames is one contiguous read;
- for each of these an index `latents-00000-of-00012.jsonl` with one line for each clip;
- shards `text-00000-of-00003.safetensors` with one tensor `text/<sha256 of the caption>` for each distinct caption,
  bf16 [number of tokens, D].

Clips and captions are divided into shares: share I of N has the numbers I, I + N, I + 2N and so on. Its shards store
them in that order, with a fixed number of items each, so dataset.json alone determines the contents of every file.

Legend: T latent frames of a clip, C channels, H W latent grid, D text width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from longvideo.checkpoint.opening import open_weights
from longvideo.config.bounds import check_whole
from longvideo.config.loading import load_config
from longvideo.data.clips import Footage
from longvideo.errors import CheckpointError, ConfigError, UserError
from longvideo.files import read_json, read_lines
from longvideo.model.config import MAX_TEXT_LEN, MAX_WIDTH

if TYPE_CHECKING:
    from longvideo.checkpoint.tensors import TensorInfo

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
LATENTS: Final = "latents"
TEXT: Final = "text"
ShardKind = Literal["latents", "text"]
EncodingPrecision = Literal["fp32", "bf16"]
MAX_SHARDS = 10**6
MOST = {
    "num_clips": 10**9,
    "num_captions": 10**10,
    "num_chunks": 10**6,
    "chunk_frames": 1024,
    "fps": 1000,
    "height": 16384,
    "width": 16384,
    "channels": 4096,
    "latent_height": 16384,
    "latent_width": 16384,
    "text_len": MAX_TEXT_LEN,
    "text_dim": MAX_WIDTH,
    "shares": 10**5,
    "clips_per_shard": 2**62,
    "captions_per_shard": 2**62,
}
"""Largest allowed values of dataset.json; larger ones are mistakes that could exhaust the memory."""
FINGERPRINT = "dataset"
"""Key in the header of every shard, for the fingerprint of the dataset.json that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The contents of dataset.json: size and origin of the clips, and their division into shards.

    num_clips, num_captions: planned numbers, clips that could not be read included. num_chunks: chunks of each clip.
    chunk_frames: latent frames of a chunk. fps, height, width: of the videos, in frames per second and pixels.
    channels, latent_height, latent_width: of the latents. text_len: text positions, tokens. text_dim: width of text
    features. precision: in which the encoders computed. manifest_sha256, vae_sha256, text_encoder_sha256: digests of
    the files that the data set was made from. shares: number of parts of the work. model: name of the model, as a note.
    """

    version: int = FORMAT_VERSION
    model: str = field(default="", compare=False)
    num_clips: int
    num_captions: int
    num_chunks: int
    chunk_frames: int
    fps: int
    height: int
    width: int
    channels: int
    latent_height: int
    latent_width: int
    text_len: int
    text_dim: int
    precision: EncodingPrecision
    manifest_sha256: str
    vae_sha256: str
    text_encoder_sha256: str
    shares: int
    clips_per_shard: int
    captions_per_shard: int

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            check_whole(name, getattr(self, name), 1, most)
        for name, items, per_shard in (
            ("clips_per_shard", self.num_clips, self.clips_per_shard),
            ("captions_per_shard", self.num_captions, self.captions_per_shard),
        ):
            if items // per_shard > MAX_SHARDS:
                raise ConfigError(
                    f"{name}={per_shard} divides {items} items into more than {MAX_SHARDS} files; use a larger number"
                )

    @property
    def num_frames(self) -> int:
        """Latent frames of a clip."""
        return self.num_chunks * self.chunk_frames

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        """Shape of a stored clip, [T, C, H, W]."""
        return self.num_frames, self.channels, self.latent_height, self.latent_width

    @property
    def fingerprint(self) -> str:
        """Digest of all values except `model`: two runs with the same digest write the same bytes."""
        values = asdict(self)
        del values["model"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def latents_shards(self) -> list[list[Shard]]:
        """Shards of latents of each share."""
        return _plan_shards(LATENTS, self.num_clips, self.clips_per_shard, self.shares)

    @property
    def text_shards(self) -> list[list[Shard]]:
        """Shards of text features of each share."""
        return _plan_shards(TEXT, self.num_captions, self.captions_per_shard, self.shares)


@dataclass(frozen=True)
class Shard:
    """One file of encoded items.

    kind: LATENTS or TEXT. number, total: of the file among all files of its kind. numbers: of the planned clips or
    captions.
    """

    kind: ShardKind
    number: int
    total: int
    numbers: range

    @property
    def stem(self) -> str:
        return f"{self.kind}-{self.number:05d}-of-{self.total:05d}"

    @property
    def file(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index_file(self) -> str:
        return f"{self.stem}.jsonl"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files, in the order in which they are written."""
        return (self.index_file, self.file) if self.kind == LATENTS else (self.file,)


@dataclass(frozen=True)
class EncodedClip:
    """A clip with its captions.

    number: among all planned clips. captions: one for each chunk. cuts: for each chunk, whether it begins a shot.
    num_frames: latent frames. source: stretches of video files, relative to the manifest's folder. shard: name of the
    file with its latents, without suffix.
    """

    number: int
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]
    num_frames: int
    source: tuple[Footage, ...]
    shard: str


@dataclass(frozen=True)
class SkippedClip:
    """A clip that could not be read when the data set was encoded. why: the error."""

    number: int
    source: tuple[Footage, ...]
    why: str


def latents_key(number: int) -> str:
    """Return the name of the tensor of a clip."""
    return f"clip/{number}/latents"


def text_key(caption: str) -> str:
    """Return the name of the tensor of a caption."""
    return f"text/{hashlib.sha256(caption.encode()).hexdigest()}"


def read_info(path: Path) -> DatasetInfo:
    """Read dataset.json. Raises UserError, naming it, if it is missing or of another version."""
    file = path / DATASET_FILE
    if not file.is_file():
        raise UserError(f"{path} has no {DATASET_FILE}; use a folder that `longvideo data encode` wrote")
    version = read_json(file).get("version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has version {version!r}, expected {FORMAT_VERSION}; encode again, or use the version of longvideo"
            " that wrote it"
        )
    try:
        return load_config(DatasetInfo, [file])
    except ConfigError as error:
        if str(file) in str(error):
            raise
        raise ConfigError(f"{file}: {error}") from error


def open_shard(file: Path, info: DatasetInfo) -> dict[str, TensorInfo]:
    """Read the header of a shard. Raises UserError if it is missing, truncated or of another run."""
    weights = open_weights(file)
    if weights.metadata.get(FINGERPRINT) != info.fingerprint:
        raise UserError(f"{file} belongs to another {DATASET_FILE}; encode its share again with --overwrite")
    return weights.infos


def index_line(entry: EncodedClip | SkippedClip) -> str:
    """Return a clip, encoded or skipped, as a line of JSON."""
    source = [asdict(footage) | {"video": footage.video.as_posix()} for footage in entry.source]
    return json.dumps({key: value for key, value in (asdict(entry) | {"source": source}).items() if key != "shard"})


def read_index(path: Path, shard: Shard) -> list[EncodedClip | SkippedClip]:
    """Read the index of a shard. Raises CheckpointError unless it lists every clip that is planned for the shard."""
    file = path / shard.index_file
    entries: list[EncodedClip | SkippedClip] = []
    try:
        for line in read_lines(file, what="index"):
            if line:
                entries.append(_index_entry(json.loads(line), shard.stem))  # noqa: PERF401 - an error counts them
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}:{len(entries) + 1} is not a line of an index ({error}); copy the file again"
        ) from error
    if [entry.number for entry in entries] != list(shard.numbers):
        raise CheckpointError(f"{file} lists {len(entries)} clips, expected {len(shard.numbers)}; copy the file again")
    return entries


def _index_entry(data: dict[str, Any], stem: str) -> EncodedClip | SkippedClip:
    source = tuple(Footage(Path(part["video"]), part["start_seconds"], part["num_frames"]) for part in data["source"])
    if "why" in data:
        return SkippedClip(data["number"], source, data["why"])
    captions, cuts = tuple(data["captions"]), tuple(data["cuts"])
    return EncodedClip(data["number"], captions, cuts, data["num_frames"], source, stem)


def _plan_shards(kind: ShardKind, num_items: int, per_shard: int, shares: int) -> list[list[Shard]]:
    of_shares = [range(share, num_items, shares) for share in range(shares)]
    parts = [[own[i : i + per_shard] for i in range(0, len(own), per_shard)] for own in of_shares]
    total = sum(len(own) for own in parts)
    number = count()
    return [[Shard(kind, next(number), total, numbers) for numbers in own] for own in parts]
