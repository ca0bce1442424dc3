"""Hand messages from the thread that makes a video to the coroutine that sends them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Outgoing:
    """A text message, and the binary one that follows it."""

    text: str
    data: bytes | None = None
    is_segment: bool = False


class Outbox:
    """A queue from any thread to one coroutine; at most `capacity` segments wait in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, capacity: int) -> None:
        self._loop, self._capacity = loop, capacity
        self._items: deque[Outgoing] = deque()
        self._segments = 0
        self._waits = True
        self._finished = False
        self._changed = threading.Condition()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    def put(self, outgoing: Outgoing) -> None:
        """Queue a message behind the others; after `finish` it is dropped."""
        with self._changed:
            if self._finished:
                return
            self._items.append(outgoing)
            self._segments += outgoing.is_segment
            self._loop.call_soon_threadsafe(self._filled.set)

    def wait_for_room(self, seconds: float) -> bool:
        """Block a thread until another segment may be put; return whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waits or self._segments < self._capacity, seconds)

    def stop_waiting(self) -> None:
        """Let nobody wait for room any more."""
        with self._changed:
            self._waits = False
            self._changed.notify_all()

    def finish(self) -> None:
        """Take no more messages; `get` returns those that are left."""
        with self._changed:
            self._finished = True
            self._loop.call_soon_threadsafe(self._filled.set)

    async def get(self) -> Outgoing | None:
        """Return the next message, or None when it was the last."""
        while True:
            with self._changed:
                if self._items:
                    outgoing = self._items.popleft()
                    self._segments -= outgoing.is_segment
                    self._changed.notify_all()
                    self._emptied.set()
                    return outgoing
                if self._finished:
                    return None
                self._filled.clear()
            await self._filled.wait()

    async def wait_for_fewer(self, messages: int) -> None:
        """Wait until fewer messages are queued."""
        while len(self._items) >= messages and not self._finished:
            self._emptied.clear()
            await self._emptied.wait()
