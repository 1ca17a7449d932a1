"""The workdir: objects that are created once, whole and durable, and Parquet files.

Local paths and NFS use a temporary file, fsync and `os.link`; any other fsspec store must have a
conditional put (`mode="create"`: If-None-Match on S3 and GCS). Listings are never cached: what
another process has committed must be seen.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from manifests import durable
from manifests.faults import StoreError as StoreError
from manifests.faults import StoreUnusable as StoreUnusable
from manifests.faults import unusable
from manifests.redact import redact

# A loader reads whole row groups: large enough for sequential reads, small enough for a few in RAM.
ROW_GROUP_BYTES = 16 << 20
# Data files never change, so a stage need not read again what the one before it has just written.
_CACHE_BYTES = 64 << 20
_WORDS = ("outcome", "reason")


@dataclass(frozen=True)
class Listed:
    """What a listing tells of an object."""

    size: int  # bytes
    modified: float  # seconds since the epoch; infinite where the store does not say


class Store:
    """A workdir: a folder, or a prefix of any fsspec store. Paths are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(f"workdir {redact(url)} can't be used: {error}") from error
        self.local = "file" in _protocols(self.fs)
        self._recent = _Recent()
        self._snapshots: dict[str, tuple[str, dict[str, bytes]]] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def create(self, name: str, data: bytes) -> bool:
        """Creates the object whole and durable; False if another one of that name is there."""
        if not self.local:
            return self._create_remote(name, data)
        path = Path(self.path(name))
        with self._told("write", name), durable.part_of(path, data) as part:
            try:
                durable.link(part, path)
            except FileExistsError:
                return self._is_ours(name, data)
            durable.sync_folder(path.parent)
        return True

    def _create_remote(self, name: str, data: bytes, tries: int = 4) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except (TypeError, NotImplementedError, ValueError) as error:
            raise StoreError(self._no_conditional_put()) from error
        except Exception as error:  # noqa: BLE001  each driver has its own
            # Refused, or the answer was lost, and not every server says which: what stands there
            # now tells. If nothing does, the object may yet appear, and its data must stay.
            try:
                return self._is_ours(name, data)
            except FileNotFoundError:
                if tries > 1:  # S3 answers 409 where two ask at once: then neither may have it
                    time.sleep(0.2)
                    return self._create_remote(name, data, tries - 1)
                raise unusable(error, "write", self._place(name)) from error
        return True

    def _is_ours(self, name: str, data: bytes) -> bool:
        """Whether what stands there is what was just put: a retry after a lost reply meets its own
        object. Commits bear an attempt's id, so equal bytes are the same attempt."""
        return self.read(name) == data

    def prove(self) -> None:
        """Raises StoreError where objects can't be created, or not exclusively: some stores that
        speak S3 ignore the condition of a put, and then two drivers lose each other's work."""
        name = f".probe/{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"first") or self.create(name, b"second"):
                raise StoreError(self._no_conditional_put())
        finally:
            with contextlib.suppress(StoreError):
                self.delete(name)

    def _no_conditional_put(self) -> str:
        return (
            f"{redact(self.url)} has no conditional put, so commits there could overwrite each "
            "other: use a local or NFS folder, S3, GCS or another store that has one"
        )

    def put(self, name: str, data: bytes) -> None:
        """Writes the object whole, over what was there."""
        with self._told("write", name):
            if not self.local:
                self.fs.pipe_file(self.path(name), data)
                return
            path = Path(self.path(name))
            with durable.part_of(path, data) as part:
                part.replace(path)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._told("read", name, missing=True):
            return cast(bytes, self.fs.cat_file(self.path(name)))

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A file to read in parts. Raises FileNotFoundError."""
        with self._told("read", name, missing=True), self.fs.open(self.path(name), "rb") as file:
            yield file

    def move(self, name: str, other: str) -> None:
        """Gives the object another name. Raises FileNotFoundError."""
        with self._told("rename", name, missing=True):
            if self.local:
                Path(self.path(name)).rename(self.path(other))
            else:
                self.fs.mv(self.path(name), self.path(other))

    def exists(self, name: str) -> bool:
        with self._told("find", name):
            return bool(self.fs.exists(self.path(name)))

    def find(self, prefix: str) -> list[str]:
        """The names of all objects under `prefix`, sorted; empty where there are none."""
        if self.local:
            with self._told("list", prefix):
                return sorted(_walk(self.path(prefix), prefix))
        return sorted(self._found(prefix))

    def listing(self, prefix: str) -> dict[str, Listed]:
        """Every object under `prefix` with its length and age, in the order of names."""
        found = {}
        for name in self.find(prefix) if self.local else ():
            with contextlib.suppress(FileNotFoundError):
                info = Path(self.path(name)).lstat()
                found[name] = Listed(info.st_size, info.st_mtime)
        for name, facts in sorted(({} if self.local else self._found(prefix)).items()):
            found[name] = Listed(int(facts["size"]), _modified(facts))
        return found

    def _found(self, prefix: str) -> dict[str, dict[str, Any]]:
        with self._told("list", prefix, missing=True):
            try:
                found = self.fs.find(self.path(prefix), detail=True)
            except FileNotFoundError:
                return {}
        cut = len(self.root) + 1
        return {path[cut:]: facts for path, facts in found.items()}

    @contextlib.contextmanager
    def _told(self, what: str, name: str, missing: bool = False) -> Iterator[None]:
        """Turns a driver's exceptions into StoreUnusable; with `missing`, not that an object is
        not there."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Drivers raise what their libraries do: OSError, botocore's own, aiohttp's own.
            if isinstance(error, pa.ArrowException) or (
                missing and isinstance(error, FileNotFoundError)
            ):
                raise
            raise unusable(error, what, self._place(name)) from error

    def _place(self, name: str) -> str:
        return self.path(name) if self.local else f"{self.url.rstrip('/')}/{name}"

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
        with self._told("delete", name), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def delete_many(self, names: Sequence[str]) -> None:
        """Deletes in the order given; many in one request where the store can."""
        for start in range(0, len(names), 500):
            some = names[start : start + 500]
            if not getattr(self.fs, "async_impl", False):
                for name in some:
                    self.delete(name)
                continue
            with self._told("delete", some[0]):
                self.fs.rm([self.path(name) for name in some])

    def prune(self, prefix: str) -> None:
        """Removes the empty folders below `prefix`, and itself; only disks have folders."""
        if self.local:
            for folder, _, _ in os.walk(self.path(prefix), topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def write_parquet(self, name: str, table: pa.Table) -> tuple[str, int]:
        """Writes the rows durably; returns the file's sha256 (hex) and its length in bytes.

        Payload (binary columns) is not compressed: latents are noise. Only words that repeat go
        into a dictionary: to find that ids, keys and captions don't takes longer than to write
        them.
        """
        payload = {f.name for f in table.schema if pa.types.is_binary(f.type)}
        words = [n for n in _WORDS if n in table.column_names]
        row_bytes = table.nbytes / max(1, table.num_rows)
        path = self.path(name)
        opened = durable.writing(Path(path)) if self.local else durable.uploading(self.fs, path)
        with self._told("write", name), opened as hashed:
            pq.write_table(
                table,
                hashed,
                compression={n: "none" if n in payload else "zstd" for n in table.column_names},
                use_dictionary=words,
                write_statistics=False,
                write_page_checksum=True,  # rows may be copied on without the whole being read
                row_group_size=max(1, int(ROW_GROUP_BYTES // max(1.0, row_bytes))),
            )
        return hashed.sha256.hexdigest(), hashed.length

    def recall(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """Arrow data that `key` names for ever: what `find` gave before, or gives now."""
        data = self._recent.get(key)
        if data is None:
            data = find()
            self._recent.put(key, data)
        return data

    def remember(self, name: str, table: pa.Table) -> None:
        """Spares `read_parquet` the file that was just written, for all columns but payload."""
        light = [f.name for f in table.schema if not pa.types.is_binary(f.type)]
        self._recent.put((name, *light), table.select(light).replace_schema_metadata(None))

    def read_parquet(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Raises StoreError, naming the file, where it is missing or damaged."""
        key = (name, *(columns or ()))
        known: pa.Table | None = self._recent.get(key)
        if known is not None:
            return known
        # A driver far away would read tens of MiB ahead, through payload that nobody asked for.
        far: dict[str, Any] = {} if self.local else {"cache_type": "none"}
        try:
            with (
                self._told("read", name, missing=True),
                self.fs.open(self.path(name), **far) as file,
            ):
                parquet = pq.ParquetFile(file, pre_buffer=not self.local)
                # A unit's columns are small: handing them to threads takes longer than they do.
                read = parquet.read(columns and list(columns), use_threads=False)
                table = read.replace_schema_metadata(None)
                self._recent.put(key, table)
                return table
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"{self._place(name)}, which a commit names, can't be read: {error}. "
                "`vidpipe verify --repair` has what is damaged made again."
            ) from error


def _unit_of(line: bytes) -> str:
    """The unit of a snapshot's line: it ends with it, as keys are sorted. Parsing the rest waits
    until it is asked for."""
    return line[:-2].rpartition(b'"unit": "')[2].decode(errors="replace")


class _Recent:
    """Arrow data used last, by what names it for ever."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[Any, ...], data: Any) -> None:
        if data.nbytes > _CACHE_BYTES // 8:
            return
        with self._lock:
            self._bytes += data.nbytes - getattr(self._kept.pop(key, None), "nbytes", 0)
            self._kept[key] = data
            while self._bytes > _CACHE_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


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


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _modified(facts: Mapping[str, Any]) -> float:
    """When an object was written, out of what its driver tells; each has its own word for it."""
    for key in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = facts.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if value is not None:
            return value.timestamp() if isinstance(value, datetime) else float(value)
    return float("inf")
