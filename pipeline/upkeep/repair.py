"""`vidpipe verify --repair`: what is damaged is made again by the next run, and nothing else is.

A commit that can't be read is put aside and its number filled, since numbers must have no gaps;
then a commit that makes attempts void has their rows pending again. Each step leaves a log that
readers understand, so a crash in here costs another repair.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace

import pyarrow as pa

from manifests.joins import array, current
from manifests.log import Commit, Counts, Log, line_of, standing
from manifests.scans import SCANS, Scan
from manifests.store import Store, StoreError
from manifests.view import SOURCE_LAYER, tally
from pipeline.dag import Pipeline
from pipeline.upkeep.verify import (
    COMMIT,
    DATA,
    MEDIUM,
    SCAN,
    SNAPSHOT,
    Damage,
    read_log,
    snapshot_lines,
)

# In the place of an attempt that nobody knows any more.
UNKNOWN = "damaged"


def repair(pipeline: Pipeline, damages: Iterable[Damage]) -> None:
    """Has what hangs on `damages` made anew by the next run. Sound files are left as they are."""
    store = pipeline.store
    by_stage: dict[str, list[Damage]] = {}
    for damage in damages:
        by_stage.setdefault(damage.stage, []).append(damage)
    for damage in by_stage.get(SOURCE_LAYER, ()):
        if damage.kind == SCAN:
            _mend_scan(store, damage.file)
    if SOURCE_LAYER in by_stage:
        _read_anew(store)  # first: whatever breaks off after it, the next scan looks at all rows
    for stage, own in by_stage.items():
        log = pipeline.dag.log(store, stage)
        snapshots = [damage.file for damage in own if damage.kind == SNAPSHOT]
        if snapshots:
            _mend_snapshots(log, snapshots)
        voids = _mend_commits(log, [d for d in own if d.kind in (COMMIT, SNAPSHOT)])
        for damage in own:
            if damage.kind in (DATA, MEDIUM):
                voids.setdefault(damage.unit, {}).update(dict.fromkeys(damage.attempts))
            if damage.kind == MEDIUM:
                # Put aside, or the next download would find it there and take it for whole.
                _put_aside(store, damage.file)
        for unit, attempts in sorted(voids.items()):
            _append_void(log, unit, list(attempts))


def _mend_snapshots(log: Log, names: list[str]) -> None:
    """Writes another snapshot of all that can be read, then puts the damaged ones aside."""
    salvage = read_log(log)
    lines = []
    for unit, commits in sorted(salvage.commits.items()):
        if commits:
            whole = [commits.get(n) or _placeholder(n) for n in range(max(commits) + 1)]
            lines.append(line_of(unit, whole))
    if lines:
        log.store.create(log.next_snapshot(), "\n".join(lines).encode())
    for name in names:
        if snapshot_lines(log.store, name)[1] is not None:
            _put_aside(log.store, name)


def _mend_commits(log: Log, damages: list[Damage]) -> dict[str, dict[str, None]]:
    """Fills the numbers of commits that can't be read; returns the units that are to be looked at
    again, each with what is void in it."""
    units = set()
    for damage in damages:
        if damage.kind == COMMIT:
            _put_aside(log.store, damage.file)
            number = int(damage.file[-11:-5])
            log.store.create(damage.file, _placeholder(number).to_json())
            units.add(damage.unit)
    if any(damage.kind == SNAPSHOT for damage in damages):
        every = read_log(log).commits.items()
        units |= {u for u, own in every if any(UNKNOWN in c.voids for c in own.values())}
    return {unit: {UNKNOWN: None} for unit in units}


def _placeholder(number: int) -> Commit:
    return Commit(number, uuid.uuid4().hex[:12], UNKNOWN, Counts(), voids=[UNKNOWN])


def _append_void(log: Log, unit: str, attempts: list[str]) -> None:
    """The last word on the unit: its account is counted anew."""
    while True:
        commits = log.commits(unit)
        counts = Counts()
        if log.stage == SOURCE_LAYER:
            counts = _source_counts(log, unit, commits, set(attempts))
        if log.append(unit, len(commits), "", counts, None, voids=attempts) is not None:
            return


def _source_counts(log: Log, unit: str, commits: list[Commit], void: set[str]) -> Counts:
    """The account of the source's rows that are left: nobody else would count them again."""
    tables = []
    for commit in standing(commits):
        if commit.attempt not in void:
            name = log.data_name(unit, commit)
            tables.append(log.store.read_parquet(name, ["clip_id", "outcome", "reason"]))
    if not tables:
        return Counts()
    state: pa.Table = current(tables)
    return tally(array(state, "outcome"), array(state, "reason"))


def _mend_scan(store: Store, name: str) -> None:
    """An empty record in its place. The units that it named come back with the next scan where it
    was the last one, under the same names; otherwise their rows are taken in as new ones."""
    _put_aside(store, name)
    empty = Scan(UNKNOWN, 0, 0, 0, 0)
    store.create(name, json.dumps(asdict(empty)).encode())


def _read_anew(store: Store) -> None:
    """Has the next scan read the source although it has not changed."""
    while True:
        names = store.find(SCANS)
        names = [name for name in names if name.endswith(".json")]
        if not names:
            return
        last = Scan(**json.loads(store.read(names[-1])))
        unread = replace(last, signature=UNKNOWN, new=0, changed=0, gone=0, units=[])
        record = json.dumps(asdict(unread)).encode()
        if last.signature == UNKNOWN or store.create(f"{SCANS}/{len(names):06d}.json", record):
            return


def _put_aside(store: Store, name: str) -> None:
    """Keeps what is left of the file beside it, for whoever wants to look; `vidpipe gc` collects
    it. What is not there any more needs no place."""
    try:
        store.move(name, f"{name}.{uuid.uuid4().hex[:6]}.damaged")
    except FileNotFoundError:
        return
    except StoreError:
        store.delete(name)
