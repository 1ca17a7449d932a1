"""Stages that take further batches before they have answered: out of order, nothing lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from killers import Streaming
from toys import Length, pipeline

from manifests.intake import scan
from manifests.log import Counts
from pipeline import commits, query
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.streams import run_piece
from pipeline.unit import Piece, Retry
from pipeline.workers.watch import Watch
from stages import base
from stages.base import Outcome, spent


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def only_unit(made: Any) -> str:
    scan(made.store, made.config.source, 99)
    (name,) = made.dag.log(made.store, "source").units()
    return str(name)


def test_answers_in_another_order_are_those_of_their_rows(tmp_path: Path) -> None:
    captions = [f"clip {i}" for i in range(11)]
    made = pipeline(tmp_path, captions, [Streaming])
    result = run(made, (), Retry(), Reporter())
    assert result.status["streaming"] == Counts(11, 11)
    found = query.select(made, "streaming").to_pylist()
    assert [row["said"] for row in found] == [row["caption"] for row in found]
    assert sorted(row["said"] for row in found) == sorted(captions)


def test_a_death_amid_a_stream_costs_the_one_that_kills(tmp_path: Path) -> None:
    captions = [*(f"clip {i}" for i in range(9)), "SIGKILL", *(f"more {i}" for i in range(9))]
    made = pipeline(tmp_path, captions, [Streaming], run={"isolate": True})
    result = run(made, (), Retry(), Reporter())
    assert not result.faults
    assert result.status["streaming"] == Counts(19, 18, {}, {"killed_worker": 1})
    (failed,) = (row for row in query.select(made, None).to_pylist() if row["outcome"] == "failed")
    assert failed["caption"] == "SIGKILL"


class Watching(Watch):
    """Remembers what is in flight, and asks to stop after so many answers."""

    def __init__(self, stop_after: int = 99) -> None:
        super().__init__()
        self.flying: set[str] = set()
        self.most = self.answered = self.commits = 0
        self.stop_after = stop_after

    def begin(self, ids: pa.ChunkedArray) -> None:
        self.flying |= set(ids.to_pylist())
        self.most = max(self.most, len(self.flying))

    def through(self, ids: pa.ChunkedArray) -> None:
        self.flying -= set(ids.to_pylist())
        self.answered += len(ids)

    def committed(self, counts: Counts) -> None:
        self.commits += counts.total

    def stopping(self) -> bool:
        return self.answered >= self.stop_after


def test_what_is_taken_and_not_answered_is_in_flight(tmp_path: Path) -> None:
    made = pipeline(tmp_path, [f"clip {i}" for i in range(10)], [Streaming])
    watch, stage = Watching(), made.stages["streaming"]
    receipt = run_piece(
        made.store, made.dag, stage, stage.setup, Piece(only_unit(made), watch=watch)
    )
    assert receipt.error is None
    assert (watch.most, watch.flying, watch.commits) == (4, set(), 10)


def test_a_stream_that_is_stopped_commits_its_answers_and_leaves_the_rest(tmp_path: Path) -> None:
    made = pipeline(tmp_path, [f"clip {i}" for i in range(10)], [Streaming])
    watch, stage = Watching(stop_after=2), made.stages["streaming"]
    receipt = run_piece(
        made.store, made.dag, stage, stage.setup, Piece(only_unit(made), watch=watch)
    )
    assert receipt.error is None
    assert receipt.counts == Counts(2, 2)
    assert watch.commits == 2
    result = run(made, (), Retry(), Reporter())
    assert result.status["streaming"] == Counts(10, 10)


def test_what_is_done_is_committed_before_a_stream_that_was_stopped_has_closed(
    tmp_path: Path,
) -> None:
    """Threads that decode may be amid a clip for longer than a stop gives them."""
    seen: list[bool] = []

    class Lingering(Streaming):
        def stream(self, batches: Iterator[pa.Table], model: None) -> Generator[tuple[int, Any]]:
            try:
                yield from super().stream(batches, model)
            finally:
                seen.append(committed.wait(5.0))

    committed = threading.Event()
    made = pipeline(tmp_path, [f"clip {i}" for i in range(10)], [Lingering])
    watch, stage = Watching(stop_after=2), made.stages["streaming"]
    watch.committed = lambda counts: committed.set()  # type: ignore[method-assign]
    receipt = run_piece(
        made.store, made.dag, stage, stage.setup, Piece(only_unit(made), watch=watch)
    )
    assert receipt.error is None and receipt.counts == Counts(2, 2)
    assert seen == [True]


class Forgetful(Streaming):
    """Breaks the contract."""

    name = "forgetful"
    answers: tuple[int, ...] = ()

    def stream(
        self, batches: Iterator[pa.Table], model: None
    ) -> Generator[tuple[int, list[Outcome]]]:
        rows = [batch.to_pylist() for batch in batches]
        for number in self.answers:
            yield number, self.process(rows[number], model)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ((0, 1), "left 1 batches without an answer"),
        ((0, 1, 1), "answered batch 1, which is not in flight"),
    ],
)
def test_a_stream_that_breaks_the_contract_fails_loudly_and_keeps_what_is_sound(
    tmp_path: Path, answers: tuple[int, ...], told: str
) -> None:
    cls = type("Forgetful", (Forgetful,), {"answers": answers})
    made = pipeline(tmp_path, ["a", "b", "c"], [cls])
    result = run(made, (), Retry(), Reporter())
    assert told in (result.faults[0].error or "")
    assert result.status["forgetful"] == Counts(3, 2, pending=1)


def test_commits_run_beside_the_next_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part committed after each batch, one at a time, and all of them in order."""
    monkeypatch.setattr(commits, "COMMIT_BYTES", 1)
    made = pipeline(
        tmp_path, [f"word {i}" for i in range(6)], [Length], {"length": {"batch_size": 1}}
    )
    name = only_unit(made)
    watch, stage = Watching(), made.stages["length"]
    receipt = run_piece(made.store, made.dag, stage, stage.setup, Piece(name, watch=watch))
    assert receipt.error is None
    done = made.dag.log(made.store, "length").commits(name)
    assert [c.rows for c in done] == [1] * 6
    assert [c.counts.pending for c in done] == [5, 4, 3, 2, 1, 0]
    assert watch.commits == 6


class SlowlyCommitted(Length):
    def metadata(self, model: None) -> dict[str, Any]:
        time.sleep(0.1)
        return {}


def test_a_slow_commit_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may be in flight meanwhile, which a time limit would blame."""
    monkeypatch.setattr(commits, "COMMIT_BYTES", 1)
    monkeypatch.setattr(commits, "SIGN_OF_LIFE", 0.01)
    heard: list[None] = []
    monkeypatch.setattr(base, "_listener", lambda: heard.append(None))
    made = pipeline(tmp_path, ["a", "b"], [SlowlyCommitted], {"length": {"batch_size": 1}})
    stage = made.stages["length"]
    receipt = run_piece(made.store, made.dag, stage, stage.setup, Piece(only_unit(made)))
    assert receipt.counts.kept == 2 and heard


class Waits(Length):
    """Says what it waited for."""

    def stream(self, batches: Iterator[pa.Table], model: None) -> Generator[tuple[int, Any]]:
        for answer in super().stream(batches, model):
            spent("wait", 0.25)
            yield answer


def test_the_receipt_says_what_a_stream_spent_its_time_on(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["a", "b"], [Waits], {"length": {"batch_size": 1}})
    stage = made.stages["length"]
    receipt = run_piece(made.store, made.dag, stage, stage.setup, Piece(only_unit(made)))
    assert receipt.seconds["wait"] == 0.5
