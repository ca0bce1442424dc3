"""Waiting for other ranks ends, and the error says for which of them it was in vain."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

import torch.distributed as dist

from longvideo.distributed import HOST_BACKEND, Mesh
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROLL_CALL_SECONDS = 5.0
"""Time in which all ranks that still run have noticed that a group is broken: gloo closes its connections then."""


class LostRank(UserError):
    """Ranks did not come to where all ranks meet. is_speaker: whether this is the rank that says so."""

    def __init__(self, message: str, *, is_speaker: bool):
        super().__init__(message)
        self.is_speaker = is_speaker


@contextmanager
def naming_lost_ranks(mesh: Mesh) -> Iterator[None]:
    """Turn an error of a group of ranks inside the block into one that names those which did not come.

    Raises LostRank.
    """
    try:
        yield
    except RuntimeError as error:
        if mesh.store is None or not (isinstance(error, dist.DistError) or HOST_BACKEND in str(error)):
            raise
        present = _roll_call(mesh.store, mesh.rank, mesh.world)
        raise LostRank(
            f"{_describe([rank for rank in range(mesh.world) if rank not in present], mesh)}; see what became of it,"
            " and start the run again: it resumes from its newest checkpoint",
            is_speaker=mesh.rank == min(present),
        ) from error


def _describe(lost: list[int], mesh: Mesh) -> str:
    if not lost:
        return "the connection of the ranks broke, though all of them run"
    who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
    minutes = mesh.timeout.total_seconds() / 60
    return f"{who} did not come to where all ranks meet within parallel.timeout_minutes={minutes:g}, or has ended"


def _roll_call(store: dist.Store, rank: int, world: int) -> set[int]:
    """Return the ranks that still run."""
    present = {rank}

    def call() -> None:
        words = dist.PrefixStore("roll call", store)
        words.set(str(rank), "present")
        for other in range(world):
            try:
                words.wait([str(other)], timedelta(seconds=ROLL_CALL_SECONDS))
                present.add(other)
            except RuntimeError:
                continue

    # a store whose process is stopped may never answer
    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join((world + 1) * ROLL_CALL_SECONDS)
    return present
