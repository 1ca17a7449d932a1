"""The `ray` runner: units as rows of a Ray Dataset, one `map_batches` per stage.

What travels between operators are names of units and nothing else:
workers read and commit through the store, so there is nothing large to move, spill or rebuild. The
worker of a stage bears the stage's name, and so does its operator on the dashboard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.util.metrics import Counter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from manifests.log import Counts
from manifests.store import StoreUnusable
from pipeline.dag import Pipeline
from pipeline.errors import RunError
from pipeline.plan import Plan
from pipeline.ray_cluster import POLL_SECONDS, cluster
from pipeline.report import Reporter
from pipeline.resources import (
    PART_ROWS,
    Pass,
    Workers,
    cut,
    passes,
    share,
    spread,
)
from pipeline.tally import Tally, outcomes
from pipeline.unit import Receipt, Retry
from pipeline.workers import stop
from pipeline.workers.process import Job
from pipeline.workers.worker import AHEAD, Driver, InProcess, Runs, Worker, own_worker

# A wave is one Dataset: enough units to keep a cluster busy, few enough for the driver's memory.
WAVE_UNITS = 20_000
# How often a unit is tried again when the task at it dies, and a dead actor is replaced.
TASK_RETRIES, ACTOR_RESTARTS = 2, 3
# An actor's calls are tried again until it is dead for good: where a node is lost they fail at
# once, over and over, until Ray has noticed, which takes it seconds.
CALL_RETRIES = -1
# Seconds that workers get to commit once somebody asked to stop: ending Ray takes some, too.
STOP_SECONDS = 6.0

Errand = tuple[tuple[str, ...], int, int]  # units, and which part of each, of how many
Looks = Mapping[tuple[str, int], int]  # rows to look at again, by unit and number of the part


def run(
    pipeline: Pipeline,
    stages: Sequence[str],
    plan: Plan,
    retry: Retry,
    report: Reporter,
    explain: bool = False,
) -> list[Receipt]:
    """Runs `stages` over the plan's units; returns the receipts of units that raised. `explain`
    has the report say how the stages are spread, and why.

    Raises RunError where workers die beyond the retries, ConfigError where the stages don't fit
    the machine.
    """
    _quiet()
    settings = pipeline.config.run
    with cluster(settings, pipeline.config.base, report) as offer:
        active = [name for name in stages if plan.stages[name].units]
        parts = -(-plan.unit_rows // PART_ROWS[0])
        workers = {
            name: share(pipeline.stages[name], offer, len(plan.stages[name].units) * parts)
            for name in active
        }
        faults: list[Receipt] = []
        with _tally(report) as tally:
            for number, part in enumerate(passes(workers, offer, settings.mode, active), 1):
                if explain:
                    report.note(_spread(number, part, workers))
                wanted = {unit for name in part.stages for unit in plan.stages[name].units}
                pieces = cut([workers[name] for name in part.stages], len(wanted), plan.unit_rows)
                units = [unit for unit in plan.units if unit in wanted]
                checks = {
                    name: spread(
                        pipeline.stages[name].checks,
                        [(unit, n) for unit in plan.stages[name].units for n in range(pieces)],
                    )
                    for name in part.stages
                }
                once = pieces > 1 and any(workers[name].once for name in part.stages)
                for wave in waves(units, pieces, once):
                    if stop.asked():
                        return faults
                    faults += _run_wave(pipeline, part, workers, wave, retry, tally, checks)
        return faults


def waves(units: Sequence[str], parts: int, once: bool) -> Iterator[list[Errand]]:
    """What workers get, one errand after the other: a part of one unit, or, with `once`, that part
    of all units, so that one worker has all rows that fall into it."""
    size = max(1, WAVE_UNITS // parts)
    for start in range(0, len(units), size):
        wave = units[start : start + size]
        if not once:
            yield [((unit,), number, parts) for unit in wave for number in range(parts)]
            continue
        # Each begins with another unit: parts of one are not committed all at the same moment.
        begins = [number * len(wave) // parts for number in range(parts)]
        yield [((*wave[n:], *wave[:n]), number, parts) for number, n in enumerate(begins)]


def _spread(number: int, part: Pass, workers: Mapping[str, Workers]) -> str:
    members = ", ".join(
        f"{name} ({workers[name].count} x {workers[name].cpus:g} CPU"
        + (f" + {workers[name].gpus:g} GPU)" if workers[name].gpus else ")")
        for name in part.stages
    )
    return f"pass {number}: {members}: {part.why}"


def _run_wave(
    pipeline: Pipeline,
    part: Pass,
    workers: Mapping[str, Workers],
    work: Sequence[Errand],
    retry: Retry,
    tally: Any,
    checks: Mapping[str, Looks],
) -> list[Receipt]:
    items = [
        {"units": json.dumps(units), "part": number, "parts": parts, "faults": "[]"}
        for units, number, parts in work
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for name in part.stages:
        job = Job(pipeline.store, pipeline.dag, pipeline.stages[name], retry)
        share_ = workers[name]
        kind = _actor if share_.actor else _task
        limits = (
            {"max_restarts": ACTOR_RESTARTS, "max_task_retries": CALL_RETRIES}
            if share_.actor
            else {"max_retries": TASK_RETRIES}
        )
        dataset = _map_batches(
            dataset,
            kind(job, pipeline.config.run.isolate, tally, checks[name]),
            batch_size=None,
            compute=_pool(share_) if share_.actor else TaskPoolStrategy(size=share_.count),
            num_cpus=share_.cpus,
            num_gpus=share_.gpus,
            memory=share_.memory or None,
            # Ray's own defaults try for ever. A clip that kills its decoder kills the worker's
            # child alone; these are about nodes that are lost.
            **limits,
        )
    faults: list[Receipt] = []
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["faults"]:
                faults += map(_receipt, json.loads(str(text)))
            for receipt in faults:
                if receipt.halts:
                    raise StoreUnusable(receipt.error)
    except ray.exceptions.RayError as error:
        if stop.asked():  # whoever asked may have told Ray's own processes too
            return faults
        raise RunError(
            f"{' → '.join(part.stages)}: a worker died and its retries are used up: "
            f"{_last_line(error)}. What was committed is kept: `vidpipe run` goes on from there."
        ) from error
    return faults


def _pool(share_: Workers) -> ActorPoolStrategy:
    """Of actors that get the next unit while they are at one: their stage's stream goes on to it.
    What runs units is the worker's child, so the calls that wait here cost nothing."""
    return ActorPoolStrategy(
        size=share_.count,
        max_tasks_in_flight_per_actor=AHEAD,
        max_concurrent_calls_per_actor=AHEAD,
        enable_true_multi_threading=True,
    )


def _map_batches(dataset: ray.data.Dataset, worker: Any, **options: Any) -> ray.data.Dataset:
    with warnings.catch_warnings():
        # The limits on retries have no named parameters yet; Ray warns that they will get some.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return dataset.map_batches(worker, **options)


_ITEM = ("units", "part", "parts", "faults")


def _step(job: Job, tally: Any, checks: Looks) -> Callable[[dict[str, Any], Runs], dict[str, Any]]:
    """What a worker does with one row of the dataset: an errand."""

    def step(batch: dict[str, Any], worker: Runs) -> dict[str, Any]:
        rows = Counter("vidpipe_rows", "rows settled", tag_keys=("stage", "outcome"))
        made = Counter("vidpipe_amounts", "what stages count: tokens", tag_keys=("stage", "what"))

        def on_rows(name: str, counts: Counts) -> None:
            tally.rows.remote(name, counts)
            for outcome, n in outcomes(counts).items():
                if n > 0:  # those that died with a worker are taken back in the report alone
                    rows.inc(n, {"stage": name, "outcome": outcome})

        driver = Driver(on_rows, tally.note.remote, _Stopping(tally))
        faults = []
        for units, *part, before in zip(*(batch[name] for name in _ITEM)):
            number, parts = map(int, part)
            own = []
            for unit in json.loads(str(units)):
                if ray.get(tally.begin.remote()):
                    break
                receipt = worker.run(
                    job, unit, driver, (number, parts), checks.get((unit, number), 0)
                )
                tally.unit.remote(receipt, number, parts)
                for what, n in receipt.amounts.items():
                    if n > 0:  # Ray refuses to add nothing
                        made.inc(n, {"stage": receipt.stage, "what": what})
                own += [asdict(receipt)] if receipt.error else []
                if receipt.halts:
                    break
            faults.append(json.dumps(json.loads(str(before)) + own))
        return {**batch, "faults": faults}

    return step


class _Stopping:
    """Whether the driver was asked to stop: asks its tally, now and then."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally
        self._stopping = False
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._asked >= POLL_SECONDS and not self._stopping:
            self._stopping = ray.get(self._tally.stopping.remote())
            self._asked = now
        return self._stopping


def _task(
    job: Job, isolate: bool, tally: Any, checks: Looks
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    step = _step(job, tally, checks)

    def task(batch: dict[str, Any]) -> dict[str, Any]:
        return step(batch, own_worker(isolate))

    task.__name__ = task.__qualname__ = job.stage.name
    return task


def _actor(job: Job, isolate: bool, tally: Any, checks: Looks) -> type[Any]:
    step = _step(job, tally, checks)

    class Actor:
        def __init__(self) -> None:
            # The model is loaded with the first unit: one that can't be is that unit's error, with
            # its remedy, not a dead actor.
            self._worker: Runs = Worker() if isolate else InProcess()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return step(batch, self._worker)

    Actor.__name__ = Actor.__qualname__ = job.stage.name
    return Actor


@contextlib.contextmanager
def _tally(report: Reporter) -> Iterator[Any]:
    """An actor that workers tell their events, and a thread that hands these to `report`, and
    the wish to stop to the workers."""
    # With the driver, as a worker's node may be lost at any time. One that starts anew has
    # forgotten what it was told; the commits have not.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kept = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    tally = ray.remote(Tally).options(num_cpus=0, **kept).remote()
    over = threading.Event()

    def show() -> None:
        rows, units, notes = ray.get(tally.drain.remote())
        for note in notes:
            report.note(note)
        for stage, counts in rows:
            report.rows(stage, counts)
        for receipt in units:
            report.unit(receipt)

    def poll() -> None:
        asked: float | None = None
        while not over.wait(POLL_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                show()
                if stop.asked() and asked is None:
                    asked = time.monotonic()
                    tally.stop.remote()
                # Units are left to end, but not the dataset: thousands may still be in line.
                if asked is not None and (
                    not ray.get(tally.running.remote()) or time.monotonic() - asked > STOP_SECONDS
                ):
                    show()
                    stop.interrupt()
                    return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            show()


def _receipt(values: dict[str, Any]) -> Receipt:
    return Receipt(**{**values, "counts": Counts(**values["counts"])})


def _quiet() -> None:
    """Ray's own bars and banners off: progress is drawn from what workers settle. Its traces are
    for its log: what they are about is raised."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
