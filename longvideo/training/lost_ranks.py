"""End a run whose ranks wait for a lost rank, and name that rank, whatever backend they wait in.

A thread of every rank writes into the store how many collectives the rank has issued in each of its groups, and reads
what the other ranks wrote. This needs neither the main thread, which may wait for a device, nor a group that still
works. A rank that stops writing was stopped or has ended. A rank that still writes, but has issued fewer collectives
than the others, does something else.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist

from longvideo.distributed import HOST_BACKEND, Mesh
from longvideo.errors import EXIT_USER_ERROR

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

LONGEST_INTERVAL = 1.0
"""Largest time between two readings of the store, seconds."""
READINGS = 20
"""Smallest number of readings within `parallel.timeout_minutes`."""
BROKEN_SECONDS = 5.0
"""Time without writing after which a rank is lost if a group is known to be broken, seconds."""
UNEXPLAINED_SECONDS = 3 * BROKEN_SECONDS
"""Time after which a run with a broken group ends though no rank is lost, seconds."""


class RankProgress:
    """What the ranks wrote into the store, and for how many readings it has stayed the same.

    Readings are counted, not seconds: a whole run may be stopped for an hour, and continue.
    store_rank: the rank whose process holds the store, None where it is the launcher's.
    """

    def __init__(self, world: int, rank: int, store_rank: int | None) -> None:
        self.rank = rank
        self.store_rank = store_rank
        self.words = [b""] * world
        self.calls: list[dict[str, int]] = [{} for _ in range(world)]
        self.silent = [0] * world
        """Readings since a rank wrote last."""
        self.idle = 0
        """Readings since any rank issued a collective."""

    def read(self, words: Sequence[bytes]) -> None:
        """Read the current values of the store. words: the bytes of every rank, see `word_of`."""
        calls = [json.loads(word)["calls"] if word else {} for word in words]
        self.silent = [
            readings + 1 if word == before else 0
            for readings, word, before in zip(self.silent, words, self.words, strict=True)
        ]
        self.idle = self.idle + 1 if calls == self.calls else 0
        self.words, self.calls = list(words), calls

    def lost(self, readings: int) -> set[int]:
        """Return the ranks that the others have waited for during this number of readings.

        While all ranks have issued the same collectives, for example while all of them compile, no rank waits for
        another.
        """
        if self.idle < readings:
            return set()
        silent = {rank for rank, count in enumerate(self.silent) if count >= readings}
        if self.rank in silent:  # this rank's own words do not come back either: the store does not answer
            return set() if self.store_rank is None else {self.store_rank}
        return silent or self._behind()

    def _behind(self) -> set[int]:
        """Return the ranks that others wait for, without those that wait themselves."""
        ranks = range(len(self.calls))
        waits_for = {(a, b) for a in ranks for b in ranks if _is_ahead(self.calls[a], self.calls[b])}
        return {b for _, b in waits_for} - {a for a, _ in waits_for}


class Monitor:
    """Two threads: one exchanges words through the store, the other ends the process if a rank is lost.

    There are two because a store whose process is stopped never answers.
    """

    def __init__(self, mesh: Mesh, store: dist.Store) -> None:
        self.mesh = mesh
        # a client serves one thread at a time, and the groups wait in their own threads
        self.store = dist.PrefixStore("progress", store).clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.progress = RankProgress(mesh.world, mesh.rank, None if _launcher_holds_store() else 0)
        self.words = self.progress.words
        seconds = mesh.timeout.total_seconds()
        self.interval = min(LONGEST_INTERVAL, seconds / READINGS)
        self.readings = math.ceil(seconds / self.interval)
        self.is_over, self.is_broken = Event(), Event()
        self.exchanger = Thread(target=self._exchange, daemon=True)
        self.watcher = Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self.exchanger.start()
        self.watcher.start()

    def stop(self) -> None:
        self.is_over.set()
        self.watcher.join()
        self.exchanger.join(BROKEN_SECONDS)

    def end_broken(self) -> None:
        """End the process because a group of ranks is broken, as soon as the lost rank is known."""
        self.is_broken.set()
        self.watcher.join()

    def _exchange(self) -> None:
        keys = [str(rank) for rank in range(self.mesh.world)]
        beat = 0
        try:
            for key in keys:
                self.store.append(key, "")  # reading a key that does not exist would wait for it
            while not self.is_over.wait(self.interval):
                beat += 1
                self.store.set(keys[self.mesh.rank], word_of(beat, _issued()))
                self.words = self.store.multi_get(keys)
        except dist.DistError:  # the process of the store has ended, and so its words stay the same
            return

    def _watch(self) -> None:
        broken = 0
        readings = min(self.readings, math.ceil(BROKEN_SECONDS / self.interval))
        most = math.ceil(UNEXPLAINED_SECONDS / self.interval)
        while not self.is_over.wait(self.interval):
            self.progress.read(self.words)
            broken += self.is_broken.is_set()
            lost = self.progress.lost(readings if broken else self.readings)
            if lost or broken > most:
                self._end(lost)

    def _end(self, lost: set[int]) -> NoReturn:
        """Print why the run ends, on one rank, and end this process."""
        if self.mesh.rank == min(set(range(self.mesh.world)) - lost):
            sys.stdout.flush()
            print(f"error: {_describe(sorted(lost), self.mesh)}", file=sys.stderr, flush=True)
        else:
            # a launcher ends all ranks when one has ended, and the line must be printed before that
            time.sleep(BROKEN_SECONDS)
        # an ordinary exit would wait for the exchange of a device with the lost rank
        os._exit(EXIT_USER_ERROR)


@contextmanager
def naming_lost_ranks(mesh: Mesh) -> Generator[None]:
    """End the process if a rank waits inside the block for a lost rank; one line on stderr names the lost rank.

    A rank is lost when the others have waited for it for `mesh.timeout`, or when it has ended.
    """
    if mesh.store is None:
        yield
        return
    monitor = Monitor(mesh, mesh.store)
    monitor.start()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or HOST_BACKEND in str(error).lower():
            monitor.end_broken()
        raise
    finally:
        monitor.stop()


def word_of(beat: int, calls: Mapping[str, int]) -> bytes:
    """Return the bytes that a rank writes. beat: a growing number. calls: issued collectives by the names of groups."""
    return json.dumps({"beat": beat, "calls": calls}).encode()


def _issued() -> dict[str, int]:
    """Return the number of collectives that this process issued in each of its groups."""
    return {
        group.group_name: group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
        for group in list(dist.distributed_c10d._world.pg_map)  # pyright: ignore[reportPrivateUsage]
    }


def _is_ahead(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return any(one[group] > other[group] for group in one.keys() & other.keys())


def _launcher_holds_store() -> bool:
    """Return whether the store belongs to torchrun, and not to the process of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _describe(lost: Sequence[int], mesh: Mesh) -> str:
    again = "start the run again: it resumes from its newest checkpoint"
    if not lost:
        return f"the connection between the ranks broke, but no rank is known to have ended; {again}"
    who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
    minutes = mesh.timeout.total_seconds() / 60
    return (
        f"{who} did not join the other ranks within parallel.timeout_minutes={minutes:g}, or ended before;"
        f" see why in the log, and {again}"
    )
