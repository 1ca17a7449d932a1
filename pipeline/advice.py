"""What is allowed and hardly meant: settings of different sections that don't fit each other."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from manifests.sources import SourceError, read
from pipeline.dag import Pipeline
from stages.filter import Filter
from stages.recaption import Recaption

# Rows of the source that are looked at: enough to tell a table without captions from a gap in one.
SEEN = 200


def advice(pipeline: Pipeline, stages: Collection[str] | None = None) -> list[str]:
    """Sentences for a person, at most one a matter; about `stages` alone, where some are named."""
    told = {
        "encode": [_of_lengths, _of_captions],
        "recaption": [_of_missing_captions],
    }
    asked = [name for name in told if stages is None or name in stages]
    return [line for name in asked for find in told[name] for line in find(pipeline)]


def _of_missing_captions(pipeline: Pipeline) -> list[str]:
    rewrites = pipeline.stages.get("recaption")
    if not isinstance(rewrites, Recaption) or "caption" not in rewrites.template.columns:
        return []
    seen = 0
    try:
        for row in islice(read(pipeline.config.source), SEEN):
            if row.caption and row.caption.strip():
                return []
            seen += 1
    except SourceError:
        return []  # is told by whoever takes its rows in
    if not seen:
        return []
    rows = "no row" if seen < SEEN else f"none of the first {SEEN} rows"
    remedy = (
        "have it rewrite descriptions alone (recaption.preset: rewrite-described), name the "
        "caption as one that may be empty, {caption?},"
        if "describe" in pipeline.stages
        else "have captions written of what is seen by a section `describe` (and rewritten by "
        "recaption.preset: rewrite-described),"
    )
    return [
        f"{rows} of the source has a caption, and recaption, whose prompt is about {{caption}}, "
        f"rejects those without one: {remedy} or leave recaption out (recaption.enabled: false)"
    ]


def _of_captions(pipeline: Pipeline) -> list[str]:
    stages = pipeline.stages
    read = {column for stage in stages.values() for column in stage.reads}
    if not {"describe", "recaption"} <= stages.keys() or "description" in read:
        return []
    return [
        "nobody reads what describe writes, and recaption's captions are trained on: have it "
        "rewrite descriptions (recaption.preset: rewrite-described), or leave it out "
        "(recaption.enabled: false)"
    ]


def _of_lengths(pipeline: Pipeline) -> list[str]:
    rules = pipeline.stages.get("filter")
    if not isinstance(rules, Filter) or "encode" not in pipeline.stages:
        return []
    sampling = pipeline.config.sampling
    least, most = min(shape.frames for shape in sampling.shapes), sampling.most
    passing = rules.passing("len", most)
    if passing is None:
        return []
    shown = ", ".join(
        f"{rule.name} ({rule.sql})" for rule in rules.rules if rule.columns == ("len",)
    )
    where = "the frames of a bucket" if sampling.buckets else "sampling.frames"
    if not passing:
        return [f"filter lets no clip through: `len` is at most {where}, {most}: {shown}"]
    if passing[0] < least and sampling.short == "reject":
        return [
            f"encode will reject clips that filter lets through: they need {least} frames "
            f"({where}), and filter takes {passing[0]}: {shown}"
        ]
    return []
