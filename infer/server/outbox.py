"""Pass messages from the thread that generates a video to the coroutine that sends them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Outgoing:
    """A text message and the binary message that follows it, if any.

    is_segment: whether the message counts against the outbox's capacity.
    """

    text: str
    data: bytes | None = None
    is_segment: bool = False


class Outbox:
    """A queue from any thread to one coroutine. At most `capacity` segments wait in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, capacity: int) -> None:
        self._loop, self._capacity = loop, capacity
        self._items: deque[Outgoing] = deque()
        self._segments = 0
        self._is_bounded = True
        self._is_finished = False
        self._changed = threading.Condition()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    def put(self, outgoing: Outgoing) -> None:
        """Append a message; after `finish` it is dropped."""
        with self._changed:
            if self._is_finished:
                return
            self._items.append(outgoing)
            self._segments += outgoing.is_segment
            self._loop.call_soon_threadsafe(self._filled.set)

    def wait_for_capacity(self, seconds: float) -> bool:
        """Block the thread until another segment fits; return whether it fits within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_bounded or self._segments < self._capacity, seconds)

    def stop_waiting(self) -> None:
        """Remove the bound on segments, so that no thread waits for capacity."""
        with self._changed:
            self._is_bounded = False
            self._changed.notify_all()

    def finish(self) -> None:
        """Accept no more messages; `get` returns the remaining ones."""
        with self._changed:
            self._is_finished = True
            self._loop.call_soon_threadsafe(self._filled.set)

    async def get(self) -> Outgoing | None:
        """Return the next message, or None after the last one."""
        while True:
            with self._changed:
                if self._items:
                    outgoing = self._items.popleft()
                    self._segments -= outgoing.is_segment
                    self._changed.notify_all()
                    self._emptied.set()
                    return outgoing
                if self._is_finished:
                    return None
                self._filled.clear()
            await self._filled.wait()

    async def wait_for_fewer(self, count: int) -> None:
        """Wait until fewer than `count` messages are queued."""
        while len(self._items) >= count and not self._is_finished:
            self._emptied.clear()
            await self._emptied.wait()
