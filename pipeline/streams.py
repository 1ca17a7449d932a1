"""Takes units through a stage, in streams that go on from one unit to the next.

A stage that streams holds rows that it has not answered: an engine's requests, frames on their way
to a VAE. If each unit had a stream of its own, the model would run empty at each unit's end. So a
stream gets the rows of the next unit once it has all of this one, if the next one waits by then,
and a unit is through when its last row is answered and committed.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count
from typing import Any

import pyarrow as pa

from manifests.faults import StoreError, StoreUnusable, halts
from manifests.redact import redact, redact_logs
from manifests.store import Store
from manifests.view import Dag
from pipeline.settle import AnyStage, StageBug
from pipeline.unit import Clock, OpenUnit, Piece, Receipt, Retry
from pipeline.workers.watch import Places
from stages.base import StageError, counting, spending

Through = Iterator[tuple[Piece, Receipt]]


class Streams:
    """Settles and commits the pending rows of pieces at `stage`, or what of them is done when their
    watch asks to stop.

    `coming` gives the piece that waits next, or None where none does at this moment. `model` gives
    what the stage's `setup` made; it is called only if a row is pending.
    """

    def __init__(
        self,
        store: Store,
        dag: Dag,
        stage: AnyStage,
        model: Callable[[], Any],
        retry: Retry,
        coming: Callable[[], Piece | None],
    ) -> None:
        self._store, self._dag, self._stage = store, dag, stage
        self._model, self._retry, self._coming = model, retry.of(stage), coming
        self._alone: deque[tuple[Piece, Receipt]] = deque()  # each is to have a stream of its own
        self._ended: list[tuple[Piece, Receipt]] = []
        self._open: list[OpenUnit] = []  # in the order in which they came
        self._flying: dict[int, OpenUnit] = {}  # of a batch that the stage has not answered
        self._clock = Clock()
        self._latest = Receipt(stage.name, "")

    def run(self) -> Through:
        """The receipts, as pieces are through, until none is waiting."""
        redact_logs()
        with spending(self._spent), counting(self._counted):
            while True:
                if self._alone:
                    yield from self._course(*self._alone.popleft(), alone=True)
                elif (piece := self._coming()) is not None:
                    yield from self._course(piece, self._receipt(piece), alone=piece.watch.suspects)
                else:
                    return

    def _course(self, piece: Piece, receipt: Receipt, alone: bool) -> Through:
        """One piece, and those that come before its stream has ended."""
        self._clock = Clock()
        fault: Exception | None = None
        try:
            yield from self._through(piece, receipt, alone)
        except Exception as error:  # noqa: BLE001  the boundary between a stage and the run
            fault = error
        except BaseException:
            for unit in self._open:
                unit.close(keep=False)
            raise
        self._end(fault)
        yield from self._told()

    def _through(self, piece: Piece, receipt: Receipt, alone: bool) -> Through:
        if piece.watch.stopping():
            self._ended.append((piece, receipt))
            return
        unit = self._opened(piece, receipt)
        if unit is None:
            return
        unit.condemn()
        for lane in unit.lanes:
            yield from self._streamed(unit, lane, alone)
            if self._stopping():
                return
        unit.given = True

    def _streamed(self, unit: OpenUnit, lane: Iterator[Places], alone: bool) -> Through:
        """One stream of the stage. Raises StageBug where a batch is answered twice, or never."""
        with closing(self._stage.stream(self._fed(unit, lane, alone), unit.model)) as answers:
            for number, outcomes in answers:
                if number not in self._flying:
                    raise StageBug(
                        f"{self._stage.name} answered batch {number}, which is not in flight"
                    )
                self._flying.pop(number).answer(number, outcomes)
                if self._stopping():
                    for each in self._open:
                        each.begin_commit()  # now: to close the stream may take longer than a stop
                    self._flying.clear()
                    return
                yield from self._told()
        if self._flying:
            raise StageBug(f"{self._stage.name} left {len(self._flying)} batches without an answer")

    def _fed(self, unit: OpenUnit, lane: Iterator[Places], alone: bool) -> Generator[pa.Table]:
        numbers = count()
        going: tuple[OpenUnit, Iterator[Places]] | None = (unit, lane)
        while going is not None:
            unit, lane = going
            for places in lane:
                if self._stopping():
                    return
                number = next(numbers)
                self._flying[number] = unit
                yield unit.batch(number, places)
            if alone:
                return
            unit.given = True
            if unit.answered:
                unit.committed()  # begins that: no death at the next one shall cost its rows
            going = self._following()

    def _following(self) -> tuple[OpenUnit, Iterator[Places]] | None:
        """The next unit that waits and has rows pending, if its stream may be this one."""
        while not self._stopping() and (piece := self._coming()) is not None:
            if piece.watch.suspects:
                self._alone.append((piece, self._receipt(piece)))
                return None
            unit = self._opened(piece, self._receipt(piece))
            if unit is None:
                continue
            for lane in unit.lanes:
                return unit, lane
            unit.given = True
        return None

    def _opened(self, piece: Piece, receipt: Receipt) -> OpenUnit | None:
        if self._open:  # the stage was at work until it asked for more
            self._clock.lap(self._now, "process")
        self._latest = receipt
        try:
            unit = OpenUnit(
                *(self._store, self._dag, self._stage, self._model, self._retry),
                *(piece, receipt, self._clock),
            )
        except Exception as error:  # noqa: BLE001  this unit's alone
            self._blame(receipt, error)
            self._ended.append((piece, receipt))
            return None
        self._open.append(unit)
        return unit

    def _told(self) -> Through:
        """The receipts of what is through; begins the last commit of what has all its answers. The
        newest unit stays open until the stream has ended, as that may still raise."""
        for unit in [unit for unit in self._open[:-1] if unit.answered and unit.committed()]:
            self._open.remove(unit)
            self._close(unit)
            self._ended.append((unit.piece, unit.receipt))
        ended, self._ended = self._ended, []
        yield from ended

    def _end(self, fault: Exception | None) -> None:
        """Commits what is settled; batches before a fault are sound. Whose fault it is nobody knows
        where several units were in flight: each of them is run again alone."""
        units, self._open = self._open, []
        self._flying.clear()
        if fault is not None and not units:
            raise fault  # by who watches: no unit's
        at_work = [unit for unit in units if not unit.answered] or units[-1:]
        again = len(at_work) > 1 and fault is not None and not _halting(fault, self._store)
        for unit in units:
            unit.abandon()  # what dies while another one is run again, dies not of these
            sound = self._close(unit)
            if sound and again and unit in at_work:
                self._alone.append((unit.piece, unit.receipt))
                continue
            if sound and fault is not None and unit in at_work:
                self._blame(unit.receipt, fault)
            self._ended.append((unit.piece, unit.receipt))

    def _close(self, unit: OpenUnit) -> bool:
        """Whether all that was settled is committed."""
        try:
            unit.close()
        except Exception as error:  # noqa: BLE001  this unit's alone
            self._blame(unit.receipt, error)
            return False
        return True

    def _blame(self, receipt: Receipt, error: Exception) -> None:
        """Puts a sentence for the user into the receipt, and a trace where it is a bug."""
        halting = _halting(error, self._store)
        receipt.halts = halting is not None
        if isinstance(error, StageError | StoreError):
            receipt.error = redact(str(error))
        else:
            text = halting or f"{type(error).__name__}: {error}"
            receipt.error = redact(text.splitlines()[0])
            receipt.trace = None if halting else redact("".join(traceback.format_exception(error)))

    def _receipt(self, piece: Piece) -> Receipt:
        return Receipt(self._stage.name, piece.unit, unchecked=piece.checks)

    def _stopping(self) -> bool:
        return any(unit.piece.watch.stopping() for unit in self._open)

    def _spent(self, phase: str, seconds: float) -> None:
        self._now.spend(phase, seconds)

    def _counted(self, what: str, n: int) -> None:
        self._now.add(what, n)

    @property
    def _now(self) -> Receipt:
        """The receipt that what happens now is put down in: where several units are in flight, that
        of the first that the stage still has something of, as it has a commit to come."""
        at_work = (unit for unit in self._open if not unit.answered)
        unit = next(at_work, self._open[-1] if self._open else None)
        return unit.receipt if unit is not None else self._latest


def _halting(error: Exception, store: Store) -> str | None:
    """Why nothing can be written any more, where that is what the error says."""
    if isinstance(error, StoreUnusable):
        return str(error)
    full = halts(error, store.url) if isinstance(error, OSError) else None
    return None if full is None else str(full)


def run_piece(
    store: Store,
    dag: Dag,
    stage: AnyStage,
    model: Callable[[], Any],
    piece: Piece,
    retry: Retry = Retry(),
) -> Receipt:
    """One piece through `stage`, by itself."""
    pieces = iter([piece])
    streams = Streams(store, dag, stage, model, retry, lambda: next(pieces, None))
    ((_, receipt),) = streams.run()
    return receipt
