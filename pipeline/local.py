"""The `local` runner: a loop in this process. Starts at once; for small work and for tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from manifests.store import StoreUnusable
from pipeline.dag import Pipeline
from pipeline.plan import Plan
from pipeline.report import Reporter
from pipeline.unit import Receipt, Retry, run_unit


def run(
    pipeline: Pipeline, stages: Sequence[str], plan: Plan, retry: Retry, report: Reporter
) -> list[Receipt]:
    """Runs `stages` over the plan's units, one stage after the other; returns the receipts of
    units that raised. Raises StoreUnusable where nothing can be written any more."""
    faults = []
    for name in stages:
        stage = pipeline.stages[name]
        model = functools.cache(stage.setup)
        for unit in plan.stages[name].units:
            receipt = run_unit(pipeline.store, pipeline.dag, stage, model, unit, retry, report.rows)
            report.unit(receipt)
            if receipt.halts:
                raise StoreUnusable(receipt.error)
            if receipt.error:
                faults.append(receipt)
    return faults
