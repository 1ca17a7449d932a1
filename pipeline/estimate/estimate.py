"""What a run will take: a sample goes through the pending stages, the rest is reckoned.

Nothing is written into the workdir. The sample has one of its own, in the system's temporary
folder, which is removed at the end: results are committed by units, and units are not cut up.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from manifests.faults import StoreUnusable, halts
from manifests.intake import scan
from manifests.log import Counts
from manifests.overlay import Overlay
from pipeline.config import RunSettings
from pipeline.dag import Pipeline
from pipeline.errors import RunError
from pipeline.estimate.drawing import Survey, draw, forget_secrets, groups, lay_out, survey
from pipeline.estimate.forecast import Forecast, Need, forecast, spread
from pipeline.estimate.pilot import Group, Tried, try_out
from pipeline.estimate.spread import Figure, exact, per_row, product, share, total
from pipeline.plan import Plan, plan
from pipeline.report import Reporter
from pipeline.resources import Offer, cores, free_space, gpus_here, usable_gpus
from pipeline.run import LOW_SPACE, reading
from pipeline.workers import stop

PREFIX = "vidpipe-estimate-"
# A worker is said to wait for others where it works for less of the time than IDLE, in a stage
# that took so long that this can be told.
IDLE, IDLE_SECONDS = 0.5, 2.0
WARM_GROUPS = 4  # beside the first one, from which on it is held against them
# A GPU that a stage is meant for, and one that it was tried on.
GPU, CPU = "gpu", "cpu"


@dataclass(frozen=True)
class StageEstimate:
    """One stage over the whole source. Totals are of the rows still to do; `need` is None where
    none of the sample came to it."""

    name: str
    tried: Counts  # the sample's rows
    device: str  # that it was tried on
    meant: str  # that it takes where there is one
    rows: Figure
    need: Need | None
    amounts: dict[str, Figure]
    cost: Figure | None  # of these, in money
    disk: Figure  # bytes
    error: str | None
    trace: str | None


@dataclass(frozen=True)
class Estimate:
    """`clips`: of the source; `population`: of these, with work to do; `sample`: of these, tried.
    Without `stages` there is nothing to do."""

    names: list[str]
    clips: int
    population: int
    sample: int
    seed: int
    stages: list[StageEstimate] = field(default_factory=list)
    here: Forecast | None = None
    there: Forecast | None = None  # on as many GPUs as were asked about
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[StageEstimate]:
        """Stages that raised."""
        return [stage for stage in self.stages if stage.error]


def estimate(
    pipeline: Pipeline,
    names: Sequence[str],
    clips: int,
    seed: int,
    gpus: int | None,
    report: Reporter,
) -> Estimate:
    """Tries `names` (all stages for none), and what they need, on `clips` clips; `gpus`: of a
    cluster of such machines, to reckon for as well.

    Raises ConfigError, SourceError or StoreError, RunError where there is no room for the sample,
    Stopped where a signal ended it.
    """
    stages = pipeline.upstream(names)
    place = tempfile.mkdtemp(prefix=PREFIX)
    folder = Path(place).resolve()
    over = replace(pipeline, store=Overlay(str(folder / "source"), pipeline.store))

    def clean() -> None:
        forget_secrets(over, folder / "work")
        shutil.rmtree(place, ignore_errors=True)

    with stop.cleaning(clean):
        try:
            return _estimate(over, stages, clips, seed, gpus, report, folder)
        except (OSError, StoreUnusable) as error:
            full = halts(error, place) if isinstance(error, OSError) else error
            if full is None or str(folder) not in str(full):
                raise
            raise RunError(
                f"{full} What the sample comes to lies there until it is reckoned up: TMPDIR names "
                "another folder for that, and a smaller --clips takes less."
            ) from error


def _estimate(
    over: Pipeline,
    stages: list[str],
    clips: int,
    seed: int,
    gpus: int | None,
    report: Reporter,
    folder: Path,
) -> Estimate:
    config = over.config
    scan(over.store, config.source, config.run.unit_size, reading(report))
    todo, found = plan(over, stages), survey(over, stages)
    open_ = [name for name in stages if found.waiting[name] or found.coming[name]]
    size = min(clips, found.population)
    told = Estimate(stages, found.clips, found.population, size, seed)
    if not found.population:
        return told
    sample = lay_out(
        over, stages, list(draw(over, stages, found, size, seed)), folder / "work", seed
    )
    sample.bind(open_)
    free = free_space(str(folder))
    if free is not None and free < LOW_SPACE:
        report.note(f"warning: {free / (1 << 30):.1f} GiB free in {folder}, where the sample goes")
    machine = Offer(float(cores()), usable_gpus(config.run, float(gpus_here())))
    ray = config.run.runner == "ray"
    workers = spread(over.stages, todo, open_, machine) if ray else None
    tried = try_out(sample, open_, workers or {}, report)
    made = [_stage(over, todo, found, tried[name], machine) for name in open_]
    needs = {stage.name: stage.need for stage in made if stage.need is not None}
    here = forecast(needs, workers, machine, config.run, seed) if needs else None
    there = _on(over, todo, needs, machine, gpus, seed) if needs and gpus else None
    notes = [
        *_notes(told, clips, made),
        *_about_waiting(tried, made, here, there),
        *_about_machines(config.run, machine, made, gpus),
    ]
    return replace(told, stages=made, here=here, there=there, notes=notes)


def _on(
    pipeline: Pipeline, todo: Plan, needs: dict[str, Need], machine: Offer, gpus: int, seed: int
) -> Forecast:
    """The forecast for so many GPUs, each with as many cores as one has here."""
    offer = Offer(machine.cpus * gpus / max(1.0, machine.gpus), float(gpus))
    workers = spread(pipeline.stages, todo, list(needs), offer)
    return forecast(needs, workers, offer, pipeline.config.run, seed)


def _stage(
    pipeline: Pipeline, todo: Plan, found: Survey, tried: Tried, machine: Offer
) -> StageEstimate:
    """From what a stage did with the sample to what it has to do."""
    name, several = tried.name, list(tried.groups.values())
    stage = pipeline.stages[name]
    rows = _rows(pipeline, found, name, several)
    each = [group.rows for group in several]
    settled = sum(each)
    need = None
    if settled:
        need = Need(rows, *_seconds(tried, stage.loads_model))
    counted = sorted({what for group in several for what in group.amounts})
    amounts = {
        what: product(rows, per_row([group.amounts[what] for group in several], each))
        for what in counted
    }
    costs = [stage.cost(group.amounts) or 0.0 for group in several]
    priced = bool(counted) and stage.cost(several[0].amounts) is not None
    cost = product(rows, per_row(costs, each)) if priced else None
    # Files beside commits, downloads, are one a row at most: those without one are nothing.
    files = [*tried.beside, *[0] * (settled - len(tried.beside))]
    commits = len(todo.stages[name].units) * sum(tried.files) / max(1, len(tried.files))
    disk = total(
        [
            exact(commits),
            product(rows, per_row([group.bytes for group in several], each)),
            product(rows, per_row(files, [1] * len(files))) if tried.beside else exact(0.0),
        ]
    )
    device = GPU if stage.accelerated and machine.gpus >= 1 else CPU
    meant = GPU if stage.accelerated else CPU
    return StageEstimate(
        *(name, tried.counts, device, meant, rows, need, amounts, cost, disk),
        *(tried.error, tried.trace),
    )


def _seconds(tried: Tried, loads_model: bool) -> tuple[Figure, float]:
    """What a row takes a worker, and its start.

    What a stage without a model took longer for the first group than for the others is its start,
    too: packages are imported, files opened. One that has a model may have answered the first group
    late because it worked at all of them: there that tells nothing.
    """
    groups = [group for group in tried.groups.values() if group.rows]
    later = [group for unit, group in tried.groups.items() if group.rows and unit != tried.first]
    if loads_model or tried.first is None or len(later) < WARM_GROUPS:
        return per_row([g.seconds for g in groups], [g.rows for g in groups]), tried.start
    seconds = per_row([g.seconds for g in later], [g.rows for g in later])
    first = tried.groups[tried.first]
    return seconds, tried.start + max(0.0, first.seconds - first.rows * seconds.value)


def _rows(pipeline: Pipeline, found: Survey, name: str, several: Sequence[Group]) -> Figure:
    """Those that wait for the stage are known; of those that stages before it have not settled,
    the sample tells how many will come."""
    waiting, coming = found.waiting[name], found.coming[name]
    if not coming:
        return exact(float(waiting))
    observed = [group.observed for group in several]
    reached = [group.reached for group in several]
    if not sum(observed):
        return Figure(float(waiting))
    split = any(pipeline.dag.layers[above].splits for above in pipeline.dag.ancestors[name])
    come = (
        per_row(reached, observed)  # several rows of a clip are no share of it
        if split
        else share(sum(reached), sum(observed), coming)
    )
    return total([exact(float(waiting)), come.times(float(coming))])


def _notes(told: Estimate, clips: int, made: Sequence[StageEstimate]) -> list[str]:
    """What a reader must know of the figures."""
    notes = []
    if told.sample < clips:
        notes.append(
            f"--clips {clips}: only {told.population} have work to do, and all of them were tried: "
            "`vidpipe run` would have been as quick, and kept what it made"
        )
    if groups(told.sample) == 1:
        notes.append("no intervals: a sample of so few clips is one observation; take more --clips")
    for stage in made:
        if stage.error:
            settled = f"{stage.tried.total} rows were settled" if stage.tried.total else "none was"
            notes.append(f"{stage.name} raised {stage.error} ({settled})")
        elif stage.need is None:
            notes.append(
                f"none of the sample came to {stage.name}: no figures for it, and the sums are "
                "without it"
            )
    return notes


def _about_waiting(
    tried: Mapping[str, Tried], made: Sequence[StageEstimate], *runs: Forecast | None
) -> Iterator[str]:
    """What is multiplied by workers though something else may bound it."""
    for stage in made:
        busy = tried[stage.name].busy
        most = max(
            (w.workers for run in runs if run for w in run.stages if w.name == stage.name),
            default=1,
        )
        if busy is None or busy > IDLE or stage.device == GPU or most == 1 or stage.need is None:
            continue
        if stage.need.seconds.value * stage.tried.total < IDLE_SECONDS:
            continue
        yield (
            f"{stage.name}: its worker had its core at work for {busy:.0%} of the time, and waited "
            f"for a network, a server or a disk for the rest: that {most} of them get {most} times "
            "as much is taken for granted"
        )


def _about_machines(
    run: RunSettings, machine: Offer, made: Sequence[StageEstimate], gpus: int | None
) -> list[str]:
    notes = []
    slow = [s.name for s in made if s.meant == GPU and s.device == CPU and s.need]
    if slow:
        notes.append(
            f"{' and '.join(slow)}: meant for a GPU, and tried on a CPU: these are a CPU's figures"
            + (f", also those for {gpus} GPUs" if gpus else "")
            + ". Run this on a machine with the GPU that is meant"
        )
    if gpus:
        each = machine.cpus / max(1.0, machine.gpus)
        notes.append(
            f"{gpus} GPUs: like the one measured, with {each:g} cores each, videos and models as "
            "fast to read as here"
            if machine.gpus >= 1
            else f"{gpus} GPUs: of machines like this one, {each:g} cores to each GPU"
        )
    if run.address:
        notes.append(
            f"tried on this machine alone; the cluster at {run.address} was not asked: "
            "--gpus N tells for N GPUs of such machines"
        )
    return notes
