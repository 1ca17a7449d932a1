"""From a table of videos to units: every source row becomes a row of exactly one frozen unit.

The pool of units only grows. A scan compares the table with the pool: new rows make new units, a
changed row is committed again in its old unit, a row that left the table is marked there, and a row
that came back is the row it was. So adding 1,000 videos to a million costs 1,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from manifests import watch
from manifests.credentials import Credentials
from manifests.log import Commit, Counts, Log, standing
from manifests.redact import clean, split_secret
from manifests.schema import ABSENT, KEPT, OUTCOME, REJECTED, SOURCE, clip_id, digest, row_key
from manifests.sources import (
    SourceRow,
    SourceSettings,
    extras_schema,
    read,
    resolve_root,
    signature,
)
from manifests.store import Store, StoreError
from manifests.view import SOURCE_FINGERPRINT, SOURCE_LAYER, Layer

MIN_UNIT, MAX_UNIT = 4, 1024
SCANS = "source/scans"


@dataclass(frozen=True)
class Scan:
    """What reading the source once came to."""

    signature: str  # of the source and how it is read: equal means that nothing can have changed
    rows: int
    new: int
    changed: int
    gone: int
    units: list[str] = field(default_factory=list)  # the new ones
    secrets: int = 0  # rows whose URI holds some: they are in `manifests.credentials`


@dataclass
class _Known:
    """One row of the pool, as small as it gets: there may be millions."""

    unit: str
    key: str
    absent: bool = field(default=False)
    version: str | None = None


def source_layer(extras: pa.Schema | None = None) -> Layer:
    """The source as the first layer of every DAG."""
    own = [f for f in SOURCE if f.name != "clip_id"]
    adds = pa.schema([*own, *(extras or pa.schema([]))])
    return Layer(SOURCE_LAYER, SOURCE_FINGERPRINT, (), adds, ())


def source_log(store: Store) -> Log:
    return Log(store, SOURCE_LAYER, SOURCE_FINGERPRINT)


def unit_size(rows: int) -> int:
    """Rows of a unit, for `rows` new ones: enough units to spread over workers and to lose little
    in a crash, few enough that each is a worthwhile piece of work."""
    if rows <= 512:
        return max(MIN_UNIT, min(64, -(-rows // 8)))
    return max(64, min(MAX_UNIT, rows // 64))


def source_signature(settings: SourceSettings) -> str:
    return digest([settings.model_dump(mode="json"), signature(settings)])


def scans(store: Store) -> list[Scan]:
    """Every scan so far, in order. Raises StoreError for a damaged record."""
    found = []
    for name in store.find(SCANS):
        try:
            found.append(Scan(**json.loads(store.read(name))))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{store.path(name)} is no record of a scan any more ({error}): delete "
                f"{store.path(SCANS)} and {store.path(SOURCE_LAYER)} to have the source read anew"
            ) from error
    return found


def last_scan(store: Store) -> Scan | None:
    return next(reversed(scans(store)), None)


def pool_units(store: Store) -> set[str]:
    """The units that count: those that a scan's record names."""
    return {unit for scan in scans(store) for unit in scan.units}


def scan(
    store: Store,
    settings: SourceSettings,
    size: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    anew: bool = False,
) -> Scan:
    """Brings the pool up to the source; does nothing where neither it nor a file that it names has
    changed since, but for `anew`.

    `size` fixes the rows of a new unit. Raises SourceError for a source that can't be read: then
    the pool is as it was, but for rows that were new and are in the table all the same.
    """
    now = source_signature(settings)
    while True:
        before = scans(store)
        if before and before[-1].signature == now and not anew and not _stale(store, before[-1]):
            return Scan(now, before[-1].rows, 0, 0, 0, secrets=before[-1].secrets)
        done = _scan(store, settings, now, {u for s in before for u in s.units}, size, progress)
        record = json.dumps(asdict(done)).encode()
        if store.create(f"{SCANS}/{len(before):06d}.json", record):
            return done


def _stale(store: Store, last: Scan) -> bool:
    """Whether an unchanged table has to be read all the same."""
    return watch.replaced(store) or (last.secrets > 0 and not Credentials(store.url))


def _scan(
    store: Store,
    settings: SourceSettings,
    now: str,
    units: set[str],
    size: int | None,
    progress: Callable[[int], None],
) -> Scan:
    """Commits what the source has and the pool of `units` has not; says what that was."""
    extras = extras_schema(settings)
    schema = pa.schema([*OUTCOME, *source_layer(extras).adds])
    log = source_log(store)
    known = _pool(log, units)
    changes: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    fresh: list[dict[str, Any]] = []
    rows = changed = 0
    whole: dict[str, str] = {}
    files: dict[str, str | None] = {}
    source = read(settings)
    if settings.kind != "folder":  # whose URIs are names of files, and whose rows have a version
        source = _watched(_public(source, whole), settings, known, files)
    for row in _rows(source, seen):
        rows += 1
        progress(rows)
        old = known.get(row["clip_id"])
        if old is None:
            fresh.append(row)
        elif old.absent or old.key != row["row_key"]:
            changed += 1
            changes.setdefault(old.unit, []).append(row)
    Credentials(store.url).keep(whole.items())  # before any row that needs them counts
    made = []
    for number, batch in enumerate(_batches(fresh, size or unit_size(len(fresh))), len(units)):
        # Numbered, so that units sort as the source does; named by what is in them, so that one
        # of that name from a scan that broke off, or from another driver, is this very unit.
        content = [[row["clip_id"], row["row_key"]] for row in batch]
        made.append(f"{number:06d}-{digest(['unit', *content], 12)}")
        if not log.commits(made[-1]):
            _commit(log, made[-1], batch, schema)
    gone = 0
    for clip, old in known.items():
        if clip not in seen and not old.absent:
            gone += 1
            changes.setdefault(old.unit, []).append(
                _settled({"clip_id": clip}, old.key, ABSENT, "gone", "no longer in the source")
            )
    for unit, batch in changes.items():
        _commit(log, unit, batch, schema)
    watch.remember(store, files.items() if len(files) <= settings.watch else None)
    return Scan(now, rows, len(fresh), changed, gone, made, len(whole))


def _watched(
    source: Iterable[SourceRow],
    settings: SourceSettings,
    known: dict[str, _Known],
    files: dict[str, str | None],
) -> Iterator[SourceRow]:
    """The rows with the versions of the local files that they name, which `files` gets as well."""
    root = resolve_root(settings)
    rows = iter(source)
    while batch := list(islice(rows, 4096)):
        paths = [watch.local_file(row.uri, root) if row.uri else None for row in batch]
        wanted = [path for path in dict.fromkeys(paths) if path is not None]
        found = dict(zip(wanted, watch.versions(wanted)))
        for row, path in zip(batch, paths):
            if path is None:
                yield row
                continue
            version = found[path]
            if version is None and (old := known.get(clip_id(row.uri or "", row.start, row.end))):
                version = old.version  # what was made of it stays, though it is gone
            if len(files) <= settings.watch:
                files[path] = version
            yield row._replace(version=version)


def _public(source: Iterable[SourceRow], whole: dict[str, str]) -> Iterator[SourceRow]:
    """The rows without secrets; `whole` gets the URIs that had some, by what is left of them."""
    for row in source:
        uri, secret = split_secret(row.uri) if row.uri else (row.uri, None)
        if uri is not None and secret is not None:
            whole[uri] = secret
        extras = {k: clean(v) if isinstance(v, str) else v for k, v in row.extras.items()}
        caption = clean(row.caption) if row.caption else row.caption
        yield row._replace(uri=uri, caption=caption, extras=extras, origin=clean(row.origin))


def _rows(source: Iterable[SourceRow], seen: set[str]) -> Iterator[dict[str, Any]]:
    """Source rows with id, key and outcome; a repeated or empty one is rejected under an id of its
    own, so that each row of the table is in the account."""
    first: dict[str, str] = {}
    for source_row in source:
        values = {
            "uri": source_row.uri,
            "caption": source_row.caption,
            "start": source_row.start,
            "end": source_row.end,
            "version": source_row.version,
            **source_row.extras,
        }
        key = row_key(v for pair in sorted(values.items()) for v in pair)
        outcome, reason, message = KEPT, None, None
        own = clip_id(source_row.uri or "", source_row.start, source_row.end)
        if source_row.flaw:
            outcome, reason, message = REJECTED, "unreadable_text", source_row.flaw
        elif not source_row.uri:
            outcome, reason = REJECTED, "no_uri"
            message = f"{source_row.origin} names no video"
        elif not _is_section(source_row.start, source_row.end):
            outcome, reason = REJECTED, "bad_section"
            message = (
                f"{source_row.origin} asks for {source_row.start} s to {source_row.end} s: "
                "a section begins at 0 or later and ends after it begins"
            )
        elif own in first:
            outcome, reason = REJECTED, "duplicate"
            message = f"{source_row.origin} repeats the clip of {first[own]}"
        else:
            first[own] = source_row.origin
        n = 0
        unique = own
        while unique in seen:
            n += 1
            unique = digest(["repeat", own, n], 24)
        seen.add(unique)
        values |= {"clip_id": unique, "origin": source_row.origin}
        yield _settled(values, key, outcome, reason, message)


def _is_section(start: float | None, end: float | None) -> bool:
    begin = start or 0.0
    return begin >= 0 and (end is None or end > begin)


def _settled(
    values: dict[str, Any], key: str, outcome: str, reason: str | None, message: str | None
) -> dict[str, Any]:
    return {
        **values,
        "row_key": key,
        "outcome": outcome,
        "reason": reason,
        "message": message,
        "attempts": 1,
    }


def _pool(log: Log, units: set[str]) -> dict[str, _Known]:
    """Every row that was ever taken in, with its last state."""
    known: dict[str, _Known] = {}
    for unit in units:
        for commit in standing(log.commits(unit)):
            names = ["clip_id", "row_key", "outcome", "version"]
            table = log.store.read_parquet(log.data_name(unit, commit), names)
            for clip, key, outcome, version in zip(*(table.column(n).to_pylist() for n in names)):
                known[clip] = _Known(unit, key, outcome == ABSENT, version)
    return known


def _commit(log: Log, unit: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Appends `rows` to a unit. The counts are those of the whole unit after it."""
    table = pa.Table.from_pylist(rows, schema=schema)
    while True:
        commits = log.commits(unit)
        counts = _counts(log, unit, commits, table)
        if log.append(unit, len(commits), "", counts, table) is not None:
            return
        if not commits:
            return  # another driver took in the same new rows: the unit's name says so


def _counts(log: Log, unit: str, commits: list[Commit], table: pa.Table) -> Counts:
    last: dict[str, tuple[str, str | None]] = {}
    columns = ["clip_id", "outcome", "reason"]
    tables = [log.store.read_parquet(log.data_name(unit, c), columns) for c in standing(commits)]
    for part in (*tables, table.select(columns)):
        for clip, outcome, reason in zip(*(column.to_pylist() for column in part.columns)):
            last[clip] = (outcome, reason)
    counts = Counts()
    for outcome, reason in last.values():
        if outcome != ABSENT:
            counts.add(outcome, reason)
    return counts


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
