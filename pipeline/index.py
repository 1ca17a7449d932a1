"""The training index: clips that are ready to train on, joined by key to captions and latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.facts import file_facts
from manifests.scans import last_scan, which
from manifests.schema import KEPT, digest
from manifests.shards import INDEX, LatentSpec, TextSpec, write_index
from manifests.store import StoreError
from manifests.view import UnitView
from pipeline.config import CAPTIONED, ConfigError
from pipeline.dag import Pipeline
from pipeline.plan import status, views

INDEX_NAME = "index/train.parquet"


def path(pipeline: Pipeline) -> str:
    return f"{pipeline.config.workdir}/{INDEX_NAME}"


def caption_column(pipeline: Pipeline) -> str:
    """The caption to train on: what is embedded, or what recaption or else describe wrote, or the
    source's own where both are left out."""
    if "embed" in pipeline.stages:
        return pipeline.stages["embed"].reads[0]
    written = (column for stage, column in CAPTIONED.items() if stage in pipeline.stages)
    return next(written, "caption")


def captions_column(column: str) -> str:
    """Where all captions of a clip are, of which `column` has the one to train on."""
    return f"{column}_captions"


def needed(pipeline: Pipeline) -> list[str]:
    """The stages that must have kept a clip, encode first."""
    column = caption_column(pipeline)
    beside = {stage: own == column for stage, own in CAPTIONED.items()} | {"embed": True}
    return ["encode", *(n for n, wanted in beside.items() if wanted and n in pipeline.stages)]


def refresh(pipeline: Pipeline) -> int | None:
    """Writes the index anew if anything that it is made of has changed. Returns its number of
    clips; None where the DAG has no encode stage, or nothing has changed.

    Raises ConfigError where the rows in the workdir are those of another source. Where no clip is
    ready there is no index. Only while rows wait, as after a changed rule that was not
    run yet, the one of before stays: it is what the settings of before are trained on.
    """
    if "encode" not in pipeline.stages:
        return None
    if other := of_another_source(pipeline):
        raise ConfigError(f"{other}: `vidpipe run` first, or name what was read")
    column, wanted = caption_column(pipeline), needed(pipeline)
    state = _state(pipeline, wanted)
    if state == _last_state(pipeline):
        return None
    tables = (_ready(view, wanted, column) for view in views(pipeline))
    tables = (table for table in tables if len(table))
    ready = next(tables, None)
    if ready is None:
        totals = status(pipeline)
        if not any(totals[name].pending for name in pipeline.upstream(wanted)):
            pipeline.store.delete(INDEX_NAME)
        return 0
    spec = LatentSpec.from_json(told(pipeline, ready.column("shard")[0].as_py()))
    stages = {n: pipeline.dag.layers[n].fingerprint for n in wanted}
    first = "first_frame_latents" in pipeline.stages["encode"].adds.names
    facts = {"caption": column, "stages": stages, "state": state, "first_frame": first}
    if "embed" in wanted:
        text = told(pipeline, ready.column("text_shard")[0].as_py())
        facts["text"] = TextSpec.from_json(text).to_json()
    return write_index(path(pipeline), pipeline.config.workdir, chain([ready], tables), spec, facts)


def of_another_source(pipeline: Pipeline) -> str:
    """Whose rows and captions stand in the workdir where they are not those of `source`, or of it
    read another way; empty where they are."""
    last = last_scan(pipeline.store)
    source, path = which(pipeline.config.written)
    if last is None or last.source in ("", source):
        return ""
    if last.path != path:
        return (
            f"rows and captions in {pipeline.config.workdir} are those of {last.path}, which was "
            f"read last, not those of {path}, as `source` has it"
        )
    return (
        f"rows and captions in {pipeline.config.workdir} are those of {last.path} as it was read "
        "last, with other settings of `source` than these"
    )


def up_to_date(pipeline: Pipeline) -> bool:
    """Whether there is an index, and nothing that it is made of has changed since."""
    if "encode" not in pipeline.stages:
        return False
    return _state(pipeline, needed(pipeline)) == _last_state(pipeline)


def _state(pipeline: Pipeline, wanted: Sequence[str]) -> str:
    """Changes whenever the index may."""
    whole = hashlib.sha256()
    for view in views(pipeline):
        attempts = [c.attempt for n in pipeline.dag.layers for c in view.commits(n)]
        whole.update(digest([view.unit, *attempts]).encode())
    made = [pipeline.dag.layers[n].fingerprint for n in wanted]
    return digest([whole.hexdigest(), *made, INDEX.names])


def _ready(view: UnitView, wanted: Sequence[str], column: str) -> pa.Table:
    """The unit's clips that every stage of `wanted` kept, in the order of their latents."""
    for name in wanted:
        view.settled(name)
    settled = [view.settled(name) for name in wanted]  # only now: a split re-indexes all of them
    ready = pa.scalar(True)
    for stage in settled:
        ready = pc.and_(ready, pc.fill_null(pc.equal(stage.outcome, KEPT), False))
    rows = pc.indices_nonzero(ready)
    latents = settled[0].take(rows)
    columns = {
        "clip_id": view.table.column("clip_id").take(rows),
        "caption": view.table.column(column).take(rows),
        "shard": latents.file.cast(pa.string()),
        "row": latents.row.cast(pa.int32()),
        "shape": view.table.column("latents_shape").take(rows),
        **dict.fromkeys(("text_key", "text_shard", "text_row", "captions"), pa.nulls(len(rows))),
        "source_id": view.source_ids(rows),
    }
    if (several := captions_column(column)) in view.table.column_names:
        columns["captions"] = view.table.column(several).take(rows)
    if "embed" in wanted:
        # A file holds every embedding that its rows name: the row's own file is the place.
        columns["text_key"] = view.table.column("embedding_key").take(rows)
        columns["text_shard"] = settled[wanted.index("embed")].file.take(rows).cast(pa.string())
        columns["text_row"] = view.table.column("embedding_row").take(rows)
    return pa.table(columns).cast(INDEX).sort_by([("shard", "ascending"), ("row", "ascending")])


def _last_state(pipeline: Pipeline) -> str | None:
    """Of what the index was made; None where there is none."""
    if not pipeline.store.exists(INDEX_NAME):
        return None
    return str(_facts(pipeline, INDEX_NAME).get("state"))


def _facts(pipeline: Pipeline, name: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    with pipeline.store.opened(name) as file:
        return file_facts(pq.read_schema(file))


def told(pipeline: Pipeline, shard: str) -> dict[str, Any]:
    """What a shard tells of its payload: the spec's values. Raises StoreError."""
    try:
        return dict(_facts(pipeline, shard)["spec"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"shard {shard} does not say what it holds: {error}") from error
