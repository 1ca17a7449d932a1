"""Local files behind a table: which they are, and whether they are still what they were.

A table says nothing of its files' contents, so each row's `version` is the size and time of its
file as a scan found it. A file that was replaced has another one, its row is committed again, and
what hangs on it is computed anew. One that has vanished keeps its version: a share that is not
mounted must not undo what was computed, and a stage that needs the file says that it is missing.

Between scans, an unchanged table is not read: what it named is listed in `source/files.parquet`,
and looking at up to 100,000 files is quick.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import pyarrow as pa

from manifests.store import Store, StoreError

FILES = "source/files.parquet"
SLOW = 50e-6  # seconds for a look, from which on waiting side by side pays: a network's disk
THREADS = 32
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SCHEMA = pa.schema([("path", pa.string()), ("version", pa.string())])


def state_of(info: os.stat_result) -> str:
    """What tells a local file from a later one of its name: `size-mtime_ns`."""
    return f"{info.st_size}-{info.st_mtime_ns}"


def version_of(path: str) -> str | None:
    """The state of the file at `path`, or of the archive that it lies in; None: there is none."""
    try:
        return state_of(os.stat(path))  # noqa: PTH116  there may be millions
    except NotADirectoryError:
        for found in re.finditer(r"\.zip/", path, re.IGNORECASE):
            archive = path[: found.end() - 1]
            if os.path.isfile(archive):  # noqa: PTH113
                return version_of(archive)
        return None
    except (OSError, ValueError):
        return None


def versions(paths: Sequence[str]) -> list[str | None]:
    """`version_of` each path, side by side where the disk is slow to answer."""
    begun = time.perf_counter()
    first = [version_of(path) for path in paths[:200]]
    slow = time.perf_counter() - begun > SLOW * max(1, len(first))
    if not slow or len(paths) <= len(first):
        return first + [version_of(path) for path in paths[200:]]
    with ThreadPoolExecutor(THREADS) as pool:
        return first + list(pool.map(version_of, paths[200:], chunksize=64))


def local_file(uri: str, root: str) -> str | None:
    """The path of the local file, or archive, that a URI of the table names; None: it is remote."""
    if _SCHEME.match(root):
        return None  # a table that is not local names no local files
    if uri.startswith("zip://") and "::" in uri:
        uri = uri.partition("::")[2]
    if uri[:7].lower() == "file://":
        path = uri[7:].removeprefix("localhost")
        return path if os.path.lexists(path) else unquote(path)
    if _SCHEME.match(uri):
        return None
    return os.path.join(root, uri)  # noqa: PTH118


class Files:
    """The local files that a scan meets. `most`: of how many the list is kept for `replaced`."""

    def __init__(self, store: Store, root: str, most: int) -> None:
        self._root, self._most = root, most
        self._before = dict(_listed(store) or ())
        self._seen: dict[str, str | None] = {}

    def versions(self, uris: pa.Array) -> pa.Array:
        """The version of each row's file; of one that has vanished, that of the last scan: what was
        made of it stays. Null for what is not local."""
        paths = [local_file(uri, self._root) if uri else None for uri in uris.to_pylist()]
        there = [path for path in dict.fromkeys(paths) if path is not None]
        found = dict(zip(there, versions(there)))
        for path, version in found.items():
            if version is None:
                found[path] = self._before.get(path)
        if len(self._seen) <= self._most:
            self._seen |= found
        return pa.array([found[p] if p is not None else None for p in paths], pa.string())

    def save(self, store: Store) -> None:
        """Lists them for `replaced`, unless they are too many to look at each time."""
        if not 0 < len(self._seen) <= self._most:
            store.delete(FILES)
            return
        columns = [list(self._seen), list(self._seen.values())]
        table = pa.table(columns, schema=_SCHEMA)
        store.write_parquet(FILES, table)
        store.remember(FILES, table)


def _listed(store: Store) -> list[tuple[str, str | None]] | None:
    """The files of the last scan; None where that list was cut off by a crash."""
    if not store.find(FILES):
        return []
    try:
        table = store.read_parquet(FILES, _SCHEMA.names)
        return list(zip(*(table.column(name).to_pylist() for name in _SCHEMA.names)))
    except (StoreError, KeyError):
        return None


def replaced(store: Store) -> bool:
    """Whether a file that the last scan listed is another one now, or there where none was."""
    listed = _listed(store)
    if listed is None:
        return True  # the scan that follows writes it anew
    now = versions([path for path, _ in listed])
    return any(v is not None and v != before for v, (_, before) in zip(now, listed))
