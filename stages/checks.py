"""Which rows of a run a stage looks at again, to see that they are right."""

from __future__ import annotations

import random


class Checks:
    """One worker's share: of the rows to come so many are to be looked at, the first one at once,
    so that a fault is seen early, the others by chance. What falls to rows that come to nothing is
    made up for by those after them."""

    def __init__(self) -> None:
        self.owed = 0
        self._rows = 0  # yet to come, of those that were told of
        self._begun = False

    def ask(self, number: int, rows: int) -> None:
        """Of the next `rows` so many are to be looked at, and as many as are owed yet."""
        self.owed += number
        self._rows += rows

    def due(self) -> bool:
        """Whether this row, which there is something to see of, is one of them."""
        chance = self.owed / max(1, self._rows)
        self.passed()
        if not self.owed or (self._begun and random.random() >= chance):
            return False
        self.owed -= 1
        self._begun = True
        return True

    def passed(self) -> None:
        """A row is through."""
        self._rows = max(0, self._rows - 1) if self.owed else 0
