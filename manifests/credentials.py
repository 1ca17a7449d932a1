"""The URIs that hold a secret, kept where no manifest is: a private file of this user's.

A table may name its videos by signed URLs, or with user and password. The manifest stores what
names the file (`manifests.redact.split_secret`); the whole URI, which download needs, goes into an
SQLite file that only this user can read, one a workdir, under `XDG_STATE_HOME`
(~/.local/state/vidpipe). Workers on other machines find it there where that folder is shared.
A scan writes it anew, so a table with fresh signatures replaces the expired ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from manifests.schema import digest
from manifests.store import StoreError

_BATCH = 500  # SQLite takes some 1000 parameters in a statement


class CredentialsError(StoreError):
    """The private file can't be written or read; the message says which, why and what to do."""


class Credentials:
    """URIs with their secrets, by the URI without them. `workdir`: the URL of the store."""

    def __init__(self, workdir: str) -> None:
        self.file = _folder() / f"{digest(['workdir', workdir.rstrip('/')], 24)}.sqlite"

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return self.file.exists()

    def keep(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Stores (public URI, whole URI) pairs; the last one of a public URI holds.

        Raises CredentialsError.
        """
        iterator = iter(pairs)
        first = next(iterator, None)
        if first is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Created before SQLite does, which would let others read it.
            os.close(os.open(self.file, os.O_CREAT | os.O_RDWR, 0o600))
            with self._open() as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS uri (public TEXT PRIMARY KEY, whole TEXT NOT NULL)"
                    " WITHOUT ROWID"
                )
                rows = itertools.chain([first], iterator)
                database.executemany("INSERT OR REPLACE INTO uri VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            raise CredentialsError(
                f"the table's URLs hold secrets, and {self.file}, where they are kept out of the "
                f"workdir, can't be written ({error}). Point XDG_STATE_HOME at a folder of yours, "
                "or name the videos by plain URLs with the credentials in the environment."
            ) from error

    def whole(self, publics: Iterable[str]) -> dict[str, str]:
        """The whole URIs of those that have one here."""
        wanted = list(dict.fromkeys(publics))
        found: dict[str, str] = {}
        if not wanted or not self:
            return found
        try:
            with self._open() as database:
                for start in range(0, len(wanted), _BATCH):
                    part = wanted[start : start + _BATCH]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT public, whole FROM uri WHERE public IN ({marks})"  # noqa: S608
                    found |= dict(database.execute(query, part).fetchall())
        except sqlite3.Error as error:
            raise CredentialsError(
                f"{self.file}, which holds the secrets of the table's URLs, can't be read "
                f"({error}). Delete it and save the table again: the next run writes it anew."
            ) from error
        return found

    def forget(self) -> None:
        """Deletes them all."""
        self.file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.file, timeout=60)
        try:
            yield database
        finally:
            database.close()


def _folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "vidpipe"
