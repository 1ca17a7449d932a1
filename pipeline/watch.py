"""What whoever watches over a unit's run hears of it and asks of it, and how that cuts its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from stages.base import Failed


@dataclass(frozen=True)
class Verdict:
    """Why a clip is settled as failed without being processed: its workers died on it."""

    error: str
    message: str
    attempts: int

    def outcome(self) -> Failed:
        return Failed(self.error, self.message)


@dataclass
class Watch:
    """Watches over one run of a unit. This one hears nothing and asks for nothing.

    `apart`      groups of clip ids that `process` gets in calls of their own, one call a group
    `condemned`  clips that it does not get at all
    """

    apart: Sequence[Sequence[str]] = ()
    condemned: Mapping[str, Verdict] = field(default_factory=dict)

    def begin(self, ids: pa.ChunkedArray) -> None:
        """`process` is about to get these clips. They are through once their rows are settled."""

    def committed(self) -> None:
        """All that was settled until now is committed."""

    def stopping(self) -> bool:
        """Whether to commit what is done and leave the rest pending."""
        return False


UNWATCHED = Watch()


@dataclass(frozen=True)
class Batch:
    """Rows, by their places among the pending ones, that are settled together."""

    places: range | pa.Array
    condemned: bool = False

    def of(self, rows: Any) -> Any:
        """Its rows of a table or values of an array."""
        if isinstance(self.places, range):
            return rows.slice(self.places.start, len(self.places))
        return rows.take(self.places)


def batches(ids: pa.ChunkedArray, size: int, watch: Watch) -> Iterator[Batch]:
    """All of `ids` once, in batches of at most `size`: first the condemned, then the groups that
    stand apart, so that a death among them costs no finished work, then the rest in its order."""
    if not watch.apart and not watch.condemned:
        for start in range(0, len(ids), size):
            yield Batch(range(start, min(start + size, len(ids))))
        return
    place = {clip: i for i, clip in enumerate(ids.to_pylist())}
    condemned = [i for clip in watch.condemned if (i := place.pop(clip, None)) is not None]
    if condemned:
        yield Batch(pa.array(condemned, pa.int64()), condemned=True)
    groups = [[i for c in group if (i := place.pop(c, None)) is not None] for group in watch.apart]
    for group in (*groups, list(place.values())):
        for start in range(0, len(group), size):
            yield Batch(pa.array(group[start : start + size], pa.int64()))
