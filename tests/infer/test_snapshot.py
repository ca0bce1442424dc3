"""Every file that is not a complete snapshot of a session is refused in one line with its name."""

from __future__ import annotations

import json
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from tests.folders import file_names

PROMPT = "a red ball bounces"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def snapshot(pipeline: StreamingPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "session.safetensors"
    with pipeline.session(PROMPT, seed=4, image=torch.zeros(32, 64, 3, dtype=torch.uint8)) as session:
        while session.next_chunk < 2:
            next(session)
        session.snapshot(path)
    return path


def changed(snapshot: Path, target: Path, change: Change) -> Path:
    with safe_open(snapshot, framework="pt") as file:
        metadata = file.metadata()
    session, tensors = json.loads(metadata["session"]), load_file(snapshot)
    change(session, tensors)
    save_file(tensors, target, metadata={**metadata, "session": json.dumps(session)})
    return target


def deleted(*keys: str) -> Change:
    def change(session: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in keys:
            session.pop(key, None)
            tensors.pop(key, None)

    return change


def put(place: str, value: object) -> Change:
    """Set an item of the session: names and numbers, divided by dots."""

    def change(session: Any, _tensors: dict[str, Tensor]) -> None:
        *way, last = (int(step) if step.isdecimal() else step for step in place.split("."))
        for step in way:
            session = session[step]
        session[last] = value

    return change


def tensor(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda _session, tensors: tensors.update({name: make(tensors[name]).contiguous()})


DAMAGE: dict[str, tuple[Change, str]] = {
    "no model": (deleted("model"), "it has no model"),
    "empty model": (put("model", {}), "a session of another model: its .* is None; expected"),
    "more model": (put("model.depth", 7), "a session of another model: its depth is 7; expected None"),
    "no steps": (deleted("steps"), "it has no steps"),
    "steps of another kind": (put("steps", {}), "steps is {}"),
    "step of another kind": (put("steps.1", 3), "chunk 1 is damaged: it is 3; expected an object"),
    "step out of order": (put("steps.1.index", 5), "chunk 1: index is 5; expected a whole number from 1 to 1"),
    "no prompt": (put("steps.1.prompts", []), "chunk 1 is damaged: it has 0 prompts"),
    "prompt of another kind": (put("steps.1.prompts", [7]), "the prompt is 7; expected text"),
    "half a character": (put("steps.1.prompts", ["a \ud83d"]), "chunk 1: the prompt is not valid text"),
    "cut of another kind": (put("steps.1.cut", "yes"), "cut is 'yes'"),
    "negative frames": (put("steps.0.num_frames", -1), "num_frames is -1"),
    "no shots": (put("shots", []), "no shot starts at chunk 0"),
    "unknown mode": (put("shots.0.2", "fade"), "'fade'.*; expected a chunk, a prompt, one of keep, recache, cut"),
    "no sampling": (deleted("sampling"), "it has no sampling"),
    "other sampling": (put("sampling", {"steps": 4}), "its sampling has .'steps'.; expected guidance, seed, steps"),
    "seed of another kind": (put("sampling.seed", "1"), "seed is '1'; expected a whole number"),
    "decoder of another kind": (put("decoder", 7), "decoder is 7; expected text"),
    "length of another kind": (put("num_frames", 1.5), "num_frames is 1.5; expected a whole number"),
    "session of another kind": (lambda session, _tensors: session.clear(), "it has no model"),
    "narrow latents": (tensor("latents.1", lambda x: x[..., :1]), "'latents.1' has the shape .*; expected"),
    "latents of two samples": (tensor("latents.0", lambda x: x.repeat(2, 1, 1, 1, 1)), "'latents.0' has the shape"),
    "half latents": (tensor("latents.1", Tensor.half), "latents.1 has the type torch.float16; expected torch.float32"),
    "latents of NaN": (tensor("latents.1", lambda x: x * torch.nan), "latents.1 holds NaN or infinity"),
    "infinite picture": (tensor("first_latent", lambda x: x / 0), "first_latent holds NaN or infinity"),
    "short noise": (tensor("noise.1", lambda x: x[:, :9]), "'noise.1' has the shape"),
    "zero noise": (tensor("noise.1", torch.zeros_like), "noise.1 is not the state of a generator"),
    "no noise": (deleted("noise.1"), "it has one of latents.1 and noise.1; expected both"),
    "no last chunk": (deleted("latents.1", "noise.1"), "chunk 2 is too far back"),
    "other tensors": (lambda _session, tensors: tensors.update(weight=torch.zeros(2)), "'weight' has the shape"),
    "latents to come": (lambda _session, tensors: tensors.update({"latents.7": torch.zeros(2)}), "'latents.7' has the"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_is_refused(name: str, snapshot: Path, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    path = changed(snapshot, tmp_path / "session.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        pipeline.restore(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_session_continues_with_another_decoder_and_says_so(
    snapshot: Path, pipeline: StreamingPipeline, tmp_path: Path
) -> None:
    path = changed(snapshot, tmp_path / "other.safetensors", put("decoder", "TAEW2.2 in bf16"))
    message = "the frames so far were decoded by .TAEW2.2 in bf16.; the session continues with the autoencoder in fp32"
    with pytest.warns(UserWarning, match=message):
        session = pipeline.restore(path)
    assert session.options.decoder == "the autoencoder in fp32"
    assert session.notice is not None and "TAEW2.2 in bf16" in session.notice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (snapshot, changed(snapshot, tmp_path / "old.safetensors", deleted("decoder"))):
            restored = pipeline.restore(same)
            assert (restored.options.decoder, restored.notice) == ("the autoencoder in fp32", None)


def test_files_that_are_no_snapshot_are_refused(snapshot: Path, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    data = snapshot.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    files = {
        "empty": b"",
        "text": b"nothing of the kind",
        "truncated": data[:-100],
        "header alone": data[: 8 + size],
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "long header": struct.pack("<Q", 10**9) + data[8:],
        "other metadata": data.replace(b"longvideo session 1", b"longvideo session 2", 1),
        "broken session": data.replace(b'{\\"sampling\\"', b'[\\"sampling\\"', 1),
        "nested session": data[:8] + data[8:].replace(b'\\"num_frames\\": null', b'\\"num_frames\\": [[[', 1),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}") as caught:
            pipeline.restore(path)
        assert "\n" not in str(caught.value)
    for path in (tmp_path, tmp_path / "nothing", Path("/dev/zero")):
        with pytest.raises(UserError, match="there is no snapshot"):
            pipeline.restore(path)


def test_a_full_disk_leaves_the_older_snapshot(snapshot: Path, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    path.write_bytes(b"old")
    session = pipeline.restore(snapshot)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*session.safetensors: .*; the older one is unchanged"):
            session.snapshot(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"old" and file_names(tmp_path) == [path.name]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_session_keeps_what_the_next_chunk_needs(kept: int, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    restored = []
    for history_chunks in (kept, 64):
        path = tmp_path / f"{history_chunks}.safetensors"
        with pipeline.session(PROMPT, seed=4, history_chunks=history_chunks) as session:
            while session.next_chunk < 6:
                next(session)
            session.snapshot(path)
            expected = next(session).frames
        with pipeline.restore(path) as session:
            restored.append(next(session).frames.astype(int))
        assert abs(restored[-1] - expected).mean() < 1  # chunks outside the window do not change the result
    assert (restored[0] == restored[1]).all()
    assert (tmp_path / f"{kept}.safetensors").stat().st_size < path.stat().st_size
