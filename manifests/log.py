"""The commit log: the only truth of a workdir.

    <workdir>/<stage>/<fingerprint>/<unit>/000000.json        a commit, created once
    <workdir>/<stage>/<fingerprint>/<unit>/<attempt>.parquet  the rows that it names
    <workdir>/<stage>/<fingerprint>/snapshots/000000.jsonl    many commits in one object

A worker writes its rows under a name that nobody else uses, then creates the commit object that
names them with their sha256. Creation fails if the object exists, so of two workers one wins and
the other reads what was won. What no commit names does not exist: a crash leaves at most an orphan.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from manifests.schema import FAILED, KEPT, REJECTED
from manifests.store import Store, StoreError

SNAPSHOTS = "snapshots"  # beside the units of a log
# Commits outside of the last snapshot that make another one worth its while.
_LOOSE_COMMITS = 256


@dataclass
class Counts:
    """The account of a stage: `total == kept + Σrejected + Σfailed + pending`, always."""

    total: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    pending: int = 0

    def add(self, outcome: str | None, reason: str | None, rows: int = 1) -> None:
        """Counts `rows`; `outcome` None is pending."""
        self.total += rows
        if outcome == KEPT:
            self.kept += rows
        elif outcome == REJECTED:
            self.rejected[reason or ""] = self.rejected.get(reason or "", 0) + rows
        elif outcome == FAILED:
            self.failed[reason or ""] = self.failed.get(reason or "", 0) + rows
        else:
            self.pending += rows

    def __neg__(self) -> Counts:
        """The same rows taken back."""
        rejected = {reason: -n for reason, n in self.rejected.items()}
        failed = {reason: -n for reason, n in self.failed.items()}
        return Counts(-self.total, -self.kept, rejected, failed, -self.pending)

    def __iadd__(self, other: Counts) -> Counts:
        self.total += other.total
        self.kept += other.kept
        self.pending += other.pending
        for mine, theirs in ((self.rejected, other.rejected), (self.failed, other.failed)):
            for reason, n in theirs.items():
                mine[reason] = mine.get(reason, 0) + n
        return self


@dataclass(frozen=True)
class Commit:
    """One commit object. `inputs` names the state of everything upstream that it was made from;
    `counts` is the account of the whole unit in that state. `data` is None where no row was
    pending: the commit then only says that nothing had to be done. `voids` are attempts whose
    data is no more: their rows are pending again."""

    seq: int
    attempt: str
    inputs: str
    counts: Counts
    data: str | None = None
    sha256: str | None = None
    size: int = 0  # bytes
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    voids: list[str] = field(default_factory=list)
    # What the stage counted for these rows: tokens. Commits of before have none.
    amounts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(self.values(), sort_keys=True).encode()

    def values(self) -> dict[str, Any]:
        """As `from_values` takes them."""
        values = {**vars(self), "counts": vars(self.counts)}
        if not self.amounts:
            del values["amounts"]  # as commits were before there were any
        return values

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        return cls.from_values(json.loads(data))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Commit:
        return cls(**{**values, "counts": Counts(**values["counts"])})


def line_of(unit: str, commits: Sequence[Commit]) -> str:
    """A unit's line of a snapshot."""
    values = {"unit": unit, "commits": [commit.values() for commit in commits]}
    return json.dumps(values, sort_keys=True)


def standing(commits: Sequence[Commit]) -> list[Commit]:
    """The commits whose rows count: those with data that no later commit made void."""
    void = {attempt for commit in commits for attempt in commit.voids}
    return [c for c in commits if c.data is not None and c.attempt not in void]


@dataclass
class History:
    """The commits of one unit as one listing found them: those of the last snapshot, as the JSON
    that stands there, and the names of those that came after it."""

    old: bytes | None = None
    loose: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # data files, with and without a commit


class Log:
    """The commits of one stage under one fingerprint."""

    def __init__(self, store: Store, stage: str, fingerprint: str) -> None:
        self.store = store
        self.stage = stage
        self.fingerprint = fingerprint
        self.prefix = f"{stage}/{fingerprint}"

    def units(self) -> dict[str, History]:
        """Every unit that has commits, as of one listing. The snapshot is read after it, so that
        a commit can't be missing in both."""
        names = self.store.find(self.prefix)
        found: dict[str, History] = {}
        for name in names:
            unit, _, file = name[len(self.prefix) + 1 :].rpartition("/")
            if unit == SNAPSHOTS or "/" in unit:
                continue
            history = found.setdefault(unit, History())
            if file.endswith(".json"):
                history.loose.append(name)
            elif file.endswith(".parquet"):
                history.files.append(file)
        for unit, old in self._snapshot().items():
            found.setdefault(unit, History()).old = old
        return {u: h for u, h in found.items() if h.old is not None or h.loose}

    def commits(self, unit: str, history: History | None = None) -> list[Commit]:
        """The unit's commits in order; `history` saves the listing where it is known.

        A snapshot has the last word on the numbers that it covers: of what stands under those
        outside of it, it holds a copy, or it is by somebody who came after it and saw nothing.
        """
        fresh = history is None
        if history is None:
            listed = self.store.find(f"{self.prefix}/{unit}")
            old = self._snapshot().get(unit)
            history = History(old, [n for n in listed if n.endswith(".json")])
        commits = [] if history.old is None else self._parse(unit, history.old)
        covered = len(commits)
        for name in history.loose:
            if int(name[-11:-5]) >= covered:
                commits.append(self.commit(name))
        gap = next((n for n, commit in enumerate(commits) if commit.seq != n), None)
        if gap is None:
            return commits
        if not fresh:  # a listing made in pages beside a run may lack one that the next one has
            return self.commits(unit)
        raise StoreError(
            f"{self.store.path(self.prefix)}/{unit} has no commit {gap:06d}: "
            "`vidpipe verify --repair` fills its place"
        )

    def compact(self) -> int:
        """Writes a snapshot where many commits stand outside of the last; returns how many it
        holds, 0 where none was needed. What it covers may be collected after a grace period.

        A crash in here, or somebody else's snapshot of the same number, costs nothing.
        """
        # Numbered before anything is listed: of two who compact at once, one has the number, and
        # no snapshot ever knows less than the one before it.
        name = self.next_snapshot()
        lines, total, loose = [], 0, 0
        for unit, history in sorted(self.units().items()):
            commits = self.commits(unit, history)
            covered = 0 if history.old is None else len(self._parse(unit, history.old))
            total += len(commits)
            loose += len(commits) - covered
            lines.append(line_of(unit, commits))
        if loose < max(_LOOSE_COMMITS, total // 4):
            return 0
        self.store.create(name, "\n".join(lines).encode())
        return total

    def next_snapshot(self) -> str:
        """The name after the last one's; those before it may have been collected."""
        names = self.snapshots()
        number = int(names[-1][-12:-6]) + 1 if names else 0
        return f"{self.prefix}/{SNAPSHOTS}/{number:06d}.jsonl"

    def snapshots(self) -> list[str]:
        """The names of all snapshots; the last one counts."""
        found = self.store.find(f"{self.prefix}/{SNAPSHOTS}")
        return [name for name in found if name.endswith(".jsonl")]

    def _snapshot(self) -> Mapping[str, bytes]:
        names = self.snapshots()
        return self.store.snapshot(names[-1]) if names else {}

    def _parse(self, unit: str, line: bytes) -> list[Commit]:
        try:
            return [Commit.from_values(values) for values in json.loads(line)["commits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self.snapshots()[-1], error) from error

    def _damaged(self, name: str, error: Exception) -> StoreError:
        return StoreError(
            f"{self.store.path(name)} is damaged ({type(error).__name__}: {error}). "
            "`vidpipe verify --repair` sets it aside; its rows are then made again."
        )

    def commit(self, name: str) -> Commit:
        """The commit of that name. Raises StoreError, FileNotFoundError."""
        try:
            return Commit.from_json(self.store.read(name))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, error) from error

    def data_name(self, unit: str, commit: Commit) -> str:
        return f"{self.prefix}/{unit}/{commit.data}"

    def append(
        self,
        unit: str,
        seq: int,
        inputs: str,
        counts: Counts,
        table: pa.Table | None,
        seconds: Mapping[str, float] = {},
        voids: Sequence[str] = (),
        amounts: Mapping[str, int] = {},
    ) -> Commit | None:
        """Commits `table` as number `seq`; None if somebody else already has, with nothing left
        behind."""
        attempt = uuid.uuid4().hex[:12]
        data, sha256, length, rows = None, None, 0, 0
        if table is not None:
            data, rows = f"{attempt}.parquet", table.num_rows
            sha256, length = self.store.write_parquet(f"{self.prefix}/{unit}/{data}", table)
        commit = Commit(
            seq, attempt, inputs, counts, data, sha256, length, rows,
            dict(seconds), time.time(), list(voids), dict(amounts),
        )  # fmt: skip
        if self.store.create(f"{self.prefix}/{unit}/{seq:06d}.json", commit.to_json()):
            if table is not None:
                self.store.remember(f"{self.prefix}/{unit}/{data}", table)
            return commit
        if data is not None:
            self.store.delete(f"{self.prefix}/{unit}/{data}")
        return None
