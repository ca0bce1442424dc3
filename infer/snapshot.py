"""A session on disk: one safetensors file with the latents it needs and, as metadata, everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.history import ChunkRecord
from longvideo.infer.options import SamplingOptions
from longvideo.infer.timeline import Shots, Step

FORMAT = "longvideo session 1"


@dataclass(frozen=True)
class SessionOptions:
    """What a session is made with from beginning to end.

    num_frames: of the whole video, None for no end. first_latent: [1, C, 1, H, W], of an opening picture. model: what
    a snapshot must agree with to be gone on with (sizes and settings, not the weights).
    """

    sampling: SamplingOptions
    model: dict[str, Any]
    num_frames: int | None = None
    first_latent: Tensor | None = None


@dataclass(frozen=True)
class Snapshot:
    """A session between two chunks: its shots, the steps of all chunks and the records of those still kept."""

    options: SessionOptions
    shots: Shots
    steps: Sequence[Step]
    kept: Sequence[ChunkRecord]


def write_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a file that is whole or not there."""
    options = snapshot.options
    tensors = {}
    for record in snapshot.kept:
        tensors[f"latents.{record.step.index}"] = record.latents.contiguous()
        tensors[f"noise.{record.step.index}"] = torch.stack(record.noise)
    if options.first_latent is not None:
        tensors["first_latent"] = options.first_latent.cpu().contiguous()
    told = {
        "sampling": asdict(options.sampling),
        "model": options.model,
        "num_frames": options.num_frames,
        "shots": [[chunk, prompt, mode] for chunk, (prompt, mode) in sorted(snapshot.shots.items())],
        "steps": [asdict(step) for step in snapshot.steps],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "session": json.dumps(told)})
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_snapshot(path: Path, *, model: dict[str, Any]) -> Snapshot:
    """Read a snapshot that a model can go on with; raises UserError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is no snapshot of a session ({FORMAT!r} is not in its metadata)")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    told = json.loads(metadata["session"])
    for key, value in told["model"].items():
        if model.get(key) != value:
            raise UserError(f"{path} was made by a model whose {key} is {value!r}; this one's is {model.get(key)!r}")
    steps = [Step(**{**step, "prompts": tuple(step["prompts"])}) for step in told["steps"]]
    kept = [
        ChunkRecord(step, tensors[f"latents.{step.index}"], tuple(tensors[f"noise.{step.index}"].unbind()))
        for step in steps
        if f"latents.{step.index}" in tensors
    ]
    options = SessionOptions(
        SamplingOptions(**told["sampling"]), told["model"], told["num_frames"], tensors.get("first_latent")
    )
    return Snapshot(options, {chunk: (prompt, mode) for chunk, prompt, mode in told["shots"]}, steps, kept)
