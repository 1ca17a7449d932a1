"""Embeddings that stand in a workdir already, found by their key: to be copied, not made again.

What is found is a copy: the file that it goes into refers to no other, so each can be verified,
collected and made anew by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.joins import array
from manifests.log import Commit, History, Log
from manifests.shards import ShardError, ShardFile
from manifests.store import Store, StoreError

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
        self._seen: set[str] = set()  # commits, by name, and units of which a snapshot was read
        self._void: set[str] = set()  # attempts
        self._files: list[str] = []
        self._gone: set[int] = set()  # files, by number
        self._places = _Places()

    def __len__(self) -> int:
        return len(self._places.keys)

    def look(self) -> None:
        """Takes in what was committed since the last time. Raises StoreError."""
        fresh: dict[str, Commit] = {}
        for unit, history in self._log.units().items():
            for commit in self._unseen(unit, history):
                self._void |= set(commit.voids)
                if commit.data is not None:
                    fresh[self._log.data_name(unit, commit)] = commit
        gone = {f"{attempt}.parquet" for attempt in self._void}
        self._gone |= {n for n, f in enumerate(self._files) if f.rsplit("/", 1)[1] in gone}
        parts = [self._places]
        for name, commit in fresh.items():
            if commit.attempt not in self._void:
                parts += self._read(name)
        if len(parts) > 1 or self._gone:
            self._places = self._joined(parts)

    def _unseen(self, unit: str, history: History) -> Iterator[Commit]:
        """Commits never change, so each is read once, and no snapshot that came later: whatever it
        holds stood outside of it before."""
        snapshot = f"{unit}/"
        if history.old is not None and snapshot not in self._seen:
            yield from self._log.commits(unit, History(history.old))
        self._seen.add(snapshot)
        for name in history.loose:
            if name not in self._seen:
                self._seen.add(name)
                try:
                    yield self._log.commit(name)
                except (StoreError, FileNotFoundError):
                    continue  # damaged, or collected since the listing: nothing to copy from

    def _read(self, name: str) -> list[_Places]:
        try:
            table = self._log.store.read_parquet(name, _PLACE)
        except StoreError:
            return []
        rows = array(table, "embedding_row").fill_null(-1).to_numpy()
        bears = np.flatnonzero(rows == np.arange(len(rows)))
        keys = array(table, "embedding_key").take(bears).to_pylist()
        number = len(self._files)
        self._files.append(name)
        files = np.full(len(bears), number, np.int32)
        return [_Places(np.array(list(map(_short, keys)), np.uint64), files, bears.astype("i4"))]

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
                for values in shard.rows(rows, list(columns)):
                    yield {name: value.as_py() for name, value in values.items()}
        except ShardError:
            self._gone.add(file)


def _short(key: str) -> int:
    return int(key[:16], 16)
