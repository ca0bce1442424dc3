"""Files of decoded frames: a video, or an array of float32 values in [0, 1].

A decoder gives uint8, so the values of an array are exactly those numbers divided by 255 and rounded to float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from longvideo.checkpoint.safetensors_file import encode_header
from longvideo.checkpoint.tensors import TensorInfo
from longvideo.errors import UserError
from longvideo.files import locked_target, write_file
from longvideo.infer.containers import CONTAINERS
from longvideo.infer.pictures import PNG

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

FRAMES = "frames"
"""Name of the tensor in a .safetensors file of frames."""
NUMPY, SAFETENSORS = ".npy", ".safetensors"
SUFFIXES = (*CONTAINERS, PNG, NUMPY, SAFETENSORS)
WHITE = np.float32(255)


def check_suffix(path: Path) -> None:
    """Raise UserError for a name that does not end in the suffix of a file of frames."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path}: expected a name that ends in {', '.join(SUFFIXES)}, or a folder")


def is_video(path: Path) -> bool:
    """Return whether a file of frames is a video, or pictures, rather than an array."""
    return path.suffix.lower() in (*CONTAINERS, PNG)


def write_array(path: Path, chunks: Iterable[np.ndarray], shape: tuple[int, int, int, int], *, fps: float) -> None:
    """Write frames to a .npy or .safetensors file, as float32 in [0, 1].

    chunks: uint8 [T, H, W, 3] each. shape: [T, H, W, 3] of all together. One chunk is in memory at a time, and the
    file gets its name when it is complete. Raises WriteError for errors of the disk.
    """

    def write(target: Path) -> None:
        with target.open("wb") as stream:
            _write_header(stream, path.suffix.lower(), shape, fps)
            for frames in chunks:
                stream.write(np.ascontiguousarray(frames.astype(np.float32) / WHITE).data)

    with locked_target(path):
        write_file(path, write)


def _write_header(stream: BinaryIO, suffix: str, shape: tuple[int, int, int, int], fps: float) -> None:
    if suffix == NUMPY:
        description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**description, "shape": shape})
    else:
        stream.write(encode_header({FRAMES: TensorInfo(shape, torch.float32)}, metadata={"fps": f"{fps:g}"}))
