"""Read and write weight files: headers are compared with the module before a single weight is loaded.

Nothing here executes code found in a file: safetensors, or torch.load(weights_only=True) for foreign .pt files.
"""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longvideo.checkpoint.names import CHECKPOINT_ENTRIES
from longvideo.errors import CheckpointError

MAX_LISTED = 8
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
RANDOM_IN_PLACE = (Tensor.normal_, Tensor.uniform_)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return torch.Size(self.shape).numel()


class Weights:
    """Tensors by name, on disk, of which only names, shapes and dtypes have been read.

    infos: TensorInfo by name. files: the files they live in. metadata: of safetensors headers, all files together.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        files: Sequence[Path],
        read: Callable[[str, torch.device], Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.infos = dict(infos)
        self.files = tuple(files)
        self.metadata = dict(metadata or {})
        self._read = read

    @property
    def label(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str, device: torch.device) -> Tensor:
        return self._read(name, device)

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """Show the same tensors under other names; raise CheckpointError where two would share one."""
        originals: dict[str, str] = {}
        for name in self.infos:
            new_name = rename(name)
            if new_name in originals:
                raise CheckpointError(f"{self.label}: {originals[new_name]!r} and {name!r} both mean {new_name!r}")
            originals[new_name] = name
        infos = {new_name: self.infos[name] for new_name, name in originals.items()}
        return Weights(infos, self.files, lambda name, device: self._read(originals[name], device), self.metadata)


def open_weights(path: Path, *, stem: str | None = None, entry: str | None = None) -> Weights:
    """Open a .safetensors file, an .index.json, a .pt or .pth file, or a folder holding one set of safetensors.

    stem: in a folder, the name before .safetensors or .safetensors.index.json.
    entry: in a .pt file, which of its dicts holds the weights, for example "generator_ema".
    Raises CheckpointError for a missing, truncated or foreign file, naming it.
    """
    if path.is_dir():
        return _open_folder(path, stem)
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors([path])
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path, entry)
    raise CheckpointError(f"{path} is not a weight file; wanted .safetensors, .safetensors.index.json, .pt or .pth")


def check_fits(module: nn.Module, weights: Weights) -> None:
    """Compare the names and shapes a module (on any device, meta too) expects with those on disk.

    Raises CheckpointError listing missing, unexpected and wrongly shaped tensors. Of tied parameters one name suffices.
    """
    expected = module.state_dict(keep_vars=True)
    infos, aliases = weights.infos, _aliases(expected)
    missing = [name for name in expected if name not in infos and aliases.get(name, name) not in infos]
    missing = [name for name in missing if not any(aliases.get(other) == name for other in infos)]
    unexpected = [name for name in infos if name not in expected]
    misshapen = [
        f"{name} {list(info.shape)}, wanted {list(expected[name].shape)}"
        for name, info in infos.items()
        if name in expected and info.shape != tuple(expected[name].shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
    problems = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{weights.label} does not fit the model: " + "; ".join(problems))


class OnMeta(TorchFunctionMode):
    """Build modules inside without memory for their weights, and without drawing initial ones.

    Under plain `torch.device("meta")` torch imports its compiler, for seconds, as soon as a module draws or scales
    random numbers. Here drawing is skipped; torch.randn gives uninitialised memory, off meta so that it can be scaled.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_IN_PLACE or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        with torch.device("meta"):
            return func(*args, **kwargs)


def load_weights(
    module: nn.Module,
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights into a module built on the meta device (or any other), after check_fits.

    Parameters become new tensors on device, floating ones cast to dtype (None keeps what is stored), so optimisers are
    built afterwards; buffers, such as packed codes and their scales, keep what is stored. Tied parameters stay tied.
    Raises CheckpointError before anything is loaded if anything is amiss.
    """
    check_fits(module, weights)
    device = torch.device(device)
    state = module.state_dict(keep_vars=True)
    aliases = _aliases(state)
    stored_as = {aliases.get(name, name): name for name in weights.infos}
    loaded: dict[str, Tensor] = {}
    for name, old in state.items():
        own_name = aliases.get(name, name)
        if own_name not in loaded:
            tensor = weights.read(stored_as[own_name], device)
            if isinstance(old, nn.Parameter):
                tensor = nn.Parameter(_cast(tensor, dtype), requires_grad=old.requires_grad)
            loaded[own_name] = tensor
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, loaded[own_name])
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers {left} are not in the weight file, so they must not be made on the meta device"
    module.to(device)  # buffers that are never stored


def save_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write folder/stem.safetensors, or numbered shards with an index when they would exceed max_shard_bytes.

    Floating tensors are cast to dtype (None keeps theirs). metadata goes into the header of every file. Each file is
    written under a temporary name and renamed, the index last; shards of an earlier save are deleted after that.
    """
    header = {"format": "pt", **(metadata or {})}
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, dtype, max_shard_bytes)
    before = {file for file in folder.glob(f"{stem}*.safetensors*") if file.is_file()}
    written: set[Path] = set()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {key: _cast(tensors[key].detach(), dtype).cpu().contiguous() for key in names}
        write_atomically(folder / name, lambda target, shard=shard: save_file(shard, target, metadata=header))
        weight_map.update(dict.fromkeys(names, name))
        written.add(folder / name)
    if len(shards) > 1:
        total_size = sum(_num_bytes(tensor, dtype) for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{stem}.safetensors.index.json", index)
        written.add(folder / f"{stem}.safetensors.index.json")
    for stale in before - written:
        stale.unlink()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let write fill a temporary neighbour of path, then rename it; a failure leaves path as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave a file that only its owner can read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda target: _write_text(target, text))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; raise CheckpointError naming the file and the line when it is none."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: it is not UTF-8 text") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """List the state of a module for saving, tied parameters once, under their first name."""
    state = module.state_dict(keep_vars=True)
    aliases = _aliases(state)
    return {name: tensor.detach() for name, tensor in state.items() if name not in aliases}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    first_name: dict[int, str] = {}
    return {name: first for name, tensor in state.items() if (first := first_name.setdefault(id(tensor), name)) != name}


def _open_folder(folder: Path, stem: str | None) -> Weights:
    pattern = stem or "*"
    indices = sorted(folder.glob(f"{pattern}.safetensors.index.json"))
    whole = sorted(file for file in folder.glob(f"{pattern}.safetensors") if "-of-" not in file.name)
    found = indices + whole
    if not found:
        raise CheckpointError(f"no weights in {folder}: wanted {stem or 'NAME'}.safetensors, or its index and shards")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several sets of weights ({names}); name one of them")
    return open_weights(found[0])


def _open_index(path: Path) -> Weights:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} puts {name!r} in {file!r}; wanted the name of a .safetensors file beside it")
    weights = _open_safetensors([path.parent / file for file in sorted(set(weight_map.values()))])
    absent = [name for name in weight_map if name not in weights.infos]
    if absent:
        raise CheckpointError(f"{path} lists {len(absent)} tensors that its files lack: {_listing(absent)}")
    return weights


def _open_safetensors(files: Sequence[Path]) -> Weights:
    infos: dict[str, TensorInfo] = {}
    home: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for file in files:
        own_infos, own_metadata = _header(file)
        for key, value in own_metadata.items():
            if metadata.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{file} says {key}={value!r}, another file of the same weights {metadata[key]!r}"
                )
        for name, info in own_infos.items():
            if name in home:
                raise CheckpointError(f"{name!r} is both in {home[name]} and in {file}")
            infos[name], home[name] = info, file

    handles: dict[tuple[Path, str], safe_open] = {}

    def read(name: str, device: torch.device) -> Tensor:
        key = (home[name], str(device))
        if key not in handles:
            handles[key] = safe_open(key[0], framework="pt", device=key[1])
        return handles[key].get_tensor(name)

    return Weights(infos, files, read, metadata)


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not file.is_file():
        raise CheckpointError(f"no weight file {file}")
    size = file.stat().st_size
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        remedy = "copy or download it again"
        raise CheckpointError(f"{file} ({size} bytes) is truncated or not safetensors: {error}; {remedy}") from error
    foreign = sorted({dtype for _, dtype in stored.values()} - DTYPES.keys())
    if foreign:
        raise CheckpointError(f"{file} stores tensors as {', '.join(foreign)}; wanted one of {', '.join(DTYPES)}")
    return {name: TensorInfo(shape, DTYPES[dtype]) for name, (shape, dtype) in stored.items()}, metadata


def _open_pickle(path: Path, entry: str | None) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated or holds more than tensors: {reason}") from error
    tensors = _select_entry(path, content, entry)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Weights(infos, [path], lambda name, device: tensors[name].to(device))


def _select_entry(path: Path, content: object, entry: str | None) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; wanted a dict of tensors")
    nested = [key for key, value in content.items() if isinstance(value, dict)]
    if entry is None:
        entry = next((name for name in CHECKPOINT_ENTRIES if name in nested), None)
    elif entry not in nested:
        raise CheckpointError(f"{path} has no entry {entry!r}; it has {_listing([str(key) for key in content])}")
    tensors = content[entry] if entry is not None else content
    wrong = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong or not tensors:
        raise CheckpointError(f"{path} is no dict of tensors: {_listing(wrong) or 'it is empty'}")
    return tensors


def _shards(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _num_bytes(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * stored.itemsize


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
