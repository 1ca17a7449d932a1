"""What a stage made of a batch, as rows of its manifest: its outcomes checked and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.joins import first_of_each
from manifests.log import Counts
from manifests.redact import sentence
from manifests.schema import FAILED, KEPT, OUTCOME, REJECTED
from manifests.view import tally
from stages.base import Failed, Outcome, Rejected, Row, Stage

AnyStage = Stage[Any, Any]


class StageBug(Exception):
    """A stage broke its contract: outcomes that don't match the rows, or columns of other types."""


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


def counted(new: pa.Table) -> Counts:
    """Counts of inputs settled: the parts of a split are one."""
    parents = new.column("parent_id")
    if parents.null_count < len(parents):
        ids = pc.coalesce(parents, new.column("clip_id")).combine_chunks()
        new = new.take(pa.array(first_of_each(ids)))
    return tally(*(new.column(c).combine_chunks() for c in ("outcome", "reason")))
