"""One stage on one unit: read what is pending, process it, commit it. Both runners call this.

It is the whole of what a worker does, in plain Python: no Ray, no printing. Rows are settled by
the stage's own outcomes; an exception is a fault of the stage or of the machine, so it settles
nothing and is handed back in the receipt, and the rows stay pending.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from manifests.log import Counts
from manifests.schema import FAILED, KEPT, OUTCOME, PENDING, REJECTED
from manifests.shards import with_facts
from manifests.store import Store
from manifests.view import Dag, UnitView
from pipeline.watch import UNWATCHED, Watch, batches
from stages.base import Failed, Outcome, Rejected, Row, Stage, StageError

# A unit's rows are committed in parts of about this size, so that latents never pile up in memory.
COMMIT_BYTES = 256 << 20

AnyStage = Stage[Any, Any]
OnRows = Callable[[str, Counts], None]


@dataclass(frozen=True)
class Retry:
    """Which failed rows are to be tried again: all, or those of some failure classes."""

    failed: bool = False
    classes: frozenset[str] = frozenset()

    def wants(self, outcome: str | None, reason: str | None) -> bool:
        return outcome == FAILED and self.failed and (not self.classes or reason in self.classes)


@dataclass
class Receipt:
    """What a worker hands back: counts of the rows it settled, and seconds. Never payload."""

    stage: str
    unit: str
    counts: Counts = field(default_factory=Counts)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # one line, where the stage raised
    trace: str | None = None


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
) -> Receipt:
    """Settles and commits the pending rows of `unit` at `stage`, or what of them is done when
    `watch` asks to stop.

    `model` gives what the stage's `setup` made; it is called only if a row is pending.
    """
    receipt = Receipt(stage.name, unit)
    clock = _Clock(receipt.seconds)
    try:
        view = UnitView(store, dag, unit)
        if _is_done(view, stage.name, retry):
            return receipt
        settled = view.settled(stage.name)
        pending = [
            i
            for i in view.reached(stage.name)
            if settled.outcome[i] == PENDING or retry.wants(settled.outcome[i], settled.reason[i])
        ]
        wanted = dict.fromkeys((*stage.reads, *stage.carries))
        rows = view.inputs(stage.name, pending, list(wanted)).to_pylist()
        loaded = model() if rows else None
        clock.lap("read")
        records: list[Row] = []
        size = 0
        for batch in batches([row["clip_id"] for row in rows], stage.batch_size, watch):
            if watch.stopping():
                break
            ids = [rows[i]["clip_id"] for i in batch.places]
            tries = [1] * len(ids)
            outcomes: Sequence[Outcome]
            if batch.condemned:
                verdicts = [watch.condemned[clip] for clip in ids]
                outcomes = [verdict.outcome() for verdict in verdicts]
                tries = [verdict.attempts for verdict in verdicts]
            else:
                watch.begin(ids)
                outcomes = stage.process([rows[i] for i in batch.places], loaded)
            clock.lap("process")
            at = [pending[i] for i in batch.places]
            keys = [(settled.key[i] or "", settled.attempts[i] + n) for i, n in zip(at, tries)]
            new = list(_records(stage, ids, keys, outcomes))
            counts = _tally(new)
            on_rows(stage.name, counts)
            receipt.counts += counts
            records += new
            size += sum(len(v) for r in new for v in r.values() if isinstance(v, bytes))
            if size >= COMMIT_BYTES:
                view = _commit(view, stage, loaded, records, receipt.seconds)
                watch.committed()
                clock.lap("commit")
                records, size = [], 0
        if records or not rows:
            _commit(view, stage, loaded, records, receipt.seconds)
            watch.committed()
            clock.lap("commit")
    except StageError as error:
        receipt.error = str(error)  # a sentence for the user, with its remedy
    except Exception as error:  # noqa: BLE001  the boundary between a stage and the run
        receipt.error = f"{type(error).__name__}: {error}".splitlines()[0]
        receipt.trace = traceback.format_exc()
    return receipt


def _is_done(view: UnitView, name: str, retry: Retry) -> bool:
    commit = view.current(name)
    if commit is None or commit.counts.pending:
        return False
    return not any(retry.wants(FAILED, reason) for reason in commit.counts.failed)


def _records(
    stage: AnyStage,
    ids: Sequence[str],
    keys: Sequence[tuple[str, int]],
    outcomes: Sequence[Outcome],
) -> Iterator[Row]:
    """Outcomes as rows of the commit's table. Raises StageBug where they break the contract."""
    if len(outcomes) != len(ids):
        raise StageBug(f"{stage.name} gave {len(outcomes)} outcomes for {len(ids)} rows")
    for clip, (key, attempts), outcome in zip(ids, keys, outcomes, strict=True):
        base = {"clip_id": clip, "row_key": key, "attempts": attempts}
        match outcome:
            case Rejected("" | None) | Failed("" | None):
                raise StageBug(f"{stage.name} gave no reason why it did not keep clip {clip}")
            case Rejected(reason, message):
                yield {**base, "outcome": REJECTED, "reason": reason, "message": message}
            case Failed(error, message):
                yield {**base, "outcome": FAILED, "reason": error, "message": message}
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


def _added(stage: AnyStage, row: Row) -> Row:
    try:
        return {name: row[name] for name in stage.adds.names}
    except KeyError as error:
        raise StageBug(f"{stage.name} declares a column {error} and left it out") from error


def _tally(records: Sequence[Row]) -> Counts:
    """Counts of inputs settled: the parts of a split are one."""
    counts = Counts()
    last = None
    for record in records:
        parent = record.get("parent_id")
        if parent is None or parent != last:
            counts.add(record["outcome"], record.get("reason"))
        last = parent
    return counts


def _commit(
    view: UnitView, stage: AnyStage, model: Any, records: list[Row], seconds: dict[str, float]
) -> UnitView:
    """Commits the records; returns a view that has seen them.

    Where another worker committed first, the rows that it settled are dropped here and the rest is
    tried again: nothing is lost and nothing stands twice.
    """
    name = stage.name
    while True:
        table = _table(stage, model, records) if records else None
        counts = _account(view, name, records)
        log = view.dag.log(view.store, name)
        seq = len(view.commits(name))
        if log.append(view.unit, seq, view.inputs_state(name), counts, table, seconds):
            return UnitView(view.store, view.dag, view.unit)
        view = UnitView(view.store, view.dag, view.unit)
        settled = view.settled(name)
        rows = view.reached(name)
        ids = view.ids(name, rows)
        tried = {(clip, settled.key[i]): settled.attempts[i] for clip, i in zip(ids, rows)}
        records = [r for r in records if tried.get(_input(r), 0) < r["attempts"]]
        if not records and view.current(name) is not None:
            return view


def _input(record: Row) -> tuple[str, str]:
    return record.get("parent_id") or record["clip_id"], record["row_key"]


def _account(view: UnitView, name: str, records: Sequence[Row]) -> Counts:
    """The account of the unit once the records are committed."""
    settled = view.settled(name)
    new = {_input(r): (r["outcome"], r.get("reason")) for r in records}
    rows = view.reached(name)
    counts = Counts()
    for clip, i in zip(view.ids(name, rows), rows):
        known = (settled.outcome[i], settled.reason[i])
        counts.add(*new.get((clip, settled.key[i] or ""), known))
    return counts


def _table(stage: AnyStage, model: Any, records: Sequence[Row]) -> pa.Table:
    schema = pa.schema([*OUTCOME, *stage.adds])
    try:
        table = pa.Table.from_pylist(list(records), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise StageBug(
            f"{stage.name} gave a value of another type than declared: {error}"
        ) from error
    return with_facts(table, {"stage": stage.identity(), **stage.metadata(model)})


class _Clock:
    """Adds up the seconds of each phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
