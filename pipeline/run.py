"""`vidpipe run`: scan the source, plan, run what is pending, account for it."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from manifests.faults import halts
from manifests.intake import scan
from manifests.log import Counts
from manifests.scans import Scan
from manifests.schema import did_you_mean
from pipeline import index, local
from pipeline.advice import advice
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.plan import Plan, plan, status
from pipeline.report import Reporter
from pipeline.resources import check_workdir, free_space, gpus_here, usable_gpus
from pipeline.unit import EVERY_CLASS, Receipt, Retry
from pipeline.workers import stop

LOW_SPACE = 2 << 30
# Of files that are not those that were hashed: to try these again, the source is looked at anew.
CHANGED = "source_changed"
READING_SECONDS = 10.0


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
    if not pipeline.store.local:
        pipeline.store.prove()
    try:
        done = scan(
            pipeline.store,
            pipeline.config.source,
            pipeline.config.run.unit_size,
            reading(report),
            anew=_looks_anew(pipeline, stages, retry),
            written=pipeline.config.written,
        )
    except OSError as error:  # the table is spilled to a temporary folder
        full = halts(error, tempfile.gettempdir())
        if full is None:
            raise
        raise full from error
    if done.new or done.changed or done.gone:
        gone = f", {done.gone} gone" if done.gone else ""
        changed = f", {done.changed} changed" if done.changed else ""
        report.note(f"source: {done.rows} rows, {done.new} new{changed}{gone}")
    todo = plan(pipeline, stages, retry)
    if retry.failed:
        _check_retry(todo, retry, report)
    if not todo.empty:
        # What has nothing to do was checked when it was done: the second run is over at once.
        pipeline.bind(stages)
        for line in advice(pipeline, stages):
            report.note(f"note: {line}")
    return done, stages, todo


def reading(report: Reporter) -> Callable[[int], None]:
    """Tells of a table that takes long to read."""
    last = time.monotonic()

    def progress(rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= READING_SECONDS:
            last = time.monotonic()
            report.note(f"source: {rows} rows read")

    return progress


def run(
    pipeline: Pipeline, names: Sequence[str], retry: Retry, report: Reporter, explain: bool = False
) -> Result:
    """Brings `names` (all stages for none) and what they need up to date.

    Raises ConfigError, SourceError, StoreError, a runner's error, or Stopped where a signal ended
    it.
    """
    done, stages, todo = prepare(pipeline, names, retry, report)
    if todo.empty:
        index.refresh(pipeline)
        return Result(done, stages, False, status(pipeline))
    settings = pipeline.config.run
    if settings.gpus and settings.address is None:  # told at once, not by a Ray that has started
        usable_gpus(settings, gpus_here())
    free = free_space(pipeline.config.workdir)
    if free is not None and free < LOW_SPACE:
        report.note(
            f"warning: {free / (1 << 30):.1f} GiB free in {pipeline.config.workdir}; "
            "a full disk ends the run (what is committed stays)"
        )
    report.start(todo.stages)
    try:
        with stop.orderly():
            faults = _run(pipeline, stages, todo, retry, report, explain)
    finally:
        report.end()
    for name in pipeline.dag.layers:
        pipeline.dag.log(pipeline.store, name).compact()
    index.refresh(pipeline)
    return Result(done, stages, True, status(pipeline), faults)


def _looks_anew(pipeline: Pipeline, stages: Sequence[str], retry: Retry) -> bool:
    """Whether rows are tried again whose files are not those that were hashed: then download has
    to see what they are now."""
    if not retry.failed or (retry.classes and not retry.classes & {CHANGED, EVERY_CLASS}):
        return False
    if CHANGED in retry.classes:
        return True
    totals = status(pipeline)
    return any(CHANGED in totals[name].failed for name in stages)


def _run(
    pipeline: Pipeline,
    stages: Sequence[str],
    todo: Plan,
    retry: Retry,
    report: Reporter,
    explain: bool,
) -> list[Receipt]:
    if pipeline.config.run.runner == "local":
        return local.run(pipeline, stages, todo, retry, report)
    from pipeline import ray_data  # takes seconds to import

    return ray_data.run(pipeline, stages, todo, retry, report, explain)


def _check_retry(todo: Plan, retry: Retry, report: Reporter) -> None:
    """Raises ConfigError for a failure class that no row has: a typo would retry nothing."""
    known = sum((Counter(stage.counts.failed) for stage in todo.stages.values()), Counter[str]())
    there = ", ".join(f"{n} {name}" for name, n in sorted(known.items())) or "none"
    for name in sorted(retry.classes - known.keys() - {EVERY_CLASS, CHANGED}):
        raise ConfigError(
            f"--retry-failed {name}: no failed row has that class.{did_you_mean(name, known)} "
            f"Failed rows: {there}."
        )
    if known and not retry.classes and not any(s.retried for s in todo.stages.values()):
        report.note(
            f"no failed row is worth another try as things are ({there}): where you have mended "
            "the cause, name the class, or `--retry-failed all`"
        )
