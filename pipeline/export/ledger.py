"""What an export has written: one SQLite file in its folder, so that the next one writes only what
is new or another, and removes what is no more."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.export.base import ExportError

# diffusion-pipe takes any other suffix in its folder for a video.
NAME = "vidpipe-export.db"

_TABLES = """
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS file
    (name TEXT PRIMARY KEY, state TEXT, size INTEGER, run INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clip (id TEXT PRIMARY KEY, number INTEGER, run INTEGER);
"""


class Ledger:
    """The files of an export, each with the state of what it was made of, and the clips' numbers.

    A file is noted after it stands under its name: a crash costs writing it again.
    """

    def __init__(self, folder: Path, target: str) -> None:
        """Raises ExportError where the folder holds anything but an export for `target`."""
        new = not (folder / NAME).exists()
        if new and folder.exists() and any(folder.iterdir()):
            raise ExportError(f"{folder} is neither empty nor an export: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._kept = time.monotonic()
            self._database = sqlite3.connect(folder / NAME, timeout=1.0)
            # Held until the end: of two exports into one folder, the second is refused.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.executescript(_TABLES)
            known = dict(self._database.execute("SELECT name, value FROM fact"))
            if known.setdefault("target", target) != target:
                raise ExportError(
                    f"{folder} holds an export for {known['target']}, not for {target}: name "
                    "another folder"
                )
            self._run = int(known.get("run", 0)) + 1
            facts = {"target": target, "run": str(self._run)}
            self._database.executemany("REPLACE INTO fact VALUES (?, ?)", facts.items())
            self._database.commit()
        except sqlite3.DatabaseError as error:
            raise ExportError(f"{folder / NAME} can't be used: {error}") from error

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # on a full disk: what was noted is written again
            self._database.commit()
        self._database.close()

    def commit(self) -> None:
        """Keeps what was noted, about once a second."""
        if time.monotonic() - self._kept > 1.0:
            self._database.commit()
            self._kept = time.monotonic()

    def holds(self, name: str, state: str) -> int | None:
        """The length of the file that was written of just this, which so is still wanted."""
        run = self._database.execute
        found = run("SELECT size FROM file WHERE name = ? AND state = ?", (name, state)).fetchone()
        if found is None:
            return None
        run("UPDATE file SET run = ? WHERE name = ?", (self._run, name))
        return int(found[0])

    def wrote(self, name: str) -> bool:
        """Whether this run wrote the file, or found it in place."""
        found = self._database.execute("SELECT run FROM file WHERE name = ?", (name,)).fetchone()
        return found is not None and found[0] == self._run

    def put(self, name: str, state: str, size: int) -> None:
        row = (name, state, size, self._run)
        self._database.execute("REPLACE INTO file VALUES (?, ?, ?, ?)", row)

    def forget(self, names: Iterable[str]) -> None:
        """These files are about to be written anew: if a crash comes between, what was noted of
        them holds no more."""
        given = ((name,) for name in names)
        self._database.executemany("UPDATE file SET state = '' WHERE name = ?", given)
        self._database.commit()

    def unwanted(self) -> Iterator[str]:
        """The files that this run neither wrote nor found in place; they are forgotten."""
        names = self._database.execute("SELECT name FROM file WHERE run <> ?", (self._run,))
        for (name,) in names.fetchall():
            yield name
            self._database.execute("DELETE FROM file WHERE name = ?", (name,))

    def number(self, clips: Iterable[str], all_of_them: bool) -> None:
        """Gives each clip a number from 0 on without a gap: its old one, if it is still below their
        count. Where `clips` are all of them, the others lose theirs."""
        run = self._database.execute
        for clip in clips:
            if not run("UPDATE clip SET run = ? WHERE id = ?", (self._run, clip)).rowcount:
                run("INSERT INTO clip VALUES (?, NULL, ?)", (clip, self._run))
        if all_of_them:
            run("DELETE FROM clip WHERE run <> ?", (self._run,))
        (count,) = run("SELECT COUNT(*) FROM clip").fetchone()
        run("UPDATE clip SET number = NULL WHERE number >= ?", (count,))
        taken = {number for (number,) in run("SELECT number FROM clip WHERE number IS NOT NULL")}
        free = (number for number in range(count) if number not in taken)
        waiting = run("SELECT id FROM clip WHERE number IS NULL ORDER BY rowid").fetchall()
        for (clip,), number in zip(waiting, free):
            run("UPDATE clip SET number = ? WHERE id = ?", (number, clip))
        self.commit()

    def number_of(self, clip: str) -> int:
        found = self._database.execute("SELECT number FROM clip WHERE id = ?", (clip,)).fetchone()
        return int(found[0])
