"""The model that a worker keeps between units."""

from __future__ import annotations

from typing import Any

from pipeline.settle import AnyStage


class Kept:
    """A stage's model: made when it is first asked for, given back by `close`."""

    def __init__(self, stage: AnyStage) -> None:
        self._stage = stage
        self._made: list[Any] = []

    def __call__(self) -> Any:
        if not self._made:
            self._made.append(self._stage.setup())
        return self._made[0]

    def close(self) -> None:
        if self._made:
            self._stage.teardown(self._made.pop())
