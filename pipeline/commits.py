"""Commits of what a unit's rows became: beside the work, in parts, each row once."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.facts import with_facts
from manifests.log import Counts
from manifests.redact import redacted
from manifests.schema import OUTCOME
from manifests.view import UnitView
from pipeline.settle import AnyStage
from pipeline.workers.watch import Watch
from stages.base import alive

# A unit's rows are committed in parts of about this size, so that latents never pile up in memory.
COMMIT_BYTES = 256 << 20
# And at least so often, so that a crash costs no more than this of a slow stage's work.
COMMIT_SECONDS = 60.0
SIGN_OF_LIFE = 1.0  # seconds between two of them while a commit is waited for


@dataclass(frozen=True)
class Spent:
    """What a commit says went into its rows: seconds of the unit up to then, by phase, and what the
    stage has counted since the commit before."""

    seconds: dict[str, float]
    amounts: dict[str, int]


class Committer:
    """Commits the rows of a unit in parts of about COMMIT_BYTES, and every COMMIT_SECONDS, in a
    thread, while further ones are processed."""

    def __init__(
        self,
        view: UnitView,
        stage: AnyStage,
        model: Any,
        watch: Watch,
        seconds: dict[str, float],
        amounts: dict[str, int],
    ) -> None:
        self._view, self._stage, self._model = view, stage, model
        self._watch, self._seconds = watch, seconds
        self._amounts, self._told = amounts, dict(amounts)  # so far, and of these in commits
        self._done: list[pa.Table] = []
        self._counts, self._bytes = Counts(), 0
        self._began = time.perf_counter()
        self._pool = ThreadPoolExecutor(1)  # its thread starts with the first commit
        self._running: Future[UnitView] | None = None
        self._under_way = Counts(), dict[str, int]()  # rows of the running commit, and amounts
        self.lost = Counts()  # rows that were taken, and whose commit failed

    def take(self, new: pa.Table, counts: Counts) -> None:
        """Raises StoreError where a commit failed."""
        self._done.append(new)
        self._counts += counts
        self._bytes += new.nbytes
        if self._bytes >= COMMIT_BYTES or time.perf_counter() - self._began >= COMMIT_SECONDS:
            self.begin()

    def begin(self) -> None:
        """Begins to commit what was taken, once the commit before is through."""
        self._wait()
        now = dict(self._amounts)
        added = {what: n - self._told.get(what, 0) for what, n in now.items()}
        spent = Spent(dict(self._seconds), {what: n for what, n in added.items() if n})
        self._told = now
        self._running = self._pool.submit(self._commit, self._done, self._counts, spent)
        self._under_way = self._counts, spent.amounts
        self._done, self._counts, self._bytes = [], Counts(), 0
        self._began = time.perf_counter()

    def begin_rest(self) -> None:
        """Begins to commit what was taken and is not committed, if there is any."""
        if self._done:
            self.begin()

    def through(self) -> bool:
        """Whether all that was taken is committed, or can't be, as `close` then says; begins that,
        unless a commit is under way."""
        if self._running is not None and not self._running.done():
            return False
        if self._running is not None and self._running.exception() is not None:
            return True
        self.begin_rest()
        return self._running is None or self._running.done()

    def close(self, keep: bool = True) -> None:
        """Commits what is left, if it is to be kept. Raises StoreError where a commit failed."""
        try:
            self._wait()
            if self._done and keep:
                self.begin()
                self._wait()
        finally:
            if keep:
                self.lost += self._counts
            self._pool.shutdown()

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            # A slow store says nothing of the clips in flight: they are not to be blamed for it.
            while not wait([running], SIGN_OF_LIFE).done:
                alive()
            try:
                self._view = running.result()
            except BaseException:
                counts, amounts = self._under_way
                self.lost += counts
                for what, n in amounts.items():  # were spent all the same: the next commit says so
                    self._told[what] -= n
                raise

    def _commit(self, done: list[pa.Table], counts: Counts, spent: Spent) -> UnitView:
        view = _commit(self._view, self._stage, self._model, done, spent)
        self._watch.committed(counts)
        return view


def _commit(
    view: UnitView, stage: AnyStage, model: Any, done: list[pa.Table], spent: Spent
) -> UnitView:
    """Commits the rows; returns a view that has seen them.

    Where another worker committed first, the rows that it settled are dropped here and the rest is
    tried again: nothing is lost and nothing stands twice.
    """
    name = stage.name
    schema = pa.schema([*OUTCOME, *stage.adds])
    new = made = pa.concat_tables(done) if done else schema.empty_table()
    while True:
        if len(new) and view.commits(name):
            # What others have settled since this unit was read: a view sees the present.
            new = new.filter(view.untried(name, new))
        if done and not len(new) and view.current(name) is not None:
            return view
        facts = redacted({"stage": stage.identity(), **stage.metadata(model)}) if len(new) else {}
        log = view.dag.log(view.store, name)
        if log.append(
            view.unit,
            len(view.commits(name)),
            view.inputs_state(name),
            view.counts_with(name, new),
            with_facts(stage.packed(new, made), facts) if len(new) else None,
            spent.seconds,
            amounts=spent.amounts,
        ):
            return UnitView(view.store, view.dag, view.unit)
        view = UnitView(view.store, view.dag, view.unit)
        done = done or [new]
