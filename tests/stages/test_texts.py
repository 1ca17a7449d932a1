"""How often is looked for embeddings that others have committed, and what that costs; that nobody
takes a long look for a hang."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from manifests.stored import StoredEmbeddings
from stages.base import Failed, on_alive
from stages.text_encoders import Text, TextEncoder
from stages.texts import LOOK_SECONDS, Texts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(StoredEmbeddings):
    """A workdir in which to look takes `seconds`."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__("/nowhere", "embed", "f")
        self._clock, self._took = clock, seconds
        self.looks: list[float] = []

    def look(self, alive: Callable[[], None] = lambda: None) -> None:
        self.looks.append(self._clock.now)
        self._clock.now += self._took
        alive()


class Lengths(TextEncoder):
    """An embedding of as many bytes as the caption has."""

    def __init__(self) -> None:
        pass

    def encode(self, captions: Sequence[str]) -> list[Text | Failed]:
        return [Text(caption.encode(), (1, len(caption)), None, 1, False) for caption in captions]


@pytest.mark.parametrize(("took", "between"), [(0.5, LOOK_SECONDS), (60.0, 600.0)])
def test_looking_takes_a_small_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch, took: float, between: float
) -> None:
    clock, heard = Clock(), list[float]()
    monkeypatch.setattr("stages.texts.time", clock)
    stored = Slow(clock, took)
    texts = Texts(Lengths(), lambda caption: f"{int(caption):032x}", stored, 0)
    on_alive(lambda: heard.append(clock.now))
    try:
        for n in range(400):
            texts.encode([str(n)])
            clock.now += 5.0
    finally:
        on_alive(lambda: None)
    gaps = [later - earlier - took for earlier, later in zip(stored.looks, stored.looks[1:])]
    assert len(gaps) > 2 and all(between <= gap <= between + 5 for gap in gaps)
    assert heard == [look + took for look in stored.looks], "a sign of life each"


def test_what_waits_for_its_commit_is_not_asked_about_with_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stages.texts.time", Clock())  # which stands still: one look
    named: list[str] = []

    def key(caption: str) -> str:
        named.append(caption)
        return f"{int(caption):032x}"

    texts = Texts(Lengths(), key, Slow(Clock(), 0.0), remember=0)
    captions = [str(n) for n in range(100)]
    for caption in captions:
        texts.encode([caption])
    assert named == captions, "each as it came, to be copied if it were there"
