"""Run an iterator in its own thread, a few items ahead of the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from longvideo.infer.closing import ClosedAtEnd

T = TypeVar("T")


class BackgroundIterator(ClosedAtEnd, Iterator[T], Generic[T]):
    """Iterates over a generator in a thread that runs ahead.

    An error in the thread is raised at once by the call that waits for the next item; finished items before it are
    dropped. `close` stops the thread after the item that it computes, and waits for it.
    """

    def __init__(self, source: Callable[[], Generator[T, None, None]], *, capacity: int, name: str) -> None:
        """Start the thread.

        source: builds the generator. It is called in the thread, so settings of a thread (CUDA stream, gradient mode)
        apply to it. capacity: largest number of finished items that wait for the caller. name: name of the thread.
        """
        self._source = source
        self._slots = threading.Semaphore(capacity)
        self._finished: queue.SimpleQueue[T | None] = queue.SimpleQueue()  # None: the thread has ended
        self._error: BaseException | None = None
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item = None if self._error else self._finished.get()
        if item is None or self._error:
            self.close()
            error, self._error = self._error, None
            if error:
                raise error
            raise StopIteration
        self._slots.release()
        return item

    def close(self) -> None:
        """Stop the thread and wait until it has ended. Closing twice does nothing."""
        self._ended = self._stopping = True
        self._slots.release()
        self._thread.join()

    def _run(self) -> None:
        iterator = None
        try:
            iterator = self._source()
            while True:
                self._slots.acquire()
                if self._stopping:
                    break
                item = next(iterator)
                self._finished.put(item)
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 - not swallowed: raised where the caller waits
            self._error = error
        finally:
            if iterator is not None:
                iterator.close()
            self._finished.put(None)
