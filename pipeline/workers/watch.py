"""What whoever watches over a unit's run hears of it and asks of it, and how that cuts its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from manifests.log import Counts
from stages.base import Failed

Places = Sequence[int]  # of rows, among those that are pending


@dataclass(frozen=True)
class Verdict:
    """Why a clip is settled as failed without being processed: its workers died on it."""

    error: str
    message: str
    attempts: int

    def outcome(self) -> Failed:
        return Failed(self.error, self.message)


@dataclass(eq=False)
class Watch:
    """Watches over one run of a unit. This one hears nothing and asks for nothing.

    `apart`      groups of clip ids that `process` gets in calls of their own, one call a group
    `condemned`  clips that it does not get at all
    """

    apart: Sequence[Sequence[str]] = ()
    condemned: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def suspects(self) -> bool:
        """Whether clips of the unit are to be processed apart."""
        return bool(self.apart or self.condemned)

    def begin(self, ids: pa.ChunkedArray) -> None:
        """The stage is about to get these clips: from now on they are in flight."""

    def through(self, ids: pa.ChunkedArray) -> None:
        """These clips are in flight no more: they are settled, or their stream has broken off."""

    def committed(self, counts: Counts) -> None:
        """Rows that were settled are committed, these many."""

    def stopping(self) -> bool:
        """Whether to commit what is done and leave the rest pending."""
        return False


UNWATCHED = Watch()


def lanes(ids: Sequence[str], size: int, watch: Watch) -> Iterator[Iterator[Places]]:
    """The places of all of `ids` that are not condemned, each once, in batches of at most `size`.
    The batches of one lane may be in flight together. The groups that stand apart have each a lane
    of their own, and come first, so that a death among them costs no finished work."""
    if not watch.apart and not watch.condemned:
        yield _cut(range(len(ids)), size)
        return
    place = {clip: i for i, clip in enumerate(ids) if clip not in watch.condemned}
    for group in watch.apart:
        yield _cut([i for clip in group if (i := place.pop(clip, None)) is not None], size)
    yield _cut(list(place.values()), size)


def _cut(places: Places, size: int) -> Iterator[Places]:
    for start in range(0, len(places), size):
        yield places[start : start + size]
