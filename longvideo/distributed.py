"""Places of ranks: data-parallel replicas, each of ranks that share a video's frames (sequence parallel)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from longvideo.config.fields import Bounded, bounded
from longvideo.errors import ConfigError, RefusedByMain, UserError
from longvideo.machine.launcher import process_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

T = TypeVar("T")
HOST_BACKEND = "gloo"
"""Backend of the group through which processes, not their devices, exchange values."""
TIMEOUT_MINUTES = 30.0
MOST_TIMEOUT_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class ParallelConfig(Bounded):
    """How a run is spread over the ranks that `torchrun` or `deepspeed` started.

    sequence: number of ranks that share the frames of a video; other ranks hold other videos.
    zero_stage: what DeepSpeed shards over all ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
    micro_batch: number of videos of a replica in one pass, by default all of its share. The gradients of all passes of
        a step are added up.
    timeout_minutes: time after which a rank that waits for others ends the run.
    """

    sequence: int = bounded(1, least=1)
    zero_stage: int = bounded(1, least=0, most=3)
    micro_batch: int | None = bounded(None, least=1)
    timeout_minutes: float = bounded(TIMEOUT_MINUTES, above=0, most=MOST_TIMEOUT_MINUTES)


@dataclass(frozen=True)
class Mesh:
    """Ranks of one replica are adjacent: rank = replica * sequence + place. Without a launcher there is one rank.

    host_group: group of all ranks through the CPU; nothing in it waits for a device. store: key-value store that all
    ranks share, outside all groups. timeout: limit of every wait for other ranks.
    """

    world: int = 1
    rank: int = 0
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = field(default=None, compare=False)
    host_group: dist.ProcessGroup | None = field(default=None, compare=False)
    store: dist.Store | None = field(default=None, compare=False)
    timeout: timedelta = field(default=timedelta(minutes=TIMEOUT_MINUTES), compare=False)

    @property
    def replicas(self) -> int:
        return self.world // self.sequence

    @property
    def replica(self) -> int:
        return self.rank // self.sequence

    @property
    def place(self) -> int:
        """Number of the part of a video's frames that this rank holds."""
        return self.rank % self.sequence

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def limit_waits(self, group: dist.ProcessGroup) -> None:
        """Give the timeout of this mesh to a group that another package created."""
        dist.distributed_c10d._set_pg_timeout(self.timeout, group)  # pyright: ignore[reportPrivateUsage]

    def barrier(self) -> None:
        """Wait for the processes of all ranks, not for their devices."""
        if self.world > 1:
            dist.barrier(group=self.host_group)

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over all ranks. Values are the host's, and no device is waited for."""
        if self.world == 1:
            return list(values)
        result = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.host_group)
        return result.tolist()

    def share_refusal(self, refusal: Exception | None) -> None:
        """Raise the main rank's exception there, if there is one, and RefusedByMain on all other ranks."""
        if self.largest([int(refusal is not None)])[0] and refusal is None:
            raise RefusedByMain("the main rank has refused to start")
        if refusal is not None:
            raise refusal

    @contextmanager
    def one_voice(self) -> Generator[None]:
        """Let the main rank alone report a UserError that all ranks raise; the others raise RefusedByMain."""
        try:
            yield
        except UserError as error:
            if self.is_main:
                raise
            raise RefusedByMain(str(error)) from error

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Call a function on rank 0 alone and return its result on all ranks; a UserError is raised on all of them."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.host_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def largest_on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Take the largest of each value over all ranks, in place, without waiting for the device."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def build_mesh(sequence: int, *, timeout_minutes: float = TIMEOUT_MINUTES, store: dist.Store | None = None) -> Mesh:
    """Divide the ranks of the default process group into replicas; every rank calls this once.

    Raises ConfigError if they do not divide.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % sequence:
        raise ConfigError(
            f"parallel.sequence is {sequence}; expected a divisor of the {world} ranks:"
            f" {', '.join(map(str, divisors(world)))}"
        )
    if world == 1:
        return Mesh()
    # a new group does not inherit the timeout of the default group
    timeout = timedelta(minutes=timeout_minutes)
    groups = [list(range(first, first + sequence)) for first in range(0, world, sequence)]
    rank = dist.get_rank()
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout) if sequence > 1 else None
        if rank in ranks and isinstance(group, dist.ProcessGroup):
            own = group
    host_group = dist.new_group(backend=HOST_BACKEND, timeout=timeout)
    assert isinstance(host_group, dist.ProcessGroup), "every rank belongs to it"
    return Mesh(world, rank, sequence, own, host_group, store, timeout)


def check_sequence(sequence: int, *, heads: int, chunk_counts: Sequence[int]) -> None:
    """Raise ConfigError, with the valid sizes, unless the ranks can share heads and chunks evenly."""
    valid = [n for n in divisors(heads) if all(count % n == 0 for count in chunk_counts)]
    if sequence not in valid:
        counts = ", ".join(map(str, sorted(set(chunk_counts))))
        raise ConfigError(
            f"parallel.sequence is {sequence}; expected a divisor of {heads} attention heads and of videos of {counts}"
            f" chunks: {', '.join(map(str, valid))}"
        )


def divide_batch(batch: int, mesh: Mesh, micro_batch: int | None) -> tuple[int, int]:
    """Return the number of videos in one pass and of passes of a replica. Raises ConfigError if they do not divide."""
    per_replica, left = divmod(batch, mesh.replicas)
    size = micro_batch or max(per_replica, 1)
    if left or not per_replica or per_replica % size:
        unit = mesh.replicas * (micro_batch or 1)
        raise ConfigError(
            f"a batch of {batch} does not divide into {mesh.replicas} replicas with passes of {size};"
            f" use a multiple of {unit}, such as {max(batch // unit, 1) * unit}"
        )
    return size, per_replica // size


def common_passes(passes: Iterable[int]) -> int:
    """Return the passes of a step that all stages have in common. passes: number of each stage; none counts as 1.

    Raises ConfigError if they differ, because DeepSpeed adds up the gradients of a fixed number of passes.
    """
    different = sorted(set(passes))
    if len(different) > 1:
        raise ConfigError(
            f"stages have {' and '.join(map(str, different))} passes of a step; expected the same number in all stages;"
            " give them one batch, or leave out parallel.micro_batch"
        )
    return different[0] if different else 1


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def start_processes(config: ParallelConfig, device: torch.device) -> dist.Store:
    """Join the other ranks of a launcher; return the store they share.

    Raises ConfigError if some do not join in time.
    """
    timeout = timedelta(minutes=config.timeout_minutes)
    backend = "nccl" if device.type == "cuda" else HOST_BACKEND
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=timeout)
    except (dist.DistError, ValueError) as error:
        raise ConfigError(
            f"not all {process_rank().world} ranks joined within parallel.timeout_minutes={config.timeout_minutes:g}:"
            f" {str(error).splitlines()[0]}; start all of them, or use a longer timeout"
        ) from error
    return store
