"""What an audit finds, and the part of it that no unit shows by itself: that no clip stands in two,
that none of the source's rows is missing, and that the training index is what the data says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.ledger import Ledger
from manifests.log import Counts
from manifests.scans import SCANS, last_scan
from manifests.shards import CAPTIONS
from manifests.view import SOURCE_LAYER
from pipeline.dag import Pipeline
from pipeline.index import INDEX_NAME

INDEX = "index"
IDS = pa.schema([pa.field("clip_id", pa.string()), pa.field("unit", pa.string())])
READY = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("text_key", pa.string()),
        pa.field("text_shard", pa.string()),
        pa.field("text_row", pa.int32()),
        pa.field("captions", CAPTIONS),
    ]
)
# Rows that wait before they are spilled: a ledger likes large tables.
_SPILL = 1 << 16
MOSTIDS = 20


@dataclass
class Finding:
    """One kind of thing that is wrong in a stage. `ids`: the first of the clips, units or files
    that it was found in; `count`: of all of them."""

    stage: str
    what: str
    ids: list[str] = field(default_factory=list)
    count: int = 0


@dataclass
class Audit:
    """The account of each stage as the data has it, and what is wrong."""

    counts: dict[str, Counts]
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    indexed: int | None = None  # rows of the training index; None: there is none to compare
    notes: list[str] = field(default_factory=list)

    def found(self, stage: str, what: str, *ids: str) -> None:
        finding = self.findings.setdefault((stage, what), Finding(stage, what))
        finding.count += len(ids)
        finding.ids += ids[: max(0, MOSTIDS - len(finding.ids))]

    def of(self, stage: str) -> list[Finding]:
        return [finding for finding in self.findings.values() if finding.stage == stage]


def told_twice(stage: str, ids: list[Any], result: Audit) -> None:
    if len(set(ids)) == len(ids):
        return
    again = [one for one, n in Counter(ids).items() if n > 1]
    names = [one if isinstance(one, str) else one[0] for one in again]
    result.found(stage, "a clip stands twice in one file", *names)


def audit_ids(ids: Spill, result: Audit) -> None:
    """No clip in two units, nor twice in one."""
    for bucket in ids.buckets():
        seen: dict[str, str] = {}
        for clip, unit in zip(*(column.to_pylist() for column in bucket.columns)):
            if seen.setdefault(clip, unit) != unit:
                result.found(SOURCE_LAYER, "a clip stands in two units", clip)


def audit_scan(pipeline: Pipeline, newest: float, result: Audit) -> None:
    """As many rows as the table had when it was last read; not while it is being read."""
    last = last_scan(pipeline.store)
    if last is None or last.signature == "damaged":
        return
    records = pipeline.store.listing(SCANS)
    read = max((info.modified for info in records.values()), default=0.0)
    rows = result.counts[SOURCE_LAYER].total
    broken = any(stage == SOURCE_LAYER for stage, _ in result.findings)
    if rows != last.rows and newest <= read and not broken:
        what = f"{last.rows} rows were read from the source, {rows} stand"
        result.found(SOURCE_LAYER, what, pipeline.config.source.path)


def audit_index(
    pipeline: Pipeline, ready: Spill, known: Ledger, fresh: bool, result: Audit
) -> None:
    """The index has exactly the clips that are ready, each with its caption and its place."""
    store = pipeline.store
    there = store.exists(INDEX_NAME)
    if not fresh and (there or ready.rows):  # where no clip is ready there is none
        result.notes.append("the index is behind the commits: the next run or training renews it")
        return
    if not there:
        result.indexed = 0
    else:
        with store.opened(INDEX_NAME) as opened:
            for batch in pq.ParquetFile(opened).iter_batches(_SPILL, columns=READY.names):
                known.add(pa.table(batch).cast(READY))
        result.indexed = known.rows
    columns = READY.names[1:]
    for mine, theirs in zip(ready.buckets(), known.buckets()):
        wanted = {row["clip_id"]: row for row in mine.to_pylist()}
        there = theirs.to_pylist()
        told_twice(INDEX, [row["clip_id"] for row in there], result)
        for row in there:
            own = wanted.pop(row["clip_id"], None)
            if own is None:
                result.found(INDEX, "clips that are not ready to train on", row["clip_id"])
                continue
            for column in columns:
                if own[column] != row[column]:
                    result.found(INDEX, f"another {column} than the data has", row["clip_id"])
        if wanted:
            result.found(INDEX, "clips that are ready and are not in it", *wanted)


class Spill:
    """Rows on their way into a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= _SPILL:
            self._flush()

    @property
    def rows(self) -> int:
        return self._ledger.rows + len(self._waiting)

    def buckets(self) -> Iterator[pa.Table]:
        self._flush()
        return self._ledger.buckets()

    def _flush(self) -> None:
        self._ledger.add(pa.Table.from_pylist(self._waiting, schema=self._ledger.schema))
        self._waiting = []
