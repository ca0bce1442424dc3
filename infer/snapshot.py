"""A session on disk: one safetensors file, with latents and noise as tensors and everything else as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvideo.errors import UserError, shown
from longvideo.files import check_file, check_target, parse_json, reason, write_file
from longvideo.infer.history import ChunkRecord
from longvideo.infer.options import SamplingOptions, whole_number
from longvideo.infer.script import check_negative_prompt, check_prompt
from longvideo.infer.timeline import MODES, LiveShot, Shots, Step

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.infer.generation import Models

FORMAT = "longvideo session 1"
FIRST_LATENT = "first_latent"
JSON_NAMES = {dict: "an object", list: "a list", bool: "true or false", str: "text"}
MAX_COUNT = 2**31
"""Largest number of frames or chunks in a snapshot; 2.8 years at 24 frames per second."""


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session, which do not change while it runs.

    model: sizes and settings of the model, but not its weights; a snapshot is restored only with equal ones.
    num_frames: pixel frames of the whole video; None means that it has no end. first_latent: [1, C, 1, H, W], latent of
    a given first frame. decoder: name and precision of the decoder, for people; a session may be continued with
    another. "" in snapshots that do not state it. footage_chunks: number of the first chunks that are not generated but
    were given as footage; num_frames includes theirs.
    """

    sampling: SamplingOptions
    model: dict[str, Any]
    num_frames: int | None = None
    first_latent: Tensor | None = None
    decoder: str = ""
    footage_chunks: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A session between two chunks.

    shots: all shots, planned ones included. steps: steps of all finished chunks. records: the chunks whose latents are
    stored.
    """

    options: SessionOptions
    shots: Shots
    steps: Sequence[Step]
    records: Sequence[ChunkRecord]


def model_identity(models: Models) -> dict[str, Any]:
    """Return `SessionOptions.model` of a model: its sizes, settings and adapters, as JSON returns them."""
    transformer = asdict(models.transformer.config)
    adapters = {"adapters": models.adapters} if models.adapters else {}
    settings = asdict(models.settings)
    del settings["trained_on"]  # it affects no video
    return json.loads(json.dumps({**settings, **transformer, **adapters}))


def write_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot; a file that exists is replaced once the new one is complete.

    Raises UserError for a path that cannot be written, and WriteError as `longvideo.files.write_file` does.
    """
    check_target(path)
    options = snapshot.options
    tensors = {}
    for record in snapshot.records:
        tensors[_latents(record.step.index)] = record.latents.contiguous()
        tensors[_noise(record.step.index)] = torch.stack(record.noise)
    if options.first_latent is not None:
        tensors[FIRST_LATENT] = options.first_latent.cpu().contiguous()
    session = {
        "sampling": asdict(options.sampling),
        "model": options.model,
        "num_frames": options.num_frames,
        "decoder": options.decoder,
        "footage_chunks": options.footage_chunks,
        "shots": [
            [chunk, shot.prompt, shot.mode, shot.negative_prompt] for chunk, shot in sorted(snapshot.shots.items())
        ],
        "steps": [asdict(step) for step in snapshot.steps],
    }
    metadata = {"format": FORMAT, "session": json.dumps(session)}
    write_file(path, lambda target: save_file(tensors, target, metadata=metadata))


def read_snapshot(path: Path, *, model: dict[str, Any], latent_shape: tuple[int, int, int, int]) -> Snapshot:
    """Read a snapshot. Raises UserError for any other file, and for a snapshot of another model.

    model: sizes and settings of the model that continues the session. latent_shape: [C, T, H, W] of its chunks.
    """
    check_file(path, "snapshot")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} is not a snapshot of a session: its metadata has no {FORMAT!r}; use a file that a session"
                    " wrote"
                )
            session = _Fields(parse_json(metadata.get("session", ""), where=f"the session in {path}"), str(path))
            _check_model(session.mapping("model"), model, path)
            steps = [_read_step(step, index, path) for index, step in enumerate(session.sequence("steps"))]
            tensors = _read_tensors(file, path, latent_shape, num_steps=len(steps))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    records = [
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
        session.text("decoder", default=""),
        whole_number(session.value("footage_chunks", default=0), f"{path}: footage_chunks", 0, len(steps)),
    )
    return Snapshot(options, _read_shots(session.sequence("shots"), path), steps, records)


class _Fields:
    """Values of a JSON object, checked for their types. where: start of every error."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is damaged: it is {shown(data)}; expected an object")
        self._data, self._where = data, where

    def value(self, name: str, *, default: Any = None) -> Any:
        """Return a value. default: that of a value that older snapshots do not have."""
        if name not in self._data and default is None:
            raise UserError(f"{self._where} is damaged: it has no {name}; expected one")
        return self._data.get(name, default)

    def text(self, name: str, *, default: str) -> str:
        return cast("str", self._of_type(name, str)) if name in self._data else default

    def mapping(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self._of_type(name, dict))

    def sequence(self, name: str, *, default: list[Any] | None = None) -> list[Any]:
        if default is not None and name not in self._data:
            return default
        return cast("list[Any]", self._of_type(name, list))

    def boolean(self, name: str) -> bool:
        return cast("bool", self._of_type(name, bool))

    def _of_type(self, name: str, kind: type) -> object:
        value = self.value(name)
        if not isinstance(value, kind):
            raise UserError(f"{self._where} is damaged: {name} is {shown(value)}; expected {JSON_NAMES[kind]}")
        return value


def _check_model(other: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    for key in dict.fromkeys((*model, *other)):
        if other.get(key) != model.get(key):
            other_value, own_value = shown(other.get(key)), shown(model.get(key))
            raise UserError(
                f"{path} is a session of another model: its {key} is {other_value}; expected {own_value}; use that"
                " model"
            )


def _read_sampling(values: dict[str, Any], path: Path) -> SamplingOptions:
    known = {field.name for field in fields(SamplingOptions)}
    if values.keys() != known:
        raise UserError(
            f"{path} is damaged: its sampling has {shown(sorted(values))}; expected {', '.join(sorted(known))}"
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
        raise UserError(f"{where} is damaged: it has {len(prompts)} prompts; expected 1")
    check_prompt(prompts[0], f"{where}: the prompt")
    negative_prompts = values.sequence("negative_prompts", default=[""])
    if len(negative_prompts) != 1:
        raise UserError(f"{where} is damaged: it has {len(negative_prompts)} negative prompts; expected 1")
    check_negative_prompt(negative_prompts[0], f"{where}: the negative prompt")
    num_frames = whole_number(values.value("num_frames"), f"{where}: num_frames", 1, MAX_COUNT)
    cut, recache = values.boolean("cut"), values.boolean("recache")
    return Step(index, (prompts[0],), (negative_prompts[0],), cut, num_frames, recache)


def _read_shots(entries: list[Any], path: Path) -> Shots:
    shots: Shots = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[2] not in MODES:
            raise UserError(
                f"{path} is damaged: a shot is {shown(entry)}; expected a chunk, a prompt, one of {', '.join(MODES)},"
                " and a negative prompt"
            )
        check_prompt(entry[1], f"{path}: the prompt of a shot")
        negative_prompt = entry[3] if len(entry) == 4 else ""  # earlier versions had none
        check_negative_prompt(negative_prompt, f"{path}: the negative prompt of a shot")
        chunk = whole_number(entry[0], f"{path}: the chunk of a shot", 0, MAX_COUNT)
        shots[chunk] = LiveShot(entry[1], entry[2], negative_prompt)
    if 0 not in shots:
        raise UserError(f"{path} is damaged: no shot starts at chunk 0; expected one")
    return shots


def _read_tensors(
    file: Any, path: Path, latent_shape: tuple[int, int, int, int], *, num_steps: int
) -> dict[str, Tensor]:
    """Read the tensors of a session, and check their shapes and types before their values."""
    channels, _, height, width = latent_shape
    state = torch.Generator().get_state()
    expected = {FIRST_LATENT: ([1, channels, 1, height, width], torch.float32)}
    for index in range(num_steps):
        expected[_latents(index)] = ([1, *latent_shape], torch.float32)
        expected[_noise(index)] = ([1, *state.shape], state.dtype)
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
        shape, dtype = expected.get(name, (None, None))
        if file.get_slice(name).get_shape() != shape:
            own_shape = file.get_slice(name).get_shape()
            advice = "no such tensor" if shape is None else str(shape)
            raise UserError(f"{path} is damaged: {shown(name)} has the shape {own_shape}; expected {advice}")
        tensor = file.get_tensor(name)
        if tensor.dtype != dtype:
            raise UserError(f"{path} is damaged: {name} has the type {tensor.dtype}; expected {dtype}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} is damaged: {name} holds NaN or infinity; expected finite values")
        tensors[name] = tensor
    for index in range(num_steps):
        if (_latents(index) in tensors) != (_noise(index) in tensors):
            raise UserError(f"{path} is damaged: it has one of {_latents(index)} and {_noise(index)}; expected both")
        if _noise(index) in tensors:
            _check_state(tensors[_noise(index)][0], _noise(index), path)
    return tensors


def _check_state(state: Tensor, name: str, path: Path) -> None:
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {name} is not the state of a generator; expected one") from error


def _latents(index: int) -> str:
    return f"latents.{index}"


def _noise(index: int) -> str:
    return f"noise.{index}"
