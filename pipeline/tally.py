"""What the workers of a cluster tell the driver, and what it asks of them: an actor on Ray."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from manifests.log import Counts
from pipeline.unit import Receipt


class Tally:
    """Gathers the workers' events for the driver to show."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, Counts]] = []
        self._units: list[Receipt] = []
        self._parts: dict[tuple[str, str], list[tuple[int, Receipt]]] = {}
        self._notes: list[str] = []
        self._running = 0
        self._stopping = False

    def begin(self) -> bool:
        """A worker has got a unit; whether it is to leave it alone."""
        self._running += not self._stopping
        return self._stopping

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def running(self) -> int:
        """Units being processed, those of dead workers counted in."""
        return self._running

    def note(self, text: str) -> None:
        self._notes.append(text)

    def rows(self, stage: str, counts: Counts) -> None:
        self._rows.append((stage, counts))

    def unit(self, receipt: Receipt, number: int, parts: int) -> None:
        """A worker is through with part `number` of the `parts` of a unit; told on once all of them
        are, with the first error among them, and the seconds and amounts of all. A part comes again
        where Ray has a lost worker's errand done from its beginning."""
        self._running -= 1
        through = self._parts.setdefault((receipt.stage, receipt.unit), [])
        through.append((number, receipt))
        if len({part for part, _ in through}) == parts:
            del self._parts[receipt.stage, receipt.unit]
            seconds, amounts = Counter[str](), Counter[str]()
            for _, each in through:
                seconds.update(each.seconds)
                amounts.update(each.amounts)
            told = next((each for _, each in through if each.error), receipt)
            self._units.append(replace(told, seconds=dict(seconds), amounts=dict(amounts)))

    def drain(self) -> tuple[list[tuple[str, Counts]], list[Receipt], list[str]]:
        drained = self._rows, self._units, self._notes
        self._rows, self._units, self._notes = [], [], []
        return drained


def outcomes(counts: Counts) -> dict[str, int]:
    """Rows by outcome, as the metrics have them."""
    return {
        "kept": counts.kept,
        "rejected": sum(counts.rejected.values()),
        "failed": sum(counts.failed.values()),
    }
