"""Files of latents in every form are read a few frames at a time, and every other file is refused in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint.latents import (
    LATENTS,
    LatentsHeader,
    LatentsWriter,
    open_latents,
    save_latents,
)
from longvideo.errors import UserError
from longvideo.files import BusyError, WriteError
from tests.files.test_writing import no_file_longer_than
from tests.folders import file_names

SHAPE = (2, 4, 5, 3, 6)


def latents(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(0))


def save_npy(value: Tensor, file: Path) -> None:
    np.save(file, value.numpy())


FORMS: dict[str, tuple[str, Callable[[Tensor, Path], None]]] = {
    "safetensors": ("a.safetensors", lambda z, file: save_file({LATENTS: z}, file)),
    "the only tensor": ("a.safetensors", lambda z, file: save_file({"x": z}, file)),
    "latents among others": ("a.safetensors", lambda z, file: save_file({LATENTS: z, "noise": z + 1}, file)),
    "a bare tensor": ("a.pt", torch.save),
    "a dict": ("a.pth", lambda z, file: torch.save({LATENTS: z, "step": 3}, file)),
    "another order of axes in memory": (
        "a.pt",
        lambda z, file: torch.save(z.mT.contiguous().mT, file),
    ),
    "npy": ("a.npy", save_npy),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]])
def test_every_form_is_read_frame_by_frame(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    (name, save), z = FORMS[form], latents(*shape)
    save(z, tmp_path / name)
    stored = open_latents(tmp_path / name)
    assert stored.shape == (1,) * (5 - len(shape)) + shape
    stored.check_values()
    for video, expected in enumerate(z if len(shape) == 5 else [z]):
        for first, last in [(0, 1), (1, 4), (4, 5), (0, 5)]:
            result = stored.frames(video, first, last)
            assert result.dtype == torch.float32 and torch.equal(result, expected[:, first:last])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cast_to_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    z = latents().to(dtype)
    save_file({LATENTS: z}, tmp_path / "a.safetensors")
    assert torch.equal(open_latents(tmp_path / "a.safetensors").frames(1, 0, 5), z[1].float())


def test_notes_are_those_that_were_written(tmp_path: Path) -> None:
    header = LatentsHeader(
        model="tiny", base="/models/b", fps=23.976, chunk_frames=8, num_frames=15, adapters="a:0.5, b"
    )
    save_latents(tmp_path / "a.safetensors", latents(), header)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), latents())
        assert file.metadata() == {
            "model": "tiny", "base": "/models/b", "fps": "23.976", "chunk_frames": "8", "num_frames": "15",
            "adapters": "a:0.5, b",
        }  # fmt: skip
    assert open_latents(tmp_path / "a.safetensors").header == header
    torch.save({LATENTS: latents(), "fps": 24, "model": "tiny", "step": 7}, tmp_path / "a.pt")
    assert open_latents(tmp_path / "a.pt").header == LatentsHeader(model="tiny", fps=24)


@pytest.mark.parametrize("lengths", [(5,), (1, 7, 8, 3)])
@pytest.mark.parametrize("kept", [1, 5])
def test_latents_that_were_added_in_parts_are_one_tensor(lengths: tuple[int, ...], kept: int, tmp_path: Path) -> None:
    parts = [latents(2, 3, length, 2, 4) + index for index, length in enumerate(lengths)]
    with LatentsWriter(tmp_path / "a.safetensors") as writer:
        for part in parts:
            writer.add(part)
        assert writer.num_latents == sum(lengths) and not (tmp_path / "a.safetensors").exists()
        writer.finish(kept, LatentsHeader(fps=24))
    assert file_names(tmp_path) == ["a.safetensors"]
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(LATENTS), torch.cat(parts, dim=2)[:, :, :kept])


def test_a_writer_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LatentsWriter(tmp_path / "a.safetensors") as writer:
        writer.add(latents())
        raise KeyboardInterrupt
    assert file_names(tmp_path) == []


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    with LatentsWriter(tmp_path / "a.safetensors") as writer:
        with pytest.raises(BusyError, match="is being written by another process"), writer.__class__(writer.path):
            pass
        writer.add(latents())
        writer.finish(1, LatentsHeader())
    assert file_names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("longest", [100, 3000])  # while latents are added, and at the end
def test_a_full_disk_is_one_line_and_the_older_file_stays(longest: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_latents(file, latents(), LatentsHeader())
    before, message = file.read_bytes(), "cannot write .*a.safetensors: file too large; the older one is unchanged"
    with no_file_longer_than(longest), pytest.raises(WriteError, match=message), LatentsWriter(file) as writer:
        writer.add(latents())
        writer.finish(5, LatentsHeader(model="m" * 3000))
    assert file.read_bytes() == before and file_names(tmp_path) == [file.name]


class Opener:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def metadata(**texts: str) -> Callable[[Path], None]:
    return lambda file: save_file({LATENTS: latents()}, file, metadata=texts)


def tensors(**values: Tensor) -> Callable[[Path], None]:
    return lambda file: save_file(values, file)


def array(value: np.ndarray) -> Callable[[Path], None]:
    return lambda file: np.save(file, value, allow_pickle=True)


def save_legacy(file: Path) -> None:
    torch.save(latents(), file, _use_new_zipfile_serialization=False)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.pt", lambda _: None, "there is no file of latents .*a.pt"),
    "suffix": ("a.ckpt2", lambda file: file.write_text("x"), "is not a file of latents; expected"),
    "text": ("a.safetensors", lambda file: file.write_text("x"), "is truncated or not safetensors"),
    "no tensor": ("a.safetensors", tensors(), "has no tensor; expected the tensor 'latents', or one tensor"),
    "several": ("a.safetensors", tensors(a=latents(), b=latents()), "has a, b; expected the tensor 'latents'"),
    "shard": ("a.safetensors", tensors(**{"clip/0/latents": latents()}), "is one file of encoded clips; use"),
    "3 axes": ("a.safetensors", tensors(x=latents(4, 3, 6)), r"shape \[4, 3, 6\]; expected latents \[C, T, H, W\] or"),
    "6 axes": ("a.pt", lambda file: torch.save(latents(1, *SHAPE), file), "expected latents"),
    "whole numbers": ("a.safetensors", tensors(x=latents().int()), "dtype int32; expected one of bfloat16"),
    "fp8": ("a.safetensors", tensors(x=latents().to(torch.float8_e4m3fn)), "dtype float8_e4m3fn; expected one of"),
    "complex": ("a.pt", lambda file: torch.save(torch.zeros(SHAPE, dtype=torch.complex64), file), "dtype complex64"),
    "no frames": ("a.safetensors", tensors(x=latents(4, 0, 3, 6)), "with T=0; expected 1 to"),
    "too high": ("a.safetensors", tensors(x=latents(1, 1, 2000, 1)), "with H=2000; expected 1 to 1024"),
    "expanded": ("a.pt", lambda file: torch.save(torch.zeros(1).expand(9, 9, 9, 9), file), "fewer are stored"),
    "list": ("a.pt", lambda file: torch.save([latents()], file), "contains a list; expected a dict of tensors"),
    "code": ("a.pt", lambda file: torch.save(Opener(file.with_name("run")), file), "it would run"),
    "legacy": ("a.pt", save_legacy, "not a file of torch.save since 1.6"),
    "npy of objects": ("a.npy", array(np.array([Opener(Path("run"))], dtype=object)), "not a .npy file"),
    "pickle as npy": ("a.npy", lambda file: file.write_bytes(pickle.dumps({"a": 1})), "not a .npy file"),
    "npz as npy": ("a.npy", lambda file: np.savez(file.open("wb"), a=np.zeros(3)), "is an archive of arrays"),
    "empty npy": ("a.npy", lambda file: file.write_bytes(b""), "is truncated or not a .npy file"),
    "npy of uint8": ("a.npy", array(np.zeros(SHAPE, np.uint8)), "array of uint8; expected one of float16"),
    "npy of big-endian": ("a.npy", array(np.zeros(SHAPE, ">f4")), "array of >f4; expected one of float16"),
    "npy in column order": ("a.npy", array(np.zeros(SHAPE, np.float32, order="F")), "is stored in column order"),
    "fps": ("a.safetensors", metadata(fps="fast"), "states fps='fast'; expected a number above 0 and at most 1000"),
    "fps NaN": ("a.safetensors", metadata(fps="nan"), "states fps='nan'; expected"),
    "chunk_frames": ("a.safetensors", metadata(chunk_frames="2.5"), "states chunk_frames=2.5; expected a whole number"),
    "many chunk_frames": ("a.safetensors", metadata(chunk_frames="9" * 400), "states chunk_frames='9{40}'; expected"),
    "model": ("a.safetensors", metadata(model=""), "states a model of 0 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, save, message = BAD[case]
    save(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        open_latents(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for name, save in FORMS.values():
        save(latents(), tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) - 200])
        with pytest.raises(UserError, match="truncated"):
            open_latents(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_float32_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    z = latents().double()
    z[1, 2, 3, 0, 0] = value
    torch.save(z, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt contains NaN or infinity"):
        open_latents(tmp_path / "a.pt").check_values()
