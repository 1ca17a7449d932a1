"""Clips of many rows in batches of one shape, and what became of them back in their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stages.base import Failed, Rejected, Row
from stages.media.frames import Clip


@dataclass
class Answer:
    """A row on its way: its clips, one or several windows, and what became of each."""

    clip: str = ""  # the row's id
    clips: list[Row | Failed | None] = field(default_factory=list)
    verdict: Rejected | Failed | None = None  # why the row as a whole is not encoded
    ended: bool = False  # there will be no more clips

    def next(self, clip: Clip) -> Waiting:
        """A clip of the row, to be encoded."""
        self.clips.append(None)
        return Waiting(clip, self, len(self.clips) - 1)

    @property
    def whole(self) -> bool:
        return self.ended and (self.verdict is not None or None not in self.clips)

    def made(self) -> list[Row] | Rejected | Failed:
        """What became of the whole row: its clips' columns, or why there are none."""
        failed = (each for each in self.clips if isinstance(each, Failed))
        return self.verdict or next(failed, None) or [c for c in self.clips if isinstance(c, dict)]


@dataclass(frozen=True)
class Waiting:
    """A clip that is to be encoded, and its place in the answer to its row."""

    clip: Clip
    answer: Answer
    place: int

    def settle(self, made: Row | Failed) -> None:
        self.answer.clips[self.place] = made


class Gathered:
    """Clips that wait for others of their shape. A batch is full with as many clips as `size` gives
    for it; where those that wait have `most` bytes, the largest batch goes as it is."""

    def __init__(self, size: Callable[[tuple[int, ...]], int], most: int) -> None:
        self._size, self._most = size, most
        self._bytes = 0
        self._waiting: dict[tuple[int, ...], list[Waiting]] = {}

    def add(self, new: Waiting) -> Iterator[list[Waiting]]:
        """The batches that are to be encoded now."""
        shape = new.clip.frames.shape
        batch = self._waiting.setdefault(shape, [])
        batch.append(new)
        self._bytes += new.clip.frames.nbytes
        if len(batch) >= self._size(shape):
            yield self._taken(shape)
        while self._bytes > self._most:
            yield self._taken(max(self._waiting, key=lambda each: _bytes(self._waiting[each])))

    def rest(self) -> Iterator[list[Waiting]]:
        while self._waiting:
            yield self._taken(next(iter(self._waiting)))

    def _taken(self, shape: tuple[int, ...]) -> list[Waiting]:
        batch = self._waiting.pop(shape)
        self._bytes -= _bytes(batch)
        return batch


def _bytes(batch: list[Waiting]) -> int:
    return sum(each.clip.frames.nbytes for each in batch)
