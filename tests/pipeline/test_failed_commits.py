"""A commit that fails beside the work is its own unit's fault, whenever it is noticed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_units_in_line import CAPTIONS, Watched, made_of, pieces, through

from manifests.faults import StoreError
from manifests.log import Counts, Log
from pipeline import commits
from pipeline.commits import Committer


@pytest.mark.parametrize("later", [0.0, 60.0], ids=["at the next commit", "when it is through"])
def test_it_is_told_of_the_unit_that_it_befell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: float
) -> None:
    """The first commit of the first unit fails, and its other rows are settled meanwhile."""
    made = made_of(tmp_path, CAPTIONS)
    line = pieces(made, Watched())
    append, begin = Log.append, Committer.begin
    failed: list[str] = []

    def failing(self: Log, unit: str, *rest: Any, **more: Any) -> Any:
        if unit == line[0].unit and not failed:
            failed.append(unit)
            time.sleep(0.1)
            raise StoreError("the store hung up")
        return append(self, unit, *rest, **more)

    def beginning(self: Committer) -> None:
        begin(self)
        if self._view.unit == line[0].unit:
            monkeypatch.setattr(commits, "COMMIT_SECONDS", later)

    monkeypatch.setattr(Log, "append", failing)
    monkeypatch.setattr(Committer, "begin", beginning)
    monkeypatch.setattr(commits, "COMMIT_SECONDS", 0.0)
    told = Counts()
    line = [replace(piece, on_rows=lambda stage, counts: told.__iadd__(counts)) for piece in line]
    receipts = through(made, line)
    assert failed and len(receipts) == 4
    log = made.dag.log(made.store, "modelled")
    for receipt in receipts:
        kept = sum(commit.rows for commit in log.commits(receipt.unit))
        assert (receipt.error is None) == (kept == 3), (receipt, kept)
        assert receipt.counts == Counts(kept, kept), "what was lost is taken back"
    kept = sum(receipt.counts.kept for receipt in receipts)
    assert (told.total, told.kept) == (kept, kept)
    if later:
        return
    # The unit was run again: what its lost rows took stands in its next commit.
    said = sum(receipt.amounts["answers"] for receipt in receipts)
    found = [c.amounts.get("answers", 0) for piece in line for c in log.commits(piece.unit)]
    assert kept == 12 and sum(found) == said > 12
