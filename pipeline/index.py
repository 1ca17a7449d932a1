"""The training index: clips that are ready to train on, joined by key to captions and latents."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from manifests.schema import KEPT, digest
from manifests.shards import INDEX, Index, LatentSpec, ShardError, file_facts
from manifests.store import StoreError
from pipeline.dag import Pipeline
from pipeline.plan import views

INDEX_NAME = "index/train.parquet"
_STATE = "index/state.json"


def path(pipeline: Pipeline) -> str:
    return f"{pipeline.config.workdir}/{INDEX_NAME}"


def caption_column(pipeline: Pipeline) -> str:
    """The caption to train on: what recaption wrote, or the source's own where it is left out."""
    return "recaption" if "recaption" in pipeline.stages else "caption"


def refresh(pipeline: Pipeline) -> int | None:
    """Writes the index anew if anything that it is made of has changed. Returns its number of
    clips; None where the DAG has no encode stage or nothing is encoded yet."""
    if "encode" not in pipeline.stages:
        return None
    column = caption_column(pipeline)
    wanted = ["encode"] + (["recaption"] if column == "recaption" else [])
    all_views = list(views(pipeline))
    state = digest(
        [
            [view.unit, *(c.attempt for n in pipeline.dag.layers for c in view.commits(n))]
            for view in all_views
        ]
        + [pipeline.dag.layers[n].fingerprint for n in wanted]
    )
    if state == _last_state(pipeline) and pipeline.store.find(INDEX_NAME):
        return None
    rows: list[dict[str, Any]] = []
    for view in all_views:
        settled = {name: view.settled(name) for name in wanted}
        captions = view.table.column(column).to_pylist()
        clips = view.table.column("clip_id").to_pylist()
        shapes = view.table.column("latents_shape").to_pylist()
        place = settled["encode"].place
        for i, clip in enumerate(clips):
            at = place[i]
            if at is not None and all(s.outcome[i] == KEPT for s in settled.values()):
                rows.append(
                    {
                        "clip_id": clip,
                        "caption": captions[i],
                        "shard": at[0],
                        "row": at[1],
                        "shape": shapes[i],
                    }
                )
    if not rows:
        pipeline.store.delete(INDEX_NAME)
        return 0
    spec = _spec(pipeline, rows[0]["shard"])
    facts = {"caption": column, "stages": {n: pipeline.dag.layers[n].fingerprint for n in wanted}}
    rows.sort(key=lambda row: (row["shard"], row["row"]))
    table = pa.Table.from_pylist(rows, schema=INDEX)
    Index(pipeline.config.workdir, table, spec, facts).save(path(pipeline))
    pipeline.store.put(_STATE, json.dumps(state).encode())
    return len(rows)


def _last_state(pipeline: Pipeline) -> str | None:
    try:
        return str(json.loads(pipeline.store.read(_STATE)))
    except FileNotFoundError:
        return None


def _spec(pipeline: Pipeline, shard: str) -> LatentSpec:
    import pyarrow.parquet as pq

    with pipeline.store.fs.open(pipeline.store.path(shard), "rb") as file:
        facts = file_facts(pq.read_schema(file))
    try:
        return LatentSpec.from_json(facts["spec"])
    except (KeyError, ShardError) as error:
        raise StoreError(f"shard {shard} does not say what its latents are: {error}") from error
