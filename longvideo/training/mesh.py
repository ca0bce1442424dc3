"""Which rank is where: data-parallel replicas, each of ranks that share a video's frames (sequence parallel)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from longvideo.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over the ranks that `torchrun` or `deepspeed` started.

    sequence: ranks that share each video's frames; the others hold other videos. zero_stage: what DeepSpeed shards over
    all ranks: 0 nothing, 1 optimiser states, 2 gradients too, 3 weights too. micro_batch: videos of a replica in one
    pass, by default all of its share; the batch of a step is reached by accumulating gradients. timeout_minutes: until
    a rank that waits gives up.
    """

    sequence: int = 1
    zero_stage: int = 1
    micro_batch: int | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.sequence < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise ConfigError(
                f"parallel.sequence={self.sequence} and parallel.micro_batch={self.micro_batch} must be at least 1"
            )
        if self.zero_stage not in range(4):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage} is unknown; use 0, 1, 2 or 3")


@dataclass(frozen=True)
class Mesh:
    """Ranks of one replica are neighbours: rank = replica * sequence + place. Without processes, one of one."""

    world: int = 1
    rank: int = 0
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def replicas(self) -> int:
        return self.world // self.sequence

    @property
    def replica(self) -> int:
        return self.rank // self.sequence

    @property
    def place(self) -> int:
        """Which part of a video's frames this rank holds."""
        return self.rank % self.sequence

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def launched() -> bool:
    """Say whether a launcher started this process, alone or as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def build_mesh(sequence: int) -> Mesh:
    """Divide the ranks of the default process group; every rank calls this once. Raises ConfigError if they do not
    divide."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % sequence:
        raise ConfigError(
            f"parallel.sequence={sequence} does not divide {world} ranks;"
            f" use one of {', '.join(map(str, divisors(world)))}"
        )
    if world == 1:
        return Mesh()
    groups = [list(range(first, first + sequence)) for first in range(0, world, sequence)]
    rank = dist.get_rank()
    own = None
    for ranks in groups:
        group = dist.new_group(ranks) if sequence > 1 else None
        if rank in ranks and isinstance(group, dist.ProcessGroup):
            own = group
    return Mesh(world, rank, sequence, own)


def check_sequence(sequence: int, *, heads: int, chunk_counts: Sequence[int]) -> None:
    """Raise ConfigError, naming the valid sizes, unless the ranks can share heads and chunks evenly."""
    valid = [n for n in divisors(heads) if all(count % n == 0 for count in chunk_counts)]
    if sequence not in valid:
        counts = ", ".join(map(str, sorted(set(chunk_counts))))
        raise ConfigError(
            f"parallel.sequence={sequence} must divide {heads} attention heads and videos of {counts} chunks;"
            f" use one of {', '.join(map(str, valid))}"
        )


def divide(batch: int, mesh: Mesh, micro_batch: int | None) -> tuple[int, int]:
    """Return the videos of one pass and the number of passes of a replica. Raises ConfigError if they do not divide."""
    per_replica, left = divmod(batch, mesh.replicas)
    size = micro_batch or max(per_replica, 1)
    if left or not per_replica or per_replica % size:
        unit = mesh.replicas * (micro_batch or 1)
        raise ConfigError(
            f"a batch of {batch} does not divide into {mesh.replicas} replicas with passes of {size};"
            f" use a multiple of {unit}, such as {max(batch // unit, 1) * unit}"
        )
    return size, per_replica // size


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def start_processes(config: ParallelConfig, device: torch.device) -> None:
    """Join the other ranks. Raises ConfigError where no launcher says who they are."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout_minutes))
