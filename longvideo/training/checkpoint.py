"""Complete, atomic checkpoints of a run, which any engine in any number of processes writes and reads."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.checkpoint.run_checkpoint import (
    MOMENTS,
    OTHERS,
    PARTS,
    RECIPE,
    STATE_FILE,
    STEP,
    WEIGHT,
    DamagedError,
    FileRecord,
    RunState,
    encode_state,
    find_damage,
    open_recipes,
    open_tensors,
    read_state,
)
from longvideo.checkpoint.tensors import InMemory, Lazy, TensorInfo, Weights
from longvideo.distributed import Mesh
from longvideo.errors import CheckpointError
from longvideo.files import TEMPORARY_SUFFIX, WriteError, reason, temporary_name, write_folder
from longvideo.training.tensor_files import write_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator, Mapping

NAME = re.compile(r"step_(\d{7,})")


class Trained(Protocol):
    """What a checkpoint needs of an engine: whole float32 tensors by the names and kinds of `run_checkpoint`."""

    @property
    def arithmetic(self) -> str:
        """Description of the arithmetic that losses are computed in, for the record."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every trained parameter."""
        ...

    def more_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of tensors that only some settings need, by NAME/KIND; `put` may leave them out."""
        ...

    def whole(self, name: str, kind: str) -> Tensor:
        """Return the weight, average, moment, step or other tensor of a parameter. Every rank calls it."""
        ...

    def put(self, name: str, kind: str, stored: Lazy) -> None:
        """Set a tensor of a parameter from a checkpoint, of which this rank reads what it needs."""
        ...

    def counts(self) -> dict[str, float]:
        """Return the numbers that a checkpoint stores."""
        ...

    def put_counts(self, counts: Mapping[str, float]) -> None:
        """Set the numbers that `counts` returned."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. Batches depend on seed and step alone, so a run needs nothing else to resume."""

    folder: Path
    state: RunState

    @property
    def step(self) -> int:
        return self.state.step

    def recipes(self) -> list[Weights]:
        """Open the tensors that each rank stored for itself when the checkpoint was written."""
        return open_recipes(self.folder, self.state)

    def load(self, trained: Trained) -> list[str]:
        """Set all tensors and counts of an engine; return lines about states of other settings.

        Raises CheckpointError first if the tensors belong to another model.
        """
        tensors = open_tensors(self.folder, self.state)
        shapes, more = trained.shapes(), trained.more_shapes()
        check_same(shapes, _weight_shapes(tensors))
        for name, info in layout(shapes).items():
            trained.put(*_divided(name), tensors.tensors.get(name) or _never_updated(name, info))
        for name in more:
            if name in tensors.tensors:
                trained.put(*_divided(name), tensors.tensors[name])
        trained.put_counts(self.state.counts)
        return _notes_on_states(more, {name for name in tensors.infos if _part(name) == OTHERS})


class CheckpointFolder:
    """The checkpoints of one run, `step_0001200/` and so on, of which the newest `keep` stay.

    All ranks use the same folder.
    """

    def __init__(self, folder: Path, *, keep: int, mesh: Mesh | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.mesh = mesh or Mesh()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, oldest first."""
        matches = [NAME.fullmatch(path.name) for path in self._entries() if path.is_dir()]
        return sorted(int(name[1]) for name in matches if name)

    def describe_newest(self) -> str:
        """Return what a run can resume from after an error of the disk."""
        steps = self.steps()
        return f"the newest whole checkpoint is {self._path(steps[-1]).name}" if steps else "no checkpoint is left"

    def strangers(self) -> list[str]:
        """Return the names in the folder that are not those of checkpoints, such as a copy under another name."""
        own = {self._path(step) for step in self.steps()}
        return sorted(path.name for path in self._entries() if path not in own and not _is_temporary(path))

    def save(self, step: int, trained: Trained, recipe: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint, each rank its share, under a temporary name; rename it; remove the oldest checkpoints.

        recipe: tensors that this rank stores for itself. Raises WriteError on all ranks when writing fails on one of
        them. The unfinished checkpoint is removed then, and older ones stay as they were.
        """
        target, mesh = self._path(step), self.mesh
        try:
            mesh.on_main(self._remove_leftovers)
            with ExitStack() as stack:
                temporary = mesh.on_main(lambda: stack.enter_context(write_folder(target, overwrite=True)))
                state = RunState(
                    step=step,
                    ranks=mesh.world,
                    sequence=mesh.sequence,
                    arithmetic=trained.arithmetic,
                    counts=trained.counts(),
                    files=self._write_files(target, temporary, trained, recipe),
                )
                mesh.on_main(lambda: _write_state(target, temporary, state))
                mesh.on_main(stack.close)
        except WriteError as error:
            raise WriteError(f"{error}; {mesh.on_main(self.describe_newest)}") from error
        mesh.on_main(self._remove_oldest)
        return target

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint after comparing every file with its checksum; None in an empty folder.

        Raises CheckpointError for a damaged one; the message names the newest checkpoint that is whole.
        """
        steps = self.mesh.on_main(self.steps)
        if not steps:
            return None
        try:
            return self._verified(steps[-1])
        except DamagedError as error:
            raise CheckpointError(f"{error}; {self._remedy(steps)}") from error

    def _write_files(
        self, target: Path, folder: Path, trained: Trained, recipe: Mapping[str, Tensor]
    ) -> dict[str, FileRecord]:
        """Write the tensors of this rank's share; return the files of all ranks.

        Ranks wait for each other in `whole`, so a rank on which writing has failed still goes through all tensors.
        """
        rank, infos = self.mesh.rank, layout(trained.shapes(), trained.more_shapes())
        share = _shares(infos, self.mesh.world)[rank]
        records: dict[str, FileRecord] = {}
        refusal: str | None = None
        for part in (*PARTS, OTHERS):
            names = [name for name in infos if _part(name) == part]
            if not names:
                continue
            values = _own_values(trained, names, share)
            try:
                if refusal is None:
                    own = {name: infos[name] for name in names if name in share}
                    records |= write_tensors(folder, f"{part}_{rank:05d}", own, values)
            except OSError as error:
                refusal = reason(error)
            for _ in values:
                pass
        try:
            if refusal is None:
                own = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in recipe.items()}
                records |= write_tensors(folder, f"{RECIPE}_{rank:05d}", own, iter(recipe.values()))
        except OSError as error:
            refusal = reason(error)
        of_ranks = self.mesh.gather((records, refusal))
        refusals = [f"{text} (on rank {number})" for number, (_, text) in enumerate(of_ranks) if text is not None]
        if refusals:
            raise WriteError(f"cannot write {target}: {refusals[0]}")
        return {name: record for files, _ in of_ranks for name, record in files.items()}

    def _verified(self, step: int) -> Checkpoint:
        """Open a checkpoint after comparing all files with their checksums, each on one rank. Raises DamagedError."""
        folder, mesh = self._path(step), self.mesh

        def read() -> RunState:
            state = read_state(folder)
            if state.step != step:
                raise DamagedError(f"{folder} is damaged: its {STATE_FILE} is of step {state.step}")
            return state

        state = mesh.on_main(read)
        own = dict(list(state.files.items())[mesh.rank :: mesh.world])
        problems = [problem for problem in mesh.gather(find_damage(folder, own)) if problem]
        if problems:
            raise DamagedError(f"{folder} is damaged: {problems[0]}")
        open_tensors(folder, state)
        open_recipes(folder, state)
        return Checkpoint(folder, state)

    def _remedy(self, steps: list[int]) -> str:
        for step in reversed(steps[:-1]):
            try:
                older = self._verified(step).folder
            except CheckpointError:
                continue
            return f"{older.name} is whole; move {self._path(steps[-1]).name} elsewhere to resume from it"
        return "there is no older whole checkpoint; start again with another --output"

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left. The run folder is locked, so no other process writes here."""
        for path in self._entries():
            if _is_temporary(path):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_oldest(self) -> None:
        for step in self.steps()[: -self.keep]:
            path = self._path(step)
            # a folder under its own name must be whole at every moment
            hidden = temporary_name(path)
            with _named(path, "remove"):
                path.rename(hidden)
                shutil.rmtree(hidden)


def layout(shapes: Mapping[str, torch.Size], more: Mapping[str, torch.Size] | None = None) -> dict[str, TensorInfo]:
    """Return all tensors of a checkpoint except those of the recipe, in the order in which they are written.

    shapes: shapes of the parameters. more: as of `Trained.more_shapes`.
    """
    every_run = {
        f"{name}/{kind}": TensorInfo(() if kind == STEP else tuple(shape), torch.float32)
        for kinds in PARTS.values()
        for name, shape in shapes.items()
        for kind in kinds
    }
    return every_run | {name: TensorInfo(tuple(shape), torch.float32) for name, shape in (more or {}).items()}


def check_same(own: Mapping[str, torch.Size], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a checkpoint holds the parameters that are trained."""
    shapes = {name: tuple(shape) for name, shape in own.items()}
    different = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    if different:
        raise CheckpointError(
            f"the checkpoint belongs to another model: {len(different)} tensors differ, among them"
            f" {', '.join(different[:3])}; use the configuration of that run, or another --output"
        )


def _shares(infos: Mapping[str, TensorInfo], world: int) -> list[set[str]]:
    """Divide tensors among ranks, so that all have about the same number of bytes."""
    shares: list[set[str]] = [set() for _ in range(world)]
    sizes = [0] * world
    for name, info in infos.items():
        rank = sizes.index(min(sizes))
        shares[rank].add(name)
        sizes[rank] += info.num_bytes
    return shares


def _own_values(trained: Trained, names: list[str], share: set[str]) -> Iterator[Tensor]:
    """Assemble all tensors together with the other ranks, and yield those of this rank's share."""
    for name in names:
        value = trained.whole(*_divided(name))
        if name in share:
            yield value.detach()


def _divided(name: str) -> tuple[str, str]:
    """Return the name of a parameter and the kind of its tensor."""
    parameter, _, kind = name.rpartition("/")
    return parameter, kind


def _part(name: str) -> str:
    """Return the part of a checkpoint that a tensor belongs to."""
    kind = _divided(name)[1]
    return next((part for part, kinds in PARTS.items() if kind in kinds), OTHERS)


def _notes_on_states(own: Iterable[str], stored: Collection[str]) -> list[str]:
    """Return lines about states that a resumed run starts again or does not use, since its settings are others."""
    missing = sorted({_divided(name)[1] for name in own if name not in stored})
    unused = sorted({_divided(name)[1] for name in stored if name not in set(own)})
    notes = [f"the checkpoint has no {', '.join(missing)}, which starts again"] if missing else []
    return [*notes, f"the checkpoint's {', '.join(unused)} is not used by these settings"] if unused else notes


def _weight_shapes(tensors: Weights) -> dict[str, tuple[int, ...]]:
    shapes = {_divided(name): info.shape for name, info in tensors.infos.items()}
    return {parameter: shape for (parameter, kind), shape in shapes.items() if kind == WEIGHT}


def _never_updated(name: str, info: TensorInfo) -> Lazy:
    """Return the moments or the step of a parameter that has had no gradient yet."""
    assert _divided(name)[1] in (*MOMENTS, STEP)
    return InMemory(torch.zeros(info.shape))


def _write_state(target: Path, folder: Path, state: RunState) -> None:
    with _named(target, "write"):
        (folder / STATE_FILE).write_text(encode_state(state), encoding="utf-8")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


@contextmanager
def _named(path: Path, act: str) -> Generator[None]:
    """Raise WriteError with the path of the checkpoint for an error of the disk inside the block."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot {act} {path}: {reason(error)}") from error
