"""What a workdir holds, read without the joins of the pipeline: to compare and to prove by."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.log import standing
from pipeline import config, dag, plan, query
from pipeline.dag import Pipeline
from pipeline.upkeep.audit import audit

SKIPPED = {"attempts", "origin"}  # how often and where: the rest must be the same


def opened(file: Path) -> Pipeline:
    return dag.build(config.load(str(file)))


@dataclass(frozen=True)
class Evidence:
    """Every row of the joined manifest, and the sha256 of every clip's latents."""

    rows: tuple[tuple[tuple[str, str], ...], ...]
    latents: tuple[tuple[str, str], ...]


def evidence(file: Path) -> Evidence:
    made = opened(file)
    rows = query.select(made, None).sort_by("clip_id").to_pylist()
    shown = tuple(
        tuple((name, repr(value)) for name, value in row.items() if name not in SKIPPED)
        for row in rows
    )
    latents = {row["clip_id"]: row["latents"] for row in committed(made, "encode")}
    hashed = ((clip, hashlib.sha256(v).hexdigest()) for clip, v in latents.items() if v is not None)
    return Evidence(shown, tuple(sorted(hashed)))


def committed(made: Pipeline, stage: str) -> list[dict[str, Any]]:
    """Every row that a commit of the stage names."""
    log = made.dag.log(made.store, stage)
    return [
        row
        for unit in log.units()
        for commit in standing(log.commits(unit))
        if commit.data
        for row in made.store.read_parquet(log.data_name(unit, commit)).to_pylist()
    ]


def wrong(file: Path) -> list[str]:
    """What does not hold in the workdir, in sentences; nothing must be wrong at any time."""
    made = opened(file)
    damaged = _damaged(made)
    found = [f"audit: {f.stage}: {f.what}: {f.ids}" for f in audit(made).findings.values()]
    if damaged:
        return damaged + found
    above: dict[str, int] = {}
    for name, counts in plan.status(made).items():
        sums = sum(counts.rejected.values()) + sum(counts.failed.values())
        if counts.total != counts.kept + sums + counts.pending:
            found.append(f"{name}: {counts} does not add up")
        above[name] = counts.kept
        if name == "source":
            continue
        needs = made.dag.layers[name].needs
        if len(needs) == 1 and counts.total != above[needs[0]]:
            found.append(f"{name}: {counts.total} in, and {needs[0]} kept {above[needs[0]]}")
        rows = committed(made, name)
        twice = [k for k, n in Counter((r["clip_id"], r["row_key"]) for r in rows).items() if n > 1]
        if twice:
            found.append(f"{name}: {twice} stand in several commits")
        settled = counts.kept + sums
        if len(rows) != settled:
            found.append(f"{name}: {len(rows)} rows are committed and {settled} accounted for")
    return found


def _damaged(made: Pipeline) -> list[str]:
    found = []
    for name in made.dag.layers:
        log = made.dag.log(made.store, name)
        for unit in log.units():
            for commit in standing(log.commits(unit)):
                if commit.data is None:
                    continue
                data = made.store.read(log.data_name(unit, commit))
                if hashlib.sha256(data).hexdigest() != commit.sha256:
                    found.append(f"{name}: {commit.data} has another sha256")
    return found
