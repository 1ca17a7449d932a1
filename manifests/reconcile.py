"""The source's rows against the pool of those that were ever taken in: what is new, changed, gone.

Both are parted by clip id (`manifests.ledger`) and compared one part at a time, so that memory
grows with what differs and with nothing else but a byte for each row.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.joins import array, last_of_each
from manifests.ledger import Ledger
from manifests.log import Log, standing
from manifests.schema import ABSENT, digest

_PART = 1 << 16  # rows of the pool that are spilled at once

CLAIM = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("row_key", pa.string()),
        pa.field("number", pa.int64()),  # of the row in the source
    ]
)
STAGED = pa.schema([*CLAIM, pa.field("kept", pa.bool_()), pa.field("origin", pa.string())])
KNOWN = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("row_key", pa.string()),
        pa.field("outcome", pa.string()),
        pa.field("unit", pa.string()),
    ]
)
# What a row of the source is to the pool.
UNCHANGED, NEW, CHANGED = range(3)


def repeated(staged: Ledger) -> pa.Table:
    """The rows whose id another row has too, under ids of their own, so that each row of the table
    is in the account: `CLAIM`, and `message` where a clip is repeated. In the source's order.

    The first that is kept has the id; without one, the first.
    """
    found: list[pa.Table] = []
    for bucket in staged.buckets():
        codes = array(bucket, "clip_id").dictionary_encode().indices.to_numpy()
        if not len(codes) or int(codes.max()) + 1 == len(codes):
            continue
        kept = array(bucket, "kept").to_numpy(zero_copy_only=False)
        order = np.lexsort((np.arange(len(codes)), ~kept, codes))
        first = np.r_[True, codes[order][1:] != codes[order][:-1]]
        group = np.flatnonzero(first)[np.cumsum(first) - 1]  # where each one's group begins
        again = np.arange(len(order)) - group
        owners, others = order[group[~first]], order[~first]
        table, owner = bucket.take(pa.array(others)), bucket.take(pa.array(owners))
        ids = [
            digest(["repeat", own, n], 24)
            for own, n in zip(table.column("clip_id").to_pylist(), again[~first].tolist())
        ]
        message = pc.binary_join_element_wise(
            table.column("origin"), owner.column("origin"), " repeats the clip of "
        )
        twice = table.column("kept")  # a row that was rejected for itself stays so
        found.append(
            pa.table(
                {
                    "clip_id": ids,
                    "row_key": table.column("row_key"),
                    "number": table.column("number"),
                    "message": pc.if_else(twice, message, pa.scalar(None, pa.string())),
                }
            )
        )
    if not found:
        return CLAIM.append(pa.field("message", pa.string())).empty_table()
    return pa.concat_tables(found).sort_by("number").combine_chunks()


def spill_pool(log: Log, units: set[str], known: Ledger) -> None:
    """Spills every row that was ever taken in, in the order of its commits."""
    waiting: list[pa.Table] = []
    listed = log.units() if units else {}
    for unit in sorted(units & listed.keys()):
        for commit in standing(log.commits(unit, listed[unit])):
            name = log.data_name(unit, commit)
            table = log.store.read_parquet(name, ["clip_id", "row_key", "outcome"])
            waiting.append(table.append_column("unit", pa.repeat(unit, len(table))))
        if sum(map(len, waiting)) >= _PART:
            known.add(pa.concat_tables(waiting))
            waiting = []
    if waiting:
        known.add(pa.concat_tables(waiting))


def compare(
    staged: Ledger,
    claims: Ledger,
    known: Ledger,
    repeats: pa.Table,
    changes: Ledger,
    rows: int,
) -> tuple[np.ndarray, pa.Table, int]:
    """What each row of the source is to the pool; the units of those that have changed, as `number`
    and `unit`; and how many rows of the pool have left the source: these are among the changes."""
    where = [pa.table({"number": pa.array([], pa.int64()), "unit": pa.array([], pa.string())})]
    if not known.rows:
        return np.full(rows, NEW, np.uint8), where[0], 0
    verdict = np.zeros(rows, np.uint8)
    again = pa.array(repeats.column("number"))
    gone = 0
    for here, renamed, there in zip(staged.buckets(), claims.buckets(), known.buckets()):
        if len(again):
            here = here.filter(pc.invert(pc.is_in(here.column("number"), again)))
        here = pa.concat_tables([here.select(CLAIM.names), renamed]).combine_chunks()
        there = _last_words(there)
        match = pc.index_in(here.column("clip_id"), there.column("clip_id"))
        old = there.take(match)
        absent = pc.equal(old.column("outcome"), ABSENT)
        other = pc.not_equal(old.column("row_key"), here.column("row_key"))
        altered = pc.fill_null(pc.or_(absent, other), False)
        numbers = here.column("number").to_numpy()
        verdict[numbers[pc.is_null(match).to_numpy()]] = NEW
        verdict[numbers[altered.to_numpy()]] = CHANGED
        units = {"number": here.column("number"), "unit": old.column("unit")}
        where.append(pa.table(units).filter(altered))
        seen = pc.is_in(there.column("clip_id"), here.column("clip_id").combine_chunks())
        lost = pc.and_(pc.invert(seen), pc.not_equal(there.column("outcome"), ABSENT))
        gone += _mark_gone(there.filter(lost), changes)
    return verdict, pa.concat_tables(where).sort_by("number").combine_chunks(), gone


def _last_words(known: pa.Table) -> pa.Table:
    """The last row of each clip."""
    last = last_of_each(array(known, "clip_id"))
    return known if len(last) == len(known) else known.take(pa.array(last))


def _mark_gone(lost: pa.Table, changes: Ledger) -> int:
    values = {
        "clip_id": lost.column("clip_id"),
        "row_key": lost.column("row_key"),
        "unit": lost.column("unit"),
        "outcome": pa.repeat(ABSENT, len(lost)),
        "reason": pa.repeat("gone", len(lost)),
        "message": pa.repeat("no longer in the source", len(lost)),
        "attempts": pa.repeat(pa.scalar(1, pa.int32()), len(lost)),
    }
    columns = [values.get(f.name, pa.nulls(len(lost), f.type)) for f in changes.schema]
    changes.add(pa.table(columns, names=changes.schema.names))
    return len(lost)


def between(table: pa.Table, first: int, last: int) -> pa.Table:
    """The rows whose `number` is in first..last; they stand in its order."""
    numbers = table.column("number").to_numpy()
    start, end = np.searchsorted(numbers, [first, last])
    return table.slice(start, end - start)
