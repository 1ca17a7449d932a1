"""Embeddings that stand in a workdir already, found by their key: to be copied, not made again.

What is found is a copy: the file that it goes into refers to no other, so each can be verified,
collected and made anew by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.joins import array
from manifests.log import Commit, History, Log
from manifests.shards import ShardError, ShardFile
from manifests.store import Store, StoreError

# Files that are read at once: a store far away answers one at a time slowly.
_READERS = 8
_PLACE = ("embedding_key", "embedding_row")
_COPIED = (
    *("embedding", "embedding_pooled", "embedding_shape"),
    *("embedding_key", "embedding_tokens", "embedding_truncated"),
)


@dataclass
class _Places:
    """Where embeddings stand, by the first 64 bits of their keys, ascending: 16 bytes each."""

    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    files: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    rows: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def of(self, keys: Collection[str]) -> Iterator[tuple[int, int, str]]:
        """File, row and key of those of `keys` that are known, in this order."""
        wanted = np.array([_short(key) for key in keys], np.uint64)
        at = np.searchsorted(self.keys, wanted)
        found = [
            (int(self.files[i]), int(self.rows[i]), key)
            for i, key, own in zip(at.tolist(), keys, wanted)
            if i < len(self.keys) and self.keys[i] == own
        ]
        return iter(sorted(found))


class StoredEmbeddings:
    """All embeddings that are committed under one fingerprint of the stage that makes them, as of
    the last `look`. What can't be read, or is another's, counts as not there."""

    def __init__(self, workdir: str, stage: str, fingerprint: str) -> None:
        self._workdir = workdir
        self._log = Log(Store(workdir), stage, fingerprint)
        self._units: set[str] = set()
        self._seen: set[str] = set()  # names of commits
        self._void: set[str] = set()  # attempts
        self._files: list[str] = []
        self._gone: set[int] = set()  # files, by number
        self._places = _Places()

    def __len__(self) -> int:
        return len(self._places.keys)

    def look(self, alive: Callable[[], None] = lambda: None) -> None:
        """Takes in what was committed since the last time, and calls `alive` as it goes on. Raises
        StoreError."""
        fresh: dict[str, Commit] = {}
        with ThreadPoolExecutor(_READERS) as pool:
            for unit, commit in self._unseen(pool):
                alive()
                self._void |= set(commit.voids)
                if commit.data is not None:
                    fresh[self._log.data_name(unit, commit)] = commit
            gone = {f"{attempt}.parquet" for attempt in self._void}
            self._gone |= {n for n, f in enumerate(self._files) if f.rsplit("/", 1)[1] in gone}
            parts = [self._places]
            names = [name for name, commit in fresh.items() if commit.attempt not in self._void]
            for name, (keys, rows) in zip(names, pool.map(self._read, names)):
                alive()
                files = np.full(len(rows), len(self._files), np.int32)
                self._files.append(name)
                parts.append(_Places(keys, files, rows))
        if len(parts) > 1 or self._gone:
            self._places = self._joined(parts)

    def _unseen(self, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Commit]]:
        """Commits, with their units, each once, as they never change: of those that a snapshot
        holds what stands there, and no snapshot that came later, as what it holds stood outside of
        it before."""
        loose: list[tuple[str, str]] = []
        for unit, history in self._log.units().items():
            held: list[Commit] = []
            if history.old is not None and unit not in self._units:
                held = self._log.commits(unit, History(history.old))
            self._units.add(unit)
            yield from ((unit, commit) for commit in held)
            fresh = [name for name in history.loose if name not in self._seen]
            self._seen.update(fresh)
            loose += [(unit, name) for name in fresh if int(name[-11:-5]) >= len(held)]
        commits = pool.map(self._commit, (name for _, name in loose))
        for (unit, _), commit in zip(loose, commits):
            if commit is not None:
                yield unit, commit

    def _commit(self, name: str) -> Commit | None:
        try:
            return self._log.commit(name)
        except (StoreError, FileNotFoundError):
            return None  # damaged, or collected since the listing: nothing to copy from

    def _read(self, name: str) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """The keys of a file's embeddings, and the rows that hold them."""
        try:
            table = self._log.store.read_parquet(name, _PLACE)
            rows = array(table, "embedding_row").fill_null(-1).to_numpy()
            bears = np.flatnonzero(rows == np.arange(len(rows)))
            keys = array(table, "embedding_key").take(bears).to_pylist()
            return np.array(list(map(_short, keys)), np.uint64), bears.astype(np.int32)
        except (StoreError, pa.ArrowException, KeyError, TypeError, ValueError):
            return np.empty(0, np.uint64), np.empty(0, np.int32)  # damaged: `verify` tells of it

    def _joined(self, parts: list[_Places]) -> _Places:
        """Each key once, in none of the files that are gone."""
        keys, files, rows = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("keys", "files", "rows")
        )
        here = np.isin(files, list(self._gone), invert=True)
        keys, files, rows = keys[here], files[here], rows[here]
        keys, first = np.unique(keys, return_index=True)
        return _Places(keys, files[first], rows[first])

    def has(self, key: str) -> bool:
        return any(True for _ in self._places.of([key]))

    def find(self, keys: Collection[str]) -> dict[str, dict[str, Any]]:
        """Of those of `keys` that stand somewhere the columns of their embedding, by key."""
        found: dict[str, dict[str, Any]] = {}
        wanted: dict[int, dict[int, str]] = {}
        for file, row, key in self._places.of(keys):
            wanted.setdefault(file, {})[row] = key
        for file, rows in wanted.items():
            for values in self._copied(file, list(rows), _COPIED):
                # Of another key with the same first half, or of a file that somebody exchanged.
                if values["embedding"] is not None and values["embedding_key"] in rows.values():
                    found[values["embedding_key"]] = values
        return found

    def empty(self) -> bytes | None:
        """The empty caption's embedding, which stands with the first of each file."""
        for number in np.unique(self._places.files).tolist():
            first = int(self._places.rows[self._places.files == number].min())
            for values in self._copied(number, [first], ("embedding_empty",)):
                if values["embedding_empty"] is not None:
                    return bytes(values["embedding_empty"])
        return None

    def _copied(
        self, file: int, rows: list[int], columns: Collection[str]
    ) -> Iterator[dict[str, Any]]:
        """Values of a file whose pages are what was written."""
        if file in self._gone:
            return
        try:
            with ShardFile(self._workdir, self._files[file], proved=True) as shard:
                for values in shard.rows(rows, list(columns), {}):
                    yield dict(zip(columns, values, strict=True))
        except ShardError:
            self._gone.add(file)


def _short(key: str) -> int:
    return int(key[:16], 16)
