"""`vidpipe verify`: is everything that the commits name still there, byte for byte?

It reads the workdir with as few assumptions as it can: what no longer parses is a finding, not an
error. `pipeline.upkeep.repair` mends what is found.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow.compute as pc

from manifests.faults import StoreError
from manifests.log import SNAPSHOTS, Commit, Log, standing
from manifests.scans import SCANS, Scan, pool_units
from manifests.schema import KEPT
from manifests.store import Store
from manifests.view import SOURCE_LAYER
from pipeline.dag import Pipeline

DATA, COMMIT, SNAPSHOT, SCAN, MEDIUM = "data", "commit", "snapshot", "scan", "download"
_CHUNK = 8 << 20
# Files that are read at once: a store far away answers one at a time slowly.
_READERS = 8


@dataclass(frozen=True)
class Damage:
    """One file that is not what was committed."""

    kind: str
    stage: str
    unit: str
    file: str  # relative to the workdir
    finding: str
    attempts: tuple[str, ...] = ()  # whose rows hang on it

    def to_json(self) -> dict[str, str]:
        return {n: getattr(self, n) for n in ("kind", "stage", "unit", "file", "finding")}


@dataclass
class Seen:
    """What has been looked at so far."""

    files: int = 0
    bytes: int = 0


@dataclass
class Salvage:
    """What can be read of a log: commits by unit and number, and what can't."""

    commits: dict[str, dict[int, Commit]] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)

    def broken(self) -> dict[str, list[int]]:
        """The numbers that are missing below the last one of each unit that lacks some."""
        gaps = {u: sorted(set(range(max(c) + 1)) - c.keys()) for u, c in self.commits.items() if c}
        return {unit: missing for unit, missing in gaps.items() if missing}


def verify(
    pipeline: Pipeline,
    stages: Sequence[str] = (),
    quick: bool = False,
    progress: Callable[[str, Seen], None] = lambda stage, seen: None,
) -> Iterator[Damage]:
    """Every file of the source and of `stages` (all for none) under the present settings that is
    missing or damaged. `quick` compares lengths and reads no data."""
    names = [SOURCE_LAYER, *(pipeline.upstream(stages) if stages else pipeline.stages)]
    if stages:
        names = [name for name in names if name in (SOURCE_LAYER, *stages)]
    yield from _scans(pipeline.store)
    seen = Seen()
    for name in names:
        log = pipeline.dag.log(pipeline.store, name)
        salvage = read_log(log)
        if name == SOURCE_LAYER:
            salvage.damages += _gone(log, salvage)
        yield from salvage.damages
        # Listed after the commits were read: what they name must be there by now.
        sizes = {file: info.size for file, info in pipeline.store.listing(log.prefix).items()}
        for files in _batches(_named(log, salvage), 64 * _READERS):
            yield from _check_all(pipeline.store, files, sizes, quick, seen)
            progress(name, seen)
        if name == "download":
            yield from _media(log, salvage, quick, seen)
            progress(name, seen)


def _gone(log: Log, salvage: Salvage) -> Iterator[Damage]:
    """Units that a scan took in and of which nothing is left."""
    try:
        pool = pool_units(log.store)
    except StoreError:
        return  # a record that can't be read is told by itself
    for unit in sorted(pool - salvage.commits.keys()):
        name = f"{log.prefix}/{unit}/000000.json"
        yield Damage(COMMIT, log.stage, unit, name, "missing, with all of its unit")


@dataclass(frozen=True)
class _File:
    """What a file should be; `size` and `sha256` None: not known."""

    damage: Damage  # what to report, less the finding
    size: int | None
    sha256: str | None


def read_log(log: Log) -> Salvage:
    """All that can still be read of a log's commits."""
    found = Salvage()
    covered: dict[str, int] = {}
    loose = [n for n in log.store.find(log.prefix) if n.endswith(".json")]
    snapshots = log.snapshots()
    # An older snapshot matters only where the last one is damaged.
    for name in reversed(snapshots):
        lines, bad = snapshot_lines(log.store, name)
        for unit, commits in lines.items():
            if unit not in found.commits:
                found.commits[unit] = dict(enumerate(commits))
                covered[unit] = len(commits)
        if bad is None:
            break
        found.damages.append(Damage(SNAPSHOT, log.stage, "", name, bad))
    for name in loose:
        unit, file = name.rsplit("/", 2)[1:]
        if unit == SNAPSHOTS or not file[:-5].isdigit() or int(file[:-5]) < covered.get(unit, 0):
            continue
        known = found.commits.setdefault(unit, {})
        try:
            known[int(file[:-5])] = Commit.from_json(log.store.read(name))
        except FileNotFoundError:
            continue  # collected meanwhile: a snapshot holds it
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            finding = f"no commit any more ({type(error).__name__})"
            found.damages.append(Damage(COMMIT, log.stage, unit, name, finding))
    told = {damage.file for damage in found.damages}
    for unit, missing in found.broken().items():
        for number in missing:
            name = f"{log.prefix}/{unit}/{number:06d}.json"
            if name not in told and not any(d.kind == SNAPSHOT for d in found.damages):
                found.damages.append(Damage(COMMIT, log.stage, unit, name, "missing"))
    return found


def snapshot_lines(store: Store, name: str) -> tuple[dict[str, list[Commit]], str | None]:
    """The lines of a snapshot that can be read, by unit, and what is wrong with the others."""
    lines: dict[str, list[Commit]] = {}
    bad = 0
    try:
        raw = store.read(name).splitlines()
    except FileNotFoundError:
        return {}, "missing"
    for line in raw:
        try:
            values = json.loads(line)
            lines[values["unit"]] = [Commit.from_values(c) for c in values["commits"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
    if not raw:
        return {}, "empty"
    return lines, f"{bad} of {len(raw)} units can't be read" if bad else None


def _named(log: Log, salvage: Salvage) -> Iterator[_File]:
    """The data files that standing commits name."""
    for unit, commits in sorted(salvage.commits.items()):
        for commit in standing([commits[n] for n in sorted(commits)]):
            name = log.data_name(unit, commit)
            damage = Damage(DATA, log.stage, unit, name, "", (commit.attempt,))
            yield _File(damage, commit.size, commit.sha256)


def _check_all(
    store: Store, files: Sequence[_File], sizes: Mapping[str, int], quick: bool, seen: Seen
) -> Iterator[Damage]:
    """The damaged ones among `files`."""
    with ThreadPoolExecutor(_READERS) as pool:
        for file, finding in zip(files, pool.map(partial(_check, store, sizes, quick), files)):
            seen.files += 1
            seen.bytes += 0 if quick else sizes.get(file.damage.file, 0)
            if finding:
                yield replace(file.damage, finding=finding)


def _check(store: Store, sizes: Mapping[str, int], quick: bool, file: _File) -> str | None:
    """What is wrong with the file; None: nothing."""
    name = file.damage.file
    if name not in sizes:
        return "missing"
    if file.size is not None and sizes[name] != file.size:
        return f"{sizes[name]} bytes, {file.size} were committed"
    if quick or file.sha256 is None:
        return None
    try:
        found = sha256_of(store, name)
    except FileNotFoundError:
        return "missing"
    except StoreError as error:
        return str(error)
    return None if found == file.sha256 else "its sha256 is another than was committed"


def sha256_of(store: Store, name: str) -> str:
    """Raises FileNotFoundError, StoreError."""
    whole = hashlib.sha256()
    with store.opened(name) as file:
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return whole.hexdigest()


def _media(log: Log, salvage: Salvage, quick: bool, seen: Seen) -> Iterator[Damage]:
    """Downloaded files, against the hash and the length that their rows hold. A video that lies
    where the user put it is not ours to check."""
    store = log.store
    for unit, commits in sorted(salvage.commits.items()):
        files: dict[str, _File] = {}
        for commit in standing([commits[n] for n in sorted(commits)]):
            try:
                table = store.read_parquet(
                    log.data_name(unit, commit), ["outcome", "path", "content", "bytes"]
                )
            except StoreError:
                continue  # told already
            kept = table.filter(pc.equal(table.column("outcome"), KEPT))
            for row in kept.to_pylist():
                path = row["path"] or ""
                if path.startswith("media/"):
                    known = files.get(path)
                    before = known.damage.attempts if known else ()
                    attempts = tuple(dict.fromkeys((*before, commit.attempt)))
                    damage = Damage(MEDIUM, log.stage, unit, path, "", attempts)
                    files[path] = _File(damage, row["bytes"], row["content"])
        for some in _batches(files.values(), 64 * _READERS):
            sizes = {n: i.size for f in some for n, i in store.listing(f.damage.file).items()}
            yield from _check_all(store, some, sizes, quick, seen)


def _scans(store: Store) -> Iterator[Damage]:
    for number, name in enumerate(n for n in store.find(SCANS) if n.endswith(".json")):
        try:
            Scan(**json.loads(store.read(name)))
        except (ValueError, TypeError) as error:
            finding = f"no record of a scan any more ({type(error).__name__})"
            yield Damage(SCAN, SOURCE_LAYER, "", name, finding)
        if not name.endswith(f"/{number:06d}.json"):
            yield Damage(SCAN, SOURCE_LAYER, "", f"{SCANS}/{number:06d}.json", "missing")
            return


def _batches(files: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(files)
    while some := list(itertools.islice(iterator, size)):
        yield some
