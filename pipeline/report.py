"""Events of a run, and how a person sees them. Runners call a Reporter and never print.

Everything here goes to stderr: stdout is for data.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from manifests.log import Counts
from manifests.redact import shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pipeline.plan import StagePlan
    from pipeline.unit import Receipt

# How often the plain report writes a line for a stage that is at work.
PLAIN_SECONDS = 5.0


class Reporter:
    """Hears of everything and says nothing; the console reporters derive from it."""

    def start(self, stages: Mapping[str, StagePlan]) -> None:
        """A run over these stages begins."""

    def rows(self, stage: str, counts: Counts) -> None:
        """Rows were settled (not yet committed)."""

    def unit(self, receipt: Receipt) -> None:
        """A unit is through a stage, or raised in it."""

    def note(self, text: str) -> None:
        """Something a person wants to know: the dashboard's URL, a warning."""

    def end(self) -> None:
        """The run is over, however it ended."""


def console(stream: TextIO | None = None) -> Reporter:
    """Live lines on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    return LiveReporter(stream) if stream.isatty() else PlainReporter(stream)


def describe(counts: Counts) -> str:
    """`31 kept, 4 rejected, 1 failed`"""
    rejected, failed = sum(counts.rejected.values()), sum(counts.failed.values())
    return f"{counts.kept} kept, {rejected} rejected, {failed} failed"


def at_work(seconds: Mapping[str, float]) -> str:
    """`, model at work 96% of the time`, where a stage tells how long its model waited."""
    spent = seconds.get("process", 0.0) + seconds.get("commit", 0.0)
    if "wait" not in seconds or not spent:  # the last of what raised is not told
        return ""
    share = max(0.0, 1 - seconds["wait"] / spent)
    return f", model at work {share:.0%} of the time"


def tokens(amounts: Mapping[str, int], seconds: Mapping[str, float]) -> str:
    """`, 812 tokens/s a worker, 73% of the prompts' tokens cached`, where a stage counts them."""
    spent = seconds.get("process", 0.0) + seconds.get("commit", 0.0)
    if not amounts.get("tokens") or not spent:
        return ""
    cached = amounts.get("cached_tokens", 0) / max(1, amounts.get("prompt_tokens", 0))
    share = f", {cached:.0%} of the prompts' tokens cached" if cached else ""
    return f", {amounts['tokens'] / spent:.0f} tokens/s a worker{share}"


def quality(amounts: Mapping[str, int]) -> str:
    """`, 31 asked again, 4 left with the original caption`, where a stage refuses answers."""
    told = {"asked_again": "asked again", "originals": "left with the original caption"}
    return "".join(f", {amounts[n]} {what}" for n, what in told.items() if amounts.get(n))


def _closing(plan: StagePlan, seconds: Mapping[str, float], amounts: Mapping[str, int]) -> str:
    """What the last line of a stage ends with."""
    cost = plan.cost(amounts) if amounts.get("tokens") else None
    price = "" if cost is None else f", cost {money(cost)}"
    return at_work(seconds) + tokens(amounts, seconds) + price + quality(amounts)


def money(cost: float) -> str:
    """Two digits after the point, or two that count where it is less."""
    return f"{cost:,.2f}" if cost >= 0.1 or not cost else f"{cost:.2g}"


def _raised(receipt: Receipt, told: set[tuple[str, str]]) -> str | None:
    """What a unit raised, where no unit of that stage has raised the same before: a device that a
    worker lacks is met by every unit."""
    if not receipt.error or (receipt.stage, receipt.error) in told:
        return None
    told.add((receipt.stage, receipt.error))
    return f"{receipt.stage}: unit {receipt.unit} raised {receipt.error}"


class PlainReporter(Reporter):
    """One line a stage when it begins, every few seconds while it works, and at its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._stages: dict[str, StagePlan] = {}
        self._done: dict[str, Counts] = {}
        self._began: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._units: dict[str, int] = {}
        self._seconds: dict[str, Counter[str]] = {}
        self._amounts: dict[str, Counter[str]] = {}
        self._raised: set[tuple[str, str]] = set()

    def start(self, stages: Mapping[str, StagePlan]) -> None:
        self._stages = dict(stages)

    def rows(self, stage: str, counts: Counts) -> None:
        with self._lock:
            now = time.monotonic()
            self._began.setdefault(stage, now)
            done = self._done.setdefault(stage, Counts())
            done += counts
            if now - self._said.setdefault(stage, now) >= PLAIN_SECONDS:
                self._said[stage] = now
                self._line(stage, now)

    def unit(self, receipt: Receipt) -> None:
        with self._lock:
            units = self._units[receipt.stage] = self._units.get(receipt.stage, 0) + 1
            plan = self._stages.get(receipt.stage)
            if raised := _raised(receipt, self._raised):
                self._write(raised)
            seconds = self._seconds.setdefault(receipt.stage, Counter())
            seconds.update(receipt.seconds)
            amounts = self._amounts.setdefault(receipt.stage, Counter())
            amounts.update(receipt.amounts)
            if plan and units == len(plan.units) and receipt.stage in self._done:
                self._line(receipt.stage, time.monotonic(), _closing(plan, seconds, amounts))
                self._said[receipt.stage] = math.inf  # that was its last line

    def note(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def _line(self, stage: str, now: float, more: str = "") -> None:
        done = self._done[stage]
        seconds = max(1e-9, now - self._began[stage])
        plan = self._stages.get(stage)
        known = plan is not None and not plan.waits
        total = f" of {plan.todo}" if plan and known else ""
        # None may be left of those told: a worker died before it committed them.
        rate = f", {done.total / seconds:.1f} rows/s" if seconds > 0.5 and done.total else ""
        left = plan.todo - done.total if plan and known else 0
        time_left = f", {left * seconds / done.total:.0f} s left" if left > 0 and rate else ""
        self._write(f"{stage}: {done.total}{total} rows: {describe(done)}{rate}{time_left}{more}")

    def _write(self, text: str) -> None:
        print(shown(text), file=self._stream, flush=True)


class LiveReporter(Reporter):
    """One live line a stage: a bar, kept/rejected/failed, rows/s, time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._plans: dict[str, StagePlan] = {}
        self._done: dict[str, Counts] = {}
        self._units: dict[str, int] = {}
        self._seconds: dict[str, Counter[str]] = {}
        self._amounts: dict[str, Counter[str]] = {}
        self._raised: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def start(self, stages: Mapping[str, StagePlan]) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._plans = dict(stages)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[outcomes]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        for name, plan in stages.items():
            if plan.units:
                self._tasks[name] = self._progress.add_task(
                    # How much there will be is not known while upstream is at work: a pulse.
                    name,
                    total=None if plan.waits else plan.todo,
                    start=False,
                    outcomes="",
                    rate="",
                )
        self._progress.start()

    def rows(self, stage: str, counts: Counts) -> None:
        if self._progress is None or stage not in self._tasks:
            return
        with self._lock:
            done = self._done.setdefault(stage, Counts())
            done += counts
            task = self._tasks[stage]
            if done.total == counts.total:
                self._progress.start_task(task)
            known = self._progress.tasks[self._progress.task_ids.index(task)]
            elapsed = max(1e-9, known.elapsed or 0.0)
            self._progress.update(
                task,
                completed=done.total,
                outcomes=describe(done),
                rate=f"{done.total / elapsed:.1f} rows/s" if elapsed > 0.5 else "",
            )

    def unit(self, receipt: Receipt) -> None:
        if raised := _raised(receipt, self._raised):
            self.note(raised)
        with self._lock:
            units = self._units[receipt.stage] = self._units.get(receipt.stage, 0) + 1
            seconds = self._seconds.setdefault(receipt.stage, Counter())
            seconds.update(receipt.seconds)
            amounts = self._amounts.setdefault(receipt.stage, Counter())
            amounts.update(receipt.amounts)
            if self._progress is not None and units == len(self._plans[receipt.stage].units):
                done = self._done.get(receipt.stage, Counts()).total
                task = self._tasks[receipt.stage]
                self._progress.start_task(task)
                outcomes = describe(self._done.get(receipt.stage, Counts()))
                outcomes += _closing(self._plans[receipt.stage], seconds, amounts)
                done = max(1, done)
                self._progress.update(task, total=done, completed=done, outcomes=outcomes)

    def note(self, text: str) -> None:
        self._console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
