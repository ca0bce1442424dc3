"""The background iterator: order, how far it runs ahead, errors, and its end."""

from __future__ import annotations

import threading
import time

import pytest

from longvideo.infer.background import BackgroundIterator


def counting(made: list[int], *, until: int = 10**9, closed: threading.Event | None = None):
    try:
        for number in range(until):
            made.append(number)
            yield number
    finally:
        if closed is not None:
            closed.set()


def settle(made: list[int]) -> int:
    """Wait until nothing more is made."""
    count = -1
    while count != len(made):
        count = len(made)
        time.sleep(0.05)
    return count


def test_items_come_in_order_and_end() -> None:
    with BackgroundIterator(lambda: counting([], until=50), capacity=3, name="count") as items:
        assert list(items) == list(range(50))
        assert list(items) == []


def test_it_runs_ahead_by_its_capacity_and_no_further() -> None:
    made: list[int] = []
    with BackgroundIterator(lambda: counting(made), capacity=2, name="count") as items:
        assert settle(made) == 2
        assert [next(items), next(items)] == [0, 1]
        assert settle(made) == 4


def test_an_error_reaches_the_caller_at_once_and_once() -> None:
    def failing():
        yield 0
        raise RuntimeError("worker broke")

    items = BackgroundIterator(failing, capacity=5, name="fail")
    items._thread.join()
    with pytest.raises(RuntimeError, match="worker broke"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_before_the_first_item_reaches_a_waiting_caller() -> None:
    def failing():
        time.sleep(0.05)
        raise ValueError("no first item")
        yield

    with (
        pytest.raises(ValueError, match="no first item"),
        BackgroundIterator(failing, capacity=1, name="fail") as items,
    ):
        next(items)


def test_closing_stops_the_thread_and_closes_the_source() -> None:
    made: list[int] = []
    closed = threading.Event()
    items = BackgroundIterator(lambda: counting(made, closed=closed), capacity=2, name="count")
    next(items)
    items.close()
    items.close()
    assert closed.is_set() and not items._thread.is_alive()
    assert list(items) == []


def test_a_chain_ends_when_its_first_link_is_closed() -> None:
    def slow():
        while True:
            time.sleep(0.02)
            yield 1

    first = BackgroundIterator(slow, capacity=1, name="first")
    second = BackgroundIterator(lambda: (item for item in first), capacity=1, name="second")
    assert next(second) == 1
    first.close()
    second.close()
    assert not first._thread.is_alive() and not second._thread.is_alive()
