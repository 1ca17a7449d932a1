"""The commit log: the only truth of a workdir.

    <workdir>/<stage>/<fingerprint>/<unit>/000000.json        a commit, created once
    <workdir>/<stage>/<fingerprint>/<unit>/<attempt>.parquet  the rows that it names

A worker writes its rows under a name that nobody else uses, then creates the commit object that
names them with their sha256. Creation fails if the object exists, so of two workers one wins and
the other reads what was won. What no commit names does not exist: a crash leaves at most an orphan.

Local paths and NFS use a temporary file, fsync and `os.link`; any other fsspec store must have a
conditional put (`mode="create"`: If-None-Match on S3 and GCS).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.schema import FAILED, KEPT, REJECTED

# A loader reads whole row groups: large enough for sequential reads, small enough for a few in RAM.
ROW_GROUP_BYTES = 16 << 20


class StoreError(Exception):
    """The workdir can't be used as it is; the message says what, why and what to do."""


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


class Store:
    """A workdir: a folder, or a prefix of any fsspec store. Paths are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"workdir {url} can't be used: {error}") from error
        self.local = "file" in _protocols(self.fs)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def create(self, name: str, data: bytes) -> bool:
        """Creates the object whole and durable; False if another one of that name is there."""
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return self._is_ours(name, data)
            except (TypeError, NotImplementedError, ValueError) as error:
                raise StoreError(
                    f"{self.url} has no conditional put, so commits there could overwrite each "
                    "other: use a local or NFS folder, S3, GCS or another store that has one"
                ) from error
            return True
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                _sync(file)
            try:
                os.link(part, path)
            except FileExistsError:
                return self._is_ours(name, data)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def _is_ours(self, name: str, data: bytes) -> bool:
        """Whether what stands there is what was just put: a retry after a lost reply meets its own
        object. Commits bear an attempt's id, so equal bytes are the same attempt."""
        return self.read(name) == data

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def find(self, prefix: str) -> list[str]:
        """The names of all objects under `prefix`, sorted; empty where there are none."""
        try:
            paths = self.fs.find(self.path(prefix))
        except FileNotFoundError:
            return []
        cut = len(self.root) + 1
        return sorted(path[cut:] for path in paths)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def write_parquet(self, name: str, table: pa.Table) -> tuple[str, int]:
        """Writes the rows durably; returns the file's sha256 (hex) and its length in bytes.

        Payload (binary columns) is neither compressed nor dictionary-encoded: latents are noise.
        """
        if self.local:
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
        payload = {f.name for f in table.schema if pa.types.is_binary(f.type)}
        rest = [n for n in table.column_names if n not in payload]
        row_bytes = table.nbytes / max(1, table.num_rows)
        with self.fs.open(self.path(name), "wb") as file:
            hashed = _HashingFile(file)
            pq.write_table(
                table,
                hashed,
                compression={n: "none" if n in payload else "zstd" for n in table.column_names},
                use_dictionary=rest,
                write_statistics=rest,
                row_group_size=max(1, int(ROW_GROUP_BYTES // max(1.0, row_bytes))),
            )
            if self.local:
                _sync(file)
        return hashed.sha256.hexdigest(), hashed.length

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises StoreError, naming the file, where it is missing or damaged."""
        try:
            with self.fs.open(self.path(name), "rb") as file:
                return pq.ParquetFile(file).read(columns=columns)
        except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
            raise StoreError(
                f"{self.path(name)}, which a commit names, can't be read: {error}. "
                "Delete that unit's folder (of the source: source/scans too) to have it made again."
            ) from error


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
                "Delete its folder to have that unit made again."
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


class _HashingFile:
    """Passes writes on and hashes them: no second read of what may be gigabytes."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sha256.update(view)
        self.length += view.nbytes
        self._file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The owner of the wrapped file closes it."""

    def tell(self) -> int:
        return self.length

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
