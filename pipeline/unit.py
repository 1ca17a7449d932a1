"""One stage on one unit: read what is pending, process it, commit it. Both runners call this.

It is the whole of what a worker does, in plain Python: no Ray, no printing. Rows are settled by
the stage's own outcomes; an exception is a fault of the stage or of the machine, so it settles
nothing and is handed back in the receipt, and the rows stay pending.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.faults import StoreError, StoreUnusable, halts
from manifests.log import Counts
from manifests.redact import redact, redact_logs, redacted
from manifests.schema import FAILED, OUTCOME, PENDING
from manifests.shards import with_facts
from manifests.store import Store
from manifests.view import Dag, UnitView
from pipeline.settle import AnyStage, StageBug, counted, settle
from pipeline.workers.watch import UNWATCHED, Places, Watch, lanes
from stages.base import StageError, alive, counting, spending

# A unit's rows are committed in parts of about this size, so that latents never pile up in memory.
COMMIT_BYTES = 256 << 20
# And at least so often, so that a crash costs no more than this of a slow stage's work.
COMMIT_SECONDS = 60.0
SIGN_OF_LIFE = 1.0  # seconds between two of them while a commit is waited for
EVERY_CLASS = "all"

Part = tuple[int, int]  # of a unit's clips: number, of how many
WHOLE: Part = (0, 1)
OnRows = Callable[[str, Counts], None]


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
    halts: bool = False  # nothing can be written: other units would fare no better

    def add(self, what: str, n: int) -> None:
        self.amounts[what] = self.amounts.get(what, 0) + n


def run_unit(
    store: Store,
    dag: Dag,
    stage: AnyStage,
    model: Callable[[], Any],
    unit: str,
    retry: Retry = Retry(),
    on_rows: OnRows = lambda stage, counts: None,
    watch: Watch = UNWATCHED,
    part: Part = WHOLE,
) -> Receipt:
    """Settles and commits the pending rows of `unit` at `stage`, or what of them is done when
    `watch` asks to stop.

    `model` gives what the stage's `setup` made; it is called only if a row is pending. Several
    workers may settle one unit side by side, each a `part` of it.
    """
    redact_logs()
    receipt = Receipt(stage.name, unit)
    retry = retry.of(stage)
    clock = _Clock(receipt.seconds)
    try:
        view = UnitView(store, dag, unit)
        if _is_done(view, stage.name, retry):
            return receipt
        settled = view.settled(stage.name)
        pending = _pending(view, stage.name, retry, part)
        rows = view.inputs(stage.name, pending, [*dict.fromkeys((*stage.reads, *stage.carries))])
        book = pa.table(
            {
                "clip_id": rows.column("clip_id"),
                "row_key": settled.key.take(pending),
                "attempts": settled.attempts.take(pending),
            }
        )
        loaded = model() if rows.num_rows else None
        clock.lap("read")
        commits = _Committer(view, stage, loaded, watch, receipt.seconds)
        with spending(clock.add), counting(receipt.add), commits:
            for clips, new in _settled(stage, loaded, book, rows, watch):
                clock.lap("process")
                counts = counted(new)
                on_rows(stage.name, counts)
                watch.through(clips)
                receipt.counts += counts
                commits.take(new, counts)
                if watch.stopping():
                    commits.begin()  # now: to close the stream may take longer than a stop gives
                clock.lap("commit")
            if not rows.num_rows:
                commits.begin()
        clock.lap("commit")
    except (StageError, StoreError) as error:
        receipt.error = redact(str(error))  # a sentence for the user, with its remedy
        receipt.halts = isinstance(error, StoreUnusable)
    except Exception as error:  # noqa: BLE001  the boundary between a stage and the run
        full = halts(error, store.url) if isinstance(error, OSError) else None
        receipt.halts = full is not None
        receipt.error = redact(str(full or f"{type(error).__name__}: {error}").splitlines()[0])
        receipt.trace = None if full else redact(traceback.format_exc())
    return receipt


def _is_done(view: UnitView, name: str, retry: Retry) -> bool:
    commit = view.current(name)
    if commit is None or commit.counts.pending:
        return False
    return not any(retry.wants(FAILED, reason) for reason in commit.counts.failed)


def _pending(view: UnitView, name: str, retry: Retry, part: Part) -> pa.Array:
    """The rows of the view that are to be settled."""
    settled, rows = view.settled(name), view.reached(name)
    outcome = settled.outcome.take(rows)
    wanted = pc.equal(outcome, PENDING)
    if retry.failed:
        known = zip(outcome.to_pylist(), settled.reason.take(rows).to_pylist())
        wanted = pc.or_(wanted, pa.array([retry.wants(*each) for each in known], pa.bool_()))
    number, parts = part
    if parts > 1:
        # By the source's clip: the same for every worker and at every stage, split or not.
        own = [int(clip[:8], 16) % parts == number for clip in view.source_ids(rows).to_pylist()]
        wanted = pc.and_(wanted, pa.array(own, pa.bool_()))
    return rows.filter(wanted)


def _settled(
    stage: AnyStage, model: Any, book: pa.Table, rows: pa.Table, watch: Watch
) -> Iterator[tuple[pa.ChunkedArray, pa.Table]]:
    """Batch by batch, as they are settled, the ids of the rows and what became of them, until
    `watch` asks to stop. `book` has their `clip_id`, `row_key` and `attempts`."""
    ids = book.column("clip_id").to_pylist()
    if not ids:
        return  # there is no model either
    condemned = [i for i, clip in enumerate(ids) if clip in watch.condemned]
    if condemned:
        verdicts = [watch.condemned[ids[i]] for i in condemned]
        own = _picked(book, condemned)
        tried = _tried(own, pa.array([verdict.attempts for verdict in verdicts]))
        outcomes = [verdict.outcome() for verdict in verdicts]
        yield own.column("clip_id"), settle(stage, tried, outcomes)
    for lane in lanes(ids, stage.batch_size, watch):
        yield from _streamed(stage, model, book, rows, lane, watch)
        if watch.stopping():
            return


def _streamed(
    stage: AnyStage,
    model: Any,
    book: pa.Table,
    rows: pa.Table,
    lane: Iterator[Places],
    watch: Watch,
) -> Iterator[tuple[pa.ChunkedArray, pa.Table]]:
    """The same of one lane. Raises StageBug where a batch is answered twice, or not at all."""
    flying: dict[int, Places] = {}

    def fed() -> Iterator[pa.Table]:
        for number, places in enumerate(lane):
            if watch.stopping():
                return
            watch.begin(_picked(book, places).column("clip_id"))
            flying[number] = places
            yield _picked(rows, places)

    with closing(stage.stream(fed(), model)) as answers:
        for number, outcomes in answers:
            if number not in flying:
                raise StageBug(f"{stage.name} answered batch {number}, which is not in flight")
            own = _picked(book, flying.pop(number))
            yield own.column("clip_id"), settle(stage, _tried(own, 1), outcomes)
            if watch.stopping():
                return
    if flying:
        raise StageBug(f"{stage.name} left {len(flying)} batches without an answer")


def _picked(table: pa.Table, places: Places) -> pa.Table:
    if isinstance(places, range):
        return table.slice(places.start, len(places))
    return table.take(pa.array(places, pa.int64()))


def _tried(book: pa.Table, times: pa.Array | int) -> pa.Table:
    """The book with so many more attempts."""
    attempts = pc.add(book.column("attempts"), times).cast(pa.int32())
    return book.set_column(2, "attempts", attempts)


class _Committer:
    """Commits the rows of a unit in parts of about COMMIT_BYTES, and every COMMIT_SECONDS, while
    the next ones are processed; what is left when the block is left, an exception or not: batches
    before a fault are sound."""

    def __init__(
        self,
        view: UnitView,
        stage: AnyStage,
        model: Any,
        watch: Watch,
        seconds: dict[str, float],
    ) -> None:
        self._view, self._stage, self._model = view, stage, model
        self._watch, self._seconds = watch, seconds
        self._done: list[pa.Table] = []
        self._counts, self._bytes = Counts(), 0
        self._began = time.perf_counter()
        self._pool = ThreadPoolExecutor(1)  # its thread starts with the first commit
        self._running: Future[UnitView] | None = None

    def take(self, new: pa.Table, counts: Counts) -> None:
        """Raises StoreError where a commit failed."""
        self._done.append(new)
        self._counts += counts
        self._bytes += new.nbytes
        if self._bytes >= COMMIT_BYTES or time.perf_counter() - self._began >= COMMIT_SECONDS:
            self.begin()

    def begin(self) -> None:
        """Begins to commit what was taken, once the commit before is through."""
        self._wait()
        seconds = dict(self._seconds)
        self._running = self._pool.submit(self._commit, self._done, self._counts, seconds)
        self._done, self._counts, self._bytes = [], Counts(), 0
        self._began = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._wait()
            if self._done and (kind is None or issubclass(kind, Exception)):
                self._commit(self._done, self._counts, self._seconds)
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            # A slow store says nothing of the clips in flight: they are not to be blamed for it.
            while not wait([running], SIGN_OF_LIFE).done:
                alive()
            self._view = running.result()

    def _commit(self, done: list[pa.Table], counts: Counts, seconds: dict[str, float]) -> UnitView:
        view = _commit(self._view, self._stage, self._model, done, seconds)
        self._watch.committed(counts)
        return view


def _commit(
    view: UnitView, stage: AnyStage, model: Any, done: list[pa.Table], seconds: dict[str, float]
) -> UnitView:
    """Commits the rows; returns a view that has seen them.

    Where another worker committed first, the rows that it settled are dropped here and the rest is
    tried again: nothing is lost and nothing stands twice.
    """
    name = stage.name
    schema = pa.schema([*OUTCOME, *stage.adds])
    new = made = pa.concat_tables(done) if done else schema.empty_table()
    while True:
        if len(new) and view.commits(name):
            # What others have settled since this unit was read: a view sees the present.
            new = new.filter(view.untried(name, new))
        if done and not len(new) and view.current(name) is not None:
            return view
        facts = redacted({"stage": stage.identity(), **stage.metadata(model)}) if len(new) else {}
        log = view.dag.log(view.store, name)
        if log.append(
            view.unit,
            len(view.commits(name)),
            view.inputs_state(name),
            view.counts_with(name, new),
            with_facts(stage.packed(new, made), facts) if len(new) else None,
            seconds,
        ):
            return UnitView(view.store, view.dag, view.unit)
        view = UnitView(view.store, view.dag, view.unit)
        done = done or [new]


class _Clock:
    """Adds up the seconds of each phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.add(phase, now - self._last)
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
