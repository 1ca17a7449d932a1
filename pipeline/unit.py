"""One stage on one unit: read what is pending, process it, commit it. Both runners call this.

It is the whole of what a worker does, in plain Python: no Ray, no printing. Rows are settled by
the stage's own outcomes; an exception is a fault of the stage or of the machine, so it settles
nothing and is handed back in the receipt, and the rows stay pending.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.faults import StoreError, StoreUnusable, halts
from manifests.joins import first_of_each
from manifests.log import Counts
from manifests.redact import redact, redact_logs, redacted, sentence
from manifests.schema import FAILED, KEPT, OUTCOME, PENDING, REJECTED
from manifests.shards import with_facts
from manifests.store import Store
from manifests.view import Dag, UnitView, tally
from pipeline.workers.watch import UNWATCHED, Batch, Watch, batches
from stages.base import Failed, Outcome, Rejected, Row, Stage, StageError

# A unit's rows are committed in parts of about this size, so that latents never pile up in memory.
COMMIT_BYTES = 256 << 20
# And at least so often, so that a crash costs no more than this of a slow stage's work.
COMMIT_SECONDS = 60.0
EVERY_CLASS = "all"

AnyStage = Stage[Any, Any]
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
    """What a worker hands back: counts of the rows it settled, and seconds. Never payload."""

    stage: str
    unit: str
    counts: Counts = field(default_factory=Counts)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # one line, where the stage raised
    trace: str | None = None
    halts: bool = False  # nothing can be written: other units would fare no better


class StageBug(Exception):
    """A stage broke its contract: outcomes that don't match the rows, or columns of other types."""


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
        done: list[pa.Table] = []
        for batch in batches(book.column("clip_id").to_pylist(), stage.batch_size, watch):
            if watch.stopping():
                break
            own = _picked(book, batch)
            ids = own.column("clip_id").to_pylist()
            outcomes: Sequence[Outcome] | pa.Table
            tries: Any = 1
            if batch.condemned:
                verdicts = [watch.condemned[clip] for clip in ids]
                outcomes = [verdict.outcome() for verdict in verdicts]
                tries = pa.array([verdict.attempts for verdict in verdicts])
            else:
                watch.begin(ids)
                try:
                    outcomes = stage.process_table(_picked(rows, batch), loaded)
                except Exception:
                    if done:  # the batches before it are sound
                        _commit(view, stage, loaded, done, receipt.seconds)
                        watch.committed()
                    raise
            clock.lap("process")
            attempts = pc.add(own.column("attempts"), tries).cast(pa.int32())
            new = settle(stage, own.set_column(2, "attempts", attempts), outcomes)
            counts = _tally(new)
            on_rows(stage.name, counts)
            receipt.counts += counts
            done.append(new)
            size = sum(table.nbytes for table in done)
            if size >= COMMIT_BYTES or clock.since("commit") >= COMMIT_SECONDS:
                view = _commit(view, stage, loaded, done, receipt.seconds)
                watch.committed()
                clock.lap("commit")
                done = []
        if done or not rows.num_rows:
            _commit(view, stage, loaded, done, receipt.seconds)
            watch.committed()
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


def _picked(table: pa.Table, batch: Batch) -> pa.Table:
    places = batch.places
    if isinstance(places, range):
        return table.slice(places.start, len(places))
    return table.take(pa.array(places, pa.int64()))


def settle(stage: AnyStage, book: pa.Table, outcomes: Sequence[Outcome] | pa.Table) -> pa.Table:
    """The outcomes of a batch as rows of the stage's manifest: OUTCOME and the columns it adds.

    `book` has the rows' `clip_id`, `row_key` and `attempts`. Raises StageBug where the outcomes
    break the contract.
    """
    schema = pa.schema([*OUTCOME, *stage.adds])
    if len(outcomes) != len(book):
        raise StageBug(f"{stage.name} gave {len(outcomes)} outcomes for {len(book)} rows")
    try:
        if isinstance(outcomes, pa.Table):
            given = {"outcome": KEPT, **{n: book.column(n) for n in book.column_names}}
            given |= {name: outcomes.column(name) for name in outcomes.column_names}
            return _whole(stage, given, len(book), schema)
        records = list(_records(stage, book.to_pylist(), outcomes))
        return pa.Table.from_pylist(records, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise StageBug(
            f"{stage.name} gave a value of another type than declared: {error}"
        ) from error


def _whole(stage: AnyStage, given: dict[str, Any], rows: int, schema: pa.Schema) -> pa.Table:
    """A table of `schema` from the columns that are given; raises StageBug for one that is not."""
    columns = []
    for column in schema:
        values = given.get(column.name)
        if values is None and column.name in stage.adds.names:
            raise StageBug(f"{stage.name} declares a column {column.name!r} and left it out")
        if isinstance(values, pa.Array | pa.ChunkedArray):
            columns.append(values.cast(column.type))
        else:
            columns.append(pa.repeat(pa.scalar(values, column.type), rows))
    table = pa.table(columns, schema=schema)
    silent = pc.and_(pc.not_equal(table["outcome"], KEPT), pc.is_null(table["reason"]))
    if pc.any(silent).as_py():
        clip = table["clip_id"].filter(silent)[0]
        raise StageBug(f"{stage.name} gave no reason why it did not keep clip {clip}")
    return table


def _records(stage: AnyStage, book: Sequence[Row], outcomes: Sequence[Outcome]) -> Iterator[Row]:
    for base, outcome in zip(book, outcomes, strict=True):
        clip = base["clip_id"]
        match outcome:
            case Rejected("" | None) | Failed("" | None):
                raise StageBug(f"{stage.name} gave no reason why it did not keep clip {clip}")
            case Rejected(reason, message):
                yield {**base, "outcome": REJECTED, **_said(reason, message)}
            case Failed(error, message):
                yield {**base, "outcome": FAILED, **_said(error, message)}
            case dict():
                yield {**base, "outcome": KEPT, **_added(stage, outcome)}
            case list() if stage.splits and outcome:
                for part in outcome:
                    own = {"clip_id": part["clip_id"], "parent_id": clip}
                    yield {**base, **own, "outcome": KEPT, **_added(stage, part)}
            case _:
                raise StageBug(
                    f"{stage.name} gave a {type(outcome).__name__} for clip {clip}: "
                    "a row, Rejected or Failed is expected"
                    + (", or a list of rows that is not empty" if stage.splits else "")
                )


def _said(reason: str, message: str) -> Row:
    """A stage's words as they are committed: whatever library they come from, without secrets."""
    return {"reason": sentence(reason), "message": sentence(message)}


def _added(stage: AnyStage, row: Row) -> Row:
    try:
        return {name: row[name] for name in stage.adds.names}
    except KeyError as error:
        raise StageBug(f"{stage.name} declares a column {error} and left it out") from error


def _tally(new: pa.Table) -> Counts:
    """Counts of inputs settled: the parts of a split are one."""
    parents = new.column("parent_id")
    if parents.null_count < len(parents):
        ids = pc.coalesce(parents, new.column("clip_id")).combine_chunks()
        new = new.take(pa.array(first_of_each(ids)))
    return tally(*(new.column(c).combine_chunks() for c in ("outcome", "reason")))


def _commit(
    view: UnitView, stage: AnyStage, model: Any, done: list[pa.Table], seconds: dict[str, float]
) -> UnitView:
    """Commits the rows; returns a view that has seen them.

    Where another worker committed first, the rows that it settled are dropped here and the rest is
    tried again: nothing is lost and nothing stands twice.
    """
    name = stage.name
    schema = pa.schema([*OUTCOME, *stage.adds])
    new = pa.concat_tables(done) if done else schema.empty_table()
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
            with_facts(new, facts) if len(new) else None,
            seconds,
        ):
            return UnitView(view.store, view.dag, view.unit)
        view = UnitView(view.store, view.dag, view.unit)
        done = done or [new]


class _Clock:
    """Adds up the seconds of each phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._start = self._last = time.perf_counter()
        self._ends: dict[str, float] = {}

    def since(self, phase: str) -> float:
        """Seconds since the last lap of that phase, or since the start."""
        return time.perf_counter() - self._ends.get(phase, self._start)

    def lap(self, phase: str) -> None:
        now = self._ends[phase] = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
