"""Rows spilled to disk, parted by an id: those that share one meet in the same bucket, and a bucket
fits in memory where the whole does not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BUCKETS = 64  # of ten million rows each has some 150,000


@functools.cache
def _pairs() -> pa.Array:
    # Not when this is imported: pyarrow imports pandas once it is given a list.
    return pa.array([f"{number:02x}" for number in range(256)])


class Ledger:
    """Tables of one schema in `folder`, parted by the last two hex digits of the column `by`.

    Rows of one id keep the order in which they were added.
    """

    def __init__(self, folder: Path, by: str, schema: pa.Schema) -> None:
        folder.mkdir()
        self._by, self.schema = by, schema
        self._files = [folder / f"{number:02d}.arrows" for number in range(BUCKETS)]
        self._writers = [pa.ipc.new_stream(str(file), schema) for file in self._files]
        self.rows = 0

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            writer.close()

    def add(self, table: pa.Table) -> None:
        """Best in large tables: each makes a batch in every bucket."""
        if not len(table):
            return
        ends = pc.utf8_slice_codeunits(table.column(self._by), -2)
        codes = pc.index_in(ends, _pairs()).to_numpy() % BUCKETS
        order = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[order], np.arange(BUCKETS + 1))
        parted = table.select(self.schema.names).cast(self.schema).take(pa.array(order))
        for writer, start, end in zip(self._writers, edges, edges[1:]):
            if end > start:
                writer.write_table(parted.slice(start, end - start))
        self.rows += len(table)

    def buckets(self) -> Iterator[pa.Table]:
        """Each bucket once, always in the same order; nothing can be added any more."""
        for writer, file in zip(self._writers, self._files):
            writer.close()
            with pa.ipc.open_stream(str(file)) as stream:
                yield stream.read_all().combine_chunks()
