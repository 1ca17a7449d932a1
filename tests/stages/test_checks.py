"""Which rows are looked at again: as many as were asked for, the first at once, the rest any."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from stages.checks import Checks


def looked_at(asked: list[tuple[int, int]], empty: frozenset[int] = frozenset()) -> list[int]:
    """The rows looked at, where each of `asked` told of so many of so many rows; of those that are
    `empty` there is nothing to see."""
    checks, first, found = Checks(), 0, []
    for number, rows in asked:
        checks.ask(number, rows)
        for row in range(first, first + rows):
            if row in empty:
                checks.passed()
            elif checks.due():
                found.append(row)
        first += rows
    return found


@pytest.mark.parametrize("seed", range(20))
def test_as_many_as_asked_for_and_the_first_at_once(seed: int) -> None:
    random.seed(seed)
    assert looked_at([(0, 50)]) == []
    one = looked_at([(3, 50), (0, 50), (2, 10)])
    assert one[0] == 0 and len(one) == 5 and sum(row < 50 for row in one) == 3
    assert looked_at([(9, 5)]) == [0, 1, 2, 3, 4], "no more than there are"
    late = looked_at([(2, 10), (0, 10)], empty=frozenset(range(10)))
    assert late[0] == 10 and len(late) == 2, "what fell to rows that came to nothing"
    assert len(looked_at([(4, 20), (0, 9)], empty=frozenset(range(1, 20, 3)))) == 4


def test_after_the_first_all_have_the_same_chance() -> None:
    random.seed(1)
    seen = Counter(row for _ in range(3000) for row in looked_at([(2, 7)]))
    assert seen[0] == 3000 and sum(seen.values()) == 6000
    assert all(400 < seen[row] < 600 for row in range(1, 7))
