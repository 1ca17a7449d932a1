"""`vidpipe captions check`: what the checks found, and captions that stand on many clips.

Equal captions are found over the whole corpus, which no worker sees: their hashes are parted on
disk, so memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.ledger import Ledger
from manifests.schema import did_you_mean
from manifests.view import SOURCE_LAYER, UnitView
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.index import caption_column
from pipeline.plan import views

_TEXTS = pa.schema([(name, pa.string()) for name in ("key", "clip_id", "text")])
EXAMPLES = 3


@dataclass(frozen=True)
class Repeated:
    """One caption that stands on several clips, but for case and punctuation."""

    text: str
    clips: int
    examples: list[str]  # ids of the first of them


@dataclass
class Captions:
    """What is known of a corpus' captions."""

    column: str
    clips: int = 0  # that have one
    distinct: int = 0
    shared: int = 0  # clips whose caption is another clip's too
    sources: Counter[str] = field(default_factory=Counter)  # model | original
    flags: Counter[str] = field(default_factory=Counter)  # of the last answers
    attempts: Counter[int] = field(default_factory=Counter)  # clips by answers asked for
    rejected: Counter[str] = field(default_factory=Counter)  # for want of a caption
    repeated: list[Repeated] = field(default_factory=list)
    amounts: Counter[str] = field(default_factory=Counter)  # tokens, of all runs
    cost: float | None = None  # of these, in money

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "repeated": [vars(one) for one in self.repeated]}


def check(
    pipeline: Pipeline,
    column: str | None = None,
    top: int = 10,
    progress: Callable[[int], None] = lambda clips: None,
) -> Captions:
    """Looks at the captions of `column` (default: those to train on), and finds the `top` most
    repeated ones. Raises ConfigError for a column that is none."""
    found = Captions(column or caption_column(pipeline))
    stage = _stage_of(pipeline, found.column)
    with (
        tempfile.TemporaryDirectory(prefix="vidpipe-captions-") as folder,
        Ledger(Path(folder) / "texts", "key", _TEXTS) as texts,
    ):
        for view in views(pipeline):
            _add(view, stage, found, texts)
            for commit in view.commits(stage):
                found.amounts.update(commit.amounts)
            progress(found.clips)
        if found.amounts and stage in pipeline.stages:
            found.cost = pipeline.stages[stage].cost(found.amounts)
        _repeated(texts, found, top)
    return found


def _stage_of(pipeline: Pipeline, column: str) -> str:
    """The stage that writes the column."""
    columns = pipeline.columns()
    if column not in columns.names or not pa.types.is_string(columns.field(column).type):
        texts = [f.name for f in columns if pa.types.is_string(f.type)]
        hint = did_you_mean(column, texts)
        raise ConfigError(f"--column {column}: there is no such column of text.{hint}")
    made = {name: stage.adds.names for name, stage in pipeline.stages.items()}
    return next((name for name, names in made.items() if column in names), SOURCE_LAYER)


def _add(view: UnitView, stage: str, found: Captions, texts: Ledger) -> None:
    view.settled(stage)  # and nothing behind it: a split would make several of a clip
    if found.column not in view.table.column_names:
        return
    written = f"{found.column}_flags" in view.table.column_names  # by a model, and checked
    if written:
        reasons = view.counts(stage).rejected.items()
        found.rejected.update({r: n for r, n in reasons if r.startswith("caption_")})
    names = ["clip_id", found.column]
    names += [f"{found.column}_{n}" for n in ("source", "flags", "attempts") if written]
    table = view.table.select(names)
    table = table.filter(table.column(found.column).is_valid())  # elsewhere it was not kept
    found.clips += len(table)
    if written:
        for name, into in (("source", found.sources), ("attempts", found.attempts)):
            into.update(table.column(f"{found.column}_{name}").to_pylist())
        flags = table.column(f"{found.column}_flags")
        found.flags.update(pc.list_flatten(flags).to_pylist())
    captions = table.column(found.column).to_pylist()
    columns = {
        "key": pa.array([_key(text) for text in captions], pa.string()),
        "clip_id": table.column("clip_id"),
        "text": table.column(found.column),
    }
    texts.add(pa.table(columns))


def _key(text: str) -> str:
    """The same for captions that differ in case, blanks and punctuation alone."""
    plain = " ".join(re.findall(r"\w+", text.casefold()))
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def _repeated(texts: Ledger, found: Captions, top: int) -> None:
    best: list[tuple[int, str]] = []
    for bucket in texts.buckets():
        counts = pc.value_counts(bucket.column("key"))
        found.distinct += len(counts)
        several = [(c["counts"], c["values"]) for c in counts.to_pylist() if c["counts"] > 1]
        found.shared += sum(n for n, _ in several)
        best = heapq.nlargest(top, best + several)
        for n, key in several:
            if (n, key) in best:
                same = bucket.filter(pc.equal(bucket.column("key"), key)).slice(0, EXAMPLES)
                ids = same.column("clip_id").to_pylist()
                found.repeated.append(Repeated(same.column("text")[0].as_py(), n, ids))
    found.repeated = heapq.nlargest(top, found.repeated, key=lambda one: (one.clips, one.text))
