"""Find a model by its packaged name, path or Hugging Face id, and refuse links that leave a model's folder."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from longvideo.checkpoint import gguf_file, pickle_file
from longvideo.errors import CheckpointError

SHIPPED = {name: Path(__file__).parent.parent / "weights" / name for name in ("tiny", "tiny-teacher")}
HUB_PREFIX = "hf:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.pth", "*.pt", "*/*.json", "*/*.safetensors", "google/umt5-xxl/*"]
LOCAL_NAMES = (
    "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "experiment", "experiments", "model", "models",
    "out", "output", "outputs", "result", "results", "run", "runs", "tmp", "weights",
)  # fmt: skip
"""Names of local folders, in lower case. An organization of such a name on the hub needs the prefix `hf:`."""
WEIGHT_SUFFIXES = (".safetensors", ".index.json", gguf_file.SUFFIX, *pickle_file.SUFFIXES)
READ_SUFFIXES = (".json", ".safetensors", ".model", gguf_file.SUFFIX, *pickle_file.SUFFIXES)
READ_FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "google")
SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""Folders of the hub's cache: files in snapshots/REVISION are links to files in blobs."""


def locate(name: str | Path) -> Path:
    """Return the folder or file of a packaged model, a path, or a Hugging Face id, which is downloaded if necessary.

    A text like org/name is a hub id unless it looks like a path: its first part is an existing folder, or is in
    LOCAL_NAMES. With the prefix `hf:` it is always a hub id. Raises CheckpointError if there is no such model.
    """
    text = str(name)
    if text.startswith(HUB_PREFIX):
        hub_id = text.removeprefix(HUB_PREFIX)
        if not HUB_ID.fullmatch(hub_id):
            raise CheckpointError(f"{text!r} is not a Hugging Face id; use {HUB_PREFIX}org/name")
        return _download(hub_id)
    if text in SHIPPED:
        if not SHIPPED[text].is_dir():
            raise CheckpointError(f"the weights of {text!r} are missing at {SHIPPED[text]}; install longvideo again")
        return SHIPPED[text]
    if (path := _existing(text)) is not None:
        return path
    if HUB_ID.fullmatch(text) and not isinstance(name, Path):
        if _looks_local(text):
            raise CheckpointError(
                f"there is no folder or file {text!r}; for a model on the Hugging Face hub use {HUB_PREFIX}{text}"
            )
        return _download(text)
    near = difflib.get_close_matches(text, SHIPPED, n=1)
    names = f"{', '.join(SHIPPED)}, a folder, a file or a Hugging Face id like org/name"
    remedy = f"did you mean {near[0]!r}?" if near else f"use {names}"
    raise CheckpointError(f"there is no model {text!r}; {remedy}")


def is_local(name: str) -> bool:
    """Return whether a name is that of a packaged model or of an existing path, which is not downloaded."""
    try:
        return name in SHIPPED or Path(name).expanduser().exists()
    except (RuntimeError, ValueError, OSError):
        return False


def lasting_name(path: Path) -> str:
    """Return a name of a located model that is valid in any working folder: a packaged name, or an absolute path."""
    packaged = {folder: name for name, folder in SHIPPED.items()}
    return packaged.get(path) or str(path.absolute())


def check_links(folder: Path) -> None:
    """Raise CheckpointError if a file that would be read as part of a model is a link to outside of its folder.

    The folder itself may be a link, and links of the hub's cache are followed. No file is opened.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if folder in SHIPPED.values():
        return  # some installers create links in a package
    root = os.path.realpath(folder)
    for entry in sorted(folder.iterdir()):
        if entry.suffix in READ_SUFFIXES or entry.name in READ_FOLDERS:
            check_inside(entry, root)
        if entry.name in READ_FOLDERS:
            for place, folders, files in os.walk(entry):
                for name in (*folders, *files):
                    check_inside(Path(place, name), root)


def check_inside(path: Path, root: str) -> None:
    """Raise CheckpointError unless a path, with links resolved, is below a folder or in the hub's blobs for it."""
    real = os.path.realpath(path)
    above = (Path(root), *Path(root).parents)
    allowed = [Path(root), *(parent.parent / BLOBS for parent in above if parent.name == SNAPSHOTS)]
    if not any(folder in (Path(real), *Path(real).parents) for folder in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside of the model's folder, and is not followed; replace it by a copy"
        )


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{text[:100]!r} cannot be a path: {getattr(error, 'strerror', error)}") from error
    if is_file and not path.name.endswith(WEIGHT_SUFFIXES):
        raise CheckpointError(
            f"{path} is not a weight file; expected a model folder, or .safetensors, .gguf, .pt or .pth"
        )
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
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and downloading it from the Hugging Face hub failed: {reason}; check the"
            " name and the connection"
        ) from error
