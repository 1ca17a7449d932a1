"""Whoever submits a unit hears of it: of its receipt, or of what was raised, never of nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from killers import Killer
from toys import Length, Shout, pipeline

from manifests.intake import scan
from manifests.log import Counts
from pipeline.unit import Receipt, Retry
from pipeline.workers import worker as workers
from pipeline.workers.process import Job
from pipeline.workers.worker import Driver, InProcess, Worker
from stages.base import Outcome, Row

SECONDS = 15.0  # no test waits for so long, unless nobody ever hears


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def made_of(folder: Path, captions: list[str], cls: type[Any]) -> tuple[Job, list[str]]:
    """Units of two clips, and what runs them."""
    made = pipeline(folder, captions, [cls])
    scan(made.store, made.config.source, 2)
    units = sorted(made.dag.log(made.store, "source").units())
    return Job(made.store, made.dag, made.stages[cls.name], Retry()), units


def driven(**more: Callable[..., Any]) -> Driver:
    told: dict[str, Callable[..., Any]] = {
        "rows": lambda stage, counts: None,
        "note": lambda text: None,
        "stopping": lambda: False,
    }
    return Driver(**(told | more))


def raising(error: Exception, when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    def called(*given: Any) -> bool:
        if when(*given):
            raise error
        return False

    return called


def heard(worker: Worker, futures: list[Future[Receipt]]) -> list[BaseException | None]:
    try:
        return [future.exception(SECONDS) for future in futures]
    finally:
        worker.close()


def lost(stage: str, counts: Counts) -> bool:
    return counts.total < 0


@pytest.mark.parametrize(
    ("captions", "broken"),
    [
        (["a", "b", "c"], {"stopping": raising(RuntimeError("the tally is gone"))}),
        (["a", "b", "c"], {"rows": raising(RuntimeError("the tally is gone"))}),
        (["SIGKILL", "b", "c"], {"note": raising(RuntimeError("the tally is gone"))}),
        (["a", "SIGKILL", "c"], {"rows": raising(RuntimeError("the tally is gone"), lost)}),
    ],
    ids=["asked", "told of rows", "told of a death", "told of rows that are lost"],
)
def test_what_a_driver_raises_is_heard_by_all_that_wait(
    tmp_path: Path, captions: list[str], broken: dict[str, Callable[..., Any]]
) -> None:
    job, units = made_of(tmp_path, captions, Killer)
    worker, driver = Worker(), driven(**broken)
    futures = [worker.submit(job, unit, driver) for unit in units]
    assert [str(error) for error in heard(worker, futures)] == ["the tally is gone"] * 2


def test_a_process_that_can_t_be_started_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, units = made_of(tmp_path, ["a", "b", "c"], Length)
    monkeypatch.setattr(workers, "Process", raising(OSError(24, "Too many open files")))
    worker = Worker()
    futures = [worker.submit(job, unit, driven()) for unit in units]
    assert all(isinstance(error, OSError) for error in heard(worker, futures))


def test_a_closed_console_is_no_death_of_a_clip(tmp_path: Path) -> None:
    """`vidpipe run 2>&1 | head`: the report raises an OSError, as a dead process's pipe does."""
    job, units = made_of(tmp_path, ["a", "b"], Length)
    notes: list[str] = []
    worker = Worker()
    driver = driven(rows=raising(BrokenPipeError(32, "Broken pipe")), note=notes.append)
    (error,) = heard(worker, [worker.submit(job, unit, driver) for unit in units])
    assert isinstance(error, BrokenPipeError) and not notes


def test_without_isolation_too(tmp_path: Path) -> None:
    job, (unit,) = made_of(tmp_path, ["a", "b"], Length)
    with pytest.raises(RuntimeError, match="the tally is gone"):
        InProcess().run(job, unit, driven(stopping=raising(RuntimeError("the tally is gone"))))


class Busy(Shout):
    """Notices where two of it are at work with one model."""

    reads = ("caption",)
    after = ()
    at_work = 0
    most = 0
    models = 0

    def setup(self) -> str:
        type(self).models += 1
        time.sleep(0.05)
        return super().setup()

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        cls = type(self)
        cls.at_work += 1
        cls.most = max(cls.most, cls.at_work)
        time.sleep(0.05)
        cls.at_work -= 1
        return super().process(rows, model)


def test_without_isolation_two_calls_at_once_run_one_after_the_other(tmp_path: Path) -> None:
    """An actor on Ray has several; there is one model, and one list of who counts."""
    job, units = made_of(tmp_path, ["a", "b", "c", "d"], Busy)
    worker = InProcess()
    receipts: list[Receipt] = []

    def call(unit: str) -> None:
        receipts.append(worker.run(job, unit, driven()))

    threads = [threading.Thread(target=call, args=[unit]) for unit in units]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [receipt.counts for receipt in receipts] == [Counts(2, 2)] * 2
    assert (Busy.models, Busy.most) == (1, 1)
