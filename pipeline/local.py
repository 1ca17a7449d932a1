"""The `local` runner: a loop over units, with one worker. Starts at once; for small work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from manifests.store import StoreUnusable
from pipeline.dag import Pipeline
from pipeline.plan import Plan
from pipeline.report import Reporter
from pipeline.resources import spread
from pipeline.unit import Receipt, Retry
from pipeline.workers import stop
from pipeline.workers.process import Job
from pipeline.workers.worker import AHEAD, Driver, InProcess, Runs, Worker


def run(
    pipeline: Pipeline, stages: Sequence[str], plan: Plan, retry: Retry, report: Reporter
) -> list[Receipt]:
    """Runs `stages` over the plan's units; returns the receipts of units that raised. Ends early
    where somebody asks to stop. Raises StoreUnusable where nothing can be written any more."""
    faults: list[Receipt] = []
    worker: Runs = Worker() if pipeline.config.run.isolate else InProcess()
    driver = Driver(report.rows, report.note, stop.asked)
    line: deque[Future[Receipt]] = deque()

    def told(receipt: Receipt) -> None:
        report.unit(receipt)
        if receipt.halts:
            raise StoreUnusable(receipt.error)
        if receipt.error:
            faults.append(receipt)

    try:
        for chain in chains(pipeline, stages):
            jobs = [
                Job(pipeline.store, pipeline.dag, pipeline.stages[name], retry) for name in chain
            ]
            wanted = [set(plan.stages[name].units) for name in chain]
            checks = [
                spread(pipeline.stages[name].checks, plan.stages[name].units) for name in chain
            ]
            # In a chain a stage may need what the one before has committed.
            most = AHEAD if len(chain) == 1 else 1
            for unit in plan.units:
                for job, units, own in zip(jobs, wanted, checks):
                    if unit not in units:
                        continue
                    if stop.asked():
                        break
                    line.append(worker.submit(job, unit, driver, checks=own[unit]))
                    if len(line) == most:
                        told(line.popleft().result())
            while line:
                told(line.popleft().result())
    finally:
        worker.close()
    return faults


def chains(pipeline: Pipeline, stages: Sequence[str]) -> Iterator[list[str]]:
    """The stages, in order, cut so that a unit goes through those of a chain one after the other:
    what one has written the next need not read. A stage that loads a model stands alone."""
    chain: list[str] = []
    for name in stages:
        if pipeline.stages[name].loads_model:
            if chain:
                yield chain
            yield [name]
            chain = []
        else:
            chain.append(name)
    if chain:
        yield chain
