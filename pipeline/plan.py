"""The plan: what is pending, and why. Pending is what upstream kept less what is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from manifests.log import Counts
from manifests.scans import pool_units
from manifests.store import StoreError
from manifests.view import SOURCE_LAYER, UnitView
from pipeline.dag import Pipeline
from pipeline.unit import Retry


@dataclass
class StagePlan:
    """One stage's part: its account now, and the units that have work for it."""

    name: str
    counts: Counts = field(default_factory=Counts)
    retried: int = 0  # failed rows that are tried again
    units: list[str] = field(default_factory=list)
    waits: bool = False  # stages upstream have work too, and may hand on more
    why: str = ""
    cost: Callable[[Mapping[str, int]], float | None] = lambda amounts: None  # of what it counts

    @property
    def todo(self) -> int:
        """Rows known to be pending; stages upstream may yet hand on more."""
        return self.counts.pending + self.retried


@dataclass
class Plan:
    stages: dict[str, StagePlan]
    unit_rows: int = 0  # of the largest unit

    @property
    def units(self) -> list[str]:
        """Units with work at any stage, in a stable order."""
        return list(dict.fromkeys(u for stage in self.stages.values() for u in stage.units))

    @property
    def empty(self) -> bool:
        return not self.units


def views(pipeline: Pipeline) -> Iterator[UnitView]:
    """Every unit of the source, as of one listing of the workdir.

    Stages are listed from the last to the first, so that what a stage has committed is seen only
    together with all that it was made from: the account adds up while a run is going on.
    """
    pool = pool_units(pipeline.store)  # before the listing, which then has all of them
    listed = {
        name: pipeline.dag.log(pipeline.store, name).units()
        for name in reversed(list(pipeline.dag.layers))
    }
    gone = sorted(pool - listed[SOURCE_LAYER].keys())
    if gone:
        raise StoreError(
            f"{len(gone)} units that were taken in have no rows any more (the first: {gone[0]}): "
            "`vidpipe verify --repair` has the source read anew"
        )
    for unit in sorted(pool):
        histories = {name: units[unit] for name, units in listed.items() if unit in units}
        yield UnitView(pipeline.store, pipeline.dag, unit, histories)


def status(pipeline: Pipeline) -> dict[str, Counts]:
    """The account of the source and of every stage."""
    return status_and_amounts(pipeline)[0]


def status_and_amounts(pipeline: Pipeline) -> tuple[dict[str, Counts], dict[str, Counter[str]]]:
    """The account of the source and of every stage, and what each has counted in all its runs under
    the present settings: tokens. What was made void since was spent all the same."""
    totals = {name: Counts() for name in pipeline.dag.layers}
    amounts = {name: Counter[str]() for name in totals}
    for view in views(pipeline):
        for name, total in totals.items():
            total += view.counts(name)
            for commit in view.commits(name):
                amounts[name].update(commit.amounts)
    return totals, amounts


def worth_retry(pipeline: Pipeline, totals: Mapping[str, Counts]) -> dict[str, int]:
    """How many failed rows of each stage may come through if they are tried again."""
    return {
        name: sum(n for error, n in totals[name].failed.items() if stage.worth_retry(error))
        for name, stage in pipeline.stages.items()
        if name in totals
    }


def plan(pipeline: Pipeline, stages: Sequence[str], retry: Retry = Retry()) -> Plan:
    """What `stages` (in topological order) have to do."""
    plans = {name: StagePlan(name, cost=pipeline.stages[name].cost) for name in stages}
    unit_rows = 1
    for view in views(pipeline):
        unit_rows = max(unit_rows, view.counts(SOURCE_LAYER).total)
        open_above: set[str] = set()
        for name, stage in plans.items():
            counts = view.counts(name)
            stage.counts += counts
            wanted = retry.of(pipeline.stages[name])
            failed = {r: n for r, n in counts.failed.items() if wanted.wants("failed", r)}
            stage.retried += sum(failed.values())
            waits = any(a in open_above for a in pipeline.dag.ancestors[name])
            stage.waits = stage.waits or waits
            if waits or counts.pending or failed or view.current(name) is None:
                stage.units.append(view.unit)
                open_above.add(name)
    for name, stage in plans.items():
        stage.why = _why(pipeline, name, stage)
    return Plan(plans, unit_rows)


def _why(pipeline: Pipeline, name: str, stage: StagePlan) -> str:
    if not stage.units:
        return "up to date"
    if not stage.todo:
        return "waits for the stages before it"
    fingerprint = pipeline.dag.layers[name].fingerprint
    seen = {path.split("/")[1] for path in pipeline.store.find(name) if path.count("/") >= 3}
    if fingerprint in seen:
        done = stage.counts.total - stage.counts.pending
        retried = f"{stage.retried} failed rows are tried again" if stage.retried else ""
        new = f"new or changed rows beside {done} that are done" if stage.counts.pending else ""
        return ", ".join(filter(None, (retried, new)))
    return "its settings changed" if seen else "never run"
