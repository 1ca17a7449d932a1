"""What whoever watches over a unit's run hears of it and asks of it, and how that cuts its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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

    def begin(self, ids: Sequence[str]) -> None:
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

    places: Sequence[int]
    condemned: bool = False


def batches(ids: Sequence[str], size: int, watch: Watch) -> Iterator[Batch]:
    """All of `ids` once, in batches of at most `size`: first the condemned, then the groups that
    stand apart, so that a death among them costs no finished work, then the rest in its order."""
    if not watch.apart and not watch.condemned:
        yield from _cut(range(len(ids)), size)
        return
    condemned = [i for i, clip in enumerate(ids) if clip in watch.condemned]
    if condemned:
        yield Batch(condemned, condemned=True)
    place = {clip: i for i, clip in enumerate(ids) if clip not in watch.condemned}
    for group in watch.apart:
        yield from _cut([i for clip in group if (i := place.pop(clip, None)) is not None], size)
    yield from _cut(list(place.values()), size)


def _cut(places: Sequence[int], size: int) -> Iterator[Batch]:
    for start in range(0, len(places), size):
        yield Batch(places[start : start + size])
