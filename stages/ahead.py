"""Work that threads do ahead of whoever needs its results: decoding, while a model runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    sources: Iterable[S],
    make: Callable[[S], Generator[T]],
    size: Callable[[T], int],
    *,
    threads: int,
    depth: int,
    most: int,
    ordered: bool = True,
) -> Generator[tuple[int, T | None]]:
    """What `make` gives of each source, in order and with the source's number (from 0); None in
    the place of an item says that a source has no more. Not `ordered`: of the source that has
    something first, so that a slow one holds up nobody.

    `threads` call `make` up to `depth` sources ahead, until what waits has `most` bytes by `size`;
    one item always may, so nothing is too large. `sources` is asked in the caller's thread. What
    `make` raises is raised here, in its place. Closing this ends the threads.
    """
    room = _Room(most)
    waiting: deque[tuple[int, _Line[T]]] = deque()
    coming = enumerate(sources)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for number, source in islice(coming, depth - len(waiting)):
                    line: _Line[T] = _Line(room)
                    waiting.append((number, line))
                    pool.submit(line.fill, partial(make, source), size)
                if not waiting:
                    return
                if not ordered:
                    room.bring_forward(waiting)
                number, line = waiting.popleft()
                for item in line:
                    yield number, item
                yield number, None
        finally:
            room.close()
            pool.shutdown(wait=False, cancel_futures=True)


class _Closed(Exception):
    """Nobody takes what a thread makes any more."""


class _Room:
    """The bytes that wait, in all lines together."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self.first: object = None  # the line that somebody takes from
        self.changed = threading.Condition()
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def bring_forward(self, waiting: deque[tuple[int, _Line[Any]]]) -> None:
        """Waits until one of the lines has something, and puts the first such in front."""
        with self.changed:
            while (ready := next((one for one in waiting if one[1].ready), None)) is None:
                self.changed.wait()
        waiting.remove(ready)
        waiting.appendleft(ready)


class _Line(Generic[T]):
    """The items of one source that wait."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._items: deque[tuple[T, int]] = deque()
        self._ended = False
        self._error: BaseException | None = None

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or nothing more to come."""
        return bool(self._items) or self._ended

    def fill(self, make: Callable[[], Generator[T]], size: Callable[[T], int]) -> None:
        """Puts all items in line, in a thread."""
        error: BaseException | None = None
        try:
            with closing(make()) as items:
                for item in items:
                    self._put(item, size(item))
        except _Closed:
            pass
        except BaseException as raised:  # noqa: BLE001  a thread's error belongs to its reader
            error = raised
        with self._room.changed:
            self._ended, self._error = True, error
            self._room.changed.notify_all()

    def _put(self, item: T, size: int) -> None:
        room = self._room
        with room.changed:
            # The line that is taken from may always go on: the others may have filled the room.
            while not room.closed and room.used + size > room.most:
                if (room.first is self and not self._items) or not room.used:
                    break
                room.changed.wait()
            if room.closed:
                raise _Closed
            room.used += size
            self._items.append((item, size))
            room.changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        room = self._room
        while True:
            with room.changed:
                room.first = self
                room.changed.notify_all()
                while not self._items and not self._ended:
                    room.changed.wait()
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._items.popleft()
                room.used -= size
                room.changed.notify_all()
            yield item
