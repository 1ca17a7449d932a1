"""`vidpipe audit`: the account proved from the data itself.

Every Parquet file that counts is read, and what each stage must have made of each clip is worked
out row by row, in plain Python: nothing here uses the joins, the keys of whole tables or the counts
that `status`, `run` and the index rely on. Then the two are compared.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.faults import StoreError
from manifests.ledger import Ledger
from manifests.log import Commit, Counts, standing
from manifests.schema import ABSENT, FAILED, KEPT, OUTCOME, PENDING, REJECTED, row_key
from manifests.view import SOURCE_LAYER, Layer, UnitView
from pipeline.dag import Pipeline
from pipeline.index import caption_column, captions_column, needed, up_to_date
from pipeline.plan import views
from pipeline.upkeep.across import (
    IDS,
    READY,
    Audit,
    Spill,
    audit_ids,
    audit_index,
    audit_scan,
    told_twice,
)
from pipeline.upkeep.verify import sha256_of

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class _Clip:
    """A row of the joined view. `ids`: what it is called, by the stage that split it last (the
    source at first); `values`: the columns of the stages that kept it."""

    ids: dict[str, str]
    values: dict[str, Any]
    outcomes: dict[str, str] = field(default_factory=dict)
    place: tuple[str, int] | None = None  # of its latents
    text: str | None = None  # the file of its embedding


@dataclass
class _Unit:
    view: UnitView
    clips: list[_Clip] = field(default_factory=list)
    known: set[str] = field(default_factory=set)  # every id that the source ever had here
    unreadable: bool = False
    stage: str = SOURCE_LAYER  # that is looked at


def audit(
    pipeline: Pipeline,
    quick: bool = False,
    progress: Callable[[int], None] = lambda units: None,
) -> Audit:
    """Proves the account of every stage, unit by unit; `quick` leaves out the files' sha256.

    Raises StoreError where the records of scans can't be read.
    """
    result = Audit({name: Counts() for name in pipeline.dag.layers})
    fresh = _indexed(pipeline)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vidpipe-audit-")))
        ids = Spill(stack.enter_context(Ledger(folder / "ids", "clip_id", IDS)))
        ready = Spill(stack.enter_context(Ledger(folder / "ready", "clip_id", READY)))
        newest, skipped = 0.0, 0
        for number, view in enumerate(views(pipeline), 1):
            unit = _Unit(view)
            try:
                newest = max([newest, *(c.created for c in view.commits(SOURCE_LAYER))])
                _audit_unit(pipeline, unit, result, quick)
            except StoreError as error:
                # What is damaged beyond reading; `vidpipe verify` tells more.
                result.found(unit.stage, f"a unit can't be read: {error}", view.unit)
                skipped += 1
                continue
            for clip in unit.clips:
                ids.add({"clip_id": clip.ids[SOURCE_LAYER], "unit": view.unit})
            for row in _ready(pipeline, unit):
                ready.add(row)
            progress(number)
        audit_ids(ids, result)
        if not skipped:
            audit_scan(pipeline, newest, result)
        if "encode" in pipeline.stages:
            known = stack.enter_context(Ledger(folder / "index", "clip_id", READY))
            audit_index(pipeline, ready, known, fresh and _indexed(pipeline), result)
    return result


def _indexed(pipeline: Pipeline) -> bool:
    """Whether the index can be compared: it is there, and of the present commits."""
    try:
        return up_to_date(pipeline)
    except StoreError:
        return False  # told of the unit


def _audit_unit(pipeline: Pipeline, unit: _Unit, result: Audit, quick: bool) -> None:
    for unit.stage in pipeline.dag.layers:
        unit.view.commits(unit.stage)
    for name, layer in pipeline.dag.layers.items():
        unit.stage = name
        tables = list(_tables(unit, name, layer, result, quick))
        if name == SOURCE_LAYER:
            counts = _audit_source(unit, tables, result)
        else:
            counts = _audit_stage(pipeline, unit, layer, tables, result)
        result.counts[name] += counts
        if not unit.unreadable and (said := unit.view.counts(name)) != counts:
            result.found(name, f"status says {_sum(said)}, the data {_sum(counts)}", unit.view.unit)
            if counts.pending > said.pending:
                lost = [c.ids[SOURCE_LAYER] for c in unit.clips if c.outcomes.get(name) == PENDING]
                result.found(name, "their row is lost, or is another clip's or key's", *lost)
        if name == "encode" and "latents" in layer.adds.names:
            _audit_latents(pipeline, unit, result)
        if name == "embed" and "embedding" in layer.adds.names:
            _audit_embeddings(pipeline, unit, result)


def _tables(
    unit: _Unit, name: str, layer: Layer, result: Audit, quick: bool
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of every file that counts, without payload, oldest first."""
    store = unit.view.store
    log = unit.view.dag.log(store, name)
    for commit in standing(unit.view.commits(name)):
        file = log.data_name(unit.view.unit, commit)
        finding = None if quick else _wrong_bytes(unit, commit, file)
        if finding:
            result.found(name, finding, file)
        try:
            with store.opened(file) as opened:
                parquet = pq.ParquetFile(opened)
                payload = {f.name for f in parquet.schema_arrow if pa.types.is_binary(f.type)}
                columns = [n for n in parquet.schema_arrow.names if n not in payload]
                table = parquet.read(columns).replace_schema_metadata(None)
        except (FileNotFoundError, StoreError, pa.ArrowException, OSError):
            unit.unreadable = True
            result.found(name, "a file that counts is missing or can't be read", file)
            continue
        lacking = [f.name for f in (*OUTCOME, *layer.adds) if f.name not in table.column_names]
        if name != SOURCE_LAYER and set(lacking) - payload:
            unit.unreadable = True
            result.found(name, f"a file lacks the columns {', '.join(lacking)}", file)
            continue
        if table.num_rows != commit.rows:
            result.found(name, f"a file has {table.num_rows} rows, not {commit.rows}", file)
        yield file, table


def _wrong_bytes(unit: _Unit, commit: Commit, file: str) -> str | None:
    try:
        found = sha256_of(unit.view.store, file)
    except (FileNotFoundError, StoreError):
        return None  # told when it is read
    return None if found == commit.sha256 else "a file's sha256 is another than was committed"


def _audit_source(unit: _Unit, tables: list[tuple[str, pa.Table]], result: Audit) -> Counts:
    """The last word on each clip, less those that left the table."""
    last: dict[str, tuple[int, int]] = {}
    for number, (_, table) in enumerate(tables):
        ids = table.column("clip_id").to_pylist()
        told_twice(SOURCE_LAYER, ids, result)
        last |= {clip: (number, row) for row, clip in enumerate(ids)}
    unit.known = set(last)
    parts = []
    for number, (_, table) in enumerate(tables):
        rows = sorted(row for at, row in last.values() if at == number)
        part = table.take(pa.array(rows, pa.int64()))
        here = [outcome != ABSENT for outcome in part.column("outcome").to_pylist()]
        part = part.filter(pa.array(here, pa.bool_()))
        if part.num_rows:
            parts.append(part)
    counts = Counts()
    whole = pa.concat_tables(parts, promote_options="permissive").to_pylist() if parts else []
    for row in whole:
        outcome = _outcome(SOURCE_LAYER, row["clip_id"], row["outcome"], row["reason"], result)
        counts.add(outcome, row["reason"])
        clip = _Clip({SOURCE_LAYER: row["clip_id"]}, row, {SOURCE_LAYER: row["outcome"]})
        unit.clips.append(clip)
    return counts


def _audit_stage(
    pipeline: Pipeline,
    unit: _Unit,
    layer: Layer,
    tables: list[tuple[str, pa.Table]],
    result: Audit,
) -> Counts:
    """What the stage has made of each clip that all it needs have kept, by what the clip is."""
    found = _by_id_and_key(unit, layer, tables, result)
    above = pipeline.dag.ancestors[layer.name]
    settled: dict[str, tuple[str | None, str | None]] = {}
    after: list[_Clip] = []
    for clip in unit.clips:
        if not all(clip.outcomes.get(need) == KEPT for need in layer.needs):
            after.append(clip)
            continue
        own = next(clip.ids[s] for s in reversed(clip.ids) if s in (*above, SOURCE_LAYER))
        key = row_key(clip.values.get(column) for column in layer.reads)
        file, rows = found.get((own, key), ("", []))
        first = rows[0][1] if rows else {"outcome": None, "reason": None}
        settled[own] = (first["outcome"], first["reason"])
        clip.outcomes[layer.name] = first["outcome"] or PENDING
        if layer.splits and rows:
            after += [_part(clip, layer.name, row) for _, row in rows]
        else:
            after.append(clip)
        for part, (number, row) in zip(after[-max(1, len(rows)) :], rows):
            if row["outcome"] == KEPT:
                part.values.update((n, row[n]) for n in layer.adds.names if n in row)
                if layer.name == "encode":
                    part.place = (file, number)
                if layer.name == "embed":
                    part.text = file
    unit.clips = after
    counts = Counts()
    for own, (outcome, reason) in settled.items():
        known = None if outcome is None else _outcome(layer.name, own, outcome, reason, result)
        counts.add(known, reason)
    return counts


def _part(clip: _Clip, splitter: str, row: dict[str, Any]) -> _Clip:
    """A part of a clip that was split; of one that was not kept there is but the clip itself."""
    ids = {**clip.ids, splitter: row["clip_id"]} if row["outcome"] == KEPT else clip.ids
    return _Clip(ids, dict(clip.values), dict(clip.outcomes), clip.place, clip.text)


def _by_id_and_key(
    unit: _Unit, layer: Layer, tables: list[tuple[str, pa.Table]], result: Audit
) -> dict[tuple[str, str], tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """For each clip and key the last file that holds it, and its rows there: one, or the parts of
    a split. A later file may settle the same again only as a further attempt."""
    found: dict[tuple[str, str], tuple[str, list[tuple[int, dict[str, Any]]]]] = {}
    attempts: dict[tuple[str, str], int] = {}
    foreign: dict[str, None] = {}
    whole = not any(c.voids for n in unit.view.dag.layers for c in unit.view.commits(n))
    splits = any(other.splits for other in unit.view.dag.layers.values())
    for file, table in tables:
        rows = table.to_pylist()
        told_twice(layer.name, [(row["clip_id"], row["row_key"]) for row in rows], result)
        for number, row in enumerate(rows):
            own = row["parent_id"] or row["clip_id"]
            place = (own, row["row_key"])
            if whole and not splits and own not in unit.known:
                foreign[own] = None
            if place not in found or found[place][0] != file:
                if row["attempts"] <= attempts.get(place, 0):
                    result.found(layer.name, "a clip was settled twice", own)
                found[place] = (file, [])
                attempts[place] = row["attempts"]
            found[place][1].append((number, row))
    if foreign:
        result.found(layer.name, "rows of clips that the unit never had", *foreign)
    if not layer.splits:
        found = {place: (file, rows[-1:]) for place, (file, rows) in found.items()}
    return found


def _outcome(stage: str, clip: str, outcome: str, reason: str | None, result: Audit) -> str | None:
    if outcome not in (KEPT, REJECTED, FAILED):
        result.found(stage, f"an outcome that is none: {outcome!r}", clip)
        return None
    if outcome != KEPT and not reason:
        result.found(stage, f"{outcome} without a reason", clip)
    return outcome


def _audit_latents(pipeline: Pipeline, unit: _Unit, result: Audit) -> None:
    """Each kept clip's bytes are there, as many as its shape and dtype say."""
    wanted: dict[str, dict[int, _Clip]] = {}
    for clip in unit.clips:
        if clip.outcomes.get("encode") == KEPT and clip.place is not None:
            wanted.setdefault(clip.place[0], {})[clip.place[1]] = clip
    for file, clips in wanted.items():
        lengths = _lengths(pipeline, "encode", file, "latents", result)
        for row, clip in clips.items() if lengths is not None else ():
            shape, dtype = clip.values["latents_shape"], clip.values["latents_dtype"]
            if wrong := _wrong_length(lengths or [], row, shape, dtype):
                result.found("encode", f"latents of {wrong}", clip.ids[SOURCE_LAYER])


def _audit_embeddings(pipeline: Pipeline, unit: _Unit, result: Audit) -> None:
    """Each kept clip's embedding stands in its file, under its key, in the row that it names."""
    wanted: dict[str, list[_Clip]] = {}
    for clip in unit.clips:
        if clip.outcomes.get("embed") == KEPT and clip.text is not None:
            wanted.setdefault(clip.text, []).append(clip)
    for file, clips in wanted.items():
        lengths = _lengths(pipeline, "embed", file, "embedding", result)
        if lengths is None:
            continue
        with pipeline.store.opened(file) as opened:
            keys = pq.read_table(opened, columns=["embedding_key"]).column(0).to_pylist()
        for clip in clips:
            values = clip.values
            row, shape = values["embedding_row"], values["embedding_shape"]
            wrong = _wrong_length(lengths, row, shape, values["embedding_dtype"])
            if wrong:
                result.found("embed", f"an embedding of {wrong}", clip.ids[SOURCE_LAYER])
            elif keys[row] != values["embedding_key"]:
                result.found("embed", "another embedding in its place", clip.ids[SOURCE_LAYER])


def _wrong_length(
    lengths: list[int | None], row: int | None, shape: list[int] | None, dtype: str
) -> str | None:
    size = math.prod(shape or [0]) * _ITEM_BYTES.get(dtype, 0)
    there = lengths[row] if row is not None and row < len(lengths) else None
    return None if size and there == size else f"{there or 0} bytes, not {dtype} x {shape}"


def _lengths(
    pipeline: Pipeline, stage: str, file: str, name: str, result: Audit
) -> list[int | None] | None:
    """The length of each row's payload, one row group in memory at a time."""
    found: list[int | None] = []
    try:
        with pipeline.store.opened(file) as opened:
            parquet = pq.ParquetFile(opened)
            for group in range(parquet.num_row_groups):
                column = parquet.read_row_group(group, columns=[name]).column(name)
                found += [v.as_buffer().size if v.is_valid else None for v in column]
    except (FileNotFoundError, StoreError, pa.ArrowException, OSError):
        result.found(stage, "a file that counts is missing or can't be read", file)
        return None
    return found


def _ready(pipeline: Pipeline, unit: _Unit) -> Iterator[dict[str, Any]]:
    """The rows that the training index must have of this unit."""
    if "encode" not in pipeline.stages:
        return
    column, wanted = caption_column(pipeline), needed(pipeline)
    for clip in unit.clips:
        if all(clip.outcomes.get(name) == KEPT for name in wanted) and clip.place is not None:
            yield {
                "clip_id": list(clip.ids.values())[-1],
                "caption": clip.values.get(column),
                "shard": clip.place[0],
                "row": clip.place[1],
                "shape": clip.values["latents_shape"],
                "text_key": clip.values.get("embedding_key"),
                "text_shard": clip.text,
                "text_row": clip.values.get("embedding_row"),
                "captions": clip.values.get(captions_column(column)),
            }


def equation(counts: Counts) -> str:
    """`1,000 in = 990 kept + 8 rejected + 2 failed + 0 pending`"""
    return f"{counts.total:,} in = {_sum(counts)}"


def _sum(counts: Counts) -> str:
    rejected, failed = sum(counts.rejected.values()), sum(counts.failed.values())
    return (
        f"{counts.kept:,} kept + {rejected:,} rejected + {failed:,} failed + "
        f"{counts.pending:,} pending"
    )
