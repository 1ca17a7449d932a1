"""A workdir as it would be: what stands in it, and what is written over it kept elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from manifests.store import Listed, Store


class Overlay(Store):
    """The objects of `below`, which stays as it is, and those that were made since: these are in
    the folder `url`. What stands below can be neither replaced nor deleted."""

    def __init__(self, url: str, below: Store) -> None:
        super().__init__(url)
        self.below = below

    def __reduce__(self) -> tuple[Any, ...]:
        return Overlay, (self.url, self.below)

    def create(self, name: str, data: bytes) -> bool:
        if self.below.exists(name):
            return self.below.read(name) == data
        return super().create(name, data)

    def read(self, name: str) -> bytes:
        return super().read(name) if super().exists(name) else self.below.read(name)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        own = super().exists(name)
        with super().opened(name) if own else self.below.opened(name) as file:
            yield file

    def exists(self, name: str) -> bool:
        return super().exists(name) or self.below.exists(name)

    def find(self, prefix: str) -> list[str]:
        return sorted({*super().find(prefix), *self.below.find(prefix)})

    def listing(self, prefix: str) -> dict[str, Listed]:
        both = self.below.listing(prefix) | super().listing(prefix)
        return dict(sorted(both.items()))

    def read_parquet(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        if super().exists(name):
            return super().read_parquet(name, columns)
        return self.below.read_parquet(name, columns)
