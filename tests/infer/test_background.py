"""The background iterator: order, how far it runs ahead, errors, and its end."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from longvideo.infer.background import BackgroundIterator


def counting(
    items_so_far: list[int], *, until: int = 10**9, closed: threading.Event | None = None
) -> Generator[int, None, None]:
    try:
        for number in range(until):
            items_so_far.append(number)
            yield number
    finally:
        if closed is not None:
            closed.set()


def test_items_come_in_order_and_end() -> None:
    with BackgroundIterator(lambda: counting([], until=50), capacity=3, name="count") as items:
        assert list(items) == list(range(50))
        assert list(items) == []


def test_it_runs_ahead_by_its_capacity_and_no_further() -> None:
    capacity, leads = 2, []
    consumed: list[int] = []
    reached = {count: threading.Event() for count in (capacity, 2 * capacity)}

    def source() -> Generator[int, None, None]:
        for number in range(100):
            leads.append(number + 1 - len(consumed))
            if number + 1 in reached:
                reached[number + 1].set()
            yield number

    with BackgroundIterator(source, capacity=capacity, name="count") as items:
        assert reached[capacity].wait(timeout=60)
        for _ in range(capacity):
            consumed += [next(items)]
        assert reached[2 * capacity].wait(timeout=60)
    assert consumed == [0, 1]
    assert max(leads) <= capacity + 1  # an item is counted as consumed a moment after its place is free


def test_an_error_reaches_the_caller_at_once_and_once() -> None:
    def failing() -> Generator[int, None, None]:
        yield 0
        raise RuntimeError("worker broke")

    items = BackgroundIterator(failing, capacity=5, name="fail")
    items._thread.join()
    with pytest.raises(RuntimeError, match="worker broke"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_before_the_first_item_reaches_a_waiting_caller() -> None:
    def failing() -> Generator[int, None, None]:
        raise ValueError("no first item")
        yield

    with (
        pytest.raises(ValueError, match="no first item"),
        BackgroundIterator(failing, capacity=1, name="fail") as items,
    ):
        next(items)


def test_closing_stops_the_thread_and_closes_the_source() -> None:
    items_so_far: list[int] = []
    closed = threading.Event()
    items = BackgroundIterator(lambda: counting(items_so_far, closed=closed), capacity=2, name="count")
    next(items)
    items.close()
    items.close()
    assert closed.is_set() and not items._thread.is_alive()
    assert list(items) == []


def test_a_chain_ends_when_its_first_link_is_closed() -> None:
    def endless() -> Generator[int, None, None]:
        while True:
            yield 1

    first = BackgroundIterator(endless, capacity=1, name="first")
    second = BackgroundIterator(lambda: (item for item in first), capacity=1, name="second")
    assert next(second) == 1
    first.close()
    second.close()
    assert not first._thread.is_alive() and not second._thread.is_alive()
