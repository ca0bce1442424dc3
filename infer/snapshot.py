"""A session on disk: one safetensors file with the latents it needs and, as metadata, everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvideo.errors import UserError
from longvideo.files import check_file, check_target, parse_json, reason, write_file
from longvideo.infer.history import ChunkRecord
from longvideo.infer.options import SamplingOptions, shown, whole_number
from longvideo.infer.script import check_prompt
from longvideo.infer.timeline import MODES, Shots, Step, SwitchMode

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "longvideo session 1"
FIRST_LATENT = "first_latent"
MAX_COUNT = 2**31
"""Of frames and chunks; 24 frames a second last 2.8 years."""


@dataclass(frozen=True)
class SessionOptions:
    """What a session is made with from beginning to end.

    num_frames: of the whole video, None for no end. first_latent: [1, C, 1, H, W], of an opening picture. model: what
    a snapshot must agree with to be restored (sizes and settings, not the weights).
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
    """Write a file that is whole or not there. Raises WriteError as `longvideo.files.write_file` does."""
    check_target(path)
    options = snapshot.options
    tensors = {}
    for record in snapshot.kept:
        tensors[_latents(record.step.index)] = record.latents.contiguous()
        tensors[_noise(record.step.index)] = torch.stack(record.noise)
    if options.first_latent is not None:
        tensors[FIRST_LATENT] = options.first_latent.cpu().contiguous()
    session = {
        "sampling": asdict(options.sampling),
        "model": options.model,
        "num_frames": options.num_frames,
        "shots": [[chunk, prompt, mode] for chunk, (prompt, mode) in sorted(snapshot.shots.items())],
        "steps": [asdict(step) for step in snapshot.steps],
    }
    metadata = {"format": FORMAT, "session": json.dumps(session)}
    write_file(path, lambda target: save_file(tensors, target, metadata=metadata))


def read_snapshot(path: Path, *, model: dict[str, Any], latent_shape: tuple[int, int, int, int]) -> Snapshot:
    """Read a snapshot that a model can continue; raises UserError for any other file.

    latent_shape: of a chunk, [C, T, H, W].
    """
    check_file(path, "snapshot of a session")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a snapshot of a session ({FORMAT!r} is not in its metadata)")
            session = _Fields(parse_json(metadata.get("session", ""), where=f"the session in {path}"), str(path))
            _check_model(session.mapping("model"), model, path)
            steps = [_read_step(step, index, path) for index, step in enumerate(session.sequence("steps"))]
            tensors = _read_tensors(file, path, latent_shape, num_steps=len(steps))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    kept = [
        ChunkRecord(step, tensors[_latents(step.index)], tuple(tensors[_noise(step.index)].unbind()))
        for step in steps
        if _latents(step.index) in tensors
    ]
    num_frames = session.value("num_frames")
    options = SessionOptions(
        _read_sampling(session.mapping("sampling"), path),
        model,
        None if num_frames is None else whole_number(num_frames, f"{path}: num_frames", 1, MAX_COUNT),
        tensors.get(FIRST_LATENT),
    )
    return Snapshot(options, _read_shots(session.sequence("shots"), path), steps, kept)


class _Fields:
    """The values of a JSON object, by name and kind. where: begins errors."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is damaged: {shown(data)} stands where an object was expected")
        self._data, self._where = data, where

    def value(self, name: str) -> Any:
        if name not in self._data:
            raise UserError(f"{self._where} is damaged: it has no {name}")
        return self._data[name]

    def mapping(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self._of_type(name, dict))

    def sequence(self, name: str) -> list[Any]:
        return cast("list[Any]", self._of_type(name, list))

    def boolean(self, name: str) -> bool:
        return cast("bool", self._of_type(name, bool))

    def _of_type(self, name: str, kind: type) -> object:
        value = self.value(name)
        if not isinstance(value, kind):
            raise UserError(f"{self._where} is damaged: {name} is {shown(value)}")
        return value


def _check_model(saved: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    for key in dict.fromkeys((*model, *saved)):
        if saved.get(key) != model.get(key):
            theirs, own = shown(saved.get(key)), shown(model.get(key))
            raise UserError(f"{path} was made by a model whose {key} is {theirs}; this one's is {own}")


def _read_sampling(values: dict[str, Any], path: Path) -> SamplingOptions:
    known = {field.name for field in fields(SamplingOptions)}
    if values.keys() != known:
        raise UserError(
            f"{path} is damaged: its sampling has {shown(sorted(values))}, wanted {', '.join(sorted(known))}"
        )
    try:
        return SamplingOptions(**values)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _read_step(data: object, index: int, path: Path) -> Step:
    where = f"{path}: chunk {index}"
    values = _Fields(data, where)
    whole_number(values.value("index"), f"{where}: index", index, index)
    prompts = values.sequence("prompts")
    if len(prompts) != 1:
        raise UserError(f"{where} is damaged: it has {len(prompts)} prompts, wanted 1")
    check_prompt(prompts[0], f"{where}: the prompt")
    num_frames = whole_number(values.value("num_frames"), f"{where}: num_frames", 1, MAX_COUNT)
    return Step(index, (prompts[0],), values.boolean("cut"), num_frames, values.boolean("recache"))


def _read_shots(entries: list[Any], path: Path) -> Shots:
    shots: Shots = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 3 or entry[2] not in MODES:
            raise UserError(f"{path} is damaged: {shown(entry)} is not a chunk, a prompt and one of {', '.join(MODES)}")
        check_prompt(entry[1], f"{path}: the prompt of a shot")
        shots[whole_number(entry[0], f"{path}: the chunk of a shot", 0, MAX_COUNT)] = (
            entry[1],
            cast("SwitchMode", entry[2]),
        )
    if 0 not in shots:
        raise UserError(f"{path} is damaged: no shot begins with chunk 0")
    return shots


def _read_tensors(
    file: Any, path: Path, latent_shape: tuple[int, int, int, int], *, num_steps: int
) -> dict[str, Tensor]:
    """Read what belongs to a session, after a look at its shapes and types."""
    channels, _, height, width = latent_shape
    state = torch.Generator().get_state()
    expected = {FIRST_LATENT: ([1, channels, 1, height, width], torch.float32)}
    for index in range(num_steps):
        expected[_latents(index)] = ([1, *latent_shape], torch.float32)
        expected[_noise(index)] = ([1, *state.shape], state.dtype)
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
        shape, dtype = expected.get(name, (None, None))
        if file.get_slice(name).get_shape() != shape:
            found = file.get_slice(name).get_shape()
            wanted = "no such tensor" if shape is None else str(shape)
            raise UserError(f"{path} is damaged: {shown(name)} has the shape {found}, wanted {wanted}")
        tensor = file.get_tensor(name)
        if tensor.dtype != dtype or not torch.isfinite(tensor).all():
            raise UserError(f"{path} is damaged: {name} is {tensor.dtype}, wanted {dtype} and no NaN or infinity")
        tensors[name] = tensor
    for index in range(num_steps):
        if (_latents(index) in tensors) != (_noise(index) in tensors):
            raise UserError(f"{path} is damaged: of {_latents(index)} and {_noise(index)} one is missing")
        if _noise(index) in tensors:
            _check_state(tensors[_noise(index)][0], _noise(index), path)
    return tensors


def _check_state(state: Tensor, name: str, path: Path) -> None:
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {name} is not the state of a generator") from error


def _latents(index: int) -> str:
    return f"latents.{index}"


def _noise(index: int) -> str:
    return f"noise.{index}"
