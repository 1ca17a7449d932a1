"""Streams that go on from one unit to the next: the model does not run empty at a unit's end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from killers import Modelled
from toys import Length, pipeline

from manifests.intake import scan
from manifests.log import Counts
from manifests.view import UnitView
from pipeline import query
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.streams import Streams
from pipeline.unit import Piece, Receipt, Retry
from pipeline.workers.watch import Verdict, Watch

OnRunner = Callable[[str], dict[str, Any]]
CAPTIONS = [f"clip {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


class Watched(Watch):
    """Remembers which units were in flight together; asks to stop after so many answers."""

    def __init__(self, stop_after: int = 99, **suspects: Any) -> None:
        super().__init__(**suspects)
        self.flying: set[str] = set()
        self.together = self.answered = 0
        self.stop_after = stop_after

    def begin(self, ids: pa.ChunkedArray) -> None:
        self.flying |= set(ids.to_pylist())
        self.together = max(self.together, len(self.flying))

    def through(self, ids: pa.ChunkedArray) -> None:
        self.flying -= set(ids.to_pylist())
        self.answered += len(ids)

    def stopping(self) -> bool:
        return self.answered >= self.stop_after


def made_of(folder: Path, captions: list[str], cls: type = Modelled, **settings: Any) -> Any:
    """Units of three clips."""
    mine = {"folder": str(folder)} if cls is Modelled else {}
    made = pipeline(folder, captions, [cls], {cls.name: {**mine, **settings}})
    scan(made.store, made.config.source, 3)
    return made


def pieces(made: Any, watch: Watch) -> list[Piece]:
    return [Piece(name, watch=watch) for name in made.dag.log(made.store, "source").units()]


def through(made: Any, coming: Iterable[Piece | None]) -> list[Receipt]:
    (stage,) = made.stages.values()
    line = iter(coming)
    receipts: list[Receipt] = []
    for piece, receipt in Streams(
        made.store, made.dag, stage, stage.setup, Retry(), lambda: next(line, None)
    ).run():
        assert piece.unit == receipt.unit
        receipts.append(receipt)
    return receipts


def streams(folder: Path) -> int:
    return len((folder / "streams").read_text().split())


def test_a_stream_goes_on_to_the_unit_that_waits(tmp_path: Path) -> None:
    made = made_of(tmp_path, CAPTIONS)
    watch = Watched()
    line = pieces(made, watch)
    receipts = through(made, line)
    assert streams(tmp_path) == 1
    assert watch.together == 4, "it holds four, and no unit has more than three"
    assert [r.unit for r in receipts] == [piece.unit for piece in line]
    assert [(r.error, r.counts) for r in receipts] == [(None, Counts(3, 3))] * 4
    log = made.dag.log(made.store, "modelled")
    assert [[c.rows for c in log.commits(unit)] for unit in log.units()] == [[3]] * 4
    found = query.select(made, "modelled").to_pylist()
    assert sorted(row["said"] for row in found) == sorted(CAPTIONS)
    assert all(row["said"] == row["caption"] for row in found)


def test_it_ends_where_none_waits_and_the_next_one_has_another(tmp_path: Path) -> None:
    made = made_of(tmp_path, CAPTIONS)
    line = pieces(made, Watched())
    first, second = [*line[:2], None], [*line[2:], None]
    assert len(through(made, first)) + len(through(made, second)) == 4
    assert streams(tmp_path) == 2


def test_units_that_are_done_are_passed_over_without_a_stream_s_end(tmp_path: Path) -> None:
    made = made_of(tmp_path, CAPTIONS)
    line = pieces(made, Watched())
    through(made, line[1:3])
    receipts = through(made, pieces(made, Watched()))
    assert streams(tmp_path) == 2
    assert sorted(r.counts.total for r in receipts) == [0, 0, 3, 3]


def test_a_fault_is_that_of_its_unit_alone(tmp_path: Path) -> None:
    """Whose it was nobody knows while several are in flight, so each is run again by itself."""
    made = made_of(tmp_path, [*CAPTIONS[:4], "crash", *CAPTIONS[4:]])
    receipts = through(made, pieces(made, Watched()))
    faults = [r for r in receipts if r.error]
    assert [r.error for r in faults] == ["ZeroDivisionError: a fault of the stage"]
    assert "raise ZeroDivisionError" in (faults[0].trace or "")
    units = made.dag.log(made.store, "source").units()
    assert sorted(r.unit for r in receipts) == sorted(units), "each is told of once"
    assert sum(r.counts.kept for r in receipts if not r.error) == 13 - 3


def test_while_one_is_run_again_no_other_is_in_flight(tmp_path: Path) -> None:
    """Or a death would be blamed on both, and the other one's clips be tried apart."""
    made = made_of(tmp_path, ["clip 0", "clip 1", "clip 2", "crash", *CAPTIONS[3:8]])
    beside: list[int] = []
    watches: list[Watched] = []

    class Alone(Watched):
        def begin(self, ids: pa.ChunkedArray) -> None:
            super().begin(ids)
            beside.append(sum(1 for watch in watches if watch.flying))

    line = [Piece(piece.unit, watch=Alone()) for piece in pieces(made, Watched())]
    watches += [piece.watch for piece in line if isinstance(piece.watch, Watched)]
    receipts = through(made, line)
    assert sum(r.error is not None for r in receipts) == 1
    broke = beside.index(2) + 1
    assert set(beside[broke : broke + 3]) == {1}, beside


def test_a_plain_stage_s_fault_costs_nobody_else_a_second_call(tmp_path: Path) -> None:
    """It answers before it takes more, so the unit before is through."""
    calls: list[str] = []

    class Called(Length):
        def one(self, caption: str | None) -> Any:
            calls.append(str(caption))
            return super().one(caption)

    made = made_of(tmp_path, [*CAPTIONS[:6], "crash"], Called)
    receipts = through(made, pieces(made, Watched()))
    assert sum(r.error is not None for r in receipts) == 1
    assert len(calls) == len(set(calls)) == 7


def test_what_is_answered_is_committed_while_the_next_one_is_at_work(tmp_path: Path) -> None:
    """A clip of the next unit that kills the worker costs the unit before it nothing."""
    found: list[int] = []

    class Looking(Length):
        def one(self, caption: str | None) -> Any:
            if caption == "look":
                deadline = time.monotonic() + 5
                while not log.commits(line[0].unit) and time.monotonic() < deadline:
                    time.sleep(0.01)
                found.append(sum(commit.rows for commit in log.commits(line[0].unit)))
            return super().one(caption)

    made = made_of(tmp_path, [*CAPTIONS[:3], "look"], Looking)
    line, log = pieces(made, Watched()), made.dag.log(made.store, "length")
    assert [receipt.error for receipt in through(made, line)] == [None, None]
    assert found == [3]


def test_units_with_suspects_have_streams_of_their_own(tmp_path: Path) -> None:
    made = made_of(tmp_path, CAPTIONS)
    line = pieces(made, Watched())
    view = UnitView(made.store, made.dag, line[1].unit)
    ids = view.source_ids(view.reached("modelled")).to_pylist()
    verdict = Verdict("killed_worker", "it was killed", 3)
    suspects = Watched(apart=[ids[:1]], condemned={ids[1]: verdict})
    receipts = through(made, [line[0], Piece(line[1].unit, watch=suspects), *line[2:]])
    assert sorted(r.counts.kept for r in receipts) == [2, 3, 3, 3]
    (condemned,) = (r.counts.failed for r in receipts if r.counts.failed)
    assert condemned == {"killed_worker": 1}
    assert suspects.together == 1, "the one that stands apart, then the one that is left"
    assert streams(tmp_path) == 4, "two of its own, one before and one after"


def test_a_stop_commits_the_answers_of_all_and_leaves_the_rest(tmp_path: Path) -> None:
    made = made_of(tmp_path, CAPTIONS)
    watch = Watched(stop_after=5)
    receipts = through(made, pieces(made, watch))
    assert sum(r.counts.kept for r in receipts) == 5
    assert not any(r.error for r in receipts)
    assert len(receipts) == 4, "each is told of, begun or not"
    result = run(made, (), Retry(), Reporter())
    assert result.status["modelled"] == Counts(12, 12)


@pytest.mark.parametrize(("runner", "most"), [("local", 1), ("ray", 4)])
def test_workers_get_the_next_unit_while_they_are_at_one(
    tmp_path: Path, on_runner: OnRunner, runner: str, most: int
) -> None:
    """Eight units. On Ray the next one is on its way while a worker is at one, which a busy machine
    may take as long for as these small units last."""
    settings = {"modelled": {"folder": str(tmp_path), "workers": 1}}
    how = {**on_runner(runner), "isolate": True, "unit_size": 16}
    captions = [f"clip {i}" for i in range(128)]
    made = pipeline(tmp_path, captions, [Modelled], settings, how)
    assert run(made, (), Retry(), Reporter()).status["modelled"] == Counts(128, 128)
    assert streams(tmp_path) <= most


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_death_with_two_units_in_flight_costs_the_clip_that_kills(
    tmp_path: Path, on_runner: OnRunner, runner: str
) -> None:
    captions = [*CAPTIONS[:4], "SIGKILL", *CAPTIONS[4:]]
    settings = {"modelled": {"folder": str(tmp_path), "workers": 1}}
    how = {**on_runner(runner), "isolate": True, "unit_size": 3}
    made = pipeline(tmp_path, captions, [Killing], settings, how)
    result = run(made, (), Retry(), Reporter())
    assert not result.faults
    assert result.status["modelled"] == Counts(13, 12, {}, {"killed_worker": 1})


class Killing(Modelled):
    """Kills its process at the captions that say so."""

    def one(self, caption: str) -> None:
        super(Modelled, self).one(caption)
