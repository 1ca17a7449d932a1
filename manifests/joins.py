"""Arrow joins by clip id and row key: which row of what was committed holds for which clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.schema import ABSENT, OUTCOME

# Where a row stands: its data file and its number there.
PLACE_FIELDS = (
    pa.field("_file", pa.dictionary(pa.int32(), pa.string())),
    pa.field("_row", pa.int64()),
)
PLACE = tuple(field.name for field in PLACE_FIELDS)


def array(table: pa.Table, name: str) -> pa.Array:
    """A column as one array."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def taken(values: pa.Array, rows: pa.Array) -> pa.Array:
    """The values at `rows`; without work where that is all of them in order, as it mostly is."""
    if len(rows) == len(values) and not rows.null_count:
        numbers = rows.to_numpy()
        if not len(numbers) or (numbers[0] == 0 and (np.diff(numbers) == 1).all()):
            return values
    return values.take(rows)


def first_of_each(ids: pa.Array) -> Any:
    """The numbers of the rows that are the first of their id, ascending: an int64 NumPy array."""
    return np.sort(np.unique(ids.dictionary_encode().indices.to_numpy(), return_index=True)[1])


def last_of_each(ids: pa.Array) -> Any:
    """The same of the last of each id."""
    codes = ids.dictionary_encode().indices.to_numpy()
    return np.sort(len(codes) - 1 - np.unique(codes[::-1], return_index=True)[1])


def scattered(at: pa.Array, rows: int) -> pa.Int64Array:
    """For each of `rows` places the position in `at` that names it; null where none does."""
    if len(at) == rows:
        return pa.array(np.arange(rows))
    place = np.full(rows, -1, np.int64)
    place[at.to_numpy()] = np.arange(len(at))
    return pa.array(place, mask=place < 0)


def current(tables: Sequence[pa.Table]) -> pa.Table:
    """The last row of each clip over the tables of the source, less those that are absent.

    Tables that have none are left out, and nulls take the type of the newest table: a column of the
    user's may have had another type before, and then no value of that time is current, since the
    row's key holds it.
    """
    if not tables:
        return pa.schema([*OUTCOME, *PLACE_FIELDS]).empty_table()
    if len(tables) == 1 and not pc.any(pc.equal(tables[0].column("outcome"), ABSENT)).as_py():
        return tables[0]  # nearly always: no clip stands twice in one commit
    ids = pa.concat_arrays([array(table, "clip_id") for table in tables])
    outcome = pa.concat_arrays([array(table, "outcome") for table in tables])
    here = np.zeros(len(ids), bool)
    here[last_of_each(ids)] = True
    here &= pc.not_equal(outcome, ABSENT).to_numpy(zero_copy_only=False)
    parts, first = [], 0
    for table in tables:
        own = here[first : first + table.num_rows]
        first += table.num_rows
        if own.any():
            part = table if own.all() else table.filter(pa.array(own))
            parts.append(_retyped(part, tables[-1].schema))
    if not parts:
        return tables[-1].slice(0, 0)
    return pa.concat_tables(parts, promote_options="permissive").unify_dictionaries()


def _retyped(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with its columns of nothing but nulls in the types of `schema`."""
    for i, field in enumerate(table.schema):
        wanted = schema.get_field_index(field.name)
        if wanted >= 0 and table.column(i).null_count == len(table):
            nulls = pa.nulls(len(table), schema.types[wanted])
            table = table.set_column(i, schema.field(wanted), nulls)
    return table


def named(state: pa.Table) -> tuple[pa.Array, pa.Array]:
    """The id, as the stage was given it, and the row key of every row of the state."""
    ids = array(state, "clip_id")
    parents = state.column("parent_id")
    if parents.null_count < len(parents):
        ids = pc.coalesce(array(state, "parent_id"), ids)
    return ids, array(state, "row_key")


def last_of(ids: pa.Array, keys: pa.Array, state: pa.Table) -> pa.Int64Array:
    """For each (id, key) the last row of the state that has them; null where none has."""
    known_ids, known_keys = named(state)
    if known_ids.equals(ids) and known_keys.equals(keys):
        return pa.array(np.arange(len(ids)))  # nearly always: all of a unit in one commit
    n = len(known_ids)
    if not n:
        return pa.nulls(len(ids), pa.int64())
    wanted = pc.binary_join_element_wise(ids, keys, ":")
    there = pc.binary_join_element_wise(known_ids, known_keys, ":")
    # index_in gives the first of equals: the last comes first when all stand in reverse.
    found = pc.index_in(wanted, there.take(pa.array(np.arange(n - 1, -1, -1))))
    return pc.subtract(pa.scalar(n - 1, pa.int64()), found.cast(pa.int64()))


def parts_of(
    ids: pa.Array, keys: pa.Array, state: pa.Table, place: pa.Int64Array
) -> tuple[pa.Array, pa.Array]:
    """The rows of the view anew, a row that was split as often as it has parts, and for each the
    row of the state that holds it. Parts of one attempt stand in one file; the last one counts."""
    found: dict[tuple[str, str], tuple[Any, list[int]]] = {}
    files = array(state, "_file").to_pylist()
    for i, (clip, key) in enumerate(zip(*(column.to_pylist() for column in named(state)))):
        file, parts = found.get((clip, key), (None, []))
        found[clip, key] = (files[i], [*parts, i] if file == files[i] else [i])
    wanted = list(zip(ids.to_pylist(), keys.to_pylist()))
    rows: list[int] = []
    match: list[int | None] = []
    for row, at in enumerate(place.to_pylist()):
        own = [None] if at is None else found.get(wanted[at], (None, [None]))[1]
        rows += [row] * len(own)
        match += own
    return pa.array(rows, pa.int64()), pa.array(match, pa.int64())
