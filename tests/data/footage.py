"""Small videos for tests of reading, checking and encoding, and the commands for that."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longvideo.cli.main import main
from longvideo.data.manifest import ShotEntry, VideoEntry, write_manifest
from longvideo.data.video import write_video

SIZE = (64, 96)
CLIP_BYTES = 2 * 8 * 4 * 4 * 6 * 2
TWO_CLIPS = ["--shard-bytes", str(2 * CLIP_BYTES)]


def square(count: int, *, brightness: int = 200) -> Tensor:
    """A square that moves over a gradient: uint8 [T, 64, 96, 3]."""
    frames = torch.arange(96, dtype=torch.uint8).expand(count, *SIZE)[..., None].repeat(1, 1, 1, 3)
    for i in range(count):
        left = i * 2 % 70
        frames[i, 20:44, left : left + 24] = torch.tensor([brightness, 60, 255 - brightness], dtype=torch.uint8)
    return frames


def write(path: Path, count: int, *, fps: float = 24, brightness: int = 200) -> VideoEntry:
    """Write a video with one shot, "SQUARE brightness", and return its entry with the full path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [square(count, brightness=brightness)], fps=fps)
    return VideoEntry(path, fps, count, (ShotEntry(0, count, f"SQUARE {brightness}"),))


def footage(folder: Path) -> Path:
    """Write three videos of 125 frames (six clips of two chunks), the second with a cut at frame 29; return the
    manifest."""
    entries = [write(folder / "videos" / f"{i}.mp4", 125, brightness=60 * i + 60) for i in range(3)]
    shots = [entry.shots for entry in entries]
    shots[1] = (ShotEntry(0, 29, "a red ball"), ShotEntry(29, 125, "a blue ball moves left"))
    named = [VideoEntry(Path("videos") / entry.video.name, 24.0, 125, shots[i]) for i, entry in enumerate(entries)]
    write_manifest(folder / "manifest.jsonl", named)
    return folder / "manifest.jsonl"


def damage(path: Path) -> None:
    """Overwrite bytes in the middle of a file, but not its header."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 400 : middle + 400] = bytes(byte ^ 0x5A for byte in data[middle - 400 : middle + 400])
    path.write_bytes(bytes(data))


def encode(manifest: Path, model: Path, out: Path, *more: str, workers: int = 0) -> int:
    """Encode clips of two chunks, and return the exit code."""
    options = ["--chunks", "2", "--device", "cpu", "--workers", str(workers), *more]
    return main(["data", "encode", str(manifest), "--model", str(model), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
