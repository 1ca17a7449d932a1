"""A unit at one stage: its pending rows, what becomes of them, and the receipt of that.

Plain Python: no Ray, no printing. Rows are settled by the stage's own outcomes; an exception is a
fault of the stage or of the machine, so it settles nothing and is handed back in the receipt, and
the rows stay pending. `pipeline.streams` takes units through a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.log import Counts
from manifests.schema import FAILED, PENDING
from manifests.store import Store
from manifests.view import Dag, UnitView
from pipeline.commits import Committer
from pipeline.settle import AnyStage, counted, settle
from pipeline.workers.watch import UNWATCHED, Places, Watch, lanes

EVERY_CLASS = "all"

Part = tuple[int, int]  # of a unit's clips: number, of how many
WHOLE: Part = (0, 1)
OnRows = Callable[[str, Counts], None]


def _unheard(stage: str, counts: Counts) -> None:
    """Nobody counts."""


@dataclass(frozen=True)
class Retry:
    """Which failed rows are to be tried again: those of some classes (`all`: of every one), or,
    where none is named, those that their stage calls worth another try."""

    failed: bool = False
    classes: frozenset[str] = frozenset()
    stage: AnyStage | None = None

    def of(self, stage: AnyStage) -> Retry:
        """The same, for rows of this stage."""
        return replace(self, stage=stage)

    def wants(self, outcome: str | None, reason: str | None) -> bool:
        if outcome != FAILED or not self.failed:
            return False
        if self.classes:
            return reason in self.classes or EVERY_CLASS in self.classes
        return self.stage is not None and self.stage.worth_retry(reason or "")


@dataclass
class Receipt:
    """What a worker hands back: counts of the rows it settled, seconds, and what its stage counted.
    Never payload."""

    stage: str
    unit: str
    counts: Counts = field(default_factory=Counts)
    seconds: dict[str, float] = field(default_factory=dict)
    amounts: dict[str, int] = field(default_factory=dict)  # what the stage counted: tokens
    error: str | None = None  # one line, where the stage raised
    trace: str | None = None
    unchecked: int = 0  # rows to look at again, where none was pending
    halts: bool = False  # nothing can be written: other units would fare no better

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def add(self, what: str, n: int) -> None:
        self.amounts[what] = self.amounts.get(what, 0) + n


@dataclass(frozen=True, eq=False)
class Piece:
    """A unit that is to be settled, or a `part` of one, which other workers settle beside this; who
    watches over it, and who hears what becomes of its rows; how many of these the stage is to look
    at again."""

    unit: str
    part: Part = WHOLE
    watch: Watch = UNWATCHED
    on_rows: OnRows = _unheard
    checks: int = 0


class OpenUnit:
    """A unit whose rows are being settled.

    `given` tells that the stage has got all of its batches, `model` what the stage's `setup` made:
    it is asked for only if a row is pending. Raises StoreError, and what `setup` raises.
    """

    def __init__(
        self,
        store: Store,
        dag: Dag,
        stage: AnyStage,
        model: Callable[[], Any],
        retry: Retry,
        piece: Piece,
        receipt: Receipt,
        clock: Clock,
    ) -> None:
        self.piece, self.receipt = piece, receipt
        self.given = False
        self.model: Any = None
        self._stage, self._clock = stage, clock
        self._flying: dict[int, Places] = {}
        self._commits: Committer | None = None
        self._rows = self._book = pa.table({"clip_id": pa.array([], pa.string())})
        view = UnitView(store, dag, piece.unit)
        if _is_done(view, stage.name, retry):
            return
        settled = view.settled(stage.name)
        pending = _pending(view, stage, retry, piece.part)
        columns = [*dict.fromkeys((*stage.reads, *stage.carries))]
        self._rows = view.inputs(stage.name, pending, columns)
        self._book = pa.table(
            {
                "clip_id": self._rows.column("clip_id"),
                "row_key": settled.key.take(pending),
                "attempts": settled.attempts.take(pending),
            }
        )
        clock.lap(receipt, "read")
        if self._rows.num_rows:
            self.model = model()
            stage.check_rows(receipt.unchecked, self._rows.num_rows, self.model)
            receipt.unchecked = 0
        clock.lap(receipt, "setup")
        self._commits = Committer(
            *(view, stage, self.model, piece.watch, receipt.seconds, receipt.amounts)
        )
        if not self._rows.num_rows:
            self._commits.begin()

    @property
    def lanes(self) -> Iterator[Iterator[Places]]:
        """The batches that may be in flight together."""
        ids = self._book.column("clip_id").to_pylist()
        return lanes(ids, self._stage.batch_size, self.piece.watch) if ids else iter(())

    def condemn(self) -> None:
        """Settles the clips that the stage is not to get."""
        condemned = self.piece.watch.condemned
        ids = self._book.column("clip_id").to_pylist()
        places = [place for place, clip in enumerate(ids) if clip in condemned]
        if places:
            verdicts = [condemned[ids[place]] for place in places]
            tried = pa.array([verdict.attempts for verdict in verdicts])
            self._settle(places, tried, [verdict.outcome() for verdict in verdicts])

    def batch(self, number: int, places: Places) -> pa.Table:
        """The rows of a batch, which is in flight from now on."""
        self.piece.watch.begin(_picked(self._book, places).column("clip_id"))
        self._flying[number] = places
        return _picked(self._rows, places)

    def answer(self, number: int, outcomes: Any) -> None:
        """Settles a batch. Raises StageBug where the outcomes break the contract, StoreError where
        an earlier commit failed."""
        self._settle(self._flying.pop(number), 1, outcomes)

    def abandon(self) -> None:
        """The stage has none of its batches any more, answered or not."""
        for places in self._flying.values():
            self.piece.watch.through(_picked(self._book, places).column("clip_id"))
        self._flying.clear()

    def _settle(self, places: Places, tries: pa.Array | int, outcomes: Any) -> None:
        own = _picked(self._book, places)
        new = settle(self._stage, _tried(own, tries), outcomes)
        self._clock.lap(self.receipt, "process")
        counts = counted(new)
        self.piece.on_rows(self._stage.name, counts)
        self.piece.watch.through(own.column("clip_id"))
        self.receipt.counts += counts
        if self._commits is not None:
            self._commits.take(new, counts)
        self._clock.lap(self.receipt, "commit")

    @property
    def answered(self) -> bool:
        """Whether the stage has nothing of it any more."""
        return self.given and not self._flying

    def begin_commit(self) -> None:
        """Has what is settled committed beside the work."""
        if self._commits is not None:
            self._commits.begin_rest()

    def committed(self) -> bool:
        """Whether all that is settled is committed; if not, that begins."""
        return self._commits is None or self._commits.through()

    def close(self, keep: bool = True) -> None:
        """Commits what is settled, if it is to be kept. Raises StoreError where a commit failed.
        Rows of one that did are pending again, and are taken back from the counts."""
        if self._commits is None:
            return
        try:
            self._commits.close(keep)
        finally:
            if (lost := -self._commits.lost).total:
                self.receipt.counts += lost
                self.piece.on_rows(self._stage.name, lost)
            self._clock.lap(self.receipt, "commit")


def _is_done(view: UnitView, name: str, retry: Retry) -> bool:
    commit = view.current(name)
    if commit is None or commit.counts.pending:
        return False
    return not any(retry.wants(FAILED, reason) for reason in commit.counts.failed)


def _pending(view: UnitView, stage: AnyStage, retry: Retry, part: Part) -> pa.Array:
    """The rows of the view that are to be settled."""
    settled, rows = view.settled(stage.name), view.reached(stage.name)
    outcome = settled.outcome.take(rows)
    wanted = pc.equal(outcome, PENDING)
    if retry.failed:
        known = zip(outcome.to_pylist(), settled.reason.take(rows).to_pylist())
        wanted = pc.or_(wanted, pa.array([retry.wants(*each) for each in known], pa.bool_()))
    number, parts = part
    if parts > 1:
        # By the source's clip: the same for every worker and at every stage, split or not. Or by
        # what the stage reads, where equal rows go together.
        by = settled.key.take(rows) if stage.once else view.source_ids(rows)
        own = [int(each[:8], 16) % parts == number for each in by.to_pylist()]
        wanted = pc.and_(wanted, pa.array(own, pa.bool_()))
    return rows.filter(wanted)


def _picked(table: pa.Table, places: Places) -> pa.Table:
    if isinstance(places, range):
        return table.slice(places.start, len(places))
    return table.take(pa.array(places, pa.int64()))


def _tried(book: pa.Table, times: pa.Array | int) -> pa.Table:
    """The book with so many more attempts."""
    attempts = pc.add(book.column("attempts"), times).cast(pa.int32())
    return book.set_column(2, "attempts", attempts)


class Clock:
    """Adds up the seconds of each phase, in the receipt of the unit that they went to."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, receipt: Receipt, phase: str) -> None:
        now = time.perf_counter()
        receipt.spend(phase, now - self._last)
        self._last = now
