"""Where a model is: the names that ship, paths, ids of the Hugging Face hub, and links that leave a model's folder."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from longvideo.checkpoint import pickle_file
from longvideo.errors import CheckpointError

SHIPPED = {name: Path(__file__).parent.parent / "weights" / name for name in ("tiny", "tiny-teacher")}
HUB_PREFIX = "hf:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.pth", "*.pt", "*/*.json", "*/*.safetensors", "google/umt5-xxl/*"]
LOCAL_NAMES = (
    "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "experiment", "experiments", "model", "models",
    "out", "output", "outputs", "result", "results", "run", "runs", "tmp", "weights",
)  # fmt: skip
"""Folders that people keep models in, in any case; whoever has such a name on the hub is reached with the prefix."""
WEIGHT_SUFFIXES = (".safetensors", ".index.json", *pickle_file.SUFFIXES)
READ_SUFFIXES = (".json", ".safetensors", ".model", *pickle_file.SUFFIXES)
READ_FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "google")
SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""The hub's cache: files in snapshots/REVISION are links into blobs."""


def locate(name: str | Path) -> Path:
    """Find the folder or file that a shipped name, a path or a hub id means; download the latter if need be.

    A text like org/name is a hub id unless it looks like a path: its first part is a folder here, or has the name of
    one that models are kept in. With the prefix `hf:` it always is one. Raises CheckpointError.
    """
    text = str(name)
    if text.startswith(HUB_PREFIX):
        hub_id = text.removeprefix(HUB_PREFIX)
        if not HUB_ID.fullmatch(hub_id):
            raise CheckpointError(f"{text!r} is not the id of a model on the hub; write it as {HUB_PREFIX}org/name")
        return _download(hub_id)
    if text in SHIPPED:
        if not SHIPPED[text].is_dir():
            raise CheckpointError(f"this installation lacks the weights of {text!r} at {SHIPPED[text]}; install again")
        return SHIPPED[text]
    if (path := _existing(text)) is not None:
        return path
    if HUB_ID.fullmatch(text) and not isinstance(name, Path):
        if _looks_local(text):
            raise CheckpointError(
                f"no folder or file {text!r}; if a model on the Hugging Face hub is meant, write {HUB_PREFIX}{text}"
            )
        return _download(text)
    near = difflib.get_close_matches(text, SHIPPED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(SHIPPED)}"
    raise CheckpointError(f"no model {text!r}: neither a folder nor a file nor a hub id like org/name; {hint}")


def check_links(folder: Path) -> None:
    """Raise CheckpointError where a file that would be read as part of a model is a link that leaves its folder.

    The folder itself may be a link, and links of the hub's cache are followed. Nothing is opened.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}")
    if folder in SHIPPED.values():
        return  # some installers put links into a package
    root = os.path.realpath(folder)
    for entry in sorted(folder.iterdir()):
        if entry.suffix in READ_SUFFIXES or entry.name in READ_FOLDERS:
            check_inside(entry, root)
        if entry.name in READ_FOLDERS:
            for place, folders, files in os.walk(entry):
                for name in (*folders, *files):
                    check_inside(Path(place, name), root)


def check_inside(path: Path, root: str) -> None:
    """Raise CheckpointError where a path, links followed, is neither below a folder nor in the hub's blobs for it."""
    real = os.path.realpath(path)
    above = (Path(root), *Path(root).parents)
    allowed = [Path(root), *(parent.parent / BLOBS for parent in above if parent.name == SNAPSHOTS)]
    if not any(folder in (Path(real), *Path(real).parents) for folder in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside of the model's folder, and is not followed; put a copy in its place"
        )


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{text[:100]!r} cannot be a path: {getattr(error, 'strerror', error)}") from error
    if is_file and not path.name.endswith(WEIGHT_SUFFIXES):
        raise CheckpointError(f"{path} is no weight file; wanted a model folder, or .safetensors, .pt or .pth")
    return path if is_folder or is_file else None


def _looks_local(text: str) -> bool:
    first, _, last = text.partition("/")
    return (
        first.lower() in LOCAL_NAMES or os.path.lexists(first) or os.path.lexists(text) or last.endswith(READ_SUFFIXES)
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no folder {hub_id!r}, and it cannot be had from the hub: {reason}") from error
