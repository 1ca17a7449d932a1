"""The sample: clips drawn at random from all that have work to do, in a workdir of their own.

What stages have already settled of them comes along, so that a stage far down is tried on the clips
that really reach it, and nothing is computed or downloaded again to get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.credentials import Credentials
from manifests.intake import found_pool
from manifests.joins import PLACE
from manifests.overlay import Overlay
from manifests.schema import KEPT, OUTCOME, PENDING
from manifests.view import SOURCE_LAYER, UnitView
from pipeline.dag import Pipeline, build
from pipeline.plan import views

GROUPS = 10  # that a sample is cut into, to see how much they differ
GROUP_CLIPS = 4  # at least, of each


@dataclass
class Survey:
    """What is to do over the whole source, as far as it is known before anything is tried."""

    clips: int = 0  # that the source has
    units: list[str] = field(default_factory=list)
    open: list[int] = field(default_factory=list)  # clips of each unit that have work to do
    # Of each stage: rows that wait for it, and clips that stages before it have not settled yet.
    waiting: dict[str, int] = field(default_factory=dict)
    coming: dict[str, int] = field(default_factory=dict)

    @property
    def population(self) -> int:
        """Clips that have work to do."""
        return sum(self.open)


@dataclass(frozen=True)
class Marks:
    """What a unit has open: ids of the source's clips."""

    open: list[str]  # that have work at some stage, in order
    coming: dict[str, set[str]]  # by stage: those that stages before it have not settled


def marks(view: UnitView, stages: Sequence[str]) -> Marks:
    """Looks at `stages`, in topological order and with all that they need."""
    for name in stages:
        view.settled(name)
    ids = view.source_ids(pa.array(np.arange(view.table.num_rows)))
    pending = {n: pc.fill_null(pc.equal(view.settled(n).outcome, PENDING), False) for n in stages}
    at = {n: set(ids.filter(mask).to_pylist()) for n, mask in pending.items()}
    above = view.dag.ancestors
    coming = {n: set[str]().union(*(at[a] for a in above[n] if a in at)) for n in stages}
    somewhere = set[str]().union(*at.values())
    return Marks([i for i in pc.unique(ids).to_pylist() if i in somewhere], coming)


def survey(pipeline: Pipeline, stages: Sequence[str]) -> Survey:
    """Goes over the whole source. Units that no stage has touched, or all are through with, are
    told by their commits."""
    found = Survey(waiting=dict.fromkeys(stages, 0), coming=dict.fromkeys(stages, 0))
    for view in views(pipeline):
        kept = view.counts(SOURCE_LAYER).kept
        found.clips += kept
        found.units.append(view.unit)
        if _untouched(view, stages):
            found.open.append(kept)
            for name in stages:
                first = pipeline.dag.ancestors[name] == [SOURCE_LAYER]
                (found.waiting if first else found.coming)[name] += kept
            continue
        counts = {name: view.counts(name) for name in stages}
        if not any(each.pending for each in counts.values()):
            found.open.append(0)
            continue
        seen = marks(view, stages)
        found.open.append(len(seen.open))
        for name in stages:
            found.waiting[name] += counts[name].pending
            found.coming[name] += len(seen.coming[name])
    return found


def _untouched(view: UnitView, stages: Sequence[str]) -> bool:
    return not any(view.commits(name) for name in stages)


def draw(
    pipeline: Pipeline, stages: Sequence[str], found: Survey, clips: int, seed: int
) -> Iterator[tuple[str, list[str]]]:
    """So many of the clips that have work to do, each as likely as any other: ids by unit."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(found.population, clips, replace=False, shuffle=False))
    ends = np.cumsum(found.open)
    for number in np.unique(np.searchsorted(ends, places, side="right")):
        first = ends[number] - found.open[number]
        own = places[(places >= first) & (places < ends[number])] - first
        view = UnitView(pipeline.store, pipeline.dag, found.units[number])
        if _untouched(view, stages):
            kept = pc.equal(view.settled(SOURCE_LAYER).outcome, KEPT)
            ids = view.table.column("clip_id").filter(kept).to_pylist()
        else:
            ids = marks(view, stages).open
        yield view.unit, [ids[place] for place in own]


def groups(clips: int) -> int:
    """Into how many groups a sample of so many is cut."""
    return max(1, min(GROUPS, clips // GROUP_CLIPS))


def elsewhere(pipeline: Pipeline, workdir: Path) -> Pipeline:
    """The same pipeline with another workdir, by the local runner."""
    folder = str(workdir)
    stages = {
        name: type(stage)(stage.settings, replace(stage.context, workdir=folder))
        for name, stage in pipeline.stages.items()
    }
    run = pipeline.config.run.model_copy(update={"runner": "local"})
    return build(replace(pipeline.config, workdir=folder, stages=stages, run=run))


def lay_out(
    pipeline: Pipeline,
    stages: Sequence[str],
    drawn: Sequence[tuple[str, list[str]]],
    workdir: Path,
    seed: int,
) -> Pipeline:
    """Makes a workdir of the clips drawn: a unit a group, put together at random, with what
    `stages` have settled of them. Nothing in it is a copy of what a stage stored beside: files that
    were downloaded are linked to."""
    made = elsewhere(pipeline, workdir)
    clips = [clip for _, ids in drawn for clip in ids]
    rng = np.random.default_rng([seed, 1])
    names = [f"{number:06d}-sample" for number in range(groups(len(clips)))]
    order = rng.permutation(len(clips))
    group_of = {clips[place]: names[at % len(names)] for at, place in enumerate(order)}
    parts: dict[str, dict[str, list[pa.Table]]] = {n: {g: [] for g in names} for n in stages}
    sources: dict[str, list[pa.Table]] = {group: [] for group in names}
    for unit, ids in drawn:
        view = UnitView(pipeline.store, pipeline.dag, unit)
        _part(_source_rows(view, ids), group_of, sources)
        for name in stages:
            if view.commits(name):
                _part(_settled_rows(view, name, group_of), group_of, parts[name])
    units = {
        group: pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        for group, tables in sources.items()
        if tables
    }
    found_pool(made.store, units)
    for name in stages:
        for group, tables in parts[name].items():
            if tables:
                _commit(made, name, group, pa.concat_tables(tables).combine_chunks())
                _link(pipeline, tables, workdir)
    _hand_on_secrets(pipeline, made, units)
    return made


def _part(rows: pa.Table, group_of: dict[str, str], into: dict[str, list[pa.Table]]) -> None:
    belongs = pa.array([group_of[clip] for clip in rows.column("clip_id").to_pylist()], pa.string())
    for group in pc.unique(belongs).to_pylist():
        into[group].append(rows.filter(pc.equal(belongs, group)))


def _source_rows(view: UnitView, ids: list[str]) -> pa.Table:
    """Rows of the source's manifest."""
    settled = view.settled(SOURCE_LAYER)
    n = view.table.num_rows
    own = {
        "clip_id": view.table.column("clip_id"),
        "parent_id": pa.nulls(n, pa.string()),
        "row_key": settled.key,
        **{name: getattr(settled, name) for name in ("outcome", "reason", "message", "attempts")},
    }
    rows = pa.table({name: own[name] for name in OUTCOME.names})
    for name in view.table.column_names:
        if name not in own:
            rows = rows.append_column(view.table.schema.field(name), view.table.column(name))
    return rows.filter(pc.is_in(rows.column("clip_id"), pa.array(ids, pa.string())))


def _settled_rows(view: UnitView, name: str, group_of: dict[str, str]) -> pa.Table:
    """What the stage has committed of these clips, and of their parts, which then belong to the
    group of what they are parts of. Latents and the like are left out: no stage reads them."""
    rows = view.state(name).drop_columns(list(PLACE))
    ours = []
    for clip, parent in zip(*(rows.column(c).to_pylist() for c in ("clip_id", "parent_id"))):
        group = group_of.get(clip) or group_of.get(parent or "")
        if group is not None:
            group_of[clip] = group
        ours.append(group is not None)
    return rows.filter(pa.array(ours, pa.bool_()))


def _commit(made: Pipeline, name: str, group: str, rows: pa.Table) -> None:
    view = UnitView(made.store, made.dag, group)
    counts = view.counts_with(name, rows)
    made.dag.log(made.store, name).append(group, 0, view.inputs_state(name), counts, rows)


def _link(pipeline: Pipeline, tables: Sequence[pa.Table], workdir: Path) -> None:
    """Files in the workdir that rows name, downloads, are where the sample looks for them."""
    if "://" in pipeline.config.workdir:
        return  # there are none: download wants a folder
    for table in tables:
        for path in table.column("path").to_pylist() if "path" in table.column_names else ():
            if path and "://" not in path and not Path(path).is_absolute():
                link = workdir / path
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(Path(pipeline.config.workdir) / path)


def _hand_on_secrets(pipeline: Pipeline, made: Pipeline, units: dict[str, pa.Table]) -> None:
    """Of the sample's URIs those that hold some are needed to download. Whoever removes the
    sample's workdir has `forget_secrets` remove them."""
    uris = [u for rows in units.values() for u in rows.column("uri").to_pylist() if u is not None]
    whole: dict[str, str] = {}
    for store in _stores(pipeline):
        whole |= Credentials(store).whole(uris)
    Credentials(made.config.workdir).keep(whole.items())


def forget_secrets(pipeline: Pipeline, workdir: Path) -> None:
    """Removes the secrets that were kept for the sample's workdir and for what it was drawn from,
    and none of the user's own."""
    for url in (str(workdir), *_stores(pipeline)[1:]):
        Credentials(url).forget()


def _stores(pipeline: Pipeline) -> list[str]:
    """The URLs of the workdir, and of what lies over it."""
    store = pipeline.store
    return [store.below.url, store.url] if isinstance(store, Overlay) else [store.url]
