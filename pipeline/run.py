"""`vidpipe run`: scan the source, plan, run what is pending, account for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from manifests.intake import Scan, scan
from manifests.log import Counts
from manifests.schema import did_you_mean
from pipeline import index, local
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.plan import Plan, plan, status
from pipeline.report import Reporter
from pipeline.resources import check_workdir, free_space
from pipeline.unit import Receipt, Retry

LOW_SPACE = 2 << 30
# Of files that are not those that were hashed: to try these again, the source is looked at anew.
CHANGED = "source_changed"


@dataclass
class Result:
    """What a run came to. `faults` are units that raised: their rows are pending."""

    scan: Scan
    stages: list[str]
    ran: bool
    status: dict[str, Counts]
    faults: list[Receipt] = field(default_factory=list)


def prepare(
    pipeline: Pipeline, names: Sequence[str], retry: Retry, report: Reporter
) -> tuple[Scan, list[str], Plan]:
    """Everything that can go wrong before work begins: columns, models, source, workdir.

    Raises ConfigError, SourceError or StoreError.
    """
    stages = pipeline.upstream(names)
    check_workdir(pipeline.config.workdir)
    anew = retry.failed and CHANGED in _classes(pipeline, stages, retry)
    done = scan(pipeline.store, pipeline.config.source, pipeline.config.run.unit_size, anew=anew)
    if done.new or done.changed or done.gone:
        gone = f", {done.gone} gone" if done.gone else ""
        changed = f", {done.changed} changed" if done.changed else ""
        report.note(f"source: {done.rows} rows, {done.new} new{changed}{gone}")
    todo = plan(pipeline, stages, _checked(pipeline, stages, retry))
    if not todo.empty:
        # What has nothing to do was checked when it was done: the second run is over at once.
        pipeline.bind(stages)
    return done, stages, todo


def run(
    pipeline: Pipeline, names: Sequence[str], retry: Retry, report: Reporter, explain: bool = False
) -> Result:
    """Brings `names` (all stages for none) and what they need up to date.

    Raises ConfigError, SourceError, StoreError or a runner's error.
    """
    done, stages, todo = prepare(pipeline, names, retry, report)
    if todo.empty:
        index.refresh(pipeline)
        return Result(done, stages, False, status(pipeline))
    free = free_space(pipeline.config.workdir)
    if free is not None and free < LOW_SPACE:
        report.note(
            f"warning: {free / (1 << 30):.1f} GiB free in {pipeline.config.workdir}; "
            "a full disk ends the run (what is committed stays)"
        )
    report.start(todo.stages)
    try:
        if pipeline.config.run.runner == "local":
            faults = local.run(pipeline, stages, todo, retry, report)
        else:
            from pipeline import ray_data  # takes seconds to import

            faults = ray_data.run(pipeline, stages, todo, retry, report, explain)
    finally:
        report.end()
    index.refresh(pipeline)
    return Result(done, stages, True, status(pipeline), faults)


def _classes(pipeline: Pipeline, stages: Sequence[str], retry: Retry) -> set[str]:
    """The failure classes that are to be tried again."""
    if retry.classes:
        return set(retry.classes)
    totals = status(pipeline)
    return {reason for name in stages for reason in totals[name].failed}


def _checked(pipeline: Pipeline, stages: Sequence[str], retry: Retry) -> Retry:
    """Raises ConfigError for a failure class that no row has: a typo would retry nothing."""
    if not retry.classes:
        return retry
    totals = status(pipeline)
    known = {reason for name in stages for reason in totals[name].failed}
    for name in sorted(retry.classes - known - {CHANGED}):
        there = ", ".join(sorted(known)) or "none"
        raise ConfigError(
            f"--retry-failed {name}: no failed row has that class.{did_you_mean(name, known)} "
            f"Classes of failed rows: {there}."
        )
    return retry
