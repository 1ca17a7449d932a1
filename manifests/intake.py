"""From a table of videos to units: every source row becomes a row of exactly one frozen unit.

The pool of units only grows. A scan compares the table with the pool: new rows make new units, a
changed row is committed again in its old unit, a row that left the table is marked there, and a row
that came back is the row it was. So adding 1,000 videos to a million costs 1,000.

Nothing here grows with the rows but a byte for each: the table is read in Arrow batches and spilled
to a temporary folder, parted by clip id, and compared with the pool one part at a time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests import local_files
from manifests.credentials import Credentials
from manifests.joins import array, current, scattered
from manifests.ledger import Ledger
from manifests.log import Log, standing
from manifests.reconcile import (
    CHANGED,
    CLAIM,
    KNOWN,
    NEW,
    STAGED,
    between,
    compare,
    repeated,
    spill_pool,
)
from manifests.redact import cleaned, part
from manifests.scans import SCANS, Scan, scans, which
from manifests.schema import (
    KEPT,
    OUTCOME,
    REJECTED,
    SOURCE,
    clip_ids,
    digest,
    row_keys,
)
from manifests.sources import SourceSettings, extras_schema, read_tables, resolve_root, signature
from manifests.store import Store
from manifests.view import SOURCE_FINGERPRINT, SOURCE_LAYER, Layer, tally

MIN_UNIT, MAX_UNIT = 64, 8192
BEGUN = "begun-"
_ROWS = 1 << 16  # rows that are judged and spilled at once


def source_layer(extras: pa.Schema | None = None) -> Layer:
    """The source as the first layer of every DAG."""
    own = [f for f in SOURCE if f.name != "clip_id"]
    adds = pa.schema([*own, *(extras or pa.schema([]))])
    return Layer(SOURCE_LAYER, SOURCE_FINGERPRINT, (), adds, ())


def source_log(store: Store) -> Log:
    return Log(store, SOURCE_LAYER, SOURCE_FINGERPRINT)


def unit_size(rows: int) -> int:
    """Rows of a unit, for `rows` new ones: many, as each costs a few files a stage, and a worker's
    model waits where one begins. Workers share units by parts, and slow work is committed within
    them."""
    return max(MIN_UNIT, min(MAX_UNIT, rows // 16))


def source_signature(settings: SourceSettings) -> str:
    return digest([settings.model_dump(mode="json"), signature(settings)])


def scan(
    store: Store,
    settings: SourceSettings,
    size: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    anew: bool = False,
    written: SourceSettings | None = None,
) -> Scan:
    """Brings the pool up to the source; does nothing where neither it nor a file that it names has
    changed since, but for `anew`.

    `size` fixes the rows of a new unit; `progress` is told the rows read so far. `written`: the
    settings with paths as the user wrote them, for the record. Raises SourceError for a source that
    can't be read: then the pool is as it was.
    """
    now = source_signature(settings)
    source, path = which(written or settings)
    while True:
        broken_off = _begun(store)
        before = scans(store)
        same = bool(before) and before[-1].signature == now and not broken_off
        if same and not anew and not _stale(store, before[-1]):
            done = replace(before[-1], new=0, changed=0, gone=0, units=[], source=source, path=path)
            if before[-1].source == source or _record(store, len(before), done):
                return done
            continue
        units = {unit for scan in before for unit in scan.units}
        mark = f"{SCANS}/{BEGUN}{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory(prefix="vidpipe-scan-") as folder:
            done = _scan(store, settings, now, units, size, progress, Path(folder), mark)
        done = replace(done, source=source, path=path)
        if _record(store, len(before), done):
            for name in (*broken_off, mark):
                store.delete(name)
            return done


def found_pool(store: Store, units: Mapping[str, pa.Table]) -> None:
    """Makes the pool of an empty store: units, by name, of rows that another pool has."""
    for name, rows in units.items():
        _commit(source_log(store), name, rows)
    rows = sum(map(len, units.values()))
    _record(store, 0, Scan("", rows, rows, 0, 0, list(units)))


def _record(store: Store, number: int, done: Scan) -> bool:
    """Whether it became the record of that number; False: another driver's did."""
    return store.create(f"{SCANS}/{number:06d}.json", json.dumps(asdict(done)).encode())


def _begun(store: Store) -> list[str]:
    """The marks of scans that have begun to change rows of the pool and have no record yet: under
    way, or broken off, and then what they changed may be true of no table any more."""
    return [name for name in store.find(SCANS) if name.startswith(f"{SCANS}/{BEGUN}")]


def _stale(store: Store, last: Scan) -> bool:
    """Whether an unchanged table has to be read all the same."""
    return local_files.replaced(store) or (last.secrets > 0 and not Credentials(store.url))


def _scan(
    store: Store,
    settings: SourceSettings,
    now: str,
    units: set[str],
    size: int | None,
    progress: Callable[[int], None],
    folder: Path,
    mark: str,
) -> Scan:
    """Commits what the source has and the pool of `units` has not; says what that was."""
    schema = pa.schema([*OUTCOME, *source_layer(extras_schema(settings)).adds])
    log = source_log(store)
    with (
        Ledger(folder / "staged", "clip_id", STAGED) as staged,
        Ledger(folder / "known", "clip_id", KNOWN) as known,
        Ledger(folder / "claims", "clip_id", CLAIM) as claims,
        Ledger(folder / "changes", "unit", schema.append(pa.field("unit", pa.string()))) as changes,
    ):
        source = _Public(store, settings)
        rows = _stage(source, schema, folder / "rows.parquet", staged, progress)
        repeats = repeated(staged)
        claims.add(repeats)
        spill_pool(log, units, known)
        verdict, where, gone = compare(staged, claims, known, repeats, changes, rows)
        new, changed = (int(np.count_nonzero(verdict == what)) for what in (NEW, CHANGED))
        made: list[str] = []
        fresh = _fresh(folder / "rows.parquet", verdict, repeats, where, changes)
        for batch in _cut(fresh, size or unit_size(new)):
            # Numbered, so that units sort as the source does; named by what is in them, so that one
            # of that name from a scan that broke off, or from another driver, is this very unit.
            made.append(f"{len(units) + len(made):06d}-{_content(batch)}")
            if not standing(log.commits(made[-1])):
                _commit(log, made[-1], batch)
        if changes.rows:
            store.create(mark, b"")
        for bucket in changes.buckets():
            for unit in pc.unique(bucket.column("unit")).to_pylist():
                own = bucket.filter(pc.equal(bucket.column("unit"), unit))
                _commit(log, unit, own.drop_columns("unit"))
    source.files.save(store)
    return Scan(now, rows, new, changed, gone, made, source.secrets)


class _Public:
    """The source's rows without secrets: these go to `manifests.credentials`, before any row that
    needs them counts. And with the versions of the local files that they name."""

    def __init__(self, store: Store, settings: SourceSettings) -> None:
        self._credentials, self._settings = Credentials(store.url), settings
        self.secrets = 0
        self.files = local_files.Files(store, resolve_root(settings), settings.watch)

    def __iter__(self) -> Iterator[pa.Table]:
        for table in read_tables(self._settings):
            if self._settings.kind == "folder":  # whose URIs are names of files
                yield table
                continue
            uris, pairs = part(array(table, "uri"))
            self._credentials.keep(pairs)
            self.secrets += len(pairs)
            parted = {
                f.name: cleaned(array(table, f.name))
                for f in table.schema
                if pa.types.is_string(f.type) and f.name != "uri"
            }
            parted |= {"uri": uris, "version": self.files.versions(uris)}
            columns = [parted.get(n, table.column(n)) for n in table.column_names]
            yield pa.table(columns, schema=table.schema)


def _stage(
    source: Iterable[pa.Table],
    schema: pa.Schema,
    file: Path,
    staged: Ledger,
    progress: Callable[[int], None],
) -> int:
    """Writes the source's rows, judged one by one, to `file`, and the ids that they claim to
    `staged`; returns how many there are."""
    rows = 0
    with pq.ParquetWriter(file, schema, compression="lz4") as writer:
        for batch in _cut(source, _ROWS):
            table = judge(batch, schema)
            numbers = pa.array(np.arange(rows, rows + len(table)))
            rows += len(table)
            writer.write_table(table)
            staged.add(
                table.select(["clip_id", "row_key", "origin"])
                .append_column("number", numbers)
                .append_column("kept", pc.equal(table.column("outcome"), KEPT))
            )
            progress(rows)
    return rows


def judge(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Source rows as rows of the source's manifest: with id and key; rejected where they name no
    video, no section of one, or a caption that can't be read."""
    uri, start, end, flaw = (array(table, n) for n in ("uri", "start", "end", "flaw"))
    begin = pc.fill_null(start, 0.0)
    section = pc.and_(pc.greater_equal(begin, 0.0), pc.fill_null(pc.greater(end, begin), True))
    reason = pc.case_when(
        pc.make_struct(pc.is_valid(flaw), pc.is_null(uri), pc.invert(section)),
        "unreadable_text", "no_uri", "bad_section",
    )  # fmt: skip
    message = pa.nulls(len(table), pa.string())
    if reason.null_count < len(table):
        told = zip(*(c.to_pylist() for c in (reason, array(table, "origin"), start, end, flaw)))
        message = pa.array([_told(*each) for each in told], pa.string())
    values = sorted(name for name in table.column_names if name not in ("flaw", "origin"))
    # The columns' names are in the key: the same values under another name are another row.
    named = table.append_column("", pa.repeat(digest(values), len(table)))
    own = {
        "clip_id": clip_ids(pc.fill_null(uri, ""), start, end),
        "parent_id": pa.nulls(len(table), pa.string()),
        "row_key": row_keys(named, ["", *values]),
        "outcome": pc.if_else(pc.is_valid(reason), pa.scalar(REJECTED), pa.scalar(KEPT)),
        "reason": reason,
        "message": message,
        "attempts": pa.repeat(pa.scalar(1, pa.int32()), len(table)),
    }
    columns = [own[f.name] if f.name in own else table.column(f.name).cast(f.type) for f in schema]
    return pa.table(columns, schema=schema)


def _told(
    reason: str | None, origin: str, start: float | None, end: float | None, flaw: str | None
) -> str | None:
    match reason:
        case "unreadable_text":
            return flaw
        case "no_uri":
            return f"{origin} names no video"
        case "bad_section":
            return (
                f"{origin} asks for {start} s to {end} s: "
                "a section begins at 0 or later and ends after it begins"
            )
    return None


def _fresh(
    file: Path, verdict: np.ndarray, repeats: pa.Table, where: pa.Table, changes: Ledger
) -> Iterator[pa.Table]:
    """The new rows in the source's order; those that have changed go to `changes`."""
    first = 0
    with pq.ParquetFile(file) as parquet:
        # One group after the other: a reader of batches keeps what it has read until its end.
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            last = first + len(table)
            table = _renamed(table, between(repeats, first, last), first)
            own = verdict[first:last]
            altered = between(where, first, last)
            if len(altered):
                rows = pc.subtract(altered.column("number"), first)
                units = altered.column("unit")
                changes.add(table.take(rows).append_column("unit", units))
            if own.any():
                yield table if (own == NEW).all() else table.filter(pa.array(own == NEW))
            first = last


def _renamed(table: pa.Table, repeats: pa.Table, first: int) -> pa.Table:
    """The rows with the repeats among them under their own ids, and rejected."""
    if not len(repeats):
        return table
    at = pc.subtract(repeats.column("number"), first).combine_chunks()
    place = scattered(at, len(table))
    twice = pc.is_valid(array(repeats, "message").take(place))
    changed = {
        "clip_id": pc.coalesce(array(repeats, "clip_id").take(place), array(table, "clip_id")),
        "outcome": pc.if_else(twice, pa.scalar(REJECTED), array(table, "outcome")),
        "reason": pc.if_else(twice, pa.scalar("duplicate"), array(table, "reason")),
        "message": pc.coalesce(array(repeats, "message").take(place), array(table, "message")),
    }
    columns = [changed.get(f.name, table.column(f.name)) for f in table.schema]
    return pa.table(columns, schema=table.schema)


def _cut(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size`; the last may be shorter."""
    waiting: list[pa.Table] = []
    there = 0
    for table in tables:
        waiting.append(table)
        there += len(table)
        if there >= size:
            whole = pa.concat_tables(waiting)
            cut = there - there % size
            for start in range(0, cut, size):
                yield whole.slice(start, size).combine_chunks()
            waiting, there = [whole.slice(cut)], there - cut
    if there:
        yield pa.concat_tables(waiting).combine_chunks()


def _content(batch: pa.Table) -> str:
    """12 digits of a hash over the clips and their keys."""
    whole = hashlib.sha256()
    for name in ("clip_id", "row_key"):
        whole.update("".join(batch.column(name).to_pylist()).encode())
    return whole.hexdigest()[:12]


def _commit(log: Log, unit: str, rows: pa.Table) -> None:
    """Appends `rows` to a unit. The counts are those of the whole unit after it."""
    while True:
        commits = log.commits(unit)
        tables = [log.store.read_parquet(log.data_name(unit, c)) for c in standing(commits)]
        columns = ["clip_id", "outcome", "reason"]
        state = current([table.select(columns) for table in (*tables, rows)])
        counts = tally(array(state, "outcome"), array(state, "reason"))
        if log.append(unit, len(commits), "", counts, rows) is not None:
            return
        if not standing(commits):
            return  # another driver took in the same new rows: the unit's name says so
