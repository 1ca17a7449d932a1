"""The joined view: what every stage has made of every clip of a unit.

A manifest is never stored whole. Each stage commits only its own columns, under the clip's id and
the key of what it read; the view joins them again, by id and key, so a result shows only beside
the inputs that it was made from. Plan, status, the index and `vidpipe show` are all read off it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.joins import (
    PLACE,
    PLACE_FIELDS,
    array,
    current,
    first_of_each,
    last_of,
    named,
    parts_of,
    scattered,
    taken,
)
from manifests.log import Commit, Counts, History, Log, standing
from manifests.schema import FAILED, KEPT, OUTCOME, PENDING, REJECTED, digest, row_keys
from manifests.store import Store, StoreError

SOURCE_LAYER = "source"
SOURCE_FINGERPRINT = "pool"  # one pool of units, whatever table the rows came from


@dataclass(frozen=True)
class Layer:
    """What the view has to know of a stage."""

    name: str
    fingerprint: str
    reads: tuple[str, ...]
    adds: pa.Schema
    needs: tuple[str, ...]  # stages directly upstream; the row must be kept by all of them
    splits: bool = False


@dataclass(frozen=True)
class Dag:
    """Layers by name in topological order, the source first."""

    layers: Mapping[str, Layer]

    @cached_property
    def ancestors(self) -> dict[str, list[str]]:
        """Everything upstream of each layer, in topological order."""
        found: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            above = {a for need in layer.needs for a in (*found[need], need)}
            found[name] = [n for n in self.layers if n in above]
        return found

    def log(self, store: Store, name: str) -> Log:
        return Log(store, name, self.layers[name].fingerprint)


_SETTLED = ("row_key", "outcome", "reason", "message", "attempts", *PLACE)


@dataclass(frozen=True)
class Settled:
    """What one stage has made of each row of the view: arrays as long as it, null where the row
    never reached the stage."""

    key: pa.StringArray
    outcome: pa.StringArray  # kept | rejected | failed | pending
    reason: pa.StringArray
    message: pa.StringArray
    attempts: pa.Int32Array
    file: pa.DictionaryArray  # the data file in which the row stands; null where pending
    row: pa.Int64Array  # its number there

    def take(self, rows: pa.Array) -> Settled:
        return Settled(*(getattr(self, name).take(rows) for name in self.__dataclass_fields__))


def tally(outcome: pa.Array, reason: pa.Array) -> Counts:
    """The account of rows of these outcomes and reasons; a null outcome is no row."""
    counts = Counts()
    for found in pc.value_counts(outcome).to_pylist():
        if found["values"] in (REJECTED, FAILED):
            why = pc.value_counts(reason.filter(pc.equal(outcome, found["values"])))
            for each in why.to_pylist():
                counts.add(found["values"], each["values"], each["counts"])
        elif found["values"] is not None:
            counts.add(found["values"], None, found["counts"])
    return counts


class UnitView:
    """One unit, joined. `listed` is what a listing of each stage found of it; without one the
    unit's folders are listed now. Whatever is committed later stays unseen: a view is one moment.
    """

    def __init__(
        self, store: Store, dag: Dag, unit: str, listed: Mapping[str, History] | None = None
    ) -> None:
        self.store, self.dag, self.unit = store, dag, unit
        self._listed = listed
        self._commits: dict[str, list[Commit]] = {}
        self._settled: dict[str, Settled] = {}
        self._table: pa.Table | None = None

    def commits(self, name: str) -> list[Commit]:
        """All commits of the stage in this unit, in order; `standing` picks those that count."""
        if name not in self._commits:
            history = None if self._listed is None else self._listed.get(name, History())
            commits = self.dag.log(self.store, name).commits(self.unit, history)
            if history is not None:
                self._check_files(name, commits, history)
            self._commits[name] = commits
        return self._commits[name]

    def _check_files(self, name: str, commits: Sequence[Commit], history: History) -> None:
        """Raises StoreError where a data file that counts is no more."""
        there = set(history.files)
        for commit in standing(commits):
            if commit.data not in there:
                file = self.dag.log(self.store, name).data_name(self.unit, commit)
                if not self.store.exists(file):  # it may have come while the listing was made
                    raise StoreError(
                        f"{self.store.path(file)}, which a commit names, is missing: `vidpipe "
                        "verify --repair` marks its rows pending, and the next run makes them anew"
                    )

    def inputs_state(self, name: str) -> str:
        """Names the state of everything upstream: equal as long as no row of it can differ."""
        above = self.dag.ancestors[name]
        return digest([[a, *(c.attempt for c in standing(self.commits(a)))] for a in above], 24)

    def current(self, name: str) -> Commit | None:
        """The last commit that was made from the present inputs: its counts hold now."""
        commits = self.commits(name)
        if name == SOURCE_LAYER:
            # One that names inputs only fills the place of another: its counts are none.
            return commits[-1] if commits and not commits[-1].inputs else None
        state = self.inputs_state(name)
        for commit in reversed(commits):
            if commit.inputs == state:
                return commit
            if commit.data is not None or commit.voids:
                break  # rows were settled since under other inputs: older counts may be short
        return None

    def counts(self, name: str) -> Counts:
        """The account of the stage in this unit. Reads no rows where a commit already has it."""
        commit = self.current(name)
        if commit is not None:
            return commit.counts
        counts = Counts()
        only = self._only_need(name)
        if only is not None and not self.commits(name):
            counts.total = counts.pending = self.counts(only).kept
            return counts
        settled, rows = self.settled(name), self.reached(name)
        return tally(settled.outcome.take(rows), settled.reason.take(rows))

    def counts_with(self, name: str, new: pa.Table) -> Counts:
        """The account of the stage once `new`, rows of its outcomes, are committed."""
        settled, rows = self.settled(name), self.reached(name)
        match = last_of(self.ids(name, rows), settled.key.take(rows), new)
        known = pc.is_valid(match)
        outcome, reason = (
            pc.if_else(known, array(new, c).take(match), getattr(settled, c).take(rows))
            for c in ("outcome", "reason")
        )
        return tally(outcome, reason)

    def untried(self, name: str, new: pa.Table) -> pa.BooleanArray:
        """Which rows of `new` are attempts that nobody has committed yet, nor a later one."""
        settled, rows = self.settled(name), self.reached(name)
        there = pa.table(
            {
                "clip_id": self.ids(name, rows),
                "parent_id": pa.nulls(len(rows), pa.string()),
                "row_key": settled.key.take(rows),
            }
        )
        match = last_of(*named(new), there)
        tried = pc.fill_null(settled.attempts.take(rows).take(match), 0)
        return pc.less(tried, array(new, "attempts"))

    def _only_need(self, name: str) -> str | None:
        """The one stage whose kept rows are exactly this stage's inputs, where there is one."""
        ancestors = self.dag.ancestors
        needs = self.dag.layers[name].needs
        last = [n for n in needs if all(m == n or m in ancestors[n] for m in needs)]
        return last[0] if last and not any(s.splits for s in self.dag.layers.values()) else None

    @property
    def table(self) -> pa.Table:
        """Source columns, and those of the stages settled so far: null where a row was not kept."""
        self.settled(SOURCE_LAYER)
        assert self._table is not None
        return self._table

    def settled(self, name: str) -> Settled:
        if name not in self._settled:
            for need in self.dag.layers[name].needs:
                self.settled(need)
            self._settled[name] = (
                self._settle_source() if name == SOURCE_LAYER else self._settle(name)
            )
        return self._settled[name]

    def reached(self, name: str) -> pa.Array:
        """The rows of the view that reached the stage, each of its inputs once, in order."""
        rows = pc.indices_nonzero(pc.is_valid(self.settled(name).outcome))
        if not any(layer.splits for layer in self.dag.layers.values()):
            return rows
        return rows.take(pa.array(first_of_each(self._ids(name).take(rows))))

    def inputs(self, name: str, rows: pa.Array, columns: Sequence[str]) -> pa.Table:
        """`clip_id`, as the stage knows it, and `columns` of the rows at `rows`."""
        own = {"clip_id": self.ids(name, rows)}
        return pa.table(own | {c: self._column(c).take(rows) for c in columns})

    def ids(self, name: str, rows: pa.Array) -> pa.StringArray:
        """The clip ids of the rows at `rows`, as the stage knows them."""
        self.settled(name)
        return self._ids(name).take(rows)

    def source_ids(self, rows: pa.Array) -> pa.StringArray:
        """The ids of the source's clips that the rows at `rows` are, or are parts of."""
        split = [n for n, layer in self.dag.layers.items() if layer.splits and n in self._settled]
        return taken(array(self.table, _before(split[0]) if split else "clip_id"), rows)

    def _column(self, name: str) -> pa.Array:
        """A column of the view; nulls for one of the user's table that this unit's rows lack."""
        if name in self.table.column_names:
            return array(self.table, name)
        return pa.nulls(self.table.num_rows)

    def _settle_source(self) -> Settled:
        """The last word on each clip; rows that left the table are left out."""
        tables = [self._read(SOURCE_LAYER, c, None) for c in standing(self.commits(SOURCE_LAYER))]
        state = current(tables)
        own = [n for n in state.column_names if n not in (*OUTCOME.names, *PLACE) or n == "clip_id"]
        self._table = state.select(own)
        return Settled(*(array(state, n) for n in _SETTLED))

    def _settle(self, name: str) -> Settled:
        layer, n = self.dag.layers[name], self.table.num_rows
        reached = pa.scalar(True)
        for need in layer.needs:
            kept = pc.equal(self._settled[need].outcome, KEPT)
            reached = pc.and_(reached, pc.fill_null(kept, False))
        at = pc.indices_nonzero(reached)
        keys = self._keys(name, at)
        ids = taken(self._ids(name), at)
        state = self.state(name)
        if layer.splits:
            rows, match = parts_of(ids, keys, state, scattered(at, n))
            self._split(name, rows, match, state)
            reached, place = reached.take(rows), scattered(at, n).take(rows)
            keys = keys.take(place)
        else:
            match = last_of(ids, keys, state)
            if len(at) < n:
                place = scattered(at, n)
                keys, match = keys.take(place), match.take(place)
        reason, message, attempts, file, row = (
            taken(array(state, column), match) for column in _SETTLED[2:]
        )
        outcome = taken(array(state, "outcome"), match)
        if outcome.null_count:  # what is not known of a row that reached the stage is pending
            nothing = pa.scalar(None, pa.string())
            outcome = pc.if_else(reached, pc.fill_null(outcome, PENDING), nothing)
            attempts = pc.fill_null(attempts, 0)
        kept = pc.fill_null(pc.equal(outcome, KEPT), False)
        if not pc.all(kept).as_py():
            match = pc.if_else(kept, match, pa.scalar(None, pa.int64()))
        for column in layer.adds:
            if not pa.types.is_binary(column.type):
                values = taken(array(state, column.name), match)
                self._table = self.table.append_column(column, values)
        return Settled(keys, outcome, reason, message, attempts, file, row)

    def _keys(self, name: str, at: pa.Array) -> pa.StringArray:
        """The row keys of the rows at `at`, which reached the stage."""
        layer = self.dag.layers[name]

        def find() -> pa.StringArray:
            inputs = pa.table({c: taken(self._column(c), at) for c in layer.reads} or {"": at})
            return row_keys(inputs, layer.reads)

        # What is upstream decides them: the stages after this one need not hash it all again. Only
        # a split beside it, which makes other rows of the view, is not upstream.
        if any(self.dag.layers[n].splits for n in self._settled):
            return find()
        key = ("keys", name, layer.fingerprint, self.unit, self.inputs_state(name))
        return self.store.recall(key, find)

    def _split(self, name: str, rows: pa.Array, match: pa.Array, state: pa.Table) -> None:
        """Replaces each row that was split by its parts, in the table and in all that is settled;
        the ids from before stay in a column for the stages that never saw the parts."""
        before = self.table.take(rows)
        whole = array(before, "clip_id")
        ids = pc.coalesce(array(state, "clip_id").take(match), whole)
        place = before.column_names.index("clip_id")
        self._table = before.set_column(place, "clip_id", ids).append_column(_before(name), whole)
        self._settled = {n: s.take(rows) for n, s in self._settled.items()}

    def _ids(self, name: str) -> pa.StringArray:
        """The clip ids as stage `name` knows them: those from before any split that it is not
        downstream of."""
        for other, layer in self.dag.layers.items():
            if layer.splits and other in self._settled and other not in self.dag.ancestors[name]:
                return array(self.table, _before(other))
        return array(self.table, "clip_id")

    def state(self, name: str) -> pa.Table:
        """All rows that stand for the unit under this fingerprint, oldest first, without payload,
        and where each stands."""
        added = [f for f in self.dag.layers[name].adds if not pa.types.is_binary(f.type)]
        columns = [*OUTCOME.names, *(f.name for f in added)]
        tables = [self._read(name, c, columns) for c in standing(self.commits(name))]
        if not tables:
            return pa.schema([*OUTCOME, *added, *PLACE_FIELDS]).empty_table()
        return pa.concat_tables(tables).unify_dictionaries()

    def _read(self, name: str, commit: Commit, columns: Sequence[str] | None) -> pa.Table:
        file = self.dag.log(self.store, name).data_name(self.unit, commit)
        table = self.store.read_parquet(file, columns)
        n = table.num_rows
        where = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([file]))
        place = (where, pa.array(np.arange(n)))
        for field, values in zip(PLACE_FIELDS, place):
            table = table.append_column(field, values)
        return table


def _before(splitter: str) -> str:
    return f"_before:{splitter}"


def ends(view: UnitView, stages: Sequence[str]) -> pa.Table:
    """For each row of the view its state after `stages` (in topological order): `stage`, which
    ended it or is the last one, `outcome`, `reason` and `message`."""
    for name in stages:
        view.settled(name)
    columns = ("outcome", "reason", "message")
    last = view.settled(stages[-1])
    n = view.table.num_rows
    stage = pa.array([stages[-1]] * n, pa.string())
    ended = {c: getattr(last, c) for c in columns}
    for name in reversed(stages):
        settled = view.settled(name)  # only now: a split re-indexes all of them
        here = pc.fill_null(pc.not_equal(settled.outcome, KEPT), False)
        stage = pc.if_else(here, pa.scalar(name), stage)
        ended = {c: pc.if_else(here, getattr(settled, c), ended[c]) for c in columns}
    ended["outcome"] = pc.fill_null(ended["outcome"], PENDING)
    return pa.table({"stage": stage, **ended})
