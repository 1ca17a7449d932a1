"""The pilot: a sample goes through the stages, by the workers' own code, and is looked at."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from manifests.log import Counts
from manifests.store import Store
from pipeline import local
from pipeline.dag import Pipeline
from pipeline.estimate.drawing import marks
from pipeline.plan import StagePlan, plan, views
from pipeline.report import Reporter
from pipeline.resources import Workers
from pipeline.unit import Receipt, Retry
from pipeline.workers import stop
from stages.encode import BESIDE

# What Ray sets for its workers: the first where nobody else has.
_THREADS, _GPUS = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"


@dataclass
class Group:
    """What one group of the sample came to at a stage."""

    rows: int = 0  # settled
    # Of processing them, without the worker's start, and without commits: a run writes them beside
    # its work, many more rows at once, and to another place.
    seconds: float = 0.0
    amounts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0  # committed, without what each file has however many rows are in it
    # Clips that stages before this one had not settled: those that they have by now, and the rows
    # of these that reached this stage.
    observed: int = 0
    reached: int = 0


@dataclass
class Tried:
    """What a stage did with the sample."""

    name: str
    groups: dict[str, Group]
    counts: Counts = field(default_factory=Counts)
    start: float = 0.0  # seconds until its worker was ready: the model loaded, its batch size found
    first: str | None = None  # the group that it met first
    files: list[int] = field(default_factory=list)  # bytes that each file has besides its rows
    beside: list[int] = field(default_factory=list)  # bytes of files that it keeps beside commits
    # Share of the time for which its worker's process had a core at work, its start included; None
    # where it had no process of its own.
    busy: float | None = None
    error: str | None = None  # what it raised first; those rows are not settled
    trace: str | None = None


class _Listener(Reporter):
    """Keeps the receipts of units, and passes everything on."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self.receipts: list[Receipt] = []

    def start(self, stages: Mapping[str, StagePlan]) -> None:
        self._report.start(stages)

    def rows(self, stage: str, counts: Counts) -> None:
        self._report.rows(stage, counts)

    def unit(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self._report.unit(receipt)

    def note(self, text: str) -> None:
        # The sample's latents are gone when somebody reads it.
        self._report.note(text.partition(f" {BESIDE}")[0])

    def end(self) -> None:
        self._report.end()


def try_out(
    pipeline: Pipeline, stages: Sequence[str], workers: Mapping[str, Workers], report: Reporter
) -> dict[str, Tried]:
    """Runs what the sample's workdir has pending, stage by stage, each by one worker that gets the
    cores which `workers` would give it (all of them where that says nothing).

    Raises Stopped where somebody asked, StoreUnusable where the sample's workdir is full.
    """
    listener = _Listener(report)
    coming = {view.unit: marks(view, stages).coming for view in views(pipeline)}
    tried = {name: Tried(name, {unit: Group() for unit in coming}) for name in stages}
    report.start(plan(pipeline, stages).stages)
    try:
        with stop.orderly():
            for name in stages:
                _try(pipeline, tried[name], workers.get(name), listener)
    finally:
        report.end()
    for view in views(pipeline):
        after = marks(view, stages).coming
        for name, one in tried.items():
            seen = coming[view.unit][name] - after[name]
            ids = view.source_ids(view.reached(name)).to_pylist()
            group = one.groups[view.unit]
            group.observed, group.reached = len(seen), sum(clip in seen for clip in ids)
    return tried


def _try(pipeline: Pipeline, one: Tried, workers: Workers | None, listener: _Listener) -> None:
    todo = plan(pipeline, [one.name])
    if todo.empty or stop.asked():
        return
    store, name = pipeline.store, one.name
    log = pipeline.dag.log(store, name)
    known = {unit: len(log.commits(unit)) for unit in todo.units}
    there = set(store.find(""))
    listener.receipts.clear()
    began, used = time.monotonic(), _cpu_seconds()
    with as_a_worker(workers):
        local.run(pipeline, [name], todo, Retry(), listener)
    if pipeline.config.run.isolate:
        one.busy = (_cpu_seconds() - used) / max(1e-9, time.monotonic() - began)
    for receipt in listener.receipts:
        spent = Counter(receipt.seconds)
        group = one.groups[receipt.unit]
        # The time of loading a model is that of `read` where it is not told apart.
        own = "setup" if "setup" in spent else "read"
        one.start += spent[own] + spent["start"]
        group.seconds += max(0.0, spent["process"] - spent["start"])
        group.rows += receipt.counts.total
        group.amounts.update(receipt.amounts)
        one.counts += receipt.counts
        if one.first is None and receipt.counts.total:
            one.first = receipt.unit
        if receipt.error and one.error is None:
            one.error, one.trace = receipt.error, receipt.trace
    for unit, seq in known.items():
        for commit in log.commits(unit)[seq:]:
            if commit.data is not None:
                rows = _row_bytes(store, log.data_name(unit, commit))
                one.groups[unit].bytes += rows
                one.files.append(commit.size - rows)
    listed = store.listing("")
    one.beside = [
        listed[file].size for file in listed.keys() - there if not file.startswith(f"{name}/")
    ]


def _row_bytes(store: Store, name: str) -> int:
    """Bytes of a data file that its rows take: the rest is its schema and facts."""
    with store.opened(name) as file:
        told = pq.ParquetFile(file).metadata
        groups = [told.row_group(number) for number in range(told.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        return sum(column.total_compressed_size for column in columns)


def _cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def as_a_worker(workers: Workers | None) -> Iterator[None]:
    """What is started within it has the cores of one worker, as many threads, and a GPU only where
    the worker would have: beside it others will be at work."""
    if workers is None:
        yield
        return
    cpus = max(1, int(workers.cpus))
    wanted = {} if _THREADS in os.environ else {_THREADS: str(cpus)}
    if not workers.gpus:
        wanted[_GPUS] = ""
    before = {name: os.environ.get(name) for name in wanted}
    pinned = hasattr(os, "sched_setaffinity")
    every = os.sched_getaffinity(0) if pinned else set()
    try:
        os.environ.update(wanted)
        if pinned:
            os.sched_setaffinity(0, sorted(every)[:cpus])
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, every)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
