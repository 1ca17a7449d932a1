"""The joined view: what every stage has made of every clip of a unit.

A manifest is never stored whole. Each stage commits only its own columns, under the clip's id and
the key of what it read; the view joins them again, by id and key, so a result shows only beside
the inputs that it was made from. Plan, status, the index and `vidpipe show` are all read off it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa

from manifests.log import Commit, Counts, History, Log, standing
from manifests.schema import ABSENT, KEPT, OUTCOME, PENDING, digest, row_keys
from manifests.store import Store

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


@dataclass
class Settled:
    """What one stage has made of each row of the view; None where the row never reached it."""

    key: list[str | None] = field(default_factory=list)
    outcome: list[str | None] = field(default_factory=list)  # kept | rejected | failed | pending
    reason: list[str | None] = field(default_factory=list)
    message: list[str | None] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    place: list[tuple[str, int] | None] = field(default_factory=list)  # data file, row in it

    def take(self, rows: Sequence[int]) -> Settled:
        return Settled(
            [self.key[i] for i in rows],
            [self.outcome[i] for i in rows],
            [self.reason[i] for i in rows],
            [self.message[i] for i in rows],
            [self.attempts[i] for i in rows],
            [self.place[i] for i in rows],
        )


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
            self._commits[name] = self.dag.log(self.store, name).commits(self.unit, history)
        return self._commits[name]

    def inputs_state(self, name: str) -> str:
        """Names the state of everything upstream: equal as long as no row of it can differ."""
        above = self.dag.ancestors[name]
        return digest([[a, *(c.attempt for c in standing(self.commits(a)))] for a in above], 24)

    def current(self, name: str) -> Commit | None:
        """The last commit that was made from the present inputs: its counts hold now."""
        commits = self.commits(name)
        if name == SOURCE_LAYER:
            return commits[-1] if commits else None
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
        settled = self.settled(name)
        for i in self.reached(name):
            counts.add(settled.outcome[i], settled.reason[i])
        return counts

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

    def reached(self, name: str) -> list[int]:
        """The rows of the view that reached the stage, each of its inputs once."""
        settled = self.settled(name)
        ids = self._ids(name)
        rows: dict[str, int] = {}
        for i, outcome in enumerate(settled.outcome):
            if outcome is not None:
                rows.setdefault(ids[i], i)
        return list(rows.values())

    def inputs(self, name: str, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """`clip_id`, as the stage knows it, and `columns` of the rows at `rows`."""
        own = {"clip_id": pa.array(self.ids(name, rows), pa.string())}
        places = pa.array(rows, pa.int64())
        return pa.table(own | {c: self._column(c).take(places) for c in columns})

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of the view; nulls for one of the user's table that this unit's rows lack."""
        if name in self.table.column_names:
            return self.table.column(name)
        return pa.chunked_array([pa.nulls(self.table.num_rows)])

    def ids(self, name: str, rows: Sequence[int]) -> list[str]:
        """The clip ids of the rows at `rows`, as the stage knows them."""
        self.settled(name)
        ids = self._ids(name)
        return [ids[i] for i in rows]

    def _settle_source(self) -> Settled:
        """The last word on each clip; rows that left the table are left out."""
        tables, places = self._data(SOURCE_LAYER)
        ids = [clip for table in tables for clip in table.column("clip_id").to_pylist()]
        outcomes = [outcome for table in tables for outcome in table.column("outcome").to_pylist()]
        last = {clip: i for i, clip in enumerate(ids)}
        rows = sorted(i for i in last.values() if outcomes[i] != ABSENT)
        state = _taken(tables, rows)
        own = [n for n in state.column_names if n not in OUTCOME.names or n == "clip_id"]
        self._table = state.select(own)
        self._clip_ids: list[str] = state.column("clip_id").to_pylist()
        columns = (state.column(n).to_pylist() for n in ("row_key", "outcome", "reason", "message"))
        key, outcome, reason, message = columns
        attempts = state.column("attempts").to_pylist()
        return Settled(key, outcome, reason, message, attempts, [places[i] for i in rows])

    def _settle(self, name: str) -> Settled:
        layer = self.dag.layers[name]
        assert self._table is not None
        table = self._table
        above = [self._settled[need].outcome for need in layer.needs]
        reached = [i for i, known in enumerate(zip(*above)) if all(o == KEPT for o in known)]
        places_reached = pa.array(reached, pa.int64())
        inputs = pa.table({c: self._column(c).take(places_reached) for c in layer.reads})
        keys = row_keys(inputs, layer.reads) if layer.reads else row_keys(table, ())
        ids = self._ids(name)
        state, places = self._state(name)
        found = _last_by_key(state, places)
        n = table.num_rows
        settled = Settled([None] * n, [None] * n, [None] * n, [None] * n, [0] * n, [None] * n)
        at: list[list[int]] = [[] for _ in range(n)]
        outcome, reason, message, attempts = (
            state.column(c).to_pylist() for c in ("outcome", "reason", "message", "attempts")
        )
        for i, key in zip(reached, keys):
            settled.key[i] = key
            at[i] = found.get((ids[i], key), [])
            settled.outcome[i] = PENDING
            if at[i]:
                j = at[i][0]
                settled.outcome[i], settled.reason[i] = outcome[j], reason[j]
                settled.message[i], settled.attempts[i] = message[j], attempts[j]
                settled.place[i] = places[j]
        if layer.splits:
            settled, at = self._split(name, settled, at, state)
        kept = [j[0] if j and o == KEPT else None for j, o in zip(at, settled.outcome)]
        picks = pa.array(kept, pa.int64())
        for column in layer.adds:
            if not pa.types.is_binary(column.type):
                values = state.column(column.name).take(picks)
                self._table = self._table.append_column(column, values)
        return settled

    def _split(
        self, name: str, settled: Settled, at: list[list[int]], state: pa.Table
    ) -> tuple[Settled, list[list[int]]]:
        """Replaces each row that was split by its parts, in the table and in all that is settled;
        the ids from before stay in a column for the stages that never saw the parts."""
        assert self._table is not None
        rows = [i for i, parts in enumerate(at) for _ in (parts or [0])]
        parts = [part for p in at for part in ([[j] for j in p] or [[]])]
        before = self._table.take(pa.array(rows, pa.int64()))
        children = state.column("clip_id").to_pylist()
        ids = [children[p[0]] if p else self._clip_ids[i] for i, p in zip(rows, parts)]
        self._table = before.set_column(
            before.column_names.index("clip_id"), "clip_id", pa.array(ids, pa.string())
        ).append_column(_before(name), before.column("clip_id"))
        self._clip_ids = ids
        self._settled = {n: s.take(rows) for n, s in self._settled.items()}
        return settled.take(rows), parts

    def _ids(self, name: str) -> list[str]:
        """The clip ids as stage `name` knows them: those from before any split that it is not
        downstream of."""
        for other, layer in self.dag.layers.items():
            if layer.splits and other in self._settled and other not in self.dag.ancestors[name]:
                assert self._table is not None
                column: list[str] = self._table.column(_before(other)).to_pylist()
                return column
        return self._clip_ids

    def _state(self, name: str) -> tuple[pa.Table, list[tuple[str, int]]]:
        """All rows ever committed for the unit under this fingerprint, oldest first, without
        payload, and where each stands."""
        tables, places = self._data(name)
        if not tables:
            added = [f for f in self.dag.layers[name].adds if not pa.types.is_binary(f.type)]
            return pa.schema([*OUTCOME, *added]).empty_table(), []
        return pa.concat_tables(tables), places

    def _data(self, name: str) -> tuple[list[pa.Table], list[tuple[str, int]]]:
        """The rows of each commit, without payload, and where each row stands."""
        layer = self.dag.layers[name]
        log = self.dag.log(self.store, name)
        tables: list[pa.Table] = []
        places: list[tuple[str, int]] = []
        for commit in standing(self.commits(name)):
            file = log.data_name(self.unit, commit)
            columns = None
            if name != SOURCE_LAYER:
                added = [f.name for f in layer.adds if not pa.types.is_binary(f.type)]
                columns = [*OUTCOME.names, *added]
            tables.append(self.store.read_parquet(file, columns).replace_schema_metadata(None))
            places += [(file, i) for i in range(tables[-1].num_rows)]
        return tables, places


def _taken(tables: Sequence[pa.Table], rows: Sequence[int]) -> pa.Table:
    """The rows at `rows`, counted over all tables, in ascending order.

    Tables that have none are left out first: a column of the user's table may have had another
    type before, and then no row of that time is current, since its key holds the type.
    """
    first = 0
    parts = []
    for table in tables:
        own = [i - first for i in rows if first <= i < first + table.num_rows]
        if own:
            parts.append(table.take(pa.array(own, pa.int64())))
        first += table.num_rows
    if not parts:
        return tables[-1].slice(0, 0) if tables else pa.schema(OUTCOME).empty_table()
    return pa.concat_tables(parts, promote_options="permissive")


def _last_by_key(
    state: pa.Table, places: Sequence[tuple[str, int]]
) -> dict[tuple[str, str], list[int]]:
    """The rows that hold for each (input id, row key): the last one, or all parts of a split."""
    parents = state.column("parent_id").to_pylist()
    clips = state.column("clip_id").to_pylist()
    keys = state.column("row_key").to_pylist()
    found: dict[tuple[str, str], list[int]] = {}
    for i, (parent, clip, key) in enumerate(zip(parents, clips, keys)):
        rows = found.setdefault((parent or clip, key), [])
        # Parts of a split stand in one file; a later attempt replaces them all.
        if not (rows and parent and parents[rows[-1]] and places[rows[-1]][0] == places[i][0]):
            rows.clear()
        rows.append(i)
    return found


def _before(splitter: str) -> str:
    return f"_before:{splitter}"


def terminal(view: UnitView, stages: Sequence[str]) -> Iterator[tuple[str, str, str | None, str]]:
    """For each row of the view its state after `stages` (in topological order): the stage that
    ended it or the last one, the outcome, the reason and the message."""
    settled = [(name, view.settled(name)) for name in stages]
    settled = [(name, view.settled(name)) for name, _ in settled]  # a split re-indexes all of them
    for i in range(view.table.num_rows):
        name, at = next(
            ((n, s) for n, s in settled if s.outcome[i] not in (KEPT, None)), settled[-1]
        )
        yield name, at.outcome[i] or PENDING, at.reason[i], at.message[i] or ""
