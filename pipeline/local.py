"""The `local` runner: a loop over units, with one worker. Starts at once; for small work."""

from __future__ import annotations

from collections.abc import Sequence

from manifests.store import StoreUnusable
from pipeline import stop
from pipeline.dag import Pipeline
from pipeline.plan import Plan
from pipeline.report import Reporter
from pipeline.unit import Receipt, Retry
from pipeline.worker import Driver, InProcess, Job, Runs, Worker


def run(
    pipeline: Pipeline, stages: Sequence[str], plan: Plan, retry: Retry, report: Reporter
) -> list[Receipt]:
    """Runs `stages` over the plan's units, one stage after the other; returns the receipts of
    units that raised. Ends early where somebody asks to stop. Raises StoreUnusable where nothing
    can be written any more."""
    faults: list[Receipt] = []
    worker: Runs = Worker() if pipeline.config.run.isolate else InProcess()
    driver = Driver(report.rows, report.note, stop.asked)
    try:
        for name in stages:
            job = Job(pipeline.store, pipeline.dag, pipeline.stages[name], retry)
            for unit in plan.stages[name].units:
                if stop.asked():
                    return faults
                receipt = worker.run(job, unit, driver)
                report.unit(receipt)
                if receipt.halts:
                    raise StoreUnusable(receipt.error)
                if receipt.error:
                    faults.append(receipt)
    finally:
        worker.close()
    return faults
