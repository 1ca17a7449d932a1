"""What is allowed and hardly meant: settings of different sections that don't fit each other."""

from __future__ import annotations

from pipeline.dag import Pipeline
from stages.filter import Filter


def advice(pipeline: Pipeline) -> list[str]:
    """Sentences for a person, at most one a matter."""
    return [*_of_lengths(pipeline), *_of_captions(pipeline)]


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
