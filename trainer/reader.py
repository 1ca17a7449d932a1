"""Rows of shards, read in large pieces before they are wanted.

A row group (some 16 MB) is read once, for all that is wanted of it soon, by threads in the
background, in the order of the file. Each row is read to where it is wanted (its place in a batch,
say) and stays there until its turn comes: nothing is copied.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from manifests.pages import Into, fresh
from manifests.shards import Embedding, Latent, ShardFile

T = TypeVar("T")

THREADS = 4  # row groups read at once: a store far away answers one at a time slowly
OPEN = 256  # shards that are kept open

Row = Latent | Embedding


class Place(NamedTuple):
    """A row of a shard."""

    shard: str
    row: int


@dataclass(frozen=True)
class Wanted(Generic[T]):
    """Rows that are wanted together, for `item`, and at most `bytes` long. `room` gives the memory
    for the latents in the place of this number, of so many bytes; None: they need their own."""

    item: T
    places: list[Place]
    bytes: int
    room: Callable[[int, int], memoryview | None]


class Shards:
    """Shards that are open: the latest used ones. `open` opens one, `rows` reads rows of it into
    the memory that it is given for each."""

    def __init__(
        self,
        open: Callable[[str], ShardFile],
        rows: Callable[[ShardFile, list[int], Into], Iterator[Row]],
    ) -> None:
        self._open, self._rows = open, rows
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Future[ShardFile]] = OrderedDict()

    def get(self, name: str) -> ShardFile:
        """Opens each but once, whoever asks."""
        with self._lock:
            mine = name not in self._files
            future = self._files.setdefault(name, Future())
            self._files.move_to_end(name)
            if len(self._files) > OPEN:
                self._files.popitem(last=False)  # closed when nobody reads it any more
        if mine:
            try:
                future.set_result(self._open(name))
            except BaseException as error:  # noqa: BLE001  those who wait for it get it too
                future.set_exception(error)
        return future.result()

    def read(self, name: str, rows: Mapping[int, tuple[Wanted[T], int]]) -> dict[int, Row]:
        """Rows (ascending) by their numbers, each where it is wanted: by whom, in which place."""

        def into(row: int, size: int) -> memoryview:
            one, number = rows[row]
            room = one.room(number, size)
            return fresh(row, size) if room is None else room

        return dict(zip(rows, self._rows(self.get(name), list(rows), into), strict=True))


def read_rows(
    plan: Iterator[Wanted[T]], shards: Shards, memory: int
) -> Generator[tuple[T, list[Row]]]:
    """What `plan` wants, in its order, each with its rows.

    Of the plan as much is known ahead as takes `memory` bytes. What the nearer half of it wants is
    read, and of each row group all that the whole of it wants is kept. So no more than `memory`
    bytes are held that are wanted yet, beside the row groups being read, and each is read once if
    all that is wanted of it lies within half of `memory`.
    """
    far: deque[Wanted[T]] = deque()
    near: deque[Wanted[T]] = deque()
    far_bytes = near_bytes = 0
    wanted: _Wishes[T] = defaultdict(dict)  # of each shard's rows, in far and near
    read: dict[Place, Future[dict[int, Row]]] = {}
    pool = ThreadPoolExecutor(THREADS, "shards")
    try:
        while True:
            while far_bytes + near_bytes < memory or not far:
                far.append(one := next(plan))
                far_bytes += one.bytes
                for number, place in enumerate(one.places):
                    if place.shard not in wanted and len(wanted) < OPEN // 2:
                        pool.submit(shards.get, place.shard)  # open when it is asked for
                    wanted[place.shard].setdefault(place.row, deque()).append((one, number))
            if near_bytes <= memory * 3 // 8:
                missing: dict[Place, None] = {}
                enough = near_bytes + memory // 8  # not all at once: the first should come soon
                while far and (near_bytes < enough or not near):
                    near.append(one := far.popleft())
                    far_bytes -= one.bytes
                    near_bytes += one.bytes
                    missing |= dict.fromkeys(place for place in one.places if place not in read)
                _request(missing, wanted, shards, read, pool)
            one = near.popleft()
            near_bytes -= one.bytes
            rows = []
            for place in one.places:
                found = read[place].result()
                rows.append(row := found[place.row])
                wishes = wanted[place.shard][place.row]
                wishes.popleft()
                if wishes and isinstance(row, Latent):  # it lies where who has it may write
                    found[place.row] = replace(row, data=memoryview(bytes(row.data)))
                elif not wishes:
                    del wanted[place.shard][place.row], found[place.row], read[place]
                    if not wanted[place.shard]:
                        del wanted[place.shard]
            yield one.item, rows
    finally:
        pool.shutdown(cancel_futures=True)


_Wishes = defaultdict[str, dict[int, deque[tuple[Wanted[T], int]]]]


def _request(
    missing: Iterable[Place],
    wanted: _Wishes[T],
    shards: Shards,
    read: dict[Place, Future[dict[int, Row]]],
    pool: ThreadPoolExecutor,
) -> None:
    """Has the row groups of `missing` read, in the order of their files, for all that is wanted:
    each row to where it is wanted first."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for place in missing:
        rows_of[place.shard].append(place.row)
    for name, rows in rows_of.items():
        file, wishes = shards.get(name), wanted[name]
        for group in sorted({file.group(row) for row in rows}):
            first, last = file.starts[group], file.starts[group + 1]
            places = {
                row: wishes[row][0]
                for row in sorted(wishes)
                if first <= row < last and Place(name, row) not in read
            }
            future = pool.submit(shards.read, name, places)
            read.update(dict.fromkeys((Place(name, row) for row in places), future))


def read_ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The items of `source`, made by a thread that is at most `depth` items ahead.

    What `source` raises is raised here; closing this generator ends the thread.
    """
    slots, stop = threading.Semaphore(depth), threading.Event()
    items: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def work() -> None:
        try:
            while slots.acquire() and not stop.is_set():
                items.put((next(source), None))
        except BaseException as error:  # noqa: BLE001  a thread's error belongs to its reader
            items.put((None, error))
        finally:
            if close := getattr(source, "close", None):
                close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            slots.release()
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        slots.release()
        thread.join()
