"""An estimate as tables for a person, and as JSON for a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.estimate.estimate import Estimate, StageEstimate
from pipeline.estimate.forecast import Forecast
from pipeline.estimate.spread import LEVEL, Figure, share
from pipeline.output import text_table
from pipeline.report import money

ENDLESS = 1 << 62  # a population that a sample takes nothing off


def lines(found: Estimate) -> list[str]:
    """What the command prints."""
    percent = f"{LEVEL:.0%}"
    told = [
        f"{found.population:,} of {found.clips:,} clips have work to do; {found.sample:,} of them, "
        f"drawn at random (seed {found.seed}), were tried. In brackets: {percent} intervals.",
        "",
        _table(
            ["stage", "rows to do", "kept", "a row", "start", "disk", "on"],
            [_row(stage) for stage in found.stages],
        ),
    ]
    for stage in found.stages:
        told += [f"{stage.name}: {_figure(n, _count)} {what}" for what, n in stage.amounts.items()]
        if stage.cost is not None:
            told.append(f"{stage.name}: cost {_figure(stage.cost, _money)}")
    told += _failures(found)
    for forecast in (found.here, found.there):
        if forecast is not None:
            told += ["", *_forecast(forecast, "here" if forecast is found.here else "there")]
    return told


def _row(stage: StageEstimate) -> list[str]:
    tried, need = stage.tried, stage.need
    return [
        stage.name,
        _figure(stage.rows, _count),
        f"{tried.kept / tried.total:.0%}" if tried.total else "",
        _figure(need.seconds, _duration) if need else "not tried",
        _duration(need.start)(need.start) if need else "",
        _figure(stage.disk, _size) if need else "",
        stage.device if stage.device == stage.meant else f"{stage.device}, not {stage.meant}",
    ]


def _failures(found: Estimate) -> list[str]:
    """What of the sample was not kept, by its reason, with the share of each."""
    rows = []
    for stage in found.stages:
        for what in ("failed", "rejected"):
            for reason, n in sorted(getattr(stage.tried, what).items(), key=lambda one: -one[1]):
                part = share(n, stage.tried.total, ENDLESS)
                rows.append([stage.name, what, reason, f"{n}", _figure(part, _percent)])
    return ["", _table(["stage", "of the sample", "why", "rows", "share"], rows)] if rows else []


def _forecast(run: Forecast, where: str) -> list[str]:
    gpus = f"{run.gpus:g} GPU{'' if run.gpus == 1 else 's'}" if run.gpus else "no GPU"
    machine = f"{run.cpus:g} cores, {gpus}"
    rows = [
        [
            stage.name,
            f"{stage.number}",
            f"{stage.workers} x {stage.cpus:g} CPU"
            + (f" + {stage.gpus:g} GPU" if stage.gpus else ""),
            _figure(stage.hours.times(3600.0), _duration),
            "bounds it" if stage.name == run.bound else "",
        ]
        for stage in run.stages
    ]
    whole = _figure(run.hours.times(3600.0), _duration)
    title = f"{'on this machine' if where == 'here' else 'on'}{': ' if where == 'here' else ' '}"
    return [
        f"{title}{machine}: {whole} in all, bound by {run.bound}",
        _table(["stage", "pass", "workers", "takes", ""], rows),
    ]


def _table(names: list[str], rows: list[list[str]]) -> str:
    return text_table(names, rows).rstrip("\n")


_Unit = Callable[[float], Callable[[float], str]]


def _figure(one: Figure, unit: _Unit) -> str:
    """The value and its interval, all in the unit that suits the value."""
    said = unit(one.value)
    if not one.known or one.low is None or one.high is None:
        return f"{said(one.value)} (?)"
    if one.low == one.value == one.high:
        return said(one.value)
    low, high = said(one.low), said(one.high)
    name = said(one.value).rpartition(" ")[2] if " " in said(one.value) else ""
    return f"{said(one.value)} ({low.removesuffix(' ' + name)}-{high.removesuffix(' ' + name)})"


def _count(value: float) -> Callable[[float], str]:
    return lambda n: f"{n:,.0f}"


def _percent(value: float) -> Callable[[float], str]:
    return lambda n: f"{n:.1%}"


def _duration(value: float) -> Callable[[float], str]:
    known = ((1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"))
    factor, unit = next(((f, u) for limit, f, u in known if value < limit), (3600.0, "h"))
    return lambda n: f"{_digits(n / factor)} {unit}"


def _money(value: float) -> Callable[[float], str]:
    return money


def _size(value: float) -> Callable[[float], str]:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    at = next((i for i in range(4) if value < 1024.0 ** (i + 1)), 4)
    return lambda n: f"{_digits(n / 1024.0**at)} {units[at]}"


def _digits(n: float) -> str:
    """Three digits that count, no exponent."""
    if n >= 99.95 or n == 0:
        return f"{n:,.0f}"
    return f"{n:.1f}" if n >= 9.995 else f"{n:.2f}"


def to_json(found: Estimate) -> dict[str, Any]:
    """Hours, seconds, bytes and rows as numbers; `low` and `high` are null where the sample tells
    of no interval."""
    return {
        "clips": found.clips,
        "with_work": found.population,
        "sample": found.sample,
        "seed": found.seed,
        "level": LEVEL,
        "stages": [_stage_json(stage) for stage in found.stages],
        "here": found.here and _forecast_json(found.here),
        "there": found.there and _forecast_json(found.there),
        "notes": found.notes,
    }


def _stage_json(stage: StageEstimate) -> dict[str, Any]:
    need = stage.need
    return {
        "name": stage.name,
        "sample": vars(stage.tried),
        "device": stage.device,
        "meant_for": stage.meant,
        "rows": stage.rows.to_json(),
        "seconds_a_row": need and need.seconds.to_json(),
        "start_seconds": need and need.start,
        "amounts": {what: figure.to_json() for what, figure in stage.amounts.items()},
        "cost": stage.cost and stage.cost.to_json(),
        "disk_bytes": stage.disk.to_json(),
        "error": stage.error,
    }


def _forecast_json(run: Forecast) -> dict[str, Any]:
    return {
        "cpus": run.cpus,
        "gpus": run.gpus,
        "hours": run.hours.to_json(),
        "bound": run.bound,
        "stages": [
            {
                "name": stage.name,
                "pass": stage.number,
                "workers": stage.workers,
                "cpus": stage.cpus,
                "gpus": stage.gpus,
                "hours": stage.hours.to_json(),
            }
            for stage in run.stages
        ],
        "passes": [{"stages": list(cut.stages), "why": cut.why} for cut in run.passes],
    }
