"""The rank of this process, read from the environment that `torchrun` or `deepspeed` gives to each process.

No other module reads RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE. Nothing here imports torch, so that a command
can ask for its rank before it loads anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from longvideo.errors import UserError


@dataclass(frozen=True)
class ProcessRank:
    """Place of this process among those of a launcher; without a launcher, the only one.

    rank: number of the process, from 0. world: number of processes. local_rank: number of the process on its host.
    local_world: number of processes on its host.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def process_rank() -> ProcessRank:
    """Return the place of this process among those of a launcher.

    Raises UserError for a variable that is not a number.
    """
    if not launched():
        return ProcessRank()
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    return ProcessRank(rank, world, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world))


def launched() -> bool:
    """Return whether a launcher started this process, alone or as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Return whether this process prints for all processes of a launcher."""
    return process_rank().rank == 0


def _number(name: str, default: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}; expected a whole number, as torchrun sets it")
    return int(text)
