"""How long stages take on a machine, by what a row takes: spread over workers as a run would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import RunSettings
from pipeline.estimate.spread import Figure, drawn, product
from pipeline.plan import Plan
from pipeline.resources import PART_ROWS, AnyStage, Offer, Pass, Workers, passes, share

HOUR = 3600.0


@dataclass(frozen=True)
class Need:
    """What a stage has to do, and what a row of it takes one worker."""

    rows: Figure
    seconds: Figure
    start: float  # seconds until a worker is ready


@dataclass(frozen=True)
class StageHours:
    """A stage's part of a run. `hours`: if nothing else of its pass held it up."""

    name: str
    number: int  # of its pass
    workers: int
    cpus: float  # of each
    gpus: float
    hours: Figure


@dataclass(frozen=True)
class Forecast:
    """A run on a machine or cluster. `bound`: the stage without which it would be over soonest."""

    cpus: float
    gpus: float
    stages: list[StageHours]
    passes: list[Pass]
    hours: Figure
    bound: str


def spread(
    stages: Mapping[str, AnyStage], todo: Plan, names: Sequence[str], offer: Offer
) -> dict[str, Workers]:
    """The workers that a run on Ray gives to `names`. Raises ConfigError where one doesn't fit."""
    parts = -(-todo.unit_rows // PART_ROWS[0])
    return {n: share(stages[n], offer, len(todo.stages[n].units) * parts) for n in names}


def forecast(
    needs: Mapping[str, Need],
    workers: Mapping[str, Workers] | None,
    offer: Offer,
    run: RunSettings,
    seed: int,
) -> Forecast:
    """`needs` in topological order; `workers` None: the local runner, one stage after the other.

    Raises ConfigError where `run.mode` asks for what does not fit.
    """
    names = list(needs)
    if workers is None:
        alone = Workers(1, offer.cpus, 0.0, 0, False)
        workers = dict.fromkeys(names, alone)
        cuts = [Pass((name,), "the local runner has one worker") for name in names]
    else:
        cuts = passes(workers, offer, run.mode, names)
    work = {name: product(need.rows, need.seconds) for name, need in needs.items()}
    lanes = {name: lane for cut in cuts for name, lane in _lanes(cut, workers, offer).items()}

    def seconds(values: dict[str, Any]) -> Any:
        return sum(_pass_seconds(cut, values, needs, workers, lanes, offer) for cut in cuts)

    stages = [
        StageHours(
            name,
            number,
            workers[name].count,
            workers[name].cpus,
            workers[name].gpus,
            work[name].times(1 / lanes[name] / HOUR),
        )
        for number, cut in enumerate(cuts, 1)
        for name in cut.stages
    ]
    known = {name: one.value for name, one in work.items()}
    longest = max(cuts, key=lambda c: _pass_seconds(c, known, needs, workers, lanes, offer))
    bound = max(longest.stages, key=lambda name: known[name] / lanes[name])
    hours = drawn(work, seconds, seed).times(1 / HOUR)
    return Forecast(offer.cpus, offer.gpus, stages, cuts, hours, bound)


def _lanes(cut: Pass, workers: Mapping[str, Workers], offer: Offer) -> dict[str, float]:
    """Workers of each stage that are at work side by side: those without a model get the cores that
    the others leave."""
    free = _free(cut, workers, offer)
    return {
        name: float(w.count) if w.actor else max(1.0, min(w.count, free // w.cpus))
        for name, w in ((name, workers[name]) for name in cut.stages)
    }


def _free(cut: Pass, workers: Mapping[str, Workers], offer: Offer) -> float:
    return max(1.0, offer.cpus - sum(workers[name].held[0] for name in cut.stages))


def _pass_seconds(
    cut: Pass,
    work: Mapping[str, Any],
    needs: Mapping[str, Need],
    workers: Mapping[str, Workers],
    lanes: Mapping[str, float],
    offer: Offer,
) -> Any:
    """A pass is as long as its slowest stage, or as what its stages without a model, which share
    the free cores, have to do together."""
    longest: Any = 0.0
    together: Any = 0.0
    for name in cut.stages:
        longest = np.maximum(longest, work[name] / lanes[name])
        if not workers[name].actor:
            together = together + work[name] * workers[name].cpus
    longest = np.maximum(longest, together / _free(cut, workers, offer))
    return longest + max(needs[name].start for name in cut.stages)
