"""The workdir: objects that are created once, whole and durable, and Parquet files.

Local paths and NFS use a temporary file, fsync and `os.link`; any other fsspec store must have a
conditional put (`mode="create"`: If-None-Match on S3 and GCS).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

# A loader reads whole row groups: large enough for sequential reads, small enough for a few in RAM.
ROW_GROUP_BYTES = 16 << 20
# Data files never change, so a stage need not read again what the one before it has just written.
_CACHE_BYTES = 64 << 20


class StoreError(Exception):
    """The workdir can't be used as it is; the message says what, why and what to do."""


class Store:
    """A workdir: a folder, or a prefix of any fsspec store. Paths are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"workdir {url} can't be used: {error}") from error
        self.local = "file" in _protocols(self.fs)
        self._tables = _Tables()
        self._snapshots: dict[str, tuple[str, dict[str, bytes]]] = {}

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
        if self.local:
            return sorted(_walk(self.path(prefix), prefix))
        try:
            paths = self.fs.find(self.path(prefix))
        except FileNotFoundError:
            return []
        cut = len(self.root) + 1
        return sorted(path[cut:] for path in paths)

    def snapshot(self, name: str) -> Mapping[str, bytes]:
        """The lines of a snapshot by unit. Snapshots never change: the last of each log is kept."""
        log = name.rsplit("/", 1)[0]
        kept = self._snapshots.get(log)
        if kept is None or kept[0] != name:
            lines = self.read(name).splitlines()
            kept = (name, {_unit_of(line): line for line in lines})
            self._snapshots[log] = kept
        return kept[1]

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

    def remember(self, name: str, table: pa.Table) -> None:
        """Spares `read_parquet` the file that was just written, for all columns but payload."""
        light = [f.name for f in table.schema if not pa.types.is_binary(f.type)]
        self._tables.put(name, light, table.select(light).replace_schema_metadata(None))

    def read_parquet(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Raises StoreError, naming the file, where it is missing or damaged."""
        known = self._tables.get(name, columns)
        if known is not None:
            return known
        try:
            with self.fs.open(self.path(name), "rb") as file:
                # A unit's columns are small: handing them to threads takes longer than they do.
                read = pq.ParquetFile(file).read(columns and list(columns), use_threads=False)
                table = read.replace_schema_metadata(None)
                self._tables.put(name, columns, table)
                return table
        except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
            raise StoreError(
                f"{self.path(name)}, which a commit names, can't be read: {error}. "
                "Delete that unit's folder (of the source: source/scans too) to have it made again."
            ) from error


def _unit_of(line: bytes) -> str:
    """The unit of a snapshot's line: it ends with it, as keys are sorted. Parsing the rest waits
    until it is asked for."""
    return line[:-2].rpartition(b'"unit": "')[2].decode()


class _Tables:
    """Small tables read last, by file and columns."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, tuple[str, ...] | None], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, name: str, columns: Sequence[str] | None) -> pa.Table | None:
        key = (name, None if columns is None else tuple(columns))
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, name: str, columns: Sequence[str] | None, table: pa.Table) -> None:
        if table.nbytes > _CACHE_BYTES // 8:
            return
        key = (name, None if columns is None else tuple(columns))
        with self._lock:
            self._bytes += table.nbytes - getattr(self._tables.pop(key, None), "nbytes", 0)
            self._tables[key] = table
            while self._bytes > _CACHE_BYTES:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes


def _walk(path: str, name: str) -> Iterator[str]:
    """The names of all files below `path`, which `name` stands for. What goes meanwhile is gone."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                own = f"{name}/{entry.name}" if name else entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(entry.path, own)
                else:
                    yield own
    except FileNotFoundError:
        return
    except NotADirectoryError:
        yield name


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
