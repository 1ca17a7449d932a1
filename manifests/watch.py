"""Local files behind a table: which they are, and whether they are still what they were.

A table says nothing of its files' contents, so each row's `version` is the size and time of its
file as a scan found it. A file that was replaced has another one, its row is committed again, and
what hangs on it is computed anew. One that has vanished keeps its version: a share that is not
mounted must not undo what was computed, and a stage that needs the file says that it is missing.

Between scans, an unchanged table is not read: what it named is listed in `source/files.parquet`,
and looking at some 100,000 files takes less than a second.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
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


def remember(store: Store, seen: Iterable[tuple[str, str | None]] | None) -> None:
    """Lists the files that a scan has seen, for `replaced`; None: too many to look at each time."""
    if seen is None:
        store.delete(FILES)
        return
    rows = list(seen)
    table = pa.table([[p for p, _ in rows], [v for _, v in rows]], schema=_SCHEMA)
    store.write_parquet(FILES, table)


def replaced(store: Store) -> bool:
    """Whether a file that the last scan listed is another one now, or there where none was."""
    if not store.find(FILES):
        return False
    try:
        table = store.read_parquet(FILES)
        paths, before = (table.column(name).to_pylist() for name in _SCHEMA.names)
    except (StoreError, KeyError):
        return True  # cut off by a crash: the scan that follows writes it anew
    return any(now != then for then, now in zip(before, versions(paths)) if now is not None)
