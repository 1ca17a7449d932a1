"""The commit log: the only truth of a workdir.

    <workdir>/<stage>/<fingerprint>/<unit>/000000.json        a commit, created once
    <workdir>/<stage>/<fingerprint>/<unit>/<attempt>.parquet  the rows that it names

A worker writes its rows under a name that nobody else uses, then creates the commit object that
names them with their sha256. Creation fails if the object exists, so of two workers one wins and
the other reads what was won. What no commit names does not exist: a crash leaves at most an orphan.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from manifests.faults import StoreError as StoreError
from manifests.faults import StoreUnusable as StoreUnusable
from manifests.objects import Store as Store
from manifests.schema import FAILED, KEPT, REJECTED


@dataclass
class Counts:
    """The account of a stage: `total == kept + Σrejected + Σfailed + pending`, always."""

    total: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    pending: int = 0

    def add(self, outcome: str | None, reason: str | None) -> None:
        """Counts one row; `outcome` None is a pending one."""
        self.total += 1
        if outcome == KEPT:
            self.kept += 1
        elif outcome == REJECTED:
            self.rejected[reason or ""] = self.rejected.get(reason or "", 0) + 1
        elif outcome == FAILED:
            self.failed[reason or ""] = self.failed.get(reason or "", 0) + 1
        else:
            self.pending += 1

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
    pending: the commit then only says that nothing had to be done."""

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

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        values = json.loads(data)
        return cls(**{**values, "counts": Counts(**values["counts"])})


class Log:
    """The commits of one stage under one fingerprint."""

    def __init__(self, store: Store, stage: str, fingerprint: str) -> None:
        self.store = store
        self.stage = stage
        self.fingerprint = fingerprint
        self.prefix = f"{stage}/{fingerprint}"

    def units(self) -> dict[str, list[str]]:
        """Every unit that has commits, with the names of these in their order."""
        found: dict[str, list[str]] = {}
        for name in self.store.find(self.prefix):
            if name.endswith(".json"):
                found.setdefault(name.rsplit("/", 2)[1], []).append(name)
        return found

    def commits(self, unit: str, names: Iterable[str] | None = None) -> list[Commit]:
        """The unit's commits in order; `names` saves the listing where it is known."""
        if names is None:
            names = [n for n in self.store.find(f"{self.prefix}/{unit}") if n.endswith(".json")]
        return [self._commit(name) for name in names]

    def _commit(self, name: str) -> Commit:
        try:
            return Commit.from_json(self.store.read(name))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.store.path(name)} is no commit any more ({type(error).__name__}: {error}). "
                "`vidpipe verify --repair` puts it aside, and that unit is made again."
            ) from error

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
    ) -> Commit | None:
        """Commits `table` as number `seq`; None if somebody else already has, with nothing left
        behind."""
        attempt = uuid.uuid4().hex[:12]
        data, sha256, length, rows = None, None, 0, 0
        if table is not None:
            data, rows = f"{attempt}.parquet", table.num_rows
            sha256, length = self.store.write_parquet(f"{self.prefix}/{unit}/{data}", table)
        commit = Commit(
            seq, attempt, inputs, counts, data, sha256, length, rows, dict(seconds), time.time()
        )
        if self.store.create(f"{self.prefix}/{unit}/{seq:06d}.json", commit.to_json()):
            return commit
        if data is not None:
            self.store.delete(f"{self.prefix}/{unit}/{data}")
        return None
