"""From a sample to the whole: figures with their intervals. Pure functions.

A sample is tried in groups of clips that were put together at random, so that what a group comes to
is one observation. Intervals are two-sided, of LEVEL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.9
_NORMAL = 1.6449
# Student's t, 0.95 quantile, for 1, 2, ... degrees of freedom; then nearly the normal one.
_T = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771),
    *(1.761, 1.753, 1.746, 1.740, 1.734, 1.729),
)
_DRAWS = 4000


@dataclass(frozen=True)
class Figure:
    """A number and its interval; without one where a single observation tells of none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None

    def times(self, factor: float) -> Figure:
        """The same in another unit, or of so many; `factor` is not negative."""
        if self.low is None or self.high is None:
            return Figure(self.value * factor)
        return Figure(self.value * factor, self.low * factor, self.high * factor)

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def exact(value: float) -> Figure:
    return Figure(value, value, value)


def share(hits: float, tried: int, population: int) -> Figure:
    """The share of `population` that has what `hits` of `tried`, drawn from it without putting
    back, have. Wilson's score interval (Wilson 1927), with as many tries as would tell as much of
    an endless population."""
    if tried <= 0:
        return Figure(0.0)
    p = hits / tried
    if tried >= population:
        return exact(p)
    n = tried * (population - 1) / (population - tried)
    z = _NORMAL**2 / n
    middle = (p + z / 2) / (1 + z)
    half = math.sqrt(z * p * (1 - p) + z * z / 4) / (1 + z)
    return Figure(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def per_row(amounts: Sequence[float], rows: Sequence[int]) -> Figure:
    """What a row takes of something, by what groups of `rows` took of it: the ratio of the sums.

    The interval is Student's t of the groups' residuals (linearised ratio estimator, Cochran 1977,
    6.3), on a logarithmic scale, as what is timed has a long tail to the right.
    """
    groups = [(float(a), n) for a, n in zip(amounts, rows, strict=True) if n > 0]
    total = sum(n for _, n in groups)
    if not total:
        return Figure(0.0)
    ratio = sum(a for a, _ in groups) / total
    if len(groups) < 2:
        return Figure(ratio)
    if ratio <= 0:
        return exact(0.0)
    squares = sum((a - ratio * n) ** 2 for a, n in groups)
    freedom = len(groups) - 1
    error = math.sqrt(len(groups) / freedom * squares) / total
    quantile = _T[freedom - 1] if freedom <= len(_T) else _NORMAL * (1 + 1.5 / freedom)
    spread = math.exp(min(quantile * error / ratio, 50.0))
    return Figure(ratio, ratio / spread, ratio * spread)


def product(a: Figure, b: Figure) -> Figure:
    """Of two that are independent: their relative errors add up as squares."""
    value = a.value * b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Figure(value)
    if value <= 0:
        return Figure(value, 0.0, a.high * b.high)
    low = math.hypot(_log(a.value, a.low), _log(b.value, b.low))
    high = math.hypot(_log(a.high, a.value), _log(b.high, b.value))
    return Figure(value, value * math.exp(-low), value * math.exp(high))


def _log(more: float, less: float) -> float:
    return math.log(more / less) if less > 0 else 50.0


def total(figures: Sequence[Figure]) -> Figure:
    """The sum of figures that are independent."""
    value = sum(one.value for one in figures)
    low = high = 0.0
    for one in figures:
        if one.low is None or one.high is None:
            return Figure(value)
        low, high = math.hypot(low, one.value - one.low), math.hypot(high, one.high - one.value)
    return Figure(value, max(0.0, value - low), value + high)


def drawn(
    figures: Mapping[str, Figure], come_to: Callable[[dict[str, Any]], Any], seed: int
) -> Figure:
    """What `come_to` makes of figures that are independent, computed of their values, and, for the
    interval, of arrays of draws from each. It must be made of what works on arrays."""
    value = float(come_to({name: np.float64(one.value) for name, one in figures.items()}))
    if not all(one.known for one in figures.values()):
        return Figure(value)
    rng = np.random.default_rng(seed)
    made = come_to({name: _draws(one, rng) for name, one in figures.items()})
    low, high = np.quantile(np.broadcast_to(made, _DRAWS), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, min(value, float(low)), max(value, float(high)))


def _draws(one: Figure, rng: np.random.Generator) -> np.ndarray:
    """Lognormal draws, each side as wide as the interval; where it begins at zero or the value is
    none, even ones."""
    assert one.low is not None and one.high is not None
    normal = rng.standard_normal(_DRAWS) / _NORMAL
    if one.low <= 0 or one.value <= 0:
        # So that the interval holds LEVEL of them.
        spare = (one.high - one.low) * (1 - LEVEL) / (2 * LEVEL)
        return np.maximum(0.0, rng.uniform(one.low - spare, one.high + spare, _DRAWS))
    side = np.where(normal < 0, _log(one.value, one.low), _log(one.high, one.value))
    return one.value * np.exp(normal * side)
