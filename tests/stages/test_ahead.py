"""Threads that work ahead: in order, bounded by bytes, and ended when nobody takes any more."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing

import pytest

from stages.ahead import ahead


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def squares(number: int) -> Generator[int]:
    time.sleep(0.01 * (number % 3))  # so that threads end out of order
    for each in range(number % 4):
        yield number * 10 + each


@pytest.mark.parametrize("threads", [1, 4])
def test_items_come_in_the_order_of_their_sources(threads: int) -> None:
    found = list(ahead(range(20), squares, lambda item: 1, threads=threads, depth=8, most=3))
    wanted = [(n, item) for n in range(20) for item in (*squares(n), None)]
    assert found == wanted


def test_what_waits_is_bounded_by_bytes() -> None:
    made: list[int] = []

    def make(source: int) -> Generator[int]:
        for each in range(3):
            made.append(source * 3 + each)
            yield each

    with closing(ahead(range(8), make, lambda item: 10, threads=4, depth=8, most=40)) as items:
        next(items)
        # 40 bytes wait, one was taken, and each thread holds one that has no room.
        assert wait_until(lambda: len(made) >= 5)
        time.sleep(0.1)
        assert len(made) <= 4 + 1 + 4
        assert sum(item is not None for _, item in items) == 23


def test_an_item_larger_than_the_room_goes_through_alone() -> None:
    found = list(ahead(range(5), squares, lambda item: 100, threads=3, depth=5, most=1))
    assert [n for n, item in found if item is None] == list(range(5))


def test_sources_are_asked_no_further_than_the_depth_and_in_the_callers_thread() -> None:
    asked: list[tuple[int, int]] = []

    def sources() -> Iterator[int]:
        for number in itertools.count():
            asked.append((number, threading.get_ident()))
            yield number

    with closing(ahead(sources(), squares, lambda item: 1, threads=2, depth=5, most=100)) as items:
        next(items)
        assert len(asked) == 5
        next(items)
        assert len(asked) == 6
    assert {ident for _, ident in asked} == {threading.get_ident()}


def test_what_is_raised_comes_in_its_place_and_ends_the_threads() -> None:
    def make(source: int) -> Generator[int]:
        yield source
        if source == 2:
            raise ZeroDivisionError("of the third")

    found = []
    with pytest.raises(ZeroDivisionError, match="of the third"):
        for pair in ahead(range(9), make, lambda item: 1, threads=3, depth=9, most=100):
            found.append(pair)
    assert found == [(0, 0), (0, None), (1, 1), (1, None), (2, 2)]


def test_closing_ends_threads_that_wait_for_room() -> None:
    ended = threading.Event()

    def make(source: int) -> Generator[int]:
        try:
            yield from itertools.repeat(source)
        finally:
            ended.set()

    before = threading.active_count()
    items = ahead(range(1), make, lambda item: 1, threads=1, depth=1, most=2)
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert ended.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize(("threads", "most"), [(1, 100), (4, 100), (4, 1)])
def test_all_items_of_each_source_come_where_order_is_no_matter(threads: int, most: int) -> None:
    items = ahead(
        range(30), squares, lambda item: 1, threads=threads, depth=8, most=most, ordered=False
    )
    found = list(items)
    for source in range(30):
        assert [item for n, item in found if n == source] == [*squares(source), None]
    assert len(found) == sum(source % 4 + 1 for source in range(30))


def test_a_slow_source_holds_up_nobody() -> None:
    gate = threading.Event()

    def make(source: int) -> Generator[int]:
        assert source or gate.wait(20)
        yield source

    items = ahead(range(9), make, lambda item: 1, threads=2, depth=4, most=9, ordered=False)
    with closing(items):
        first = [next(items) for _ in range(2 * 8)]
        assert [n for n, item in first if item is None] == list(range(1, 9))
        gate.set()
        assert list(items) == [(0, 0), (0, None)]
