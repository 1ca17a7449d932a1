"""Figures and their intervals: what they are by hand, and how often they hold in simulations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.estimate.spread import LEVEL, Figure, drawn, exact, per_row, product, share, total


def test_a_share_has_wilsons_interval() -> None:
    # 7 of 20 of a practically endless population, 90%: computed from Wilson's formula by hand.
    found = share(7, 20, 10**12)
    assert found.value == 0.35
    assert (found.low, found.high) == (pytest.approx(0.20226, 1e-4), pytest.approx(0.53349, 1e-4))


@pytest.mark.parametrize(("hits", "tried"), [(0, 40), (40, 40)])
def test_a_share_of_none_or_all_is_not_held_for_certain(hits: int, tried: int) -> None:
    found = share(hits, tried, 10_000)
    assert found.low is not None and found.high is not None
    assert found.low <= found.value <= found.high
    assert 0.04 < found.high - found.low < 0.08


def test_a_share_of_everything_is_exact() -> None:
    assert share(3, 12, 12) == exact(0.25)
    nearly = share(30, 99, 100)
    assert nearly.low is not None and nearly.low > 0.28


def test_one_group_tells_of_no_interval() -> None:
    found = per_row([12.0], [4])
    assert found == Figure(3.0) and not found.known
    assert not product(found, exact(7.0)).known
    assert not total([found, exact(1.0)]).known
    assert product(found, exact(7.0)).value == 21.0


def test_groups_without_rows_are_no_observations() -> None:
    assert per_row([6.0, 0.0], [3, 0]) == Figure(2.0)
    assert per_row([], []) == Figure(0.0)
    assert per_row([0.0, 0.0], [3, 4]) == exact(0.0)


def test_equal_groups_have_no_spread() -> None:
    found = per_row([2.0, 4.0, 6.0], [1, 2, 3])
    assert found.value == found.low == found.high == 2.0


def test_two_groups_are_worth_little() -> None:
    """Two observations, one degree of freedom: t is 6.3."""
    found = per_row([9.0, 11.0], [10, 10])
    assert found.low is not None and found.high is not None
    assert found.high == pytest.approx(math.exp(6.314 * 0.1)) and found.low == 1 / found.high


def test_relative_errors_add_up_as_squares() -> None:
    a, b = Figure(2.0, 2 / 1.3, 2 * 1.3), Figure(5.0, 5 / 1.4, 5 * 1.4)
    both = product(a, b)
    assert both.value == 10 and both.high is not None
    assert math.log(both.high / 10) == pytest.approx(math.hypot(math.log(1.3), math.log(1.4)))


def test_a_product_of_nothing_may_be_as_much_as_both_may() -> None:
    assert product(Figure(0.0, 0.0, 3.0), Figure(2.0, 1.0, 4.0)) == Figure(0.0, 0.0, 12.0)


def test_a_sum_is_less_uncertain_than_its_parts() -> None:
    one = Figure(10.0, 7.0, 14.0)
    found = total([one, one, exact(5.0)])
    assert found.value == 25
    assert found.low == pytest.approx(25 - 3 * math.sqrt(2))
    assert found.high == pytest.approx(25 + 4 * math.sqrt(2))


def test_what_is_drawn_follows_the_formula() -> None:
    a, b = Figure(100.0, 80.0, 125.0), exact(50.0)

    def larger(values: dict[str, Any]) -> Any:
        return np.maximum(values["a"], values["b"])

    found = drawn({"a": a, "b": b}, larger, seed=0)
    assert found.value == 100
    assert found.low == pytest.approx(80, rel=0.02) and found.high == pytest.approx(125, rel=0.02)
    assert drawn({"a": Figure(100.0), "b": b}, larger, seed=0) == Figure(100.0)
    never = drawn({"a": Figure(0.0, 0.0, 10.0), "b": exact(0.0)}, larger, seed=0)
    assert never.value == never.low == 0 and never.high == pytest.approx(10, rel=0.05)


def held(intervals: list[Figure], truth: float) -> float:
    return float(
        np.mean([f.low <= truth <= f.high for f in intervals if f.low is not None and f.high])
    )


@pytest.mark.parametrize("share_true", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("population", [300, 100_000])
def test_shares_are_where_the_interval_says(share_true: float, population: int) -> None:
    rng = np.random.default_rng(1)
    good = round(share_true * population)
    found = [
        share(int(rng.hypergeometric(good, population - good, 200)), 200, population)
        for _ in range(1000)
    ]
    assert LEVEL - 0.03 <= held(found, good / population) <= LEVEL + 0.06


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_seconds_a_row_are_where_the_interval_says(sigma: float) -> None:
    """Rows whose times have a long tail, in ten groups, of which a gate lets 40% through."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(1500):
        rows = rng.binomial(20, 0.4, 10)
        times = [rng.lognormal(0.0, sigma, n).sum() for n in rows]
        found.append(per_row(times, rows.tolist()))
    assert LEVEL - 0.05 <= held(found, math.exp(sigma**2 / 2)) <= LEVEL + 0.05


def test_work_is_where_the_interval_says() -> None:
    """The product of both: how many rows come, and what one takes."""
    rng = np.random.default_rng(3)
    found, population, sigma = [], 50_000, 0.6
    for _ in range(1500):
        rows = rng.binomial(20, 0.4, 10)
        times = [rng.lognormal(0.0, sigma, n).sum() for n in rows]
        come = share(int(rows.sum()), 200, population).times(population)
        found.append(product(come, per_row(times, rows.tolist())))
    assert LEVEL - 0.05 <= held(found, 0.4 * population * math.exp(sigma**2 / 2)) <= LEVEL + 0.05
